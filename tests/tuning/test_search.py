"""A search is exact in its budget, and an interrupted one ends as an uninterrupted one."""

import logging
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
from cmaes import CatCMAwM

from pho_service.errors import InvalidInput, StudyError
from pho_service.spec.objective import SAMPLERS
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps
from pho_service.tuning.finalists import finalists
from pho_service.tuning.plan import Outcome, RatedCandidate, SearchPlan
from pho_service.tuning.search import run_search
from storage.studies import once, open_storage, open_study, record_of

PATTERN = Pattern.parse("0.5", "layer")
PLAN = SearchPlan(pattern=PATTERN, space=SearchSpace(), trials=30, seed=3)

# QMC and GP are experimental in Optuna 5.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def loss(candidate):
    """A smooth objective with its minimum inside the box."""
    c = candidate.coefficients
    total = c.row + c.column + c.neighbourhood
    return (
        1 + (c.row / total - 0.2) ** 2 + (c.neighbourhood / total - 0.5) ** 2
        + (c.activation_exponent - 0.8) ** 2 + (c.gradient_exponent - 0.4) ** 2
        + 0.1 * (c.kernel_size != 9)
    )  # fmt: skip


def evaluate(candidates):
    return [Outcome(value=loss(c), attributes={"seconds": 0.0}) for c in candidates]


class Interrupting:
    """Rates like :func:`evaluate` until it has rated ``after`` candidates, then is interrupted."""

    def __init__(self, after):
        self.left = after

    def __call__(self, candidates):
        self.left -= len(candidates)
        if self.left < 0:
            raise KeyboardInterrupt
        return evaluate(candidates)


def trials_of(url, name="s"):
    with open_storage(url) as storage:
        study = open_study(storage, name, direction="minimize")
        return [(t.number, t.value, t.params, t.user_attrs["coefficients"]) for t in study.trials]


def search(url, plan, rate=evaluate):
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        return run_search(study, plan, rate)


def undisturbed(tmp_path, plan):
    url = f"sqlite:///{tmp_path / 'undisturbed.db'}"
    search(url, plan)
    return trials_of(url)


OURS = ("cmaes", "hill-climb")  # Optuna tests its own


@pytest.mark.parametrize(
    "sampler",
    [n if n in OURS else pytest.param(n, marks=pytest.mark.thorough) for n in SAMPLERS],
)
def test_continued_it_ends_as_if_undisturbed(tmp_path, url, sampler):
    plan = replace(PLAN, sampler=sampler, trials=16 if sampler == "gp" else 30)
    with pytest.raises(KeyboardInterrupt):
        search(url, plan, Interrupting(after=14))
    search(url, plan)

    assert trials_of(url) == undisturbed(tmp_path, plan)


def test_a_climb_advances_as_far_as_it_goes_and_then_asks_for_nothing_more(url):
    plan = replace(PLAN, sampler="hill-climb", trials=200)
    advanced = []
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        rated = run_search(study, plan, evaluate, advanced.append)

    assert 30 < sum(advanced) == len(rated) < 200
    assert search(url, replace(plan, trials=300), Interrupting(after=0)) == rated


@pytest.mark.parametrize(
    "first", [7, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 6, 9, 17, 22))]
)
def test_one_cut_in_a_generation_goes_on_as_if_it_never_was(url, first):
    search(url, PLAN)
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        cut = open_study(storage, "cut", direction="minimize")
        cut.add_trials(study.get_trials()[:first])
        run_search(cut, PLAN, evaluate)

    assert trials_of(url, "cut") == trials_of(url, "s")


def test_a_search_has_exactly_the_trials_that_are_asked_for_of_more_it_looks_at_those_alone(url):
    for trials in (6, 13, 15):
        search(url, replace(PLAN, trials=trials))
        assert [t[0] for t in trials_of(url)] == list(range(trials))
    again = search(url, replace(PLAN, trials=12))

    assert len(again) == 12
    assert max(r.number for r in again) == 11


def test_the_published_methods_come_first_and_are_never_better(url):
    rated = search(url, PLAN)
    methods = [c.method for c in PLAN.baselines()]
    by_number = sorted(rated, key=lambda r: r.number)

    assert [r.candidate.method for r in by_number[: len(methods)]] == methods
    assert {r.candidate.method for r in by_number[len(methods) :]} == {"crepe"}
    assert rated[0].value == min(loss(r.candidate) for r in rated)


def test_with_direction_maximize_the_highest_value_comes_first(url):
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="maximize")
        rated = run_search(study, replace(PLAN, direction="maximize"), evaluate)

    assert rated[0].value == max(r.value for r in rated)
    assert rated[0].value > 1.5


def test_one_that_cannot_be_rated_is_kept_with_its_cause_if_it_is_all_of_them_it_is_told(url):
    def rate(candidates):
        return [
            Outcome(value=None, failure="q_proj: NaN") if c.method == "wanda" else o
            for c, o in zip(candidates, evaluate(candidates), strict=True)
        ]

    rated = search(url, PLAN, rate)
    with open_storage(url) as storage:
        trials = open_study(storage, "s", direction="minimize").trials
    failed = [t for t in trials if t.state.name == "FAIL"]

    assert len(rated) == PLAN.trials - 1
    assert [t.user_attrs["failure"] for t in failed] == ["q_proj: NaN"]
    assert failed[0].user_attrs["coefficients"]["normalisation"] == "none"
    with pytest.raises(StudyError, match=r"every trial .* failed.*: no numbers"):
        search(
            url.replace("study", "nothing"), PLAN,
            lambda candidates: [Outcome(value=None, failure="no numbers") for _ in candidates],
        )  # fmt: skip


