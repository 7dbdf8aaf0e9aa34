"""The stage that prunes: what `pho prune` writes, in the artifact store, whatever happens to it."""

import hashlib
import re
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pytest
import torch
from fastapi.testclient import TestClient
from sqlalchemy import delete as sql_delete

import pho_service as pho
from pho_service.api.answers import Job
from pho_service.api.app import create_app
from pho_service.cli.remote import outcome
from pho_service.client import Client
from pho_service.errors import OutputError
from pho_service.host.artifacts import PrunedStore
from pho_service.host.settings import read_settings
from pho_service.models.bundle_file import read_bundle
from pho_service.models.calibration import bundle_path, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.scratch import Memo, Record
from pho_service.pipeline import export as exporting
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.progress import silent
from pho_service.spec.baselines import baseline
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Pattern
from storage.jobs import ask_to_prune, note_removed
from storage.records import JobState, LostClaim, StageKind
from storage.tables import jobs
from workers.conductor import Conductor
from workers.inputs import Seal
from workers.watch import TurnOver, Turns, Watch
from workers.work import SealedWork

_begun: list[Any] = []


@pytest.fixture
def job(hand, small):
    """A job that waits to be pruned; its search is done once for all tests of this file."""
    if not _begun:
        _begun.append(hand.done(small(confirm=None)))
    (job,) = _begun
    if hand.store.get(job.id).state is JobState.SUCCEEDED:
        note_removed(hand.store.database, job.id, "by another test")
    return ask_to_prune(hand.store.database, job.id)


def folder_of(hand, job):
    """The files of a job, in its store."""
    (found,) = (hand.bundles / "pruned" / str(job.id)).iterdir()
    assert isinstance(found, Path)
    return found


