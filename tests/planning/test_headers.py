"""Where headers come from: folders, GGUF files, a stand-in of the hub; and odd ones."""

import contextlib
import gzip
import json
import struct
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import hf_api

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.builtin import smollm2
from pho_service.planning.shapes import (
    MOST_BYTES,
    MOST_HEADER,
    TensorHeader,
    model_shapes,
    read_header,
    read_shapes,
)

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}
NAME = "model.layers.0.up_proj.weight"
TENSORS = {NAME: TensorHeader((8, 4), "BF16")}
ENTRY = {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}


def safetensors(document):
    """A file of weights that is a header alone."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text


FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors({"__metadata__": {"format": "pt"}, NAME: ENTRY}),
}
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves one model, to who has the token."""

    asked: ClassVar[list[str]] = []
    written: ClassVar[int] = 0

    def do_GET(self):
        self.asked.append(self.path)
        content = FILES.get(self.path.rpartition("/")[2])
        private = "private" in self.path and self.headers.get("authorization") != "Bearer right"
        status = 401 if private else 500 if "broken" in self.path else 200 if content else 404
        if "elsewhere" in self.path:
            self.send_response(302)
            self.send_header("location", "http://127.0.0.1:9/secret")
            self.end_headers()
            return
        if "odd" in self.path:
            self.send_response(200)
            if "bomb" in self.path:
                self.send_header("content-encoding", "gzip")
            self.end_headers()
            if "bomb" in self.path:
                self.wfile.write(FILES["bomb"])
                return
            self.write_on(b" " * 2**20 if "endless" in self.path else b" ")
            return
        self.send_response(status)
        self.send_header("content-length", str(len(content or b"") if status == 200 else 0))
        self.send_header("etag", '"x"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if status == 200 and self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET  # noqa: N815

    def write_on(self, content):
        """Write until nobody reads, or the test is over."""
        with contextlib.suppress(OSError):
            for _ in range(100):
                Hub.written += self.wfile.write(content)
                time.sleep(0.02)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def away(monkeypatch, tmp_path):
    """A hub that does not answer, and an empty cache."""
    point(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def point(monkeypatch, url):
    """HF_ENDPOINT, which the hub's library reads when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", url)


@pytest.fixture
def hub(away, monkeypatch):
    del away
    Hub.asked, Hub.written = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield Hub
        server.shutdown()


def written(folder, **files):
    """A model folder with these files instead of the usual ones."""
    for name, content in {**FILES, **files}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return str(folder)


def test_a_folder_is_read_without_its_weights(tmp_path):
    found = read_header(written(tmp_path))

    assert found.config == CONFIG
    assert found.tensors == TENSORS


def test_the_files_that_the_index_names_and_no_others(tmp_path):
    index = {"weight_map": {NAME: "a.safetensors", "x": "b.safetensors"}}
    shards = {
        "model.safetensors": None,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "a.safetensors": safetensors({NAME: ENTRY}),
        "consolidated.safetensors": b"",
    }
    with pytest.raises(ModelError, match=r"has no b\.safetensors, which its index names"):
        read_header(written(tmp_path, **shards))
    more = safetensors({"x": {**ENTRY, "shape": []}})
    found = read_header(written(tmp_path, **shards, **{"b.safetensors": more}))
    shards["model.safetensors.index.json"] = json.dumps(index).replace("a.s", "../a.s").encode()

    assert found.tensors == {**TENSORS, "x": TensorHeader((), "BF16")}
    with pytest.raises(InvalidInput, match="may only name files that lie in the same folder"):
        read_header(written(tmp_path, **shards))


def test_smollm2s_header_gives_the_shapes_of_its_weights_tied_embeddings_included():
    shapes = model_shapes("smollm2", read_header(str(smollm2())))

    assert shapes.parameters == 134_515_008
    assert shapes.prunable == 106_168_320
    assert len(shapes.blocks) == 30
    assert shapes.vocabulary == 49152
    assert (shapes.dtype, shapes.context) == ("float32", 8192)


def test_all_experts_of_a_gguf_are_in_one_tensor(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2moe")
    writer.add_block_count(1)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_token_list(["a", "b", "c"])
    for name, shape in {
        "token_embd": (3, 64), "blk.0.attn_norm": (64,), "blk.0.attn_q": (64, 64),
        "blk.0.attn_q_norm": (16,), "blk.0.ffn_gate_exps": (4, 32, 64),
        "blk.0.ffn_down_exps": (4, 64, 32), "blk.0.ffn_gate_inp": (4, 64),
        "blk.0.ffn_gate_shexp": (96, 64), "blk.0.ffn_down_shexp": (64, 96),
    }.items():  # fmt: skip
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shapes = model_shapes("m", read_header(str(path)))
    (block,) = shapes.blocks

    assert shapes.vocabulary == 3
    assert block.norms == 64 + 64
    assert {li.name: (li.count, li.share) for li in block.linears} == {
        "attn.q": (1, 1), "ffn.experts.gate": (4, 0.5), "ffn.experts.down": (4, 0.5),
        "ffn.shared.gate": (1, 1), "ffn.shared.down": (1, 1),
    }  # fmt: skip


def test_hub(hub, monkeypatch):
    """The headers are asked for, in the revision that is named, with the user's token, once."""
    assert read_header("org/name").tensors == TENSORS
    assert read_header("org/name", revision="v2").config == CONFIG
    monkeypatch.setenv("HF_TOKEN", "right")
    assert read_header("org/private").tensors == TENSORS
    assert "/org/name/resolve/main/config.json" in hub.asked
    assert "/org/name/resolve/v2/config.json" in hub.asked
    assert hub.asked.count(f"/org/name/resolve/{COMMIT}/model.safetensors") == 1


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/private", "private or gated"),
        ("org/broken", "answered 500"),
        ("org/elsewhere", "to an address without https"),
        ("org/odd-endless", f"has more than {MOST_BYTES} bytes"),
        ("org/odd-drip", r"cannot be reached \(TimeoutError\)"),
        ("a b", "neither a folder or file here nor a name on the hub"),
    ],
)
def test_what_the_hub_says_is_said_in_words(name, words, monkeypatch):
    monkeypatch.setattr("pho_service.planning.shapes.TIMEOUT_S", 1.0)
    with pytest.raises(ModelError, match=words):
        read_header(name)

    assert Hub.written < 4 * MOST_BYTES  # the rest is not waited for


