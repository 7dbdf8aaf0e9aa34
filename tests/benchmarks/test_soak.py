"""The soak: a service that is disturbed for some seconds, and the rules that it is held to."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest

from storage.records import StageKind

pytestmark = pytest.mark.thorough


def test_soak(benchmark, tmp_path):
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
def test_mixtures(changed, told):
    """A job whose stages or configuration name two texts or two weights is found out."""

    def measured():
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
