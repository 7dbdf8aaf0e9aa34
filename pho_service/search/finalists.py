"""
Which candidates of a search are looked at again, and what was measured of them, each once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna

from pho_service.search.plan import RatedCandidate
from pho_service.spec.candidate import Candidate

CONFIRMED = 3  # finalists that get a perplexity, and the best baseline


def finalists(rated: Sequence[RatedCandidate], count: int) -> list[RatedCandidate]:
    """
    The candidates that are looked at again: the best ``count`` different ones, and all baselines.

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
    chosen: list[RatedCandidate] = []
    for candidate in rated:
        if (
            (costly or candidate.candidate.method == "crepe")
            and len(chosen) < count
            and all(_differ(candidate.params, other.params) for other in chosen)
        ):
            chosen.append(candidate)
    numbers = {c.number for c in chosen}
    return [
        c for c in rated if c.number in numbers or not (costly or c.candidate.method == "crepe")
    ]


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


def best_by_divergence(
    compared: Sequence[RatedCandidate], divergences: Mapping[int, float], count: int = CONFIRMED
) -> list[RatedCandidate]:
    """
    The finalists that deserve a perplexity: the best ``count``, and the best baseline.

    Args:
        compared: Finalists, in any order.
        divergences: From the dense model, by the number of the trial.
        count: How many, the baseline not counted if it is none of them.

    Returns:
        In the order of ``compared``.
    """
    by_divergence = sorted(compared, key=lambda c: divergences[c.number])
    chosen = by_divergence[:count]
    chosen += [c for c in by_divergence if c.candidate.method != "crepe"][:1]
    numbers = {c.number for c in chosen}
    return [c for c in compared if c.number in numbers]


def confirmed_before(
    study: optuna.Study, rated: Sequence[RatedCandidate], *, text_sha256: str
) -> list[RatedCandidate]:
    """
    The candidates whose perplexity on a text a study holds already.

    They stay finalists, so that a longer search never ends with a worse result than the shorter
    one that it extends.

    Args:
        study: The record: see :func:`measure_once`.
        rated: Trials of it.
        text_sha256: Of the text and the way it is cut.

    Returns:
        In the order of ``rated``.
    """
    kept = study.user_attrs
    return [
        candidate
        for candidate in rated
        if kept.get(f"perplexity:{candidate.number}", {}).get("text_sha256") == text_sha256
    ]


def united(
    rated: Sequence[RatedCandidate], *groups: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """The candidates of several groups, each once, in the order of ``rated``."""
    numbers = {candidate.number for group in groups for candidate in group}
    return [candidate for candidate in rated if candidate.number in numbers]


def measure_once(
    study: optuna.Study,
    what: Literal["divergence", "perplexity"],
    number: int,
    candidate: Candidate,
    measure: Callable[[Candidate], float],
    *,
    text_sha256: str,
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """
    What a study holds of a finalist, measured and kept at once if it is not there.

    Args:
        study: The record. Its user attribute ``{what}:{number}`` holds the
            value and the text's hash; one of another text is measured again.
        what: Is measured.
        number: Of the trial in this study.
        candidate: Of it.
        measure: Prunes with a candidate and measures.
        text_sha256: Of the text and the way it is cut.
        fence: Entered around the write; may refuse by raising.
    """
    key = f"{what}:{number}"
    stored = study.user_attrs.get(key)
    if stored is None or stored.get("text_sha256") != text_sha256:
        stored = {
            "method": candidate.method,
            what: measure(candidate),
            "text_sha256": text_sha256,
        }
        with fence():
            study.set_user_attr(key, stored)
    return float(stored[what])


def confirm(
    study: optuna.Study,
    rated: Sequence[RatedCandidate],
    perplexity: Callable[[Candidate], float],
    *,
    text_sha256: str,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, RatedCandidate]]:
    """
    Measure the perplexity of finalists; each is kept in the study at once.

    Args:
        study: The record: see :func:`measure_once`.
        rated: The finalists.
        perplexity: Prunes with a candidate and measures.
        text_sha256: Of the text and the way it is cut.
        advance: Called with 1 after each finalist.

    Returns:
        (perplexity, candidate), best first; equal ones in the order of ``rated``.
    """
    measured = []
    for rating in rated:
        value = measure_once(
            study, "perplexity", rating.number, rating.candidate, perplexity,
            text_sha256=text_sha256,
        )  # fmt: skip
        measured.append((value, rating))
        advance(1)
    return sorted(measured, key=lambda pair: pair[0])
