"""A service of its own for a benchmark, and a model that takes no time."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORDS = [
    "a", "model", "weight", "row", "column", "layer", "score", "token", "window", "text", "prune",
]  # fmt: skip


@contextmanager
def service(folder: Path, *, workers: int, **settings: str) -> Iterator[str]:
    """
    Run `pho serve` on a data folder and give its URL; its log is ``folder/log``.

    Args:
        folder: For the data; models and texts of jobs lie below it.
        workers: Local ones.
        settings: More ``PHO_`` variables, without the prefix.
    """
    environment = {
        **os.environ,
        "PHO_DATA_DIR": str(folder / "data"),
        "PHO_CACHE_DIR": str(folder / "cache"),
        "PHO_MODEL_ROOTS": str(folder),
        "PHO_TEXT_ROOTS": str(folder),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **{f"PHO_{name.upper()}": value for name, value in settings.items()},
    }
    command = [sys.executable, "-c", "from pho_service.cli import main; main()", "serve",
               "--port", "0", "--workers", str(workers)]  # fmt: skip
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            found = re.search(r"http://[^\s/]+", process.stdout.readline())
            if not found:
                raise SystemExit(f"the service does not start: {(folder / 'log').read_text()}")
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def wait_for_workers(url: str, count: int) -> None:
    """Wait until so many workers report; for five minutes at most."""
    from pho_service.client import Client

    deadline = time.monotonic() + 300
    with Client(url) as client:
        while len(client.workers()) < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(client.workers())} of {count} workers report after 300 s")
            time.sleep(0.2)


def write_tiny_model(folder: Path, *, name: str = "tiny", seed: int = 0) -> dict[str, object]:
    """Write a random Llama of 18,432 weights and a text; give the fields of a job on them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder / name)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a token
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(  # noqa: S106
        folder / name
    )
    (folder / "text.txt").write_text(" ".join(WORDS * 100))
    return {
        "model": name,
        "pattern": "0.5",
        "preset": "score",
        "calibration": {
            "text": "text.txt", "samples": 6, "context_length": 32, "kernel_sizes": [3, 5],
            "rows_per_layer": 4, "projection_rows": 16,
        },
        "confirm": None,
    }  # fmt: skip


def write_text(file: Path, *, seed: int = 0) -> None:
    """Write 1,100 words in a random order, so that windows of it share no run."""
    words = WORDS * 100
    random.Random(seed).shuffle(words)  # noqa: S311 - no secret
    file.write_text(" ".join(words))
