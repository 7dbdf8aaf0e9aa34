"""A job that cuts blocks: every split is a trial, and the folder is that of `pho prune`."""

import json
import re
import sys

import pytest
from pydantic import ValidationError
from sqlalchemy import select
from torch import equal

from pho_service.errors import InvalidInput
from pho_service.models.bundle_file import read_bundle
from pho_service.models.calibration import bundle_path, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.scratch import Memo
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.cuts import CutPieces
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.spec.configuration import Configuration
from pho_service.spec.structure import Structure
from storage.records import JobState, StageKind
from storage.tables import configurations


@pytest.fixture
def cut(small):
    """The document of a small job that cuts a fifth of the blocks' weights out."""

    def build(**changes):
        usual = {"pattern": "structured:20%", "trials": 200, "preset": "best", "prune": True}
        return small(**{**usual, **changes})

    return build


def folder_of(hand, job):
    """The files of a job, in its store."""
    (folder,) = (hand.bundles / "pruned" / str(job.id)).iterdir()
    return folder


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def locally(hand, job, spec, out):
    """What `pho prune` writes with the configuration of a job."""
    model = load_model(str(hand.folder / "model"), device="cpu")
    source = TextSource(path=str(hand.folder / "calibration.jsonl"))
    text = calibration_text(model, source, spec.calibration.settings())
    bundle = read_bundle(bundle_path(hand.bundles, text.bundle_key))
    work = Work.of(bundle, model, calibration=text.calibration)
    prune_job(work, Configuration.model_validate(job.best), out)
    return out


def test_the_best_split_is_written(hand, cut, tmp_path):
    spec = cut()
    job = hand.done(spec)
    (trials,) = hand.trials(job)
    best, folder = job.best, folder_of(hand, job)
    kinds = [stage.kind for stage in job.stages]

    assert best["method"] == "structured"
    assert "coefficients" not in best
    assert len(best["finalists"]) == 2
    assert len(trials) == best["search"]["trials"] >= 2
    assert all(value > 0 for _, _, value, _, _ in trials)
    assert kinds.count(StageKind.PERPLEXITY) == 3  # two cuts, and the dense model
    assert weights(folder) == weights(locally(hand, job, spec, tmp_path / "local"))
    dense = load_model(str(hand.folder / "model"), device="cpu")
    assert all(check.passed for check in check_folder(folder, original=dense))


def test_a_share_of_the_file_is_cut_out_of_the_blocks(hand, cut):
    job = hand.done(cut(pattern="smaller:20%"))
    dense, smaller = (
        load_model(str(folder), device="cpu").parameters
        for folder in (hand.folder / "model", folder_of(hand, job))
    )

    assert job.best["pattern"] == "smaller:20%"
    assert smaller / dense == pytest.approx(0.8, abs=0.05)


class TestGoals:
    """A cut for a file of so many bytes, or for a speed: the worker finds what it takes."""

    @pytest.fixture
    def told(self, monkeypatch):
        """What a goal takes, told by this test, and how often it was asked for."""
        asked = []

        def tell(pattern, *_):
            asked.append(str(pattern))
            return {"share": tell.share, "says": f"so structured:{tell.share:.0%}"}

        tell.share, tell.asked = 0.2, asked
        monkeypatch.setattr("pho_service.pipeline.cuts._told", tell)
        monkeypatch.setattr("pho_service.pipeline.cuts.check_goal", lambda *_: None)
        monkeypatch.setattr("pho_service.pipeline.curve.check_goal", lambda *_: None)
        monkeypatch.setattr("pho_service.pipeline.faster.speed_of", lambda *_, **__: "measured")
        monkeypatch.setattr(
            "pho_service.pipeline.faster.speed_sentence", lambda goal, seen: f"{goal.times} {seen}"
        )
        return tell

    @pytest.mark.usefixtures("told")
    def test_the_speed_of_what_was_cut_is_measured_at_the_end(self, hand, cut):
        job = hand.done(cut(pattern="faster:1.2x"))
        by_share = hand.done(cut(pattern="structured:20%"))

        assert job.pruning.result["speed"] == "1.2 measured"
        assert not by_share.pruning.result.get("speed")

    @pytest.mark.usefixtures("told")
    def test_it_is_cut_by_the_share_that_the_worker_has_found(self, hand, cut):
        job = hand.done(cut(pattern="faster:1.2x"))
        same = hand.done(cut(pattern="structured:20%"))

        assert job.best["pattern"] == "faster:1.2x"
        assert job.best["cut"] == same.best["cut"]
        assert job.best["search"]["goal"]["says"] == "so structured:20%"
        assert weights(folder_of(hand, job)) == weights(folder_of(hand, same))

    def test_what_was_found_outlives_a_worker(self, hand, cut, told, monkeypatch):
        job = hand.until(hand.submit(cut(pattern="faster:1.2x")), StageKind.SEARCH)
        with monkeypatch.context() as patch:
            patch.setattr(CutPieces, "_costs", _stopped)
            with pytest.raises(SystemExit):
                hand.step(job)
        told.share = 0.4  # on another machine, say
        job = hand.until(job, None)

        assert told.asked == ["faster:1.2x"]
        assert job.best["search"]["goal"]["share"] == 0.2

    def test_where_nothing_is_cut_the_whole_model_is_written_and_not_recovered(
        self, hand, cut, told
    ):
        told.share = 0.0
        job = hand.done(cut(pattern="faster:1.2x", recovery={"tokens": 64}))
        folder = folder_of(hand, job)
        whole, written = (
            load_model(str(each), device="cpu") for each in (hand.folder / "model", folder)
        )

        assert job.best["cut"]["structure"] == Structure().to_dict()
        assert (job.best["cut"]["removed"], job.best["search"]["trials"]) == (0, 1)
        assert "recovery" not in json.loads((folder / "pruning.json").read_text())
        assert all(
            equal(each.weight, written.linears[name].weight) for name, each in whole.linears.items()
        )

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("bytes:1kB", r"0\.001 MB are too few for .* with half of its blocks cut"),
            ("faster:1.2x:llama.cpp", "xllamacpp"),
        ],
    )
    def test_what_cannot_be_is_said_before_the_calibration(
        self, hand, cut, pattern, message, monkeypatch
    ):
        monkeypatch.setattr("pho_service.pipeline.cuts.converter_for", lambda _: [])
        monkeypatch.setattr("workers.pieces.converter_for", lambda _: None)
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        job = hand.submit(cut(pattern=pattern))
        with pytest.raises(InvalidInput, match=message):
            hand.until(job, None)

        assert not [*hand.bundles.glob("*.safetensors")]


