"""What is read of studies."""

import random

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from pho_service.shown.page import (
    ENOUGH,
    MeasuredTrials,
    importances,
    measured_in,
    trials_of,
    with_measurements,
)
from pho_service.shown.report import ReportTrial

SPACE = {
    "row_share": FloatDistribution(0, 1), "spread": FloatDistribution(0, 1),
    "fixed": FloatDistribution(0, 1), "method": CategoricalDistribution(("crepe", "ria-row")),
}  # fmt: skip


def frozen(number, value, method="crepe", **params):
    trial = create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params={"row_share": 0.5, "spread": 0.5, "fixed": 0.5, "method": method, **params},
        distributions=SPACE,
        user_attrs={"method": method},
    )
    trial.number = number
    return trial


def candidates(count, sign=1):
    """Candidates whose value depends on ``row_share`` alone."""
    rng = random.Random(0)
    shares = [rng.random() for _ in range(count)]
    return [
        frozen(n, sign * (share - 0.3) ** 2, row_share=share, spread=rng.random())
        for n, share in enumerate(shares)
    ]


def test_numbers_count_all_islands_in_turn_and_baselines_are_there_once():
    island = [frozen(0, 0.5, "ria-row"), frozen(1, 0.25), frozen(2, None)]
    found = trials_of([island, island], 2)

    assert [(t.number, t.method, t.value) for t in found] == [
        (0, "ria-row", 0.5), (2, "crepe", 0.25), (3, "crepe", 0.25), (4, "crepe", None),
        (5, "crepe", None),
    ]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
def test_what_decides_the_value_is_the_most_important(sign):
    shares = importances([candidates(60, sign)], maximised=sign < 0)

    assert list(shares) == ["row_share", "spread"]
    assert shares["row_share"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    others = [frozen(n, 1.0, "ria-row") for n in range(60)]  # baselines do not count
    same = [frozen(n, n / 10) for n in range(60)]
    for few in ([*candidates(ENOUGH - 1), *others], same):
        assert importances([few], maximised=False) == {}


def test_a_study_keeps_perplexities_and_divergences_by_trial():
    study = optuna.create_study()
    study.set_user_attr("perplexity:3", {"perplexity": 20.0, "text_sha256": "a"})
    study.set_user_attr("divergence:4", {"divergence": 0.5, "text_sha256": "a"})
    study.set_user_attr("pattern", "0.5")

    assert measured_in(study) == MeasuredTrials(perplexities={3: 20.0}, divergences={4: 0.5})
    study.set_user_attr("perplexity:4", {"perplexity": 10.0, "text_sha256": "b"})
    assert measured_in(study).perplexities == {}  # those of several texts cannot be compared


def test_what_the_configuration_says_goes_before_the_study(report_of):
    configuration = report_of().configuration
    rating = configuration.finalists[0].model_copy(update={"perplexity": 19.0})
    configuration = configuration.model_copy(update={"finalists": [rating]})
    trials = [ReportTrial(number=n, method="crepe", value=1.0) for n in (4, 5)]
    measured = MeasuredTrials(perplexities={4: 30.0, 5: 22.0})

    found = with_measurements(trials, measured, configuration)

    assert [trial.perplexity for trial in found] == [19.0, 22.0]
