"""Proposals of a correction, on a proxy that is wrong on purpose."""

from typing import Any

import numpy as np
import pytest

from pho_service.tuning.correction import Array, Correction, MeasuredPoint, next_point

WRONG = np.array([0.15, -0.1, 0.0, 0.05])  # what the proxy does not know, for each number


def proxies(points: Array) -> Array:
    """Least at zeros."""
    return np.asarray(2.0 * np.exp(np.square(points).sum(axis=1)))


def truth(point: Array) -> float:
    """As the proxy, but tilted: least at -WRONG / 1.6."""
    return float(np.exp(0.8 * np.log(proxies(point[None])[0]) + WRONG @ point))


def corrected(count: int, seed: int) -> list[MeasuredPoint]:
    point = np.zeros(4)
    measured = []
    for number in range(count):
        measured.append(
            MeasuredPoint(point=point, proxy=proxies(point[None])[0], value=truth(point))
        )
        point = next_point(measured, proxies, seed=[seed, number])
    return measured


@pytest.mark.parametrize("seed", range(3))
def test_finds_where_the_proxy_is_wrong(seed: int) -> None:
    values = [each.value for each in corrected(20, seed)]

    least = truth(-WRONG / 1.6)
    gained = np.log(values[0] / min(values)) / np.log(values[0] / least)
    assert gained > 0.8
    assert np.mean(values[-5:]) < np.mean(values[1:6])  # later ones lie nearer together


def test_proposals_depend_on_the_seed_and_on_what_was_measured_alone_and_have_four_digits() -> None:
    first, second, other = corrected(4, 0), corrected(4, 0), corrected(4, 1)

    assert [each.point.tolist() for each in first] == [each.point.tolist() for each in second]
    assert first[1].point.tolist() != other[1].point.tolist()
    assert (first[3].point == np.round(first[3].point, 4)).all()


def test_offsets_that_were_given_are_where_it_starts_nothing_pulls_it_back() -> None:
    start = MeasuredPoint(point=np.full(4, 3.0), proxy=1.0, value=1.0)

    found = next_point([start], lambda points: np.ones(len(points)), seed=[0])

    assert np.abs(found - 3.0).max() < 10


@pytest.mark.parametrize(
    ("trial", "words"),
    [(7, "0.5000 at trial 3, 0.4000 at trial 7"), (None, "none is nearer than trial 3")],
)
def test_what_came_of_it_is_stored_and_said(trial: int | None, words: str) -> None:
    after: Any = 0.4 if trial else 0.5
    correction = Correction(corrects=3, trial=trial, divergences=(0.5, after), count=9, tokens=1022)

    assert Correction.from_dict(correction.to_dict()) == correction
    assert words in str(correction)
