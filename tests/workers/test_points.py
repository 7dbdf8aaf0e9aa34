"""Jobs with several patterns: each point is what a search of it alone finds, whatever happens."""

from threading import Barrier, Event, Thread
from unittest.mock import Mock

import optuna
import pytest
from optuna.trial import create_trial

from pho_service.api.view import JobView
from pho_service.errors import TargetMissed
from pho_service.models.scratch import Memo
from pho_service.pipeline import rating
from pho_service.tuning.search import add_point
from storage.records import JobState, LostClaim, NewStage, StageKind, StageState
from storage.studies import open_storage, open_study, pareto_study_name, study_name
from workers.conductor import Conductor, pareto_of_job
from workers.watch import TurnOver, Turns, Watch

TARGET = {"perplexity_rise": 0.02, "step": 0.2, "lowest": 0.1, "highest": 0.9}


def found(job):
    """What the points have stored, without what differs from job to job."""
    return [
        {
            **{name: v for name, v in stage.result.items() if name not in ("seconds", "study")},
            "configuration": without_study(stage.result["configuration"]),
        }
        for stage in job.of_kind(StageKind.POINT)
        if stage.result is not None
    ]


def without_study(configuration):
    """As another study would give it."""
    search = {k: v for k, v in configuration["search"].items() if k != "study"}
    return {**configuration, "search": search}


def assert_pareto(store, job):
    """The Pareto study has each finished trial of each point once, with its sparsity."""
    with open_storage(store.database.studies_url) as storage:
        pareto = optuna.load_study(study_name=pareto_study_name(job.name), storage=storage)
        expected = []
        for stage in job.of_kind(StageKind.POINT):
            name = study_name(job.name, stage.number)
            trials = optuna.load_study(study_name=name, storage=storage).trials
            sparsity = 0.5 if stage.about == "2:4" else float(str(stage.about))
            expected += [(name, t.number, stage.about, [sparsity, t.value]) for t in trials]
        of = ("of_study", "trial", "pattern")
        points = [(*(t.user_attrs[k] for k in of), t.values) for t in pareto.trials]

        assert pareto.directions == [
            optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        ]  # fmt: skip
        assert [t.number for t in pareto.trials] == list(range(len(expected)))
        assert sorted(points) == sorted(expected)
        assert pareto.best_trials


def test_each_patterns_configuration_is_that_of_pho_search_at_it_after_one_calibration(
    desk, spec_of, undisturbed
):
    """Also where a worker was killed at the end of a point."""
    spec = spec_of(
        pattern=None, patterns=["2:4", "0.3"], preset="crepe-plus", trials=10,
        confirm={"finalists": 2},
    )  # fmt: skip
    job = desk.until(desk.submit(spec), StageKind.POINT)
    complete, desk.store.complete = desk.store.complete, _killed
    with pytest.raises(SystemExit):
        desk.step(job)
    desk.store.complete = complete
    job = desk.until(job, None)
    alone = [undisturbed(spec.of_pattern(each)).configuration for each in spec.points]

    assert (job.state, job.best) == (JobState.SUCCEEDED, None)
    assert [stage.about for stage in job.of_kind(StageKind.POINT)] == ["0.3", "2:4"]
    assert [stage.attempt for stage in job.of_kind(StageKind.POINT)] == [2, 1]
    assert [mine["configuration"] for mine in found(job)] == alone
    assert_pareto(desk.store, job)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.thorough
def test_each_pattern_is_reported_on_a_data_set_if_that_is_asked(hand, small):
    folder = hand.folder / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((hand.folder / "report.jsonl").read_bytes())
    report = {"dataset": "set", "split": "train", "windows": 3}
    job = hand.done(small(pattern=None, patterns=["0.3", "0.5"], report=report))
    points = JobView(job).answer.measured

    for point, mine in zip(points, found(job), strict=True):
        reported = mine["configuration"]["report"]
        assert (point.perplexity, point.dense) == (reported["pruned"], reported["dense"])
        assert point.measured_on == "report text"
        assert reported["text"]["source"].endswith("/set train")


def _killed(*_, **__):
    raise SystemExit


