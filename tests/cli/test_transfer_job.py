"""`pho transfer-job`, and how a transfer is followed."""

import json
from pathlib import Path

import pytest
from pretended_user import FOUND, SPEC, succeed, take

from pho_service.client import Client
from storage.claims import LibraryAddition
from storage.records import StageKind

PERPLEXITIES = {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": 20.5, "own": 20.0}
PROXIES = {"wanda": 0.4, "ria": 0.5, "transferred": 0.3, "own": 0.25}


def work(store, job_id):
    """Do a transfer of two models; the second cannot be read."""
    document = FOUND.model_dump(mode="json")
    done = {
        "target": "org/one", "key": "k", "model": {"name": "org/one"}, "gain": 4.5, "own": None,
        "perplexities": PERPLEXITIES, "proxies": PROXIES, "regret": 0.1, "proxy_regret": 0.2,
        "report": None, "warnings": [],
    }  # fmt: skip
    bad = {
        "target": "org/two", "key": "", "error": {"type": "ModelError", "message": "no weights"},
        "warnings": ["org/two: no weights"],
    }  # fmt: skip
    for number, result in enumerate((done, bad)):
        claim = take(store, job_id, StageKind.TRANSFER, number)
        store.complete(claim, result, library=[LibraryAddition(document, result)], ended=True)


@pytest.fixture
def searched(url, store):
    """The id of a job that has a configuration."""
    with Client(url) as client:
        job = client.submit(SPEC)
    succeed(store, job.id, FOUND)
    return str(job.id)


@pytest.fixture
def transferred(url, store, searched):
    """The id of a transfer that is done."""
    with Client(url) as client:
        job = client.transfer(searched, ["org/one", "org/two"])
    work(store, job.id)
    return str(job.id)


def test_submit(remote, url, searched, texts):
    """Options stand in the document where they belong; the id is printed."""
    text = str(texts["report"])
    result = remote(
        "transfer-job", searched, "org/one", "org/two",
        "--report-text", text, "--report-windows", 3, "--text", str(texts["calibration"]),
        "--search", "--trials", 50, "--seed", 4, "--confirm-text", str(texts["confirmation"]),
        "--stream", "--name", "mine", "--priority", 2,
    )  # fmt: skip
    with Client(url) as client:
        job = client.job(result.stdout.strip())
        source = client.job(searched)

    assert result.exit_code == 0, result.stderr
    assert f"pho watch {job.short}" in result.stderr
    assert job.kind == "transfer"
    assert job.spec["models"] == ["org/one", "org/two"]
    assert (job.spec["report"]["text"], job.spec["report"]["windows"]) == (text, 3)
    assert (job.spec["search"]["trials"], job.spec["search"]["seed"]) == (50, 4)
    assert job.spec["search"]["confirm"]["text"] == str(texts["confirmation"])
    assert job.spec["calibration"]["text"] == str(texts["calibration"])
    assert job.spec["calibration"]["samples"] == source.spec["calibration"]["samples"]
    assert 7 in job.spec["calibration"]["kernel_sizes"]
    assert (job.spec["stream"], job.spec["priority"], job.spec["source"]) == (True, 2, searched)


def test_a_transfer_is_shown_with_its_tables(remote, transferred):
    shown = remote("show", transferred).stdout
    watched = remote("watch", transferred)
    listed = remote("jobs").stdout

    for text in (shown, watched.stdout):
        assert "models       2 of 2" in text
        assert "note         org/two: no weights" in text
        (row, proxies) = (line.split() for line in text.splitlines() if line.startswith("one "))
        assert row[:6] == ["one", "10.00", "24.00", "25.00", "20.50", "20.00"]
        assert row[6:] == ["+105.0%", "18.0%", "10.0%"]
        assert proxies == ["one", "0.4000", "0.5000", "0.3000", "0.2500", "40.0%", "20.0%"]
    assert watched.exit_code == 0
    assert "2/2 models" in listed


def test_numbers_and_a_picture_are_written_to_files(remote, transferred):
    result = remote("transfer-job", transferred, "--out", "t.json", "--plot", "t.html")
    written = json.loads(Path("t.json").read_text())

    assert result.exit_code == 0, result.stderr
    assert written["format"] == "pho-transfer"
    assert [target["target"] for target in written["targets"]] == ["org/one", "org/two"]
    assert written["configuration"] == FOUND.model_dump(mode="json")
    assert ">20.50<" in Path("t.html").read_text()  # the bar of what was transferred


REFUSED = [
    ("{searched}", 2, "give MODEL..."),
    ("{searched} org/one --trials 5", 2, "--trials: for --search alone"),
    ("{searched} org/one --search --trials 0", 2, "--trials 0 is below 1."),
    ("{searched} org/one --report-windows 4", 2, "--report-windows 4: a text or a dataset is"),
    ("{searched} org/one org/one", 2, "org/one is given twice"),
    ("{searched} /etc/passwd", 1, "/models/0"),
    ("{searched} --out t.json", 1, "The job is a search"),
    ("{searched} org/one --pattern 2:4", 1, "The job has no pattern 2:4"),
    ("{searched} --pattern 0.5 --out t.json", 2, "says which of several patterns"),
    ("{transferred} org/one", 1, "The job is a transfer"),
    ("{searched} org/one --out no/t.json", 1, "does not exist"),
]


def test_what_cannot_be_asked_is_said_in_one_sentence_and_no_job_is_made(
    remote, searched, transferred, url
):
    for words, code, message in REFUSED:
        asked = words.format(searched=searched, transferred=transferred).split()
        result = remote("transfer-job", *asked)

        assert result.exit_code == code
        assert message in result.stderr
    with Client(url) as client:
        assert len(list(client.jobs())) == 2
    assert not Path("t.json").exists()