@pytest.mark.usefixtures("hub")
def test_what_the_hub_packs_unasked_is_not_unpacked(monkeypatch):
    monkeypatch.setitem(FILES, "bomb", gzip.compress(bytes(2**26), 1))
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"its config\.json is not JSON"):
        read_header("org/odd-bomb")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert most < 4 * MOST_BYTES


def test_a_revision_leads_nowhere_but_to_the_model(hub):
    read_header("org/name", revision="../../../../api/whoami-v2?x=")

    (asked,) = (path for path in hub.asked if path.endswith("config.json"))
    assert asked == "/org/name/resolve/..%2F..%2F..%2F..%2Fapi%2Fwhoami-v2%3Fx%3D/config.json"


@pytest.mark.usefixtures("hub")
def test_the_headers_of_all_shards_on_the_hub(monkeypatch):
    other = NAME.replace("up", "down")
    index = {"weight_map": {NAME: "a.safetensors", other: "b.safetensors"}}
    shards = {"a.safetensors": safetensors({NAME: ENTRY}), "b.safetensors": None}
    monkeypatch.setitem(FILES, "model.safetensors.index.json", json.dumps(index).encode())
    for name, content in {**shards, "model.safetensors": None}.items():
        monkeypatch.setitem(FILES, name, content)
    with pytest.raises(ModelError, match=r"has no b\.safetensors, which its index names"):
        read_header("org/sharded")
    monkeypatch.setitem(FILES, "b.safetensors", safetensors({other: ENTRY}))

    assert read_header("org/sharded").tensors.keys() == {NAME, other}


@pytest.mark.usefixtures("away")
def test_hub_is_away(tmp_path, monkeypatch):
    """A hub that does not answer is named, with the way out; so it is where it may not be asked."""
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ModelError, match="the Hugging Face hub cannot be reached"):
            read_header("org/name")
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    written(folder / "snapshots" / COMMIT)

    assert read_header("org/name").tensors == TENSORS  # that of the cache


ONE = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"[" * 100_000, "is not JSON"),
        ("config.json", b"[1]", "is not a JSON object"),
        ("config.json", b" " * (MOST_BYTES + 1), "has more than"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, "has neither model.safetensors nor"),
        ("model.safetensors", struct.pack("<Q", MOST_HEADER + 1) + b"{" * 9, "it has no header"),
        ("model.safetensors", struct.pack("<Q", 9) + b"{}", "cut short"),
        ("model.safetensors", safetensors({"x": 1}), "cannot be read"),
        ("model.safetensors", safetensors({"x": {**ENTRY, "shape": [2**31]}}), "number above 0"),
        ("model.safetensors", safetensors({"x": {**ENTRY, "shape": [1] * 9}}), "no shape"),
        ("m.gguf", b"", "is not a whole GGUF file"),
        ("m.gguf", b"GGML" + bytes(40), "GGUF magic invalid"),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        ("m.gguf", ONE + struct.pack("<IIQ", 9, 9, 2**60), "arrays of arrays"),
        ("m.gguf", ONE + struct.pack("<IIQ", 9, 4, 2**60), "the file ends in what is declared"),
        ("m.gguf", ONE + struct.pack("<IIQ", 9, 8, 2**60), "its header has more than"),
        ("m.gguf", ONE + struct.pack("<I", 77), "is not a valid GGUFValueType"),
    ],
)
def test_a_file_that_is_odd_or_not_there_is_told_at_once_in_words(name, content, words, tmp_path):
    folder = written(tmp_path, **{name: content})
    with pytest.raises(ModelError, match=words):
        read_header(str(tmp_path / name) if name == "m.gguf" else folder)


def test_missing(tmp_path):
    """A path that is not there is never asked of the hub; messages have the name alone."""
    with pytest.raises(ModelError, match=r"\./m does not exist on this machine"):
        read_header("./m")
    with pytest.raises(ModelError) as found:
        read_header("m", path=str(tmp_path))
    assert str(tmp_path) not in str(found.value)


def test_the_shapes_of_files_here_are_read_once_whoever_asks_until_they_change(
    tmp_path, monkeypatch
):
    """Pages ask for them again and again, and a hundred thousand tensors take seconds."""
    read = []
    monkeypatch.setattr(
        "pho_service.planning.shapes.read_header",
        lambda name, **more: read.append(name) or time.sleep(0.05) or read_header(name, **more),
    )
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        written(folder)
    written(bad, **{"config.json": b"[1]"})

    def ask(folder):
        try:
            return read_shapes("m", path=str(folder))
        except ModelError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(ask, [good, bad] * 8)]
    assert len(read) == 2
    assert answers[:2] * 8 == answers
    written(bad, **{"config.json": FILES["config.json"] + b" "})

    assert answers[0] == ask(bad) == ask(good)
    assert len(read) == 3