def test_target(hand, small):
    """
    The answer is within the target and the next step is not, both measured; killed in the middle
    and done again, the same job has the same points.
    """
    spec = small(pattern=None, target=TARGET, preset="score", trials=6, confirm={"finalists": 1})
    job = hand.done(spec)
    again = hand.submit(spec)
    for _ in range(2):
        hand.step(again)
    hand.inputs = hand.new_inputs()
    again = hand.until(again, None)
    points = sorted(found(job), key=lambda each: each["sparsity"])
    inside = [p for p in points if p["perplexity"] <= 1.02 * p["dense"]]

    assert job.state is JobState.SUCCEEDED
    assert job.best["pattern"] == inside[-1]["pattern"]
    assert job.best["search"]["target"]["points"] == [
        {"sparsity": p["sparsity"], "perplexity": p["perplexity"]} for p in points
    ]
    sparser = [p["sparsity"] for p in points if p["sparsity"] > inside[-1]["sparsity"]]
    assert not sparser or round(sparser[0] - inside[-1]["sparsity"], 6) == TARGET["step"]
    assert len(points) <= spec.most_points
    assert found(again) == found(job)
    assert_pareto(hand.store, again)


def test_missed(hand, small):
    """A target that nothing is within fails the job in words; what was measured stays."""
    spec = small(
        pattern=None,
        target={"perplexity_rise": 0.1, "lowest": 0.7, "highest": 0.71},
        preset="score",
    )
    job = hand.until(hand.submit(spec), StageKind.FINISH)
    hand.edit(job, StageKind.POINT, lambda point: point.update(perplexity=2 * point["dense"]))
    with pytest.raises(TargetMissed, match="no sparsity is within 10 % of dense"):
        hand.until(job, None)
    job = hand.store.get(job.id)

    assert (job.state, job.best) == (JobState.FAILED, None)
    assert "already the lowest sparsity, 0.7, is above" in job.error["message"]
    assert [stage.about for stage in job.of_kind(StageKind.POINT)] == ["0.7"]


def test_one_point(hand, small):
    """A job with one pattern in its list has the study of that, and no Pareto study."""
    job = hand.done(small(pattern=None, patterns=["0.3"], preset="score"))
    with open_storage(hand.store.database.studies_url) as storage:
        names = [n for n in optuna.get_all_study_names(storage) if n.startswith(job.name)]

    assert names == [job.name]


@pytest.fixture
def claims(hand, small):
    """Both points of a job, each in the hand of a worker; nothing is searched yet."""
    job = hand.submit(small(pattern=None, patterns=["0.3", "0.5"], preset="score"))
    points = [
        NewStage(kind=StageKind.POINT, number=i, params={"pattern": pattern})
        for i, pattern in enumerate(("0.3", "0.5"))
    ]
    hand.store.complete(hand.take(job), {}, then=points)
    return [hand.take(job, number) for number in (0, 1)]


def test_at_once(hand, claims, monkeypatch):
    """Two workers whose points end at the same time make one Pareto study, which has both."""
    monkeypatch.setattr("pho_service.tuning.search._AT_ONCE", 3)
    together = Barrier(2, timeout=60)
    failed = []

    def end(claim):
        name = study_name(claim.job.name, claim.stage.number)
        pattern = str(claim.stage.about)
        try:
            with open_storage(hand.store.database.studies_url) as storage:
                study = open_study(storage, name, direction="minimize")
                study.add_trials([create_trial(value=n / 10) for n in range(8)])
                together.wait()
                pareto = pareto_of_job(hand.store, claim, storage)
                assert pareto is not None
                together.wait()
                for _ in range(2):  # a stage that is repeated
                    add_point(
                        pareto, study, float(pattern), pattern,
                        lambda: hand.store.fence(claim, storage),
                    )  # fmt: skip
        except BaseException as error:  # of a thread, that the test must see
            failed.append(error)

    workers = [Thread(target=end, args=[claim]) for claim in claims]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert failed == []
    assert_pareto(hand.store, hand.store.get(claims[0].job.id))


