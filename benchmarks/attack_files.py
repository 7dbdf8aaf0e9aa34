"""
Hostile files below the roots: texts that grow, folders that name others, weights that lie.
"""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from attack_target import Attack, Target
from local_service import write_text

MOST_BYTES = 4 * 2**30  # that a worker may be resident with
SECRET = "secret_header_apikey"  # noqa: S105 - what must not be told


def _refused(target: Target, *words: str, **fields: Any) -> str | None:
    """A job ends at its door or in its first stage, with these words and without a retry."""
    answer = target.submit(**fields)
    if answer.status_code == 422:
        said = str(answer.json()["detail"])
    elif answer.status_code == 202:
        job = target.wait(str(answer.json()["id"]))
        if job["state"] != "failed":
            return f"the job is {job['state']}"
        said = f"{job['error']['message']}"
        if (job["error"].get("attempts") or 1) > 1:
            return f"it was tried {job['error']['attempts']} times: {said[:200]}"
    else:
        return f"{answer.status_code} {answer.text[:200]}"
    if SECRET in said:
        return f"it tells what is in the file: {said[:200]}"
    if any(not character.isprintable() for character in said):
        return f"control characters: {said[:100]!r}"
    if len(said) > 2000:
        return f"{len(said)} characters of error"
    missing = [word for word in words if word.lower() not in said.lower()]
    return f"it says {said[:200]!r}, nothing of {missing[0]}" if missing else None


def _text(target: Target, name: str) -> dict[str, Any]:
    return {"calibration": {**target.spec["calibration"], "text": name}}


def _dataset(target: Target, name: str) -> dict[str, Any]:
    calibration = {k: v for k, v in target.spec["calibration"].items() if k != "text"}
    return {"calibration": {**calibration, "dataset": name}}


