"""How well a proxy ranks, against cases that are plain to see."""

import numpy as np
import pytest
from scipy import stats

from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.tuning.validation import proxy_quality, random_candidates, verdict

PERPLEXITY = [10.0, 11.0, 12.0, 14.0, 17.0, 21.0, 26.0, 32.0, 40.0, 50.0, 61.0, 73.0]


def test_the_same_order_gives_1_everywhere_and_no_regret():
    quality = proxy_quality([p**2 for p in PERPLEXITY], PERPLEXITY, higher_is_better=False, seed=0)

    assert quality.spearman == quality.spearman_better_half == pytest.approx(1)
    assert quality.kendall == pytest.approx(1)
    assert quality.spearman_interval == pytest.approx((1, 1))
    assert quality.regret == 0
    assert verdict("p", quality) is None


def test_the_opposite_order_gives_1_its_regret_is_that_of_the_worst_candidates():
    values = [-p for p in PERPLEXITY]
    wrong = proxy_quality(values, PERPLEXITY, higher_is_better=False, seed=0)
    right = proxy_quality(values, PERPLEXITY, higher_is_better=True, seed=0)

    assert wrong.spearman == pytest.approx(-1)
    assert wrong.top_k == 3
    assert wrong.regret == pytest.approx(50 / 10 - 1)
    assert right.regret == 0


def test_a_proxy_without_order_is_said_to_be_no_better_than_chance():
    values = np.random.default_rng(0).normal(size=40)
    perplexity = np.random.default_rng(1).normal(size=40) + 20
    quality = proxy_quality(list(values), list(perplexity), higher_is_better=False, seed=0)
    sentence = verdict("fisher", quality)

    assert quality.spearman_interval[0] < 0 < quality.spearman_interval[1]
    assert sentence is not None
    assert "fisher does not rank" in sentence
    same = proxy_quality([1.0] * 12, PERPLEXITY, higher_is_better=False, seed=0)
    assert same.spearman == 0


@pytest.mark.parametrize("digits", [0, 6])
def test_rank_correlations_are_those_of_scipy_with_ties_and_without(digits):
    generator = np.random.default_rng(2)
    x = generator.normal(size=30).round(digits)
    y = (20 + x + generator.normal(size=30)).round(digits)
    quality = proxy_quality(list(x), list(y), higher_is_better=False, seed=0)

    assert quality.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert quality.kendall == pytest.approx(stats.kendalltau(x, y).statistic)


def test_fewer_candidates_have_a_wider_interval_which_comes_from_the_seed():
    generator = np.random.default_rng(3)
    y = generator.normal(size=60)
    x = y + generator.normal(size=60)

    def quality(n, seed=0):
        return proxy_quality(x[:n].tolist(), y[:n].tolist(), higher_is_better=False, seed=seed
                             ).spearman_interval  # fmt: skip

    wide, narrow = quality(15), quality(60)

    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert quality(60) == narrow
    assert quality(60, seed=1) != narrow


def test_they_fill_the_box_longer_lists_begin_like_shorter_ones():
    space, pattern = SearchSpace(gradient_exponent=(0.5, 0.5)), Pattern.parse("0.5")
    drawn = random_candidates(space, pattern, count=200, seed=1)
    exponents = [c.coefficients.activation_exponent for c in drawn]

    assert random_candidates(space, pattern, count=20, seed=1) == drawn[:20]
    assert random_candidates(space, pattern, count=20, seed=2) != drawn[:20]
    assert {c.coefficients.gradient_exponent for c in drawn} == {0.5}
    assert {c.coefficients.kernel_size for c in drawn} == {3, 5, 9, 15}
    assert min(exponents) < 0.1
    assert max(exponents) > 1.4
