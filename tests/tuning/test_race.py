"""A race over windows finds the best of all, and measures fewer windows than there are."""

import numpy as np
import pytest

from pho_service.tuning.finalists import (
    is_behind,
    race_looks,
    race_order,
    still_racing,
)

WINDOWS, BLOCKS = 16, 8
MEANS = (3.0, 3.01, 3.02, 3.03, 3.05, 3.08, 3.1, 3.15, 3.2, 3.3, 3.5, 4.0)  # nats a token


def finalists(seed):
    """Losses of known means: windows and blocks differ by far more than finalists do."""
    rng = np.random.default_rng(seed)
    text = rng.normal(0, 0.5, (WINDOWS, 1)) + rng.normal(0, 0.3, (WINDOWS, BLOCKS))
    return {
        number: dict(enumerate((64 * (mean + text + own)).tolist()))
        for number, mean in enumerate(MEANS)
        if (own := rng.normal(0, 0.02, (WINDOWS, BLOCKS))) is not None
    }


def run(losses, seed):
    """Who is left before all windows are seen, and evaluations spent."""
    order, looks = race_order(WINDOWS, seed), race_looks(WINDOWS, 1)
    left, seen = [*losses], dict.fromkeys(losses, WINDOWS)
    for windows in looks[:-1]:
        before, left = left, still_racing(
            {number: losses[number] for number in left}, order[:windows],
            windows=WINDOWS,
        )  # fmt: skip
        seen.update(dict.fromkeys(set(before) - set(left), windows))
    return left, sum(seen.values()) / WINDOWS


def test_the_best_on_the_whole_text_is_never_dropped_and_most_others_are_early():
    for seed in range(20):
        losses = finalists(seed)
        best = min(losses, key=lambda number: np.sum([*losses[number].values()]))
        left, spent = run(losses, seed)

        assert best in left
        assert len(left) <= 3
        assert spent < 4.5


def test_of_candidates_that_prune_alike_the_first_one_goes_on_and_no_other_is_needed():
    same = finalists(0)[0]

    assert still_racing({5: same, 3: same, 4: same}, [1], windows=WINDOWS) == [5]


def test_who_is_behind_by_the_same_on_every_block_is_behind_a_single_number_says_nothing():
    assert is_behind(np.full(8, 0.25), 1, windows=16, level=1e-6)
    assert not is_behind(np.full(8, -0.25), 1, windows=16, level=1e-6)
    assert not is_behind(np.array([100.0]), 1, windows=16, level=0.5)


def test_blocks_that_agree_inside_of_windows_and_differ_between_them_count_as_windows_do():
    alike = np.repeat([1.0, -0.5, 1.2, -0.6], 8)
    mixed = np.tile([1.0, -0.5, 1.2, -0.6], 8)

    assert not is_behind(alike, 4, windows=1000, level=0.05)
    assert is_behind(mixed, 4, windows=1000, level=0.05)


def test_one_of_two_equal_finalists_is_dropped_no_more_often_than_the_level_says():
    rng = np.random.default_rng(0)
    dropped = sum(is_behind(rng.normal(size=16), 2, windows=1000, level=0.05) for _ in range(4000))

    assert 0.02 < dropped / 4000 < 0.055


def test_the_order_of_windows_is_that_of_the_seed_each_window_once():
    assert sorted(race_order(16, 3)) == [*range(16)]
    assert race_order(16, 3) == race_order(16, 3) != race_order(16, 4)


@pytest.mark.parametrize(
    ("windows", "first", "looks"),
    [
        (16, 1, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16]),
        (3, 1, [1, 2, 3]),
        (1, 1, [1]),
        (64, 4, [4, 5, 6, 7, 8, 10]),
    ],
)
def test_looks_come_after_ever_more_windows(windows, first, looks):
    found = race_looks(windows, first)

    assert found[: len(looks)] == looks
    assert found[-1] == windows