def sums(folder):
    """The SHA-256 of each file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_as_pho_prune(hand, small, tmp_path):
    """`prune` in a document ends the job with the bytes of `pho prune`, and their hashes."""
    spec = small(prune=True, confirm=None)
    job = hand.done(spec)
    _begun.append(job)
    model = load_model(str(hand.folder / "model"), device="cpu")
    source = TextSource(path=str(hand.folder / "calibration.jsonl"))
    text = calibration_text(model, source, spec.calibration.settings())
    bundle = read_bundle(bundle_path(hand.bundles, text.bundle_key))
    configuration = Configuration.model_validate(job.best)
    prune_job(
        Work.of(bundle, model, calibration=text.calibration), configuration, tmp_path / "local"
    )

    stored = job.pruning.result["files"]
    assert {file["name"]: file["sha256"] for file in stored} == sums(tmp_path / "local")
    assert sums(folder_of(hand, job)) == sums(tmp_path / "local")
    assert all(check.passed for check in check_folder(folder_of(hand, job), original=None))


def test_gguf_files_are_among_the_files_of_the_model(hand, small, monkeypatch):
    """Each is made once, also where a worker was killed while it wrote the second."""
    made = []

    def export(folder, out, gguf_type, **_):
        made.append(gguf_type)
        if made == ["q8_0", "bf16"]:
            (folder / ".pho-left").mkdir()
            _killed()
        out.write_bytes(gguf_type.encode())
        return gguf_type

    monkeypatch.setattr("pho_service.pipeline.export.export", export)
    monkeypatch.setattr("workers.pieces.converter_for", lambda _: None)
    spec = small(prune=True, confirm=None, gguf=["q8_0", "bf16"])
    job = hand.until(hand.submit(spec), StageKind.PRUNE)
    with pytest.raises(SystemExit):
        hand.step(job)
    hand.inputs = hand.new_inputs()
    job = hand.until(job, None)

    names = [file["name"] for file in job.pruning.result["files"]]
    assert [name for name in names if "gguf" in name] == [
        "model-pruned-bf16.gguf", "model-pruned-q8_0.gguf",
    ]  # fmt: skip
    assert made == ["q8_0", "bf16", "bf16"]
    assert not [name for name in names if ".pho" in name]


def test_files_of_so_many_bytes_are_chosen_on_the_first_windows_of_the_calibration(
    hand, small, monkeypatch
):
    made = []

    def export(_folder, out, gguf_type, *, most, bundle, **_):
        made.append((most, bundle))
        out.write_bytes(b"gguf")
        return gguf_type

    monkeypatch.setattr("pho_service.pipeline.export.export", export)
    monkeypatch.setattr("workers.pieces.converter_for", lambda types: made.append(types))
    monkeypatch.setattr("workers.pieces.check_vocabulary", lambda *_: None)
    spec = small(prune=True, confirm=None, gguf=["q8_0", "105MB", "90MB"])
    job = hand.until(hand.submit(spec), None)
    pruned = load_model(str(folder_of(hand, job)), device="cpu")
    types, (no_size, _), (first, bundle), (second, again) = made

    assert types == ["q8_0"]
    assert (no_size, first, second) == (None, 105_000_000, 90_000_000)
    assert bundle is again
    bundle.check_model(pruned.linears)  # it is of the pruned model
    assert bundle.provenance["settings"]["samples"] == min(16, spec.calibration.samples)
    names = [file["name"] for file in job.pruning.result["files"]]
    assert {"model-pruned-105MB.gguf", "model-pruned-90MB.gguf"} < {*names}


def test_what_types_cost_is_kept_for_the_next_attempt_and_the_next_file(hand, small, monkeypatch):
    """A worker gives way behind each record; another one goes on there, and nothing is left."""
    made, calibrated = [], []

    def export(_folder, out, gguf_type, *, memo, **_):
        known = memo.read("nats")
        made.append((out.name, known and known.values["nats"]))
        memo.keep("nats", Record(values={"nats": 0.5}))  # looks for others
        if len(made) == 1:
            _killed()
        out.write_bytes(b"gguf")
        return gguf_type

    def bundle_for(*about, **how):
        calibrated.append(about)
        return few_windows(*about, **how)

    few_windows = exporting.bundle_for
    monkeypatch.setattr("pho_service.pipeline.export.export", export)
    monkeypatch.setattr("pho_service.pipeline.export.bundle_for", bundle_for)
    monkeypatch.setattr("workers.pieces.converter_for", lambda _: None)
    monkeypatch.setattr("workers.pieces.check_vocabulary", lambda *_: None)
    job = hand.until(
        hand.submit(small(prune=True, confirm=None, gguf=["105MB", "90MB"])), StageKind.PRUNE
    )
    with pytest.raises(SystemExit):
        hand.step(job)
    hand.inputs = hand.new_inputs()
    job = hand.until(job, None)

    names = [f"model-pruned-{size}.gguf" for size in ("105MB", "90MB")]
    assert made == [(names[0], None), (names[0], 0.5), (names[1], 0.5)]
    assert len(calibrated) == 1
    assert not [*folder_of(hand, job).parent.glob(".*.bits")]


def test_a_file_of_too_few_bytes_is_told_before_the_search(hand, small, monkeypatch):
    monkeypatch.setattr("workers.pieces.converter_for", lambda _: [])
    monkeypatch.setattr("workers.pieces.check_vocabulary", lambda *_: None)
    error = hand.failed(small(prune=True, confirm=None, gguf=["1kB"]))

    assert error["stage"] == "calibrate"
    assert "0.001 MB are too few for " in error["message"]
    assert "MB as a GGUF file: 4.5 bits are the" in error["message"]


def test_a_worker_without_a_converter_says_so_before_the_search(hand, small, monkeypatch):
    monkeypatch.setattr("pho_service.models.gguf_file.find_spec", lambda _: None)
    error = hand.failed(small(prune=True, confirm=None, gguf=["q8_0"]))

    assert error["stage"] == "calibrate"
    assert "no converter to GGUF" in error["message"]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_told_before_the_search(
    hand, small, monkeypatch, tmp_path
):
    """As its converter tells it of the vocabulary alone; no Python file is beside that."""
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(
        "import os, sys\n"
        "assert '--vocab-only' in sys.argv\n"
        "files = sorted(os.listdir(sys.argv[1]))\n"
        "sys.exit(f'BPE pre-tokenizer was not recognized, {files}')\n"
    )
    monkeypatch.setenv("PHO_CONVERTER", str(converter))
    error = hand.failed(small(prune=True, confirm=None, gguf=["q8_0"]))

    assert error["stage"] == "calibrate"
    assert "does not convert model: BPE pre-tokenizer was not recognized" in error["message"]
    assert "config.json" in error["message"]
    assert "GGUF has no name for this tokenizer" in error["message"]


TRAINED = {
    "prune": True, "preset": "crepe",
    "steps": {"update": "least-squares", "reconstruction": {"method": "block"}},
}  # fmt: skip


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_blocks_that_the_confirmation_has_trained_are_not_trained_again_for_the_same_bytes(
    hand, small, tmp_path, monkeypatch, trained, killed
):
    """Also where a worker was killed when it had taken up the first of them."""
    spec = small(pattern="0.5", **TRAINED)
    job = hand.until(hand.submit(spec), StageKind.PRUNE)
    waiting = [*hand.bundles.glob(f"pruned/{job.id}/.*.blocks/*.safetensors")]
    if killed:
        read = Memo.read
        with monkeypatch.context() as patch:
            patch.setattr(Memo, "read", lambda s, n: _killed() if "1" in n else read(s, n))
            with pytest.raises(SystemExit):
                hand.step(job)
        hand.inputs = hand.new_inputs()
    job = hand.until(job, None)
    model = load_model(str(hand.folder / "model"), device="cpu")
    source = TextSource(path=str(hand.folder / "calibration.jsonl"))
    text = calibration_text(model, source, spec.calibration.settings())
    bundle = read_bundle(bundle_path(hand.bundles, text.bundle_key))
    found = Configuration.model_validate(job.best)

    assert found.steps.reconstruction.wanted  # it makes the model better
    assert len(waiting) == 2
    assert trained == ["model.layers.0", "model.layers.1"]
    assert job.pruning.attempt == 1 + killed
    prune_job(Work.of(bundle, model, calibration=text.calibration), found, tmp_path / "local")
    assert sums(folder_of(hand, job)) == sums(tmp_path / "local")


@pytest.mark.thorough
def test_of_a_target_only_the_blocks_of_its_answer_wait_and_they_are_not_trained_again(
    hand, small, trained
):
    target = {"perplexity_rise": 9.0, "step": 0.1, "lowest": 0.4, "highest": 0.6}
    job = hand.until(hand.submit(small(pattern=None, target=target, **TRAINED)), StageKind.PRUNE)
    waiting = [*hand.bundles.glob(f"pruned/{job.id}/.*.blocks")]
    points = job.of_kind(StageKind.POINT)
    before = [*trained]
    job = hand.until(job, None)

    assert [point.about for point in points] == ["0.5", "0.6"]
    assert job.best["pattern"] == "0.6"
    assert job.best["steps"]["reconstruction"]["method"] == "block"
    assert len(waiting) == 1
    assert trained == before == 2 * ["model.layers.0", "model.layers.1"]
    assert (folder_of(hand, job) / "model.safetensors").is_file()


def test_cut_off_at_the_end(hand, job, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(hand.store, "complete", _killed)
        with pytest.raises(SystemExit):
            hand.step(job)
    written = sums(folder_of(hand, job))
    monkeypatch.setattr("workers.pieces.prune_job", _killed)
    hand.step(job)
    found = hand.store.get(job.id)

    assert found.state is JobState.SUCCEEDED
    assert found.best == job.best
    assert found.pruning.attempt == 2
    assert {file["name"]: file["sha256"] for file in found.pruning.result["files"]} == written


def _killed(*_, **__):
    raise SystemExit


def test_full_store(hand, job, limited_disk):
    """
    A full store fails the job in words, and what a killed worker had half written does not stay;
    with room again the job is resumed and ends. The worker's next model is dense.
    """
    left = hand.bundles / "pruned" / str(job.id) / ".pho-left"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    spec = JobSpec.model_validate(job.spec)
    hand.inputs.calibrate(
        spec, Seal(**job.of_kind(StageKind.CALIBRATE)[0].result["inputs"]), silent
    )  # before the disk is full
    dense = hand.inputs.model(spec).weights_sha256
    with limited_disk(20_000), pytest.raises(OutputError, match=r"resume the job|was not written"):
        hand.step(job)
    failed = hand.store.get(job.id)
    hand.store.ask(job.id, "resume")
    hand.step(job)

    assert (failed.state, failed.error["stage"]) == (JobState.FAILED, "prune")
    assert failed.best is not None
    assert hand.store.get(job.id).state is JobState.SUCCEEDED
    assert (folder_of(hand, job) / "pruning.json").is_file()
    assert hand.inputs.model(spec).weights_sha256 == dense


def test_object_store(hand, job, tmp_path):
    """In an object store the files are the same, and nothing stays in the worker's cache."""
    url = "memory://bucket-of-pruned"
    hand.inputs.pruned = PrunedStore(url, tmp_path / "cache")
    hand.step(job)
    files, root = fsspec.core.url_to_fs(url)
    result = hand.store.get(job.id).pruning.result
    found = {
        file["name"]: hand.inputs.pruned.open(job.id, result["key"], file["name"]).read()
        for file in result["files"]
    }

    assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == {
        file["name"]: file["sha256"] for file in result["files"]
    }
    assert not (tmp_path / "cache" / "pruned" / str(job.id)).exists()
    hand.inputs.pruned.remove(job.id)
    assert files.find(root) == []


