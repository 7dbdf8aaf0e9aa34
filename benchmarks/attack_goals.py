"""
What a cut for so many bytes or for a speed could use up, or lose.
"""

from contextlib import suppress
from datetime import timedelta
from typing import Any

import httpx
import psutil
from attack_bounds import TURN_S, _keys
from attack_target import ENDED, Attack, Target
from local_service import write_text
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pho_service.models.builtin import smollm2
from storage.database import Database
from storage.keys import KeyStore, Quota

MODEL = "goal"
MEGABYTES = 13  # of 20 with eight bits and 10.4 with four
BEGUN_S = 300.0  # until bits are rated, on a busy machine
PIECE_S = 10.0  # a matrix rounded in five ways, and the conversion of a model, on a busy machine
ENDED_S = 600.0


def _document(target: Target, pattern: str, **fields: Any) -> dict[str, Any]:
    """A job for a goal, on a model with a tokenizer that llama.cpp knows."""
    folder = target.folder / MODEL
    if not folder.is_dir():
        file = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024,
            num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(target.folder / "confirm.txt", seed=target.seed)
    return {
        "model": MODEL, "pattern": pattern, "calibration": target.spec["calibration"],
        "confirm": {"text": "confirm.txt", "finalists": 1, "windows": 4},
        "prune": True, "recovery": None, **fields,
    }  # fmt: skip


def _rating_bits(
    target: Target, headers: dict[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """A job that has begun to rate bits, and what it looks like then."""
    document = _document(target, f"bytes:{MEGABYTES}MB")
    answer = httpx.post(f"{target.url}/v1/jobs", json=document, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text
    path = f"{target.url}/v1/jobs/{answer.json()['id']}"
    return path, target.reached(path, "Rounding", headers, seconds=BEGUN_S)


def _long_telling(target: Target) -> str | None:
    """A small job of another key begins within two turns and a piece."""
    mine, yours = _keys(target)
    path, shown = _rating_bits(target, mine)
    if shown["state"] != "running":
        return f"bits were never rated: {shown['state']} {shown.get('error')}"
    took, most = target.small_job_s(yours), 2 * TURN_S + PIECE_S
    other = httpx.get(path, headers=mine, timeout=60).json()["state"]
    httpx.post(f"{path}:cancel", headers=mine, timeout=60)
    if other in ENDED:
        return f"the goal was told before: {other}"
    return f"it waited for {took:.0f} s, and turns have {TURN_S:g}" if took > most else None


def _killed_telling(target: Target) -> str | None:
    """Workers are killed while bits are rated, and while the file is written."""
    path, shown = _rating_bits(target)
    if shown["state"] != "running":
        return f"bits were never rated: {shown['state']} {shown.get('error')}"
    job, wrong = path.rpartition("/")[2], []
    for step in ("Rounding", "Reading it back"):
        for process in target.service.all_workers():
            with suppress(psutil.Error):
                process.kill()
        target.reached(path, step, seconds=ENDED_S)
    ended = target.wait(job, seconds=ENDED_S)
    if ended["state"] != "succeeded":
        return f"it is {ended['state']}: {ended.get('error')}"
    files = target.get(f"/v1/jobs/{job}/artifacts").json()["files"]
    sizes = [file["bytes"] for file in files if file["name"].endswith(".gguf")]
    if len(sizes) != 1 or sizes[0] > 10**6 * MEGABYTES:
        wrong.append(f"files of {sizes} bytes, not of {MEGABYTES} MB at most")
    wrong += [file["name"] for file in files if ".bits" in file["name"] or ".pho-" in file["name"]]
    return "; ".join(wrong)


def _impossible_goals(target: Target) -> str | None:
    """Each is refused, or its job fails and says why; nothing is written."""
    wrong = []
    sent = {
        goal: httpx.post(f"{target.url}/v1/jobs", json=_document(target, goal), timeout=60)
        for goal in (
            "bytes:1B", "bytes:1kB", "bytes:0MB", "bytes:-5MB", "bytes:nanMB", "bytes:1e400TB",
            "faster:1x", "faster:nanx", "faster:1e400x", "faster:1000x", "faster:9.9x",
            "faster:1.2x:vllm", "faster:1.2x:llama.cpp:q9_9", "smaller:0%", "smaller:100%",
        )
    }  # fmt: skip
    for goal, answer in sent.items():
        word = goal.rpartition(":")[2]  # which the error names
        if answer.status_code == 202:
            ended = target.wait(answer.json()["id"], seconds=ENDED_S)
            says = (ended.get("error") or {}).get("message", "")
            if ended["state"] != "failed" or (word not in says and "are too few" not in says):
                wrong.append(f"{goal}: {ended['state']} {str(ended.get('error'))[:200]}")
        elif answer.status_code != 422 or word not in answer.text:
            wrong.append(f"{goal}: {answer.status_code} {answer.text[:200]}")
    return "; ".join(wrong)


def _goals_and_quotas(target: Target) -> str | None:
    """Files of so many bytes are chosen on a text: a key without room for it has none."""
    database, quota = Database(target.service.database_url, pool=1), Quota(800, timedelta(7))
    secret = KeyStore(database).create("few", sees_all=False, quota=quota)[1]
    database.close()
    headers, wrong = {"authorization": f"Bearer {secret}"}, []
    for document, code in (
        (_document(target, f"bytes:{MEGABYTES}MB"), 422),
        (_document(target, "structured:10%", gguf=["13MB", "15MB"]), 422),
        (_document(target, "structured:10%", gguf=["q8_0"]), 202),
    ):
        answer = httpx.post(f"{target.url}/v1/jobs", json=document, headers=headers, timeout=60)
        if answer.status_code != code:
            wrong.append(f"{document['pattern']}: {answer.status_code} {answer.text[:200]}")
        if answer.status_code == 202:
            path = f"{target.url}/v1/jobs/{answer.json()['id']}:cancel"
            httpx.post(path, headers=headers, timeout=60)
    return "; ".join(wrong)


GOALS = (
    Attack(name="impossible goals", about="15 of bytes, speeds and sizes", run=_impossible_goals),
    Attack(name="goal killed", about="while bits are rated, and at the end", run=_killed_telling),
)
GOALS_WITH_KEYS = (
    Attack(name="long goal", about="bits of 43 matrices, and another key", run=_long_telling),
    Attack(name="goals and quotas", about="3 of them, 800 tokens", run=_goals_and_quotas),
)