def _stopped(*_):
    raise SystemExit


@pytest.mark.parametrize(
    "kind",
    [
        StageKind.PERPLEXITY,
        *(pytest.param(k, marks=pytest.mark.thorough) for k in (StageKind.SEARCH, StageKind.PRUNE)),
    ],
)
def test_killed_in_the_middle_of_a_cut(hand, cut, tmp_path, monkeypatch, kind):
    """What a worker had worked out of some blocks is taken up, for the same bytes."""
    spec = cut()
    job = hand.until(hand.submit(spec), kind)
    keep, kept = Memo.keep, []

    def killing(memo, name, record):
        keep(memo, name, record)
        kept.append(name)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Memo, "keep" if kind is not StageKind.PRUNE else "read", killing)
        with pytest.raises((SystemExit, TypeError)):
            hand.step(job)
    hand.inputs = hand.new_inputs()
    again = []
    monkeypatch.setattr(Memo, "keep", lambda m, name, r: (again.append(name), keep(m, name, r)))
    job = hand.until(job, None)

    assert job.state is JobState.SUCCEEDED
    if kept:
        assert kept[0] not in again[:1]
    assert weights(folder_of(hand, job)) == weights(locally(hand, job, spec, tmp_path / "local"))


def test_it_gives_way_between_blocks(hand, cut, small, tmp_path, monkeypatch):
    """Where another job waits, a look between two blocks ends the turn; the bytes are the same."""
    monkeypatch.setattr("workers.watch.LOOK_EVERY_S", 0.0)
    spec = cut()
    job = hand.submit(spec)
    other = hand.submit(small(confirm=None))
    hand.work(job, turn_s=1e-9, most=12)
    put_down = [e for e in hand.store.history(job.id, limit=1000) if e.kind == "put_down"]
    hand.store.ask(other.id, "cancel")
    job = hand.until(hand.store.get(job.id), None)

    assert {event.data["stage"] for event in put_down} & {"search", "perplexity"}
    assert {event.data["why"] for event in put_down} == {"turn"}
    assert weights(folder_of(hand, job)) == weights(locally(hand, job, spec, tmp_path / "local"))


@pytest.mark.thorough
def test_each_share_of_a_curve_has_the_cut_of_a_job_of_its_own(hand, cut):
    """Also where a worker was killed after the first of them; the library has none of them."""
    shares = ["structured:15%", "structured:30%"]
    job = hand.until(hand.submit(cut(pattern=None, patterns=shares, prune=False)), StageKind.POINT)
    hand.step(job)
    hand.inputs = hand.new_inputs()
    job = hand.until(job, None)
    points = [stage.result for stage in job.of_kind(StageKind.POINT)]
    alone = hand.done(cut(pattern=shares[1], prune=False)).best
    with hand.store.database.transaction() as connection:
        in_the_library = connection.execute(select(configurations)).all()

    assert job.state is JobState.SUCCEEDED
    assert [point["pattern"] for point in points] == shares
    chosen = ("cut", "perplexities", "finalists", "objective")
    assert [points[1]["configuration"][key] for key in chosen] == [alone[key] for key in chosen]
    assert in_the_library == []


@pytest.mark.thorough
def test_a_target_of_cuts_writes_the_largest_that_is_within(hand, cut):
    target = {"perplexity_rise": 9.0, "step": 0.1, "lowest": 0.2, "highest": 0.3}
    job = hand.done(cut(pattern=None, target={**target, "structured": True}))

    assert job.best["pattern"] == "structured:30%"
    assert job.best["search"]["target"]["structured"]
    assert weights(folder_of(hand, job))


@pytest.mark.thorough
def test_recovered_as_any_other(hand, cut):
    job = hand.done(cut(recovery={"tokens": 640, "rate": 2e-3, "text": "confirmation.jsonl"}))
    recovered = job.pruning.result["recovery"]

    assert recovered["after"] < recovered["before"]
    assert job.best["cut"]["removed"] > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 10}, "trials cannot be asked for with structured:20%"),
        ({"preset": "score"}, "preset cannot be asked for"),
        ({"scope": "layer"}, "scope cannot be asked for"),
        ({"islands": 2}, "islands cannot be asked for"),
        ({"stream": True}, "stream cannot be asked for"),
        ({"confirm": None}, "confirm: null cannot be asked for"),
        ({"pattern": None, "patterns": ["0.5", "structured:20%"]}, "Ask for two curves"),
        (
            {"pattern": None, "patterns": ["structured:20%"], "prune": False, "preset": "score"},
            "preset cannot be asked for",
        ),
    ],
)
def test_what_a_cut_does_not_have(cut, changes, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        cut(**changes)


def test_a_share_that_no_split_comes_near_fails_before_the_search(hand, cut):
    error = hand.failed(cut(pattern="structured:99%"))

    assert error["stage"] == "calibrate"
    assert "comes near a share of 0.99" in error["message"]