def test_deleted_meanwhile(hand, job, monkeypatch):
    """A job that is deleted while a worker prunes leaves no files."""
    keep = hand.inputs.pruned.keep
    _begun.clear()

    def delete(*given):
        keep(*given)
        with hand.store.database.transaction() as connection:
            connection.execute(sql_delete(jobs).where(jobs.c.id == job.id))

    monkeypatch.setattr(hand.inputs.pruned, "keep", delete)
    with pytest.raises(LostClaim):
        hand.step(job)

    assert list((hand.bundles / "pruned").iterdir()) == []


def test_from_a_question_to_a_model(hand, tmp_path):
    """
    A document without a preset is searched by `best`; what is pulled is what the configuration
    says, is whole when it is packed, and writes the same text before and after.
    """
    roots = {"model_roots": (hand.folder,), "text_roots": (hand.folder,)}
    app = create_app(hand.store.database, read_settings(artifacts=str(hand.bundles), **roots))
    document = {
        "model": "model", "pattern": "0.5", "prune": True, "trials": 12,
        "calibration": {
            "text": "calibration.jsonl", "samples": 6, "context_length": 32, "rows_per_layer": 4,
            "projection_rows": 16, "kernel_sizes": [3, 5],
        },
        "confirm": {"text": "confirmation.jsonl", "finalists": 1, "windows": 3},
    }  # fmt: skip
    with TestClient(app, "http://127.0.0.1:8000/v1") as http, Client("http://x") as client:
        client._http = http
        job = client.submit(document)
        hand.until(hand.store.get(job.id), None)
        best = client.best(job.id)
        client.pull(job.id, tmp_path / "pruned")
    pho.pack(tmp_path / "pruned", tmp_path / "pruned.pho")
    dense = pho.load_model(str(hand.folder / "model"), device="cpu")
    before = pho.load_model(str(tmp_path / "pruned"), device="cpu")
    after = pho.load_packed(tmp_path / "pruned.pho", device="cpu")
    prompt = torch.arange(1, 9)[None]
    texts = [
        each.model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
        for each in (before, after)
    ]

    assert best.steps.update == "least-squares"
    assert best.perplexities.pruned == best.confirmation.perplexity
    assert all(check.passed for check in check_folder(tmp_path / "pruned.pho", original=dense))
    assert len(texts[0][0]) > 8
    assert texts[0] == texts[1]


