"""The soak: a service that is disturbed for some seconds, and the rules that it is held to."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from storage.records import StageKind

pytestmark = pytest.mark.thorough


def test_soak(benchmark: Callable[..., Any], tmp_path: Path) -> None:
    """A few jobs under fire: every rule was looked at, none is broken, all of it is written."""
    out = tmp_path / "soak.json"
    table = benchmark(
        "soak", "--minutes", 0.1, "--every", 1, "--workers", 1, "--outside", 0, "--people", 1,
        "--only", "not divisible", "--only", "changing text", "--out", out,
    )  # fmt: skip
    written = json.loads(out.read_text())

    assert table["every accepted job ends"][1] == "0"
    assert sum(written["kills"].values()) > 0
    assert sum(written["jobs"].values()) >= 3
    assert len(written["invariants"]) > 15
    assert int(table["no configuration mixes hashes"][0]) >= 2  # on either text
    assert {rule["violated"] for rule in written["invariants"].values()} == {0}


def test_what_does_not_hold_is_counted_by_its_rule_with_the_first_example() -> None:
    found = import_module("invariants").Invariants()
    for number in range(4):
        found.check("numbers are even", number % 2 == 0, f"{number} is not")
    found.check_all("letters are vowels", ["b"], of=3)

    assert found.checked == {"numbers are even": 4, "letters are vowels": 3}
    assert found.violated == {"numbers are even": 2, "letters are vowels": 1}
    assert found.examples == {"numbers are even": "1 is not", "letters are vowels": "b"}


@pytest.mark.parametrize(
    ("last", "explained"),
    [
        ("psycopg.errors.AdminShutdown: terminating connection", True),
        ("storage.studies.DatabaseGone: the database went away", True),
        ("KeyError: 'trials'", False),
    ],
)
def test_tracebacks(last: str, explained: bool) -> None:
    """A traceback is explained by its last line, and no other line by itself."""
    soak = import_module("soak")
    log = (
        f"12:00 ERROR it failed\nTraceback (most recent call last):\n  File x\n{last}\n12:01 INFO y"
    )
    (trace,) = soak._tracebacks(log)

    assert last in trace
    assert "12:01" not in trace
    assert bool(soak.EXPLAINED.search(trace)) is explained


@pytest.mark.skipif(
    not hasattr(psutil, "RLIMIT_AS"), reason="only Linux limits another process's memory"
)
def test_starved() -> None:
    """A process that is given no more memory runs out of it, lives on, and is given some again."""
    allocate = """
for line in iter(input, "end"):
    try:
        print(len(bytearray(2**26)), flush=True)
    except MemoryError:
        print("no memory", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", allocate],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask() -> str:
            child.stdin.write("more\n")  # type: ignore[union-attr]
            return child.stdout.readline().strip()  # type: ignore[union-attr]

        assert ask() == str(2**26)
        ends = [import_module("chaos").starve(psutil.Process(child.pid)) for _ in range(2)]
        assert ask() == "no memory"
        for end in ends:
            end()
        assert ask() == str(2**26)
        child.stdin.write("end\n")


def test_replaced(tmp_path: Path) -> None:
    """A text and a model get their other contents, of the same size, and the first ones again."""
    files = import_module("replaced_files").ReplacedFiles(tmp_path)
    chance = random.Random(0)
    for name, replace in (
        ("changing.txt", files.replace_text),
        ("changing/model.safetensors", files.replace_model),
    ):
        seen = [(tmp_path / name).read_bytes()]
        for _ in range(2):
            replace(chance)
            seen.append((tmp_path / name).read_bytes())
        assert seen[0] == seen[2] != seen[1]
        assert len(seen[0]) == len(seen[1])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda _: None, None),
        (lambda job: job.measured[1].update(weights_sha256="w2"), "weights under perplexities"),
        (lambda job: job.measured[1].update(text_sha256="t2"), "windows of perplexities"),
        (lambda job: job.best["confirmation"]["text"].update(sha256="d2"), "texts of perplexities"),
        (lambda job: job.best["model"].update(weights_sha256="w2"), "weights of model 0"),
        (lambda job: job.best["calibration"]["text"].update(sha256="d2"), "calibration text 0"),
    ],
)
def test_mixtures(changed: Callable[[Any], None], told: str | None) -> None:
    """A job whose stages or configuration name two texts or two weights is found out."""

    def measured() -> dict[str, Any]:
        on = {"text": {"sha256": "d"}}
        return {"weights_sha256": "w", "text_sha256": "t", "measured_on": on}

    results = {
        StageKind.PERPLEXITY: [measured(), measured()],
        StageKind.CALIBRATE: [
            {
                "inputs": {"weights_sha256": "w", "confirmation": "t"},
                "provenance": {"text": {"sha256": "c"}},
            }
        ],
    }
    job = SimpleNamespace(
        measured=results[StageKind.PERPLEXITY],
        best={
            "model": {"weights_sha256": "w"},
            "calibration": {"text": {"sha256": "c"}},
            "confirmation": {"text": {"sha256": "d"}},
        },
        of_kind=lambda kind: [SimpleNamespace(result=r, part_of=None) for r in results[kind]],
    )
    changed(job)

    found = [*import_module("replaced_files").mixtures(job)]

    assert [line.split(":")[0] for line in found] == ([] if told is None else [told])
