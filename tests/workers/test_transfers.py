"""Transfers, joint searches and warm starts, done by workers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from pho_service.models.calibration import cached_bundle, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import own_search, transfer_job
from pho_service.spec.configuration import Configuration
from pho_service.spec.transfer import TransferRequest, TransferSpec
from storage.configurations import ConfigurationStore
from storage.records import JobState, StageKind


@pytest.fixture(autouse=True)
def one_worker(crew: Any) -> None:
    """All tests of this file share one worker at least."""
    crew.man(1)


@pytest.fixture
def other(home: Path) -> Path:
    """A model that is not the one of the jobs."""
    folder = home / "other"
    if not folder.is_dir():
        shutil.copytree(home / "model", folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        model.model.layers[0].mlp.down_proj.weight.data *= 3
        model.model.layers[1].self_attn.v_proj.weight.data[:, ::3] *= 4
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def searched(crew: Any, spec_of: Any) -> Any:
    """A job that has a configuration."""
    return crew.done(spec_of(trials=20))


@pytest.fixture
def transfer_of(searched: Any, home: Path) -> Any:
    """The document of a transfer of what the job has found."""

    def build(*models: Path | str, job: Any = searched, **changes: Any) -> TransferSpec:
        document = {
            "models": [str(model) for model in models],
            "report": {"text": str(home / "report.jsonl"), "windows": 3},
            **changes,
        }
        request = TransferRequest.model_validate(document)
        return TransferSpec.of(request, str(job.id), job.best, job.spec)

    return build


def measured(job: Any) -> list[dict[str, Any]]:
    """What a transfer gave, model by model."""
    return [stage.result for stage in job.of_kind(StageKind.TRANSFER)]


def alone(spec: TransferSpec, folder: Path) -> dict[str, Any]:
    """What `pho transfer` gives for the first model."""
    target = spec.target(0)
    settings = target.calibration.settings()
    model = load_model(target.model, device="cpu")
    text = calibration_text(model, TextSource(path=target.calibration.text), settings)
    windows, record = read_windows(
        model,
        TextSource(path=spec.report.text),
        context_length=settings.context_length,
        bos=settings.bos,
        max_windows=spec.report.windows,
    )
    held_out = text.held_out[: target.confirm.windows]
    found = Configuration.model_validate(spec.configuration)
    search = spec.search and own_search(
        found,
        spec.search,
        finalists=spec.search.confirm.candidates,
    )
    return transfer_job(
        Calibrated(
            name=target.model,
            bundle=cached_bundle(model, text, settings, folder),
            model=model,
            calibration=text.calibration,
            confirm=ReportText(windows=held_out, record=text.record),
            report=ReportText(windows=windows, record=record),
        ),
        found,
        search=search,
    ).to_dict()


def test_as_pho_transfer(crew: Any, transfer_of: Any, other: Path, tmp_path: Path) -> None:
    """The numbers are those of `pho transfer` for the same model and texts."""
    spec = transfer_of(other, search={"trials": 14, "confirm": {"candidates": 2, "windows": 3}})
    (mine,) = measured(crew.done(spec))
    expected = alone(spec, tmp_path)

    assert mine["perplexities"] == expected["perplexities"]
    assert set(mine["perplexities"]) == {"dense", "wanda", "ria", "transferred", "own"}
    assert mine == expected


def test_a_stage_each(crew: Any, transfer_of: Any, other: Path, home: Path) -> None:
    """Each model has a stage; one that cannot be read is said, and the others are measured."""
    job = crew.done(transfer_of(other, home / "texts-only", home / "model"))
    first, failed, last = measured(job)

    assert job.best is None
    assert first["perplexities"]["transferred"] != first["perplexities"]["ria"]
    assert failed["error"]["type"] == "InvalidInput"
    assert str(home / "texts-only") in failed["warnings"][0]
    assert last["target"] == str(home / "model")
    assert last["perplexities"]["ria"] > 0


def test_without_report(crew: Any, transfer_of: Any, other: Path) -> None:
    """Without a report text the proxies are compared, and nothing else."""
    (mine,) = measured(crew.done(transfer_of(other, report=None)))

    assert mine["perplexities"] == {}
    assert set(mine["proxies"]) == {"wanda", "ria", "transferred"}
    assert mine["report"] is None


@pytest.mark.thorough
def test_does_not_hold(crew: Any, searched: Any, transfer_of: Any, other: Path) -> None:
    """Where the configuration is worse than RIA, a warning says so and what to do."""
    nonsense = {"row": 0.0, "column": 1.0, "neighbourhood": 0.0, "kernel_size": 3,
                "activation_exponent": 0.0, "gradient_exponent": 4.0}  # fmt: skip
    found = {**searched.best, "coefficients": nonsense}
    spec = transfer_of(other, report=None).model_copy(update={"configuration": found})
    (mine,) = measured(crew.done(spec))

    assert "is no better than RIA's" in mine["warnings"][0]
    assert f"pho search {other}" in mine["warnings"][0]


def test_into_the_library(crew: Any, searched: Any, transfer_of: Any, other: Path) -> None:
    """The library keeps what was measured with the configuration, and the own best beside it."""
    job = crew.done(transfer_of(other, search={"trials": 14, "confirm": {"windows": 3}}))
    library = {each.id: each for each in ConfigurationStore(crew.database).all()}
    (entry,) = (each for each in library.values() if each.job_id == searched.id)
    own = [each for each in library.values() if each.job_id == job.id]
    (mine,) = measured(job)
    found = mine.pop("own")

    assert entry.transfers == [mine]
    assert mine["target"] == str(other)
    assert own[0].document == found


def test_killed(crew: Any, transfer_of: Any, other: Path, home: Path) -> None:
    """A worker that dies in the midst of a model does not lose the others, nor that one."""
    crew.man(1)
    spec = transfer_of(home / "model", other, search={"trials": 400, "confirm": {"windows": 3}})
    job = crew.submit(spec)
    crew.kill(job, StageKind.TRANSFER)
    crew.man(1)
    done = crew.succeeded(job)
    again = crew.done(spec)

    assert measured(done) == measured(again)
    assert any(stage.failures for stage in done.of_kind(StageKind.TRANSFER))


@pytest.mark.thorough
def test_paused_and_cancelled(crew: Any, transfer_of: Any, other: Path) -> None:
    """A transfer is paused, resumed and cancelled as any job."""
    job = crew.submit(transfer_of(other, search={"trials": 2000, "confirm": {"windows": 3}}))
    crew.busy(job, StageKind.TRANSFER)
    crew.store.ask(job.id, "pause")
    paused = crew.wait(job, JobState.PAUSED)
    crew.store.ask(job.id, "resume")
    crew.busy(job, StageKind.TRANSFER, attempt=2)
    crew.store.ask(job.id, "cancel")

    assert paused.state is JobState.PAUSED
    assert crew.wait(job).state is JobState.CANCELLED


def test_joint(crew: Any, spec_of: Any, found: Any, other: Path, tmp_path: Path) -> None:
    """A job over several models finds what `pho search A B` finds."""
    spec = spec_of(trials=30, confirm=None, more_models=[str(other)], objective={"over": "worst"})
    job = crew.done(spec)
    bundles = {}
    for number, name in enumerate(spec.models):
        mine = spec.of_model(number)
        settings = mine.calibration.settings()
        model = load_model(name, device="cpu")
        text = calibration_text(model, TextSource(path=mine.calibration.text), settings)
        bundles[name] = cached_bundle(model, text, settings, tmp_path)
    expected = search_job(spec.request(0), bundles)
    configuration = expected.configuration.model_dump(mode="json")
    del configuration["search"]["study"]

    assert found(job) == configuration
    assert set(job.best["objective"]["relative_to_ria"]) == {*spec.models}
    assert job.warnings == expected.warnings
    assert len(job.of_kind(StageKind.CALIBRATE)) == 2
    assert list(job.of_kind(StageKind.FINISH)[0].result["layers"]) == spec.models


@pytest.mark.thorough
def test_joint_transfer(crew: Any, spec_of: Any, transfer_of: Any, other: Path) -> None:
    """What a joint search has found can be measured on each of its models."""
    joint = crew.done(spec_of(trials=20, confirm=None, more_models=[str(other)]))
    first, second = measured(crew.done(transfer_of(joint.spec["model"], other, job=joint)))

    assert first["perplexities"]["transferred"] > 0
    assert second["perplexities"]["transferred"] > 0


def test_warm(own_crew: Any, spec_of: Any, other: Path) -> None:
    """A warm job begins with the library's best; its document says with what."""
    own_crew.man(1)
    searched = own_crew.done(spec_of(trials=40, confirm=None))
    spec = spec_of(model=str(other), trials=40, seed=5, confirm=None, warm_start={})
    job = own_crew.done(spec)
    (point,) = job.spec["warm_start"]["found"]
    (start,) = job.best["search"]["warm_start"]
    again = own_crew.done(spec.model_validate(job.spec))

    assert point["coefficients"] == searched.best["coefficients"]
    assert point["reasons"][0] == "pattern 0.5, scope layer"
    assert start["trial"] == 6
    assert any(w.startswith("Warm start: ") for w in job.warnings)
    assert again.spec == job.spec
    assert own_crew.trials(again) == own_crew.trials(job)


def test_nothing_to_begin_with(crew: Any, spec_of: Any) -> None:
    """If the library has nothing for the pattern, the search is cold, and says so."""
    job = crew.done(spec_of(pattern="3:4", trials=20, confirm=None, warm_start={}))

    assert job.spec["warm_start"]["found"] == []
    assert "warm_start" not in job.best["search"]
    assert any("had nothing for 3:4" in warning for warning in job.warnings)