def test_a_text_too_short_to_recover_on_is_named_before_the_search(hand, small):
    lines = (hand.folder / "report.jsonl").read_text().splitlines()
    (hand.folder / "short.jsonl").write_text("\n".join(lines[:8]))
    error = hand.failed(small(prune=True, recovery={"tokens": 640, "text": "short.jsonl"}))

    assert error["stage"] == "calibrate"
    assert re.search(r"short\.jsonl has too few windows .* on: [1-3], and 4", error["message"])


def test_a_recovered_model_is_what_is_kept_and_the_report_says_what_it_gained(hand, small):
    """On several texts: they and their shares stand wherever a job says its text."""
    calibration = {"more_texts": ["report.jsonl"], "shares": [2, 1]}
    spec = small(prune=True, recovery={"tokens": 640, "rate": 2e-3}, calibration=calibration)
    job = hand.done(spec)
    folder = folder_of(hand, job)
    card = (folder / "README.md").read_text()
    recovered = job.pruning.result["recovery"]
    names = "calibration.jsonl (66.7%) and report.jsonl (33.3%)"  # not where they lie
    app = create_app(hand.store.database, read_settings())
    with TestClient(app, "http://127.0.0.1:8000") as client:
        shown = client.get(f"/v1/jobs/{job.id}").json()
        page = client.get(f"/jobs/{job.id}").text
        report = client.get(f"/v1/jobs/{job.id}/report").text
        text = client.get(f"/v1/jobs/{job.id}/best").json()["calibration"]["text"]

    assert recovered["after"] <= recovered["before"]
    assert recovered["text"]["source"] == text["source"] == names
    assert [Path(each["source"]).name for each in text["texts"]] == [
        "calibration.jsonl", "report.jsonl",
    ]  # fmt: skip
    assert card.count(names) == 2
    assert names in report
    assert recovered["tokens"] == 768  # in eight equal parts
    assert recovered["perplexities"].keys() == {"dense", "pruned", "recovered"}
    assert shown["recovery"] == recovered
    assert re.search(r'id="result".*id="recovery".*id="stages"', page, re.DOTALL)
    (line,) = [each for each in outcome(Job.model_validate(shown)) if "recovery" in each]
    values = [number(recovered["perplexities"][name]) for name in ("pruned", "recovered")]
    assert f"perplexity {' → '.join(values)}" in line
    columns = ["prompt", "dense", "pruned", "recovered"]
    assert [*recovered["continuations"][0]] == columns
    rows = ".*".join(f">{name}</" for name in columns[1:])
    assert re.search(rf'id="writing".*{rows}', page, re.DOTALL)
    assert "| prompt | dense | pruned | recovered |" in card
    assert all(check.passed for check in check_folder(folder, original=None))
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


