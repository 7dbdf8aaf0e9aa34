"""What a service makes of a job: the same as `pho search`, whoever does the work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import bundle_path, calibrate, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.spec.job import island_seed
from storage.records import JobState, StageKind, StageState

TRIALS = 200
LONG = 400  # trials; many seconds
URL = ["--database-url", "postgresql://nobody@localhost/nothing"]


@pytest.fixture(autouse=True)
def one_worker(crew: Any) -> None:
    """All tests of this file share one worker at least."""
    crew.man(1)


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    """A copy of the model and the texts that a test may change."""
    return Path(shutil.copytree(home, tmp_path / "own"))


def bundles(crew: Any) -> dict[str, int]:
    """The bundles on disk, with the time at which each was made."""
    found = (crew.folder / "data" / "artifacts" / "bundles").glob("*.safetensors")
    return {path.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as-it-is"),
        pytest.param(
            {"confirm": {"text": None}},
            id="confirmed-on-held-out-windows",
            marks=pytest.mark.thorough,
        ),
        pytest.param({"confirm": None}, id="not-confirmed", marks=pytest.mark.thorough),
        pytest.param({"objective": {"name": "gini"}}, id="gini", marks=pytest.mark.thorough),
        pytest.param(
            {"objective": {"name": "perplexity"}, "trials": 15},
            id="perplexity",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"objective": {"name": "perplexity"}, "sampler": "hill-climb", "trials": 300},
            id="hill-climb-to-its-end",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"pattern": "2:4", "seed": 3, "steps": {"permutation": "score", "deployable": True}},
            id="2:4-deployable",
        ),
        pytest.param({"preset": "best", "corrections": 3}, id="best-corrected"),
        pytest.param(
            {
                "preset": "crepe-plus",
                "pattern": "4:8",
                "steps": {"repruning": "dsnot"},
                "trials": 15,
                "stream": True,
            },
            id="4:8-streamed",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"scope": "global", "sampler": "tpe", "search_space": {"row_share": [0.2, 0.8]}},
            id="tpe-global",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_as_pho_search(
    crew: Any, spec_of: Any, undisturbed: Any, found: Any, changes: dict[str, Any]
) -> None:
    """The trials and the configuration are those of `pho search` for the same model and texts."""
    job = crew.done(spec_of(**changes))
    alone = undisturbed(spec_of(**changes))

    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_not_confirmed_is_said(crew: Any, spec_of: Any) -> None:
    """Without perplexities the configuration has none, and a warning says so."""
    job = crew.done(spec_of(confirm=None))

    assert job.best["confirmation"] is None
    assert job.of_kind(StageKind.PERPLEXITY) == []
    assert any("Not confirmed" in warning for warning in job.warnings)


def test_validation(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A validation ranks random candidates by each proxy, and changes nothing of the search."""
    spec = spec_of(trials=20, validation={"candidates": 8, "seed": 2})
    job = crew.done(spec)
    (finish,) = job.of_kind(StageKind.FINISH)
    ranks = {name: quality["spearman"] for name, quality in finish.result["validation"].items()}

    assert ranks == undisturbed(spec).ranks
    assert found(job) == undisturbed(spec).configuration