def test_lost(hand, claims):
    """A worker that has lost its point makes no Pareto study: the job may be deleted by then."""
    hand.store.give_up(claims[0])
    with open_storage(hand.store.database.studies_url) as storage:
        with pytest.raises(LostClaim):
            pareto_of_job(hand.store, claims[0], storage)
        names = optuna.get_all_study_names(storage)

    assert pareto_study_name(claims[0].job.name) not in names


def test_after_its_turn_a_curve_lets_another_job_in_before_its_next_point(hand, small, monkeypatch):
    monkeypatch.setattr("workers.watch.Watch.look_between", Mock())  # not within a point
    with hand.store.database.transaction() as connection:  # what other tests left waits no more
        left = "UPDATE procrastinate_jobs SET status = 'cancelled' WHERE status = 'todo'"
        connection.exec_driver_sql(left)
    job = hand.until(
        hand.submit(small(pattern=None, patterns=["0.3", "0.5"], preset="score")), StageKind.POINT
    )
    other = hand.submit(small())
    hand.work(job, turn_s=1e-9, most=1)
    known = [stage for each in (job, other) for stage in hand.store.get(each.id).stages]
    mine = [stage.id for stage in known if stage.state is StageState.WAITING]
    with hand.store.database.transaction() as connection:
        query = (
            "SELECT args FROM procrastinate_jobs WHERE status = 'todo'"
            " AND (args->>'stage_id')::int = ANY(%s) ORDER BY priority DESC, id LIMIT 1"
        )
        (first,) = connection.exec_driver_sql(query, (mine,)).one()

    assert hand.store.get(job.id).of_kind(StageKind.POINT)[0].result
    assert first["stage_id"] == other.stages[0].id


@pytest.mark.thorough
def test_a_point_gives_its_worker_away_between_its_perplexities_and_goes_on_there(
    hand, small, monkeypatch
):
    several = small(pattern=None, patterns=["0.3", "0.5"], preset="score", trials=6)
    job = hand.until(hand.submit(several), StageKind.POINT)
    hand.submit(small())
    monkeypatch.setattr("workers.pieces.IslandSearch._advance", Mock())  # not in its search
    monkeypatch.setattr("workers.watch.LOOK_EVERY_S", 0.0)
    measured, given_away = [], 0
    measure = rating.measure
    monkeypatch.setattr(
        "pho_service.pipeline.rating.measure",
        lambda subject, candidate, *rest, **more: (
            measured.append(candidate) or measure(subject, candidate, *rest, **more)
        ),
    )
    while not hand.store.get(job.id).of_kind(StageKind.POINT)[0].result:
        claim = hand.take(job, 0)
        try:
            Conductor(hand.store, hand.inputs, Event(), Turns(seconds=1e-9)).run(claim)
        except TurnOver:
            given_away += 1
            hand.store.end_turn(claim)

    assert given_away
    assert len({str(each) for each in measured}) == len(measured)  # none of them twice


@pytest.mark.thorough
def test_the_training_of_blocks_gives_its_worker_away_and_goes_on_with_those_that_are_trained(
    hand, small, monkeypatch
):
    steps = {"update": "least-squares", "reconstruction": {"method": "block"}}
    spec = small(preset="crepe", confirm={"finalists": 1}, steps=steps)
    job, alone = (hand.until(hand.submit(spec), StageKind.FINISH) for _ in range(2))
    hand.until(alone, None)
    keep, trained, given_away = Memo.keep, [], []

    def kept(self, name, block):
        trained.append(name)
        keep(self, name, block)

    def look(_):
        if trained and not given_away:
            given_away.append(trained[-1])
            raise TurnOver

    monkeypatch.setattr(Watch, "look_for_others", look)
    monkeypatch.setattr(Memo, "keep", kept)
    claim = hand.take(job)
    with pytest.raises(TurnOver):
        Conductor(hand.store, hand.inputs, Event(), Turns()).run(claim)
    hand.store.end_turn(claim)
    hand.until(job, None)
    best, other = (hand.store.get(each.id).best for each in (job, alone))

    assert given_away == ["model.layers.0"]
    assert trained == ["model.layers.0", "model.layers.1"]  # none of them twice
    assert without_study(best) == without_study(other)
    assert not (hand.bundles / "pruned" / str(job.id)).exists()  # what nothing needs any more
