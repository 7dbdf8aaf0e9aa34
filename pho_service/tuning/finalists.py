"""
Which candidates of a search are looked at again, and what was measured of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate
from storage.studies import record_of

What = Literal["divergence", "perplexity", "calibration_divergence"]


def finalists(rated: Sequence[RatedCandidate], count: int) -> list[RatedCandidate]:
    """
    The candidates that are looked at again: ``count`` different ones, and all baselines.

    The objective and the second opinion propose the best that they have left, in turn: which of
    them ranks better depends on the model, and perplexity decides between them afterwards.

    Late generations of a search are nearly copies of its best; measuring
    copies would be a waste. A candidate is different if one of
    its values differs by 0.05 or more, or its kernel size or allocation does.
    Where each measurement takes a calibration of its own (re-pruning, weight
    updates), baselines get one only if they are among the best.

    Args:
        rated: Best first.
        count: How many, beside the baselines where those are measured anyway.

    Returns:
        Best first.
    """
    costly = any(c.candidate.steps.needs_text for c in rated)
    found = [c for c in rated if costly or c.candidate.method == "crepe"]
    judged = [(c.second_opinion, c) for c in found if c.second_opinion is not None]
    orders = (iter(found), (c for _, c in sorted(judged, key=lambda pair: pair[0])))
    chosen: list[RatedCandidate] = []
    for order in islice(cycle(orders), 2 * count):  # twice, should the second have none to propose
        if len(chosen) < count:
            chosen += islice(
                (c for c in order if all(_differ(c.params, other.params) for other in chosen)), 1
            )
    passed_over = {c.number for c in found} - {c.number for c in chosen}
    return [c for c in rated if c.number not in passed_over]


def _differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if any(a[k] != b[k] for k in ("kernel_size", "allocation", "method")):
        return True
    return any(abs(a[k] - b[k]) >= 0.05 for k in a if isinstance(a[k], float))


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """
    How far candidates are from the dense model.

    Attributes:
        by_number: Mean Kullback-Leibler divergence in nats, by number of the trial.
        tokens: Predictions that it is the mean of; None if nothing was compared.
    """

    by_number: Mapping[int, float] = field(default_factory=dict)
    tokens: int | None = None


def confirmed_before(
    islands: Islands, rated: Sequence[RatedCandidate], *, text_sha256: str
) -> list[RatedCandidate]:
    """
    The candidates whose perplexity on a text their study holds already.

    They stay finalists, so that a longer search never ends with a worse result than the shorter
    one that it extends.
    """
    records = [record_of(study) for study in islands.studies]

    def of(number: int) -> Any:
        _, there = islands.place(number)
        return records[islands.of_island(number)].get(f"perplexity:{there}", {}).get("text_sha256")

    return [candidate for candidate in rated if of(candidate.number) == text_sha256]


def united(
    rated: Sequence[RatedCandidate], *groups: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """The candidates of several groups, each once, in the order of ``rated``."""
    numbers = {candidate.number for group in groups for candidate in group}
    return [candidate for candidate in rated if candidate.number in numbers]