def test_where_no_block_is_trained_neither_the_model_nor_its_text_is_opened():
    work = object.__new__(SealedWork)  # without inputs, which opening would ask for

    assert work.blocks(baseline("wanda", Pattern.parse("0.5"))) is None


@pytest.mark.thorough
def test_a_recovery_gives_its_worker_away_again_and_again_and_ends_with_the_same_files(
    hand, small, monkeypatch
):
    spec = small(prune=True, recovery={"tokens": 640, "rate": 2e-3})
    job, alone = (hand.until(hand.submit(spec), StageKind.PRUNE) for _ in range(2))
    alone = hand.until(alone, None)
    looks, given_away = [], 0

    def gives_way(_):
        looks.append(None)
        return len(looks) % 12 in (0, 1)  # and still when it has kept what it has

    monkeypatch.setattr(Watch, "gives_way", gives_way)
    while hand.store.get(job.id).pruning.result is None:
        claim = hand.take(job)
        try:
            Conductor(hand.store, hand.inputs, Event(), Turns()).run(claim)
        except TurnOver:
            given_away += 1
            hand.store.end_turn(claim)
    files, others = (
        {file["name"]: file["sha256"] for file in hand.store.get(each.id).pruning.result["files"]}
        for each in (job, alone)
    )

    assert given_away > 2
    assert files.keys() == others.keys()
    assert {name for name in files if files[name] != others[name]} <= {"pruning.json", "README.md"}