def test_a_search_goes_on_where_another_machine_began_it_whose_arithmetic_rounds_otherwise(
    url, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    here = SearchSpace.candidate

    def there(*arguments):
        candidate = here(*arguments)
        exponent = candidate.coefficients.activation_exponent * (1 + 1e-13)
        coefficients = replace(candidate.coefficients, activation_exponent=exponent)
        return replace(candidate, coefficients=coefficients)

    with monkeypatch.context() as patch:
        patch.setattr(SearchSpace, "candidate", there)
        search(url, PLAN)
    before = trials_of(url)
    search(url, replace(PLAN, trials=60))

    assert trials_of(url)[:30] == before
    assert len(trials_of(url)) == 60
    assert not any("another machine's" in message for message in caplog.messages)


def test_also_where_eigenvectors_have_the_other_direction_there_and_so_all_candidates_are_others(
    url, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    search(url, PLAN)
    before = trials_of(url)
    here = CatCMAwM._eigen_decomposition

    def there(optimizer):
        vectors, roots = here(optimizer)
        return (-vectors if optimizer.generation else vectors), roots

    monkeypatch.setattr(CatCMAwM, "_eigen_decomposition", there)
    rated = search(url, replace(PLAN, trials=120))

    assert trials_of(url)[:30] == before
    assert len(trials_of(url)) == 120
    assert any("trial 14 of study 's' is another machine's" in m for m in caplog.messages)
    assert rated[0].number >= 30
    assert rated[0].value < 1.01


def test_trials_that_no_cma_es_can_have_drawn_are_refused(url):
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        run_search(study, replace(PLAN, trials=14), evaluate)
        study.add_trials(study.trials[:6])

        with pytest.raises(StudyError, match=r"trial 14 .* other coefficients"):
            run_search(study, PLAN, evaluate)


def test_a_study_of_another_seed_is_not_continued(url):
    search(url, PLAN)

    with pytest.raises(StudyError, match=r"trial 6 .* other coefficients"):
        search(url, replace(PLAN, seed=4))


def test_a_study_that_another_program_runs_is_refused(url):
    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        study.ask()

        with pytest.raises(StudyError, match=r"trial 0 .* not finished"):
            run_search(study, PLAN, evaluate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 3}, "trials=3 is too few: the first 6 are the baselines"),
        *(({"sampler": name}, r"is not one of cmaes, .* nor a sampler of Optuna")
          for name in ("hill", 3)),
        ({"seed": -1}, "seed=-1"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(InvalidInput, match=message):
        replace(PLAN, **change)


def test_finalists_differ_best_first_with_every_baseline(url):
    rated = search(url, replace(PLAN, trials=120))
    chosen = finalists(rated, 5)
    found = [c for c in chosen if c.candidate.method == "crepe"]
    distances = [
        max(
            (a.params["kernel_size"] != b.params["kernel_size"]) * 1.0,
            *(abs(a.params[k] - b.params[k]) for k in a.params if isinstance(a.params[k], float)),
        )
        for i, a in enumerate(found)
        for b in found[:i]
    ]

    assert len(found) == 5
    assert min(distances) >= 0.05
    assert found[0] == next(r for r in rated if r.candidate.method == "crepe")
    assert {c.number for c in chosen if c.candidate.method != "crepe"} == set(range(6))
    assert [c.value for c in chosen] == sorted(c.value for c in chosen)


def test_what_is_measured_is_kept_inside_of_the_fence_for_one_text(url):
    search(url, PLAN)
    inside = []

    @contextmanager
    def fence():
        before = record_of(study)
        yield
        inside.append(record_of(study).keys() - before.keys())

    with open_storage(url) as storage:
        study = open_study(storage, "s", direction="minimize")
        values = [
            once(
                study,
                "divergence:7",
                {"text": text},
                lambda value=value: {"divergence": value},
                fence=fence,
                note=(7, "divergence"),
            )["divergence"]
            for text, value in (("a", 0.5), ("a", 0.6), ("b", 0.7))
        ]

    assert values == [0.5, 0.5, 0.7]
    assert inside == [{"divergence:7"}, set()]


def test_a_trial_is_readable_in_a_dashboard_method_scope_coefficients_time(url):
    search(url, PLAN)
    with open_storage(url) as storage:
        trial = open_study(storage, "s", direction="minimize").trials[10]
    c = trial.user_attrs["coefficients"]

    assert trial.params["method"] == trial.user_attrs["method"] == "crepe"
    assert trial.user_attrs["scope"] == "layer"
    assert math.isclose(c["row"] + c["column"] + c["neighbourhood"], 1.0)
    assert trial.user_attrs["seconds"] == 0.0


@pytest.mark.parametrize(
    ("opinions", "chosen"),
    [
        ((6.0, None, 4.0, 1.0, 3.0, 2.0), [[0], [0, 3], [0, 1, 3], [0, 1, 3, 5], [0, 1, 2, 3, 5]]),
        ((None,) * 6, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_where_a_measurement_takes_a_calibration_finalists_are_the_best_by_either_opinion(
    opinions, chosen
):
    plan = replace(PLAN, steps=Steps(update="obs"))  # so that baselines take part
    rated = [
        RatedCandidate(
            number=i,
            candidate=replace(candidate, steps=plan.steps),
            params=plan.space.params(candidate),
            value=float(i),
            second_opinion=opinion,
        )
        for i, (candidate, opinion) in enumerate(zip(plan.baselines(), opinions, strict=True))
    ]

    assert [[c.number for c in finalists(rated, count)] for count in range(1, 6)] == chosen
    assert len(finalists(rated, 100)) == 6
