"""What a service makes of a job: the same as `pho search`, whoever does the work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from pho_service.host.artifacts import TextFiles, sha256_of
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import bundle_path
from pho_service.spec.fields import named_texts
from pho_service.spec.job import JobSpec, island_seed
from storage.records import JobState, StageKind
from workers.__main__ import main

TRIALS = 40


@pytest.fixture
def folder(desk, home, tmp_path):
    """A copy of the model and the texts that a test may change."""
    desk.folder = Path(shutil.copytree(home, tmp_path / "own"))
    desk.inputs = desk.new_inputs()
    return desk.folder


def bundles(desk):
    """The bundles on disk, with the time at which each was made."""
    found = desk.bundles.rglob("*.safetensors")
    return {path.name: path.stat().st_mtime_ns for path in found}


def thorough(name, **changes):
    """A job that is done with ``--thorough`` alone."""
    return pytest.param(changes, id=name, marks=pytest.mark.thorough)


CLIMB = {"objective": {"name": "perplexity"}, "sampler": "hill-climb", "trials": 300}
STREAMED = {"preset": "crepe-plus", "steps": {"repruning": "dsnot"}, "trials": 15, "stream": True}
FOLDED = {"permutation": "score", "deployable": True}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as-it-is"),
        thorough("2:4-deployable", pattern="2:4", seed=3, steps=FOLDED),
        thorough("best", preset="best"),
        thorough("on-held-out-windows", confirm={"text": None}),
        thorough("hill-climb-to-its-end", **CLIMB),
        thorough("4:8-streamed", pattern="4:8", **STREAMED),
        thorough(
            "tpe-global", scope="global", sampler="tpe", search_space={"row_share": [0.2, 0.8]}
        ),
    ],
)
def test_the_trials_and_the_configuration_are_those_of_pho_search(
    desk, spec_of, undisturbed, found, changes
):
    job = desk.done(spec_of(**changes))
    alone = undisturbed(spec_of(**changes))

    assert desk.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_a_validation_ranks_random_candidates_by_each_proxy_and_changes_nothing_of_the_search(
    desk, spec_of, undisturbed, found
):
    spec = spec_of(trials=10, validation={"candidates": 8, "seed": 2})
    job = desk.done(spec)
    (finish,) = job.of_kind(StageKind.FINISH)
    ranks = {name: quality["spearman"] for name, quality in finish.result["validation"].items()}

    assert ranks == undisturbed(spec).ranks
    assert found(job) == undisturbed(spec).configuration


def test_what_the_winner_does_to_each_linear_is_kept_and_without_perplexities_it_is_said(
    desk, spec_of
):
    spec = spec_of(scope="global", confirm=None, trials=10)
    job = desk.done(spec)
    (stage,) = job.of_kind(StageKind.FINISH)
    cells = stage.result["layers"][spec.model]
    kinds = [kind for _, kind, _, _ in cells[: len(cells) // 2]]

    assert {block for block, _, _, _ in cells} == {"model.layers.0", "model.layers.1"}
    assert kinds == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert all(0 < error < 1 for _, _, error, _ in cells)
    assert len({sparsity for _, _, _, sparsity in cells}) > 3
    assert job.best["confirmation"] is None
    assert job.of_kind(StageKind.PERPLEXITY) == []
    assert any("Not confirmed" in warning for warning in job.warnings)


@pytest.mark.thorough
def test_a_job_that_leaves_linears_dense_finds_what_pho_search_finds_and_shows_which_they_are(
    desk, spec_of, undisturbed, found
):
    linears = {"ignore": ["*.o_proj"], "sparsities": {"*.down_proj": 0.25}}
    spec = spec_of(steps={"linears": linears}, trials=10, confirm=None)
    job = desk.done(spec)
    (stage,) = job.of_kind(StageKind.FINISH)
    shares = {kind: share for _, kind, _, share in stage.result["layers"][spec.model]}

    assert found(job) == undisturbed(spec).configuration
    assert job.best["steps"]["linears"] == {"targets": [], **linears}
    assert (shares["self_attn.o_proj"], shares["mlp.down_proj"]) == (0, 0.25)


def test_each_island_is_the_search_with_its_own_seed_the_best_of_all_of_them_wins(
    desk, spec_of, undisturbed
):
    job = desk.done(spec_of(islands=3, confirm=None))
    alone = [undisturbed(spec_of(confirm=None, seed=island_seed(0, i))) for i in range(3)]
    values = [a.configuration["objective"]["value"] for a in alone]
    best = min(range(3), key=lambda i: values[i])

    assert desk.trials(job) == [a.trials for a in alone]
    assert job.best["objective"]["value"] == values[best]
    assert job.best["coefficients"] == alone[best].configuration["coefficients"]
    assert (job.best["search"]["islands"], job.best["search"]["island"]) == (3, best)


@pytest.mark.thorough
def test_an_extended_job_has_the_trials_of_one_with_as_many_from_the_start_and_no_worse_best(
    desk, spec_of, undisturbed, found
):
    job = desk.done(spec_of(trials=10))
    before = found(job)
    job = desk.until(desk.store.ask(job.id, "extend", trials=12), None)
    alone = undisturbed(spec_of())
    perplexities = [each["confirmation"]["perplexity"] for each in (before, alone.configuration)]

    assert desk.trials(job) == [alone.trials]
    assert found(job)["confirmation"]["perplexity"] == min(perplexities)


def test_extended_in_the_midst_of_its_search_it_ends_as_if_it_had_been_that_long(
    desk, spec_of, undisturbed, found
):
    job = desk.submit(spec_of(trials=TRIALS - 20, confirm=None))
    job = desk.work(job, at=14, do=lambda: desk.store.ask(job.id, "extend", trials=20))
    alone = undisturbed(spec_of(trials=TRIALS, confirm=None))

    assert desk.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_a_hill_climb_that_ended_by_itself_has_nothing_more_to_do_with_more_trials(
    desk, spec_of, undisturbed, found
):
    job = desk.done(spec_of(sampler="hill-climb", trials=300))
    before = desk.trials(job)
    job = desk.until(desk.store.ask(job.id, "extend", trials=20), None)
    (search,) = job.of_kind(StageKind.SEARCH)

    assert desk.trials(job) == before
    assert search.result["trials"] == len(before[0])
    assert not search.result["out_of_time"]
    assert found(job) == undisturbed(spec_of(sampler="hill-climb", trials=320)).configuration
    assert any(f"after {len(before[0])} of 320 trials" in warning for warning in job.warnings)


def test_a_search_whose_time_is_up_ends_with_the_best_of_the_trials_that_it_has(
    desk, spec_of, undisturbed
):
    job = desk.done(spec_of(trials=10_000, timeout_s=0.5, confirm=None))
    (trials,) = desk.trials(job)
    (search,) = job.of_kind(StageKind.SEARCH)

    assert 0 < len(trials) < 10_000  # on any machine
    assert trials[:100] == undisturbed(spec_of(trials=100, confirm=None)).trials[: len(trials)]
    assert job.best["objective"]["value"] == min(value for _, _, value, _, _ in trials)
    assert search.result["out_of_time"]


def test_jobs_with_the_same_calibration_share_one_bundle_and_one_that_was_lost_is_made_again(
    desk, spec_of, undisturbed
):
    first = desk.done(spec_of(trials=10, confirm=None))
    made = bundles(desk)
    second = desk.done(spec_of(trials=10, seed=1, confirm=None))
    shared = bundles(desk)
    shutil.rmtree(desk.bundles)
    desk.inputs = desk.new_inputs()
    longer = desk.until(desk.store.ask(first.id, "extend", trials=12), None)

    assert shared == made
    assert len(made) == 1
    assert first.best["calibration"] == second.best["calibration"]
    assert bundles(desk).keys() == made.keys()
    assert desk.trials(longer) == [undisturbed(spec_of(confirm=None)).trials]


@pytest.mark.thorough
def test_a_job_on_uploaded_texts_finds_what_one_on_the_same_files_finds(desk, spec_of, tmp_path):
    files = TextFiles(str(tmp_path / "store"), tmp_path / "cache")
    files.folder.mkdir(parents=True)
    desk.inputs.access = replace(desk.inputs.access, texts=files)
    plain = spec_of(trials=10)
    written = plain.model_dump_json()
    for _, name in [*named_texts(plain.model_dump())]:
        path = Path(desk.inputs.access.text(name))
        text_id = f"sha256:{sha256_of(path)}{path.suffix}"
        shutil.copy(path, files.place(text_id))
        written = written.replace(json.dumps(name), json.dumps(text_id))
    uploaded, known = desk.done(JobSpec.model_validate_json(written)), desk.done(plain)

    assert written.count("sha256:") >= 2
    assert uploaded.best["coefficients"] == known.best["coefficients"]
    assert uploaded.best["perplexities"] == known.best["perplexities"]


def test_without_its_text_a_job_fails_at_once_says_why_and_can_be_resumed_when_it_is_there(
    desk, spec_of, folder
):
    text = folder / "calibration.jsonl"
    text.rename(folder / "away")
    spec = spec_of(
        model=str(folder / "model"), calibration={"text": str(text)}, confirm=None, trials=10
    )
    job = desk.work(desk.submit(spec))
    (folder / "away").rename(text)

    assert job.state is JobState.FAILED
    assert (job.error["type"], job.error["stage"]) == ("InvalidInput", "calibrate")
    said = (
        "text 'calibration.jsonl' does not exist below the folders of PHO_TEXT_ROOTS. Did you "
        "mean confirmation.jsonl?"
    )
    assert job.error["message"] == said
    assert job.error["attempts"] == 1

    job = desk.work(desk.store.ask(job.id, "resume"))

    assert job.state is JobState.SUCCEEDED
    assert job.error is None


def test_what_cannot_be_done_fails_before_the_search_and_costs_no_calibration(
    desk, spec_of, monkeypatch
):
    monkeypatch.setattr("workers.inputs.WorkerInputs.calibrate", Mock(side_effect=AssertionError))
    for changes, message in (
        ({"model": "/etc"}, "PHO_MODEL_ROOTS"),
        ({"confirm": {"text": "nothing.jsonl"}}, "nothing.jsonl"),
        ({"pattern": "2:5"}, "0.self_attn.q_proj: in_features=32"),
        ({"pattern": None, "patterns": ["0.5", "3:7"]}, "multiple of M=7"),
        ({"steps": {"linears": {"targets": ["re:.*\\.none"]}}}, "matches none of the"),
    ):
        error = desk.failed(spec_of(**changes))

        assert (error["type"], error["stage"]) == ("InvalidInput", "calibrate")
        assert message in error["message"]


def test_an_error_in_a_layer_keeps_the_layer(desk, spec_of, folder):
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder / "model")
    text = str(folder / "calibration.jsonl")
    spec = spec_of(model=str(folder / "model"), calibration={"text": text}, confirm=None)
    error = desk.failed(spec)

    assert (error["type"], error["stage"]) == ("NumericalError", "calibrate")
    assert error["layer"] == "model.layers.1.mlp.up_proj"


def test_memory_that_ran_out_fails_the_job_in_words_at_once(desk, spec_of, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("workers.inputs.load_model", load)
    error = desk.failed(spec_of(max_attempts=3))

    assert (error["type"], error["attempts"]) == ("OutOfMemory", 1)
    assert "Tried to allocate 2.00 GiB. Use a smaller model" in error["message"]
    assert "shorter windows (calibration.context_length)" in error["message"]


def test_with_more_failed_trials_than_allowed_the_job_fails_and_names_layer_and_coefficients(
    desk, spec_of, calibrated
):
    spec = spec_of(max_failed_trials=3, confirm=None)
    bundle = calibrated(spec)[2]
    last = replace(bundle.layers[-1], rows=bundle.layers[-1].rows * 1e30)  # beyond float32
    path = bundle_path(desk.bundles, bundle.key)
    path.parent.mkdir(parents=True)
    write_bundle(replace(bundle, layers=[*bundle.layers[:-1], last]), path)
    error = desk.failed(spec)

    assert (error["type"], error["stage"]) == ("TrialsFailed", "search")
    assert "max_failed_trials=3" in error["message"]
    assert "model.layers.1.mlp.down_proj" in error["message"]
    assert error["candidate"]["coefficients"].keys() >= {"row", "column", "neighbourhood"}


def test_a_perplexity_that_cannot_be_measured_fails_the_job_and_the_candidate_is_kept(
    desk, spec_of, folder
):
    text = folder / "confirmation.jsonl"
    spec = spec_of(
        model=str(folder / "model"), calibration={"text": str(folder / "calibration.jsonl")},
        confirm={"text": str(text)}, trials=20, stream=True,
    )  # fmt: skip
    job = desk.until(desk.submit(spec), StageKind.PERPLEXITY)
    text.unlink()
    job = desk.work(job)

    assert job.state is JobState.FAILED
    assert (job.error["type"], job.error["stage"]) == ("InvalidInput", "perplexity")
    assert job.error["candidate"] in [
        s.params["candidate"] for s in job.of_kind(StageKind.PERPLEXITY)
    ]


def test_a_cancel_reaches_the_worker_in_the_midst_of_a_search_and_what_was_found_stays(
    desk, spec_of
):
    job, asked = desk.submit(spec_of(trials=TRIALS)), []
    job = desk.work(job, at=15, do=lambda: asked.append(desk.store.ask(job.id, "cancel")))

    assert [each.state for each in asked] == [JobState.CANCELLING]
    assert job.state is JobState.CANCELLED
    assert 15 <= len(desk.trials(job)[0]) < TRIALS
    assert job.best is None


def test_a_paused_job_stands_still_resumed_it_ends_as_if_nothing_had_happened(
    desk, spec_of, undisturbed, found
):
    spec = spec_of(trials=TRIALS, confirm=None)
    job = desk.submit(spec)
    job = desk.work(job, at=7, do=lambda: desk.store.ask(job.id, "pause"))
    (trials,) = desk.trials(job)

    assert job.state is JobState.PAUSED
    assert len(trials) < TRIALS

    job = desk.work(desk.store.ask(job.id, "resume"))

    assert desk.trials(job) == [undisturbed(spec).trials]
    assert found(job) == undisturbed(spec).configuration


def test_a_small_job_is_done_during_a_long_search_on_the_only_worker_which_changes_nothing_of_it(
    desk, spec_of, undisturbed, found, monkeypatch
):
    monkeypatch.setattr("workers.watch.LOOK_EVERY_S", 0.0)
    spec = spec_of(trials=TRIALS, confirm=None)
    long = desk.until(desk.submit(spec), StageKind.SEARCH)
    small = desk.submit(spec_of(confirm=None))
    long = desk.work(long, turn_s=1e-6, most=1)
    (search,) = long.of_kind(StageKind.SEARCH)
    small = desk.work(small)
    done = desk.work(long)

    assert (long.state, small.state) == (JobState.RUNNING, JobState.SUCCEEDED)
    assert 0 < search.done < TRIALS
    assert done.of_kind(StageKind.SEARCH)[0].failures == 0
    assert desk.trials(done) == [undisturbed(spec).trials]
    assert found(done) == undisturbed(spec).configuration


def test_a_wrong_option_or_setting_ends_with_exit_code_2_and_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("workers.__main__.configure_logs", lambda _: None)
    monkeypatch.setattr("workers.__main__.adopt_loggers", lambda *_: None)
    monkeypatch.setenv("PHO_DATABASE_URL", "")  # so that what the worker sets is taken back
    for options, heartbeat, message in (
        (["--database-url", "postgresql://a@b/c", "--stages", "polish"], "1", "calibrate, point"),
        ([], "0", "PHO_HEARTBEAT_S='0'"),
        ([], "1", "no database is given"),
        (["--devices", "cpu"], "1", "No such option"),
    ):
        monkeypatch.setenv("PHO_HEARTBEAT_S", heartbeat)
        monkeypatch.delenv("PHO_DATABASE_URL", raising=False)
        result = CliRunner().invoke(main, options)

        assert result.exit_code == 2
        assert message in result.stderr
