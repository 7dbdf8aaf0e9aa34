"""Transfers, joint searches and warm starts, done by workers."""

import shutil
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from pho_service.models.data_sets import TextSource
from pho_service.models.texts import ReportText, read_windows
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import own_search, transfer_job
from pho_service.pipeline.work import Work
from pho_service.spec.configuration import Configuration
from pho_service.spec.transfer import TransferRequest, TransferSpec
from storage.configurations import ConfigurationStore
from storage.records import StageKind


@pytest.fixture
def other(home):
    """A model that is not the one of the jobs."""
    folder = home / "other"
    if not folder.is_dir():
        shutil.copytree(home / "model", folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        model.model.layers[0].mlp.down_proj.weight.data *= 3
        model.model.layers[1].self_attn.v_proj.weight.data[:, ::3] *= 4
        model.save_pretrained(folder)
    return folder


_searched: list[Any] = []


@pytest.fixture
def searched(desk, spec_of):
    """A job that has a configuration, in the database that all tests of this file share."""
    if not _searched:
        _searched.append(desk.done(spec_of()))
    return _searched[0]


@pytest.fixture
def transfer_of(searched, home):
    """The document of a transfer of what the job has found."""

    def build(*models, **changes):
        document = {
            "models": [str(model) for model in models],
            "report": {"text": str(home / "report.jsonl"), "windows": 3},
            **changes,
        }
        request = TransferRequest.model_validate(document)
        return TransferSpec.of(request, str(searched.id), searched.best, searched.spec)

    return build


def measured(job):
    """What a transfer gave, model by model."""
    return [stage.result for stage in job.of_kind(StageKind.TRANSFER)]


def test_the_numbers_are_those_of_pho_transfer_for_the_same_model_and_texts(
    desk, transfer_of, other, calibrated
):
    spec = transfer_of(other, search={"trials": 14, "confirm": {"finalists": 2, "windows": 3}})
    (mine,) = measured(desk.done(spec))
    target = spec.target(0)
    model, text, bundle = calibrated(target)
    windows, record = read_windows(
        model,
        TextSource(path=spec.report.text),
        context_length=target.calibration.context_length,
        bos=target.calibration.settings().bos,
        max_windows=spec.report.windows,
    )
    held_out = text.held_out[: target.confirm.windows]
    found = Configuration.model_validate(spec.configuration)
    work = Work(
        bundles={target.model: bundle},
        dense=model,
        calibration=text.calibration,
        confirm=ReportText(windows=held_out, record=text.record),
        report=ReportText(windows=windows, record=record),
    )
    search = own_search(found, spec.search, finalists=spec.search.confirm.finalists)

    assert set(mine["perplexities"]) == {"dense", "wanda", "ria", "transferred", "own"}
    assert mine == transfer_job(target.model, work, found, search=search).to_dict()


def test_a_stage_each(desk, transfer_of, other, home):
    """Each model has a stage; one that cannot be read is said, and the others are measured."""
    job = desk.done(transfer_of(other, home / "texts-only", home / "model"))
    first, failed, last = measured(job)

    assert job.best is None
    assert first["perplexities"]["transferred"] != first["perplexities"]["ria"]
    assert failed["error"]["type"] == "InvalidInput"
    assert str(home / "texts-only") in failed["warnings"][0]
    assert last["target"] == str(home / "model")
    assert last["perplexities"]["ria"] > 0


def test_without_report(desk, transfer_of, other):
    """Without a report text the proxies are compared, and nothing else."""
    (mine,) = measured(desk.done(transfer_of(other, report=None)))

    assert mine["perplexities"] == {}
    assert set(mine["proxies"]) == {"wanda", "ria", "transferred"}
    assert mine["report"] is None


def test_into_the_library(desk, searched, transfer_of, other):
    """The library keeps what was measured with the configuration, and the own best beside it."""
    job = desk.done(transfer_of(other, search={"trials": 14, "confirm": {"windows": 3}}))
    library = {each.id: each for each in ConfigurationStore(desk.store.database).all()}
    (entry,) = (each for each in library.values() if each.job_id == searched.id)
    own = [each for each in library.values() if each.job_id == job.id]
    (mine,) = measured(job)
    found = mine.pop("own")

    assert mine in entry.transfers
    assert mine["target"] == str(other)
    assert own[0].document == found


@pytest.mark.thorough
def test_a_worker_that_dies_in_the_midst_of_a_model_loses_neither_the_others_nor_that_one(
    crew, desk, transfer_of, other, home
):
    crew.man(1)
    spec = transfer_of(home / "model", other, search={"trials": 100, "confirm": {"windows": 3}})
    job = crew.submit(spec)
    crew.kill(job, StageKind.TRANSFER)
    crew.man(1)
    done = crew.succeeded(job)
    again = desk.done(spec)

    assert measured(done) == measured(again)
    assert any(stage.failures for stage in done.of_kind(StageKind.TRANSFER))


def test_a_job_over_several_models_finds_what_pho_search_of_them_finds(
    desk, spec_of, found, other, calibrated
):
    spec = spec_of(trials=30, confirm=None, more_models=[str(other)], objective={"over": "worst"})
    job = desk.done(spec)
    bundles = {
        name: calibrated(spec.of_model(number))[2] for number, name in enumerate(spec.models)
    }
    expected = search_job(spec.request(0), Work(bundles=bundles))
    configuration = expected.configuration.model_dump(mode="json")
    del configuration["search"]["study"]

    assert found(job) == configuration
    assert set(job.best["objective"]["relative_to_ria"]) == {*spec.models}
    assert job.warnings == expected.warnings
    assert len(job.of_kind(StageKind.CALIBRATE)) == 2
    assert list(job.of_kind(StageKind.FINISH)[0].result["layers"]) == spec.models


@pytest.fixture
def own_desk(desk, database):
    return type(desk)(database, desk.folder, desk.bundles)


def test_a_warm_job_begins_with_the_librarys_best_its_document_says_with_what(
    own_desk, spec_of, other
):
    searched = own_desk.done(spec_of(confirm=None))
    spec = spec_of(model=str(other), seed=5, confirm=None, warm_start={})
    job = own_desk.done(spec)
    (point,) = job.spec["warm_start"]["found"]
    (start,) = job.best["search"]["warm_start"]
    again = own_desk.done(spec.model_validate(job.spec))

    assert point["coefficients"] == searched.best["coefficients"]
    assert point["reasons"][0] == "pattern 0.5, scope layer"
    assert start["trial"] == 6
    assert any(w.startswith("Warm start: ") for w in job.warnings)
    assert again.spec == job.spec
    assert own_desk.trials(again) == own_desk.trials(job)


def test_nothing_to_begin_with(desk, spec_of):
    """If the library has nothing for the pattern, the search is cold, and says so."""
    job = desk.done(spec_of(pattern="3:4", trials=20, confirm=None, warm_start={}))

    assert job.spec["warm_start"]["found"] == []
    assert "warm_start" not in job.best["search"]
    assert any("had nothing for 3:4" in warning for warning in job.warnings)