def test_layers(crew: Any, spec_of: Any) -> None:
    """What the winner does to each linear is kept: its error, and the share that it loses."""
    spec = spec_of(scope="global", confirm=None, trials=10)
    (stage,) = crew.done(spec).of_kind(StageKind.FINISH)
    cells = stage.result["layers"][spec.model]
    kinds = [kind for _, kind, _, _ in cells[: len(cells) // 2]]

    assert {block for block, _, _, _ in cells} == {"model.layers.0", "model.layers.1"}
    assert kinds == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert all(0 < error < 1 for _, _, error, _ in cells)
    assert len({sparsity for _, _, _, sparsity in cells}) > 3


@pytest.mark.thorough
def test_some_linears(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A job that leaves linears dense finds what `pho search` finds, and shows which they are."""
    linears = {"ignore": ["*.o_proj"], "sparsities": {"*.down_proj": 0.25}}
    spec = spec_of(steps={"linears": linears}, trials=10, confirm=None)
    job = crew.done(spec)
    (stage,) = job.of_kind(StageKind.FINISH)
    shares = {kind: share for _, kind, _, share in stage.result["layers"][spec.model]}

    assert found(job) == undisturbed(spec).configuration
    assert job.best["steps"]["linears"] == {"targets": [], **linears}
    assert (shares["self_attn.o_proj"], shares["mlp.down_proj"]) == (0, 0.25)


def test_islands(crew: Any, spec_of: Any, undisturbed: Any) -> None:
    """Each island is the search with its own seed; the best of all of them wins."""
    job = crew.done(spec_of(islands=3, confirm=None))
    alone = [undisturbed(spec_of(confirm=None, seed=island_seed(0, i))) for i in range(3)]
    values = [a.configuration["objective"]["value"] for a in alone]
    best = min(range(3), key=lambda i: values[i])

    assert crew.trials(job) == [a.trials for a in alone]
    assert job.best["objective"]["value"] == values[best]
    assert job.best["coefficients"] == alone[best].configuration["coefficients"]
    assert (job.best["search"]["islands"], job.best["search"]["island"]) == (3, best)


def test_extend(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """An extended job has the trials of one with as many from the start, and no worse best."""
    job = crew.done(spec_of(trials=20))
    before = found(job)
    job = crew.succeeded(crew.store.ask(job.id, "extend", trials=20))
    alone = undisturbed(spec_of(trials=40))
    perplexities = [each["confirmation"]["perplexity"] for each in (before, alone.configuration)]

    assert crew.trials(job) == [alone.trials]
    assert found(job)["confirmation"]["perplexity"] == min(perplexities)


@pytest.mark.thorough
def test_extend_unconfirmed(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Where nothing is confirmed, it ends as if it had been that long from the start."""
    job = crew.done(spec_of(trials=20, confirm=None))
    job = crew.succeeded(crew.store.ask(job.id, "extend", trials=20))

    assert found(job) == undisturbed(spec_of(trials=40, confirm=None)).configuration


def test_extend_while_it_runs(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Also if it is extended in the midst of its search."""
    job = crew.submit(spec_of(trials=TRIALS - 20))
    crew.busy(job, StageKind.SEARCH)
    crew.store.ask(job.id, "extend", trials=20)
    job = crew.succeeded(job)
    alone = undisturbed(spec_of(trials=TRIALS))

    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_extend_what_has_ended(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A hill climb that ended by itself has nothing more to do when it is given more trials."""
    job = crew.done(spec_of(sampler="hill-climb", trials=300))
    before = crew.trials(job)
    job = crew.succeeded(crew.store.ask(job.id, "extend", trials=20))
    (search,) = job.of_kind(StageKind.SEARCH)

    assert crew.trials(job) == before
    assert search.result["trials"] == len(before[0])
    assert not search.result["out_of_time"]
    assert found(job) == undisturbed(spec_of(sampler="hill-climb", trials=320)).configuration
    assert any(f"after {len(before[0])} of 320 trials" in warning for warning in job.warnings)


def test_timeout(crew: Any, spec_of: Any, undisturbed: Any) -> None:
    """A search whose time is up ends with the best of the trials that it has."""
    job = crew.done(spec_of(trials=10_000, timeout_s=0.5, confirm=None))
    (trials,) = crew.trials(job)
    (search,) = job.of_kind(StageKind.SEARCH)

    assert 0 < len(trials) < 10_000  # on any machine
    assert trials[:100] == undisturbed(spec_of(trials=100, confirm=None)).trials[: len(trials)]
    assert job.best["objective"]["value"] == min(value for _, _, value, _, _ in trials)
    assert search.result["out_of_time"]


@pytest.mark.thorough
def test_one_bundle(crew: Any, spec_of: Any) -> None:
    """Jobs with the same calibration share one bundle, which is made once."""
    before = bundles(crew)
    first = crew.done(spec_of(calibration={"seed": 5}, confirm=None))
    made = bundles(crew)
    second = crew.done(spec_of(calibration={"seed": 5}, seed=1, confirm=None))

    assert len(made) == len(before) + 1
    assert bundles(crew) == made
    assert first.best["calibration"] == second.best["calibration"]


def test_lost_bundle(crew: Any, spec_of: Any, undisturbed: Any) -> None:
    """A bundle that was lost is made again, the same."""
    before = bundles(crew)
    job = crew.done(spec_of(trials=20, calibration={"seed": 6}))
    (lost,) = bundles(crew).keys() - before.keys()
    (crew.folder / "data" / "artifacts" / "bundles" / lost).unlink()
    crew.done(spec_of())  # so that the worker does not have it in memory any more
    job = crew.succeeded(crew.store.ask(job.id, "extend", trials=20))

    assert lost in bundles(crew)
    assert crew.trials(job) == [undisturbed(spec_of(calibration={"seed": 6})).trials]


def test_text_is_missing(crew: Any, spec_of: Any, folder: Path) -> None:
    """Without its text a job fails at once, says why, and can be resumed when it is there."""
    text = folder / "calibration.jsonl"
    text.rename(folder / "away")
    job = crew.wait(crew.submit(spec_of(calibration={"text": str(text)})))
    (folder / "away").rename(text)

    assert job.state is JobState.FAILED
    assert job.error["type"] == "InvalidInput"
    assert job.error["stage"] == "calibrate"
    assert f"{str(text)!r} does not exist" in job.error["message"]
    assert job.error["attempts"] == 1

    job = crew.succeeded(crew.store.ask(job.id, "resume"))

    assert job.error is None


@pytest.mark.thorough
def test_confirmation_text_is_missing(crew: Any, spec_of: Any, folder: Path) -> None:
    """A text that is only needed later is missed before the search."""
    error = crew.failed(spec_of(confirm={"text": str(folder / "nothing.jsonl")}))

    assert error["stage"] == "calibrate"
    assert "nothing.jsonl" in error["message"]


def test_model_outside(crew: Any, spec_of: Any) -> None:
    """A worker opens no model outside of its folders, whoever let the job in."""
    error = crew.failed(spec_of(model="/etc"))

    assert (error["type"], error["stage"]) == ("InvalidInput", "calibrate")
    assert "PHO_MODEL_ROOTS" in error["message"]


@pytest.mark.thorough
def test_width_and_groups(crew: Any, spec_of: Any) -> None:
    """A width that M does not divide fails before the search, and the layer is named."""
    error = crew.failed(spec_of(pattern="2:5"))

    assert (error["type"], error["stage"]) == ("InvalidInput", "calibrate")
    assert "model.layers.0.self_attn.q_proj: in_features=32" in error["message"]


@pytest.mark.thorough
def test_an_error_in_a_layer_keeps_the_layer(crew: Any, spec_of: Any, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder / "model")
    error = crew.failed(spec_of(model=str(folder / "model")))

    assert (error["type"], error["stage"]) == ("NumericalError", "calibrate")
    assert error["layer"] == "model.layers.1.mlp.up_proj"


def test_too_many_failed_trials(crew: Any, spec_of: Any) -> None:
    """With more failed trials than allowed the job fails, and names layer and coefficients."""
    spec = spec_of(calibration={"seed": 8}, max_failed_trials=3, confirm=None)
    settings = spec.calibration.settings()
    model = load_model(spec.model, device="cpu")
    text = calibration_text(model, TextSource(path=spec.calibration.text), settings)
    bundle = calibrate(model, text, settings)
    last = replace(bundle.layers[-1], rows=bundle.layers[-1].rows * 1e30)  # beyond float32
    path = bundle_path(crew.folder / "data" / "artifacts", text.bundle_key)
    write_bundle(replace(bundle, layers=[*bundle.layers[:-1], last]), path)
    error = crew.failed(spec)

    assert (error["type"], error["stage"]) == ("TrialsFailed", "search")
    assert "max_failed_trials=3" in error["message"]
    assert "model.layers.1.mlp.down_proj" in error["message"]
    assert error["candidate"]["coefficients"].keys() >= {"row", "column", "neighbourhood"}


@pytest.mark.thorough
def test_failed_perplexity(crew: Any, spec_of: Any, folder: Path) -> None:
    """A perplexity that cannot be measured fails the job, and the candidate is kept."""
    text = folder / "confirmation.jsonl"
    job = crew.submit(spec_of(confirm={"text": str(text)}, trials=60, stream=True))
    crew.busy(job, StageKind.SEARCH)
    text.unlink()
    job = crew.wait(job)
    perplexities = job.of_kind(StageKind.PERPLEXITY)

    assert job.state is JobState.FAILED
    assert (job.error["type"], job.error["stage"]) == ("InvalidInput", "perplexity")
    assert job.error["candidate"] in [s.params["candidate"] for s in perplexities]


def test_a_job_that_fails_holds_up_no_other(crew: Any, spec_of: Any) -> None:
    wrong = [crew.submit(spec_of(model="/etc", seed=i)) for i in range(3)]
    right = crew.submit(spec_of(confirm=None))

    assert crew.succeeded(right).best is not None
    assert {crew.store.get(job.id).state for job in wrong} == {JobState.FAILED}


def test_cancel(crew: Any, spec_of: Any) -> None:
    """A cancel reaches the worker in the midst of a search, and what was found stays."""
    job = crew.submit(spec_of(trials=LONG))
    crew.busy(job, StageKind.SEARCH, done=15)
    asked = crew.store.ask(job.id, "cancel")
    started = time.monotonic()
    job = crew.wait(job)

    assert asked.state is JobState.CANCELLING
    assert job.state is JobState.CANCELLED
    assert time.monotonic() - started < 5
    assert 15 <= len(crew.trials(job)[0]) < LONG
    assert job.best is None


def test_pause_and_resume(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A paused job stands still; resumed, it ends as if nothing had happened."""
    job = crew.submit(spec_of(trials=TRIALS))
    crew.busy(job, StageKind.SEARCH, done=7)
    crew.store.ask(job.id, "pause")
    job = crew.wait(job, JobState.PAUSED)
    trials = crew.trials(job)
    crew.done(spec_of(confirm=None))  # the worker is free for others

    assert job.state is JobState.PAUSED
    assert crew.trials(job) == trials
    assert len(trials[0]) < TRIALS

    job = crew.succeeded(crew.store.ask(job.id, "resume"))

    assert crew.trials(job) == [undisturbed(spec_of(trials=TRIALS)).trials]
    assert found(job) == undisturbed(spec_of(trials=TRIALS)).configuration


def test_takes_turns(
    own_crew: Any, spec_of: Any, undisturbed: Any, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small job is done during a long search on the only worker, which changes nothing of it."""
    monkeypatch.setenv("PHO_TURN_S", "0.2")
    own_crew.man(1)
    long = own_crew.submit(spec_of(trials=LONG))
    own_crew.busy(long, StageKind.SEARCH)
    small = own_crew.done(spec_of(trials=TRIALS))
    long = own_crew.store.get(long.id)
    (search,) = long.of_kind(StageKind.SEARCH)
    own_crew.store.ask(long.id, "cancel")
    own_crew.wait(long)

    assert long.state is JobState.RUNNING
    assert (search.attempt > 1, search.failures) == (True, 0)
    assert own_crew.trials(small) == [undisturbed(spec_of(trials=TRIALS)).trials]
    assert found(small) == undisturbed(spec_of(trials=TRIALS)).configuration


def test_worker_is_seen(crew: Any, spec_of: Any) -> None:
    """A worker is listed with its device, its stages, and what it is busy with."""
    job = crew.submit(spec_of(trials=LONG))
    process = crew.busy(job, StageKind.SEARCH)
    worker = crew.at_work()[process]
    crew.store.ask(job.id, "cancel")
    crew.wait(job)

    assert worker.device == "cpu"
    assert worker.stages == list(StageKind)
    assert (worker.job_id, worker.stage) == (job.id, StageKind.SEARCH)
    assert crew.at_work()[process].stage is None


@pytest.mark.thorough
def test_restricted(own_crew: Any, spec_of: Any) -> None:
    """A worker with --stages does those alone, and is listed with them."""
    worker = own_crew.start("--stages", "calibrate, search")
    own_crew.man(1)
    job = own_crew.submit(spec_of())
    listed = own_crew.at_work()[worker].stages
    own_crew.until(lambda: own_crew.store.get(job.id).of_kind(StageKind.CONFIRM))
    time.sleep(0.5)  # for it, to take what it should not
    job = own_crew.store.get(job.id)

    assert listed == ["calibrate", "search"]
    assert [(s.kind, s.state) for s in job.stages] == [
        (StageKind.CALIBRATE, StageState.DONE),
        (StageKind.SEARCH, StageState.DONE),
        (StageKind.CONFIRM, StageState.WAITING),
    ]


@pytest.mark.thorough
def test_four_workers(crew: Any, spec_of: Any, found: Any) -> None:
    """Four workers find what one does: the same trials in all islands, the same best."""
    one = crew.done(spec_of(islands=3, trials=24))
    crew.man(4)
    four = crew.done(spec_of(islands=3, trials=24))

    assert crew.trials(four) == crew.trials(one)
    assert {**found(four), "search": None} == {**found(one), "search": None}


def test_calibrated_in_turn(crew: Any, spec_of: Any) -> None:
    """Of two jobs with the same calibration the second waits for the first one's bundle."""
    crew.man(2)
    before = bundles(crew)
    two = [crew.submit(spec_of(calibration={"seed": 7}, seed=i, confirm=None)) for i in range(2)]
    spans = [
        (stage.started_at, stage.finished_at)
        for job in map(crew.succeeded, two)
        for stage in job.of_kind(StageKind.CALIBRATE)
    ]

    assert len(bundles(crew)) == len(before) + 1
    assert spans[0][1] <= spans[1][0]


def test_terminated(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """SIGTERM in a search: handed back at once, in order, and another worker ends it."""
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    process = crew.busy(job, StageKind.SEARCH, done=15)
    os.kill(process, signal.SIGTERM)
    started = time.monotonic()
    code = crew.ended(process)
    took_s = time.monotonic() - started
    gone = process not in crew.at_work()
    job = crew.succeeded(job)
    (search,) = job.of_kind(StageKind.SEARCH)

    assert (code, gone) == (0, True)
    assert took_s < 10
    assert (search.attempt, search.failures) == (2, 0)
    assert crew.trials(job) == [undisturbed(spec_of(trials=TRIALS)).trials]
    assert found(job) == undisturbed(spec_of(trials=TRIALS)).configuration


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        (
            ["--stages", "calibrate,polish", *URL],
            {},
            "calibrate, point, search, confirm",
        ),
        ([], {"PHO_HEARTBEAT_S": "0"}, "PHO_HEARTBEAT_S='0'"),
        ([], {}, "no database is given"),
        (["--devices", "cpu"], {}, "No such option"),
    ],
)
def test_bad_options(options: list[str], variable: dict[str, str], message: str) -> None:
    """A wrong option or setting ends with exit code 2 and says what is wrong."""
    settings = {k: v for k, v in os.environ.items() if k != "PHO_DATABASE_URL"}
    result = subprocess.run(
        [sys.executable, "-m", "workers", *options],
        env={**settings, **variable},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert result.returncode == 2
    assert message in result.stderr