def _bomb(target: Target) -> str | None:
    """One entry of a megabyte in a dictionary, and 20,000 rows of it."""
    path = target.folder / "bomb.parquet"
    indices = pa.array([0] * 20_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a " * 500_000]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    job = target.wait(target.job(**_text(target, path.name)))
    peaks = [_peak(process.pid) for process in target.service.all_workers()]
    most = max([peak for peak in peaks if peak is not None], default=0)
    if most > MOST_BYTES:
        return f"a worker took {most / 2**30:.1f} GiB"
    if job["state"] == "succeeded":
        return None  # a part of it is a text like any other
    error = job.get("error") or {}
    if "bytes" not in str(error.get("message")):
        return f"it is {job['state']}, not for its size: {error.get('message')}"
    return None if error["attempts"] == 1 else f"it was tried {error['attempts']} times"


def _peak(pid: int) -> int | None:
    """The most bytes that a process was resident with, where the system tells."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def _sparse(target: Target) -> str | None:
    """Ten gigabytes of nothing."""
    path = target.folder / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    return _refused(target, **_text(target, path.name))


def _endless_line(target: Target) -> str | None:
    """A line of 600 MB in a .jsonl."""
    path = target.folder / "line.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(600_000_000)
    try:
        return _refused(target, **_text(target, path.name))
    finally:
        path.unlink()


def _column_names(target: Target) -> str | None:
    """A column whose name forges a line of a log."""
    name = "x\x1b[31m\nINFO forged"
    pq.write_table(pa.table({name: ["a"]}), target.folder / "names.parquet")
    found = _refused(target, **_text(target, "names.parquet"))
    log = target.log()
    if "\x1b[31m" in log or "\nINFO forged" in log:
        return "the log has a forged line"
    return found


def _wide(target: Target) -> str | None:
    """20,000 columns."""
    table = pa.table({f"column_{number}": ["a"] for number in range(20_000)})
    pq.write_table(table, target.folder / "wide.parquet")
    return _refused(target, **_text(target, "wide.parquet"))


def _model(target: Target, name: str) -> Path:
    """A copy of the model, below the roots."""
    folder = target.folder / name
    shutil.copytree(target.folder / "tiny", folder, dirs_exist_ok=True)
    return folder


def _index(target: Target) -> str | None:
    """An index of weights that names files outside of the folder."""
    wrong = []
    for number, place in enumerate(("../tiny/model.safetensors", "/etc/passwd", "a/../../x")):
        folder = _model(target, f"index-{number}")
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": place}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        found = _refused(target, "index", model=folder.name)
        wrong += [f"{place}: {found}"] if found else []
    return ", ".join(wrong)


def _cards(target: Target) -> str | None:
    """Cards of data sets that name files outside, and addresses; none is asked for."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        """Notes who asks."""

        def do_GET(self) -> None:
            """Whatever is asked for."""
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"text": "a"}')

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

        def log_message(self, *_: object) -> None:
            """Nothing."""

    outside = target.folder.parent / f"{target.folder.name}-secret.csv"
    outside.write_text(f"{SECRET},b\n1,2\n")
    wrong = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number, place in enumerate(
            (
                str(outside),
                f"../../{outside.name}",
                f"../{outside.name}",
                f"http://127.0.0.1:{server.server_port}/latest/x.json",
            )
        ):
            folder = target.folder / f"card-{number}"
            folder.mkdir(exist_ok=True)
            (folder / "README.md").write_text(
                f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(place)}\n---\n"
            )
            found = _refused(target, **_dataset(target, folder.name))
            wrong += [f"{place}: {found}"] if found else []
        server.shutdown()
    outside.unlink()
    if asked:
        wrong.append(f"the machine was asked for {asked[0]}")
    return ", ".join(wrong)


def _deep(target: Target) -> str | None:
    """Models that say that they have more layers or experts than could be made."""
    wrong = []
    for field in ("num_hidden_layers", "num_local_experts"):
        folder = _model(target, f"deep-{field}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: 10**8}))
        found = _refused(target, field, model=folder.name)
        wrong += [f"{field}: {found}"] if found else []
    return ", ".join(wrong)


def _lying_blocks(target: Target) -> str | None:
    """Cuts of models that say that they have other neurons and heads than their weights."""
    write_text(target.folder / "confirm.txt", seed=target.seed)
    confirm = {"text": "confirm.txt", "finalists": 1, "windows": 2}
    about = {"pattern": "structured:20%", "preset": "best", "confirm": confirm}
    honest = target.wait(target.job(**about))
    if honest["state"] != "succeeded":
        return f"the honest model's cut is {honest['state']}, so nothing was tried"
    wrong = []
    for field, value in (
        ("intermediate_size", 10**9), ("intermediate_size", 0), ("intermediate_size", -64),
        ("num_attention_heads", 5), ("num_attention_heads", 10**7), ("num_attention_heads", 0),
        ("num_key_value_heads", 3), ("num_key_value_heads", 0), ("head_dim", 7),
        ("head_dim", 10**9),
    ):  # fmt: skip
        folder = _model(target, f"blocks-{field}-{value}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        found = _refused(target, "cannot be loaded", model=folder.name, **about)
        wrong += [f"{field} {value}: {found}"] if found else []
    return ", ".join(wrong)


def _tokenizer(target: Target) -> str | None:
    """A tokenizer whose pattern makes its library panic, or search for ever."""
    folder = _model(target, "panic")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+(b+)+(c+)+" * 40 + "$"},
        "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    (target.folder / "as.txt").write_text("a" * 200_000)
    return _refused(target, model="panic", **_text(target, "as.txt"))


def _odd_weights(target: Target) -> str | None:
    """Headers that declare more than there is, pickles, weights that are missing."""
    wrong = []
    for name, content in (
        ("header", (2**62).to_bytes(8, "little") + b"{}"),
        ("nothing", b""),
        ("garbage", b"\x00" * 4096),
    ):
        folder = _model(target, f"weights-{name}")
        (folder / "model.safetensors").write_bytes(content)
        found = _refused(target, model=folder.name)
        wrong += [f"{name}: {found}"] if found else []
    folder = _model(target, "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = _refused(target, "pickled", model=folder.name)
    wrong += [f"pickled: {found}"] if found else []
    return ", ".join(wrong)


FILES = (
    Attack(name="parquet that grows", about="a small file of 20 GB of text", run=_bomb),
    Attack(name="sparse text", about="10 GB of nothing", run=_sparse),
    Attack(name="endless line", about="a .jsonl of one line of 600 MB", run=_endless_line),
    Attack(name="column names", about="control characters in a parquet file", run=_column_names),
    Attack(name="wide table", about="20,000 columns", run=_wide),
    Attack(name="index of weights", about="3 that name files outside", run=_index),
    Attack(name="cards of data sets", about="3 files outside, 1 address", run=_cards),
    Attack(name="deep model", about="10^8 layers, 10^8 experts", run=_deep),
    Attack(name="lying blocks", about="10 cuts of other widths and heads", run=_lying_blocks),
    Attack(name="panic", about="a tokenizer's pattern with nested repeats", run=_tokenizer),
    Attack(name="odd weights", about="4 files that are no weights", run=_odd_weights),
)  # fmt: skip
