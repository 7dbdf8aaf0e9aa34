"""
The tokens of a text on this machine, counted before a job is taken.

The tokenizer's file may be anybody's, so it is read in a process of its own that has seconds.
"""

import json
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

MOST_BYTES = 2 * 2**20  # of a text: some hundred thousand tokens, a second
_MOST_TOKENIZER_BYTES = 32 * 2**20  # that of LLaMA 3 has 9 MB
_TIMEOUT_S = 5.0
_SLOTS = threading.BoundedSemaphore(2)  # counts at once; who comes when all are taken does without
_SEPARATOR = "\n\n"  # between documents, as in a calibration


def count_tokens(model: Path, text: Path, field: str) -> int | None:
    """The tokens of a text by the tokenizer in a model's folder; None if seconds do not tell."""
    tokenizer = model / "tokenizer.json"
    try:
        of_tokenizer, of_text = tokenizer.stat(), text.stat()
        small = of_tokenizer.st_size <= _MOST_TOKENIZER_BYTES and of_text.st_size <= MOST_BYTES
        if text.suffix not in (".txt", ".jsonl") or not small:
            return None
        state = (of_tokenizer.st_mtime_ns, of_text.st_mtime_ns)
        return _counted(str(tokenizer), str(text), field, state)
    except (OSError, ValueError, subprocess.SubprocessError):  # whoever calibrates says why
        return None


@lru_cache(64)  # of what is there; while somebody types into the form, it is asked again and again
def _counted(tokenizer: str, text: str, field: str, _state: tuple[int, int]) -> int:
    if not _SLOTS.acquire(blocking=False):
        raise OSError("others are counted")
    try:  # not where the service was started, which may be a root: -P
        command = [sys.executable, "-P", "-m", __name__, tokenizer, text, field]
        answer = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)  # noqa: S603 - this file
        return int(answer.stdout)
    finally:
        _SLOTS.release()


def _main(tokenizer_file: str, text_file: str, field: str) -> None:
    from tokenizers import Tokenizer  # which workers have, and the API may have

    tokenizer = Tokenizer.from_file(tokenizer_file)
    whole = Path(text_file).read_text(encoding="utf-8")
    documents = [whole]
    if text_file.endswith(".jsonl"):
        documents = [json.loads(line)[field] for line in whole.split("\n") if line.strip()]
    counts = [
        len(tokenizer.encode(part, add_special_tokens=False).ids)
        for document in documents
        if document.strip()
        for part in (document, _SEPARATOR)
    ]
    sys.stdout.write(str(sum(counts)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
