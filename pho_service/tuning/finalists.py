"""
Which candidates of a search are looked at again, and what was measured of them, each once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

from pho_service.progress import Fence
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.race import Losses
from storage.studies import keep_record, note_trial, record_of

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


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """
    What was measured of finalists.

    Attributes:
        perplexities: By number of the trial.
        measured_on: The fields of a confirmation that say what on; None if nothing was.
        divergences: Divergences of those that were compared with the dense model.
        evaluations: What all of it took, in perplexities of the whole text; None if it was not
            counted.
    """

    perplexities: Mapping[int, float] = field(default_factory=dict)
    measured_on: Mapping[str, Any] | None = None
    divergences: Divergences = field(default_factory=Divergences)
    evaluations: float | None = None

    def best_first(self, rated: Sequence[RatedCandidate]) -> list[tuple[float, RatedCandidate]]:
        """(perplexity, candidate) of those that have one; equal ones in the order of ``rated``."""
        measured = [
            (self.perplexities[r.number], r) for r in rated if r.number in self.perplexities
        ]
        return sorted(measured, key=lambda pair: pair[0])


def confirmed_before(
    islands: Islands, rated: Sequence[RatedCandidate], *, text_sha256: str
) -> list[RatedCandidate]:
    """
    The candidates whose perplexity on a text their study holds already.

    They stay finalists, so that a longer search never ends with a worse result than the shorter
    one that it extends.

    Args:
        islands: The record: see :func:`measure_once`.
        rated: Trials of it.
        text_sha256: SHA-256 of the text and the way it is cut.

    Returns:
        In the order of ``rated``.
    """
    kept = [record_of(study) for study in islands.studies]

    def of(number: int) -> Any:
        _, there = islands.place(number)
        return kept[islands.of_island(number)].get(f"perplexity:{there}", {}).get("text_sha256")

    return [candidate for candidate in rated if of(candidate.number) == text_sha256]


def united(
    rated: Sequence[RatedCandidate], *groups: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """The candidates of several groups, each once, in the order of ``rated``."""
    numbers = {candidate.number for group in groups for candidate in group}
    return [candidate for candidate in rated if candidate.number in numbers]


def measure_once(
    islands: Islands,
    what: What,
    rated: RatedCandidate,
    measure: Callable[[RatedCandidate], float],
    *,
    text_sha256: str,
    fence: Fence = nullcontext,
) -> float:
    """
    What the study of a finalist holds of it, measured and kept at once if it is not there.

    Args:
        islands: The record. The record ``{what}:{number}`` of a study holds the
            value and the text's hash; one of another text is measured again.
        what: Is measured.
        rated: The finalist.
        measure: Prunes with the finalist's candidate and measures.
        text_sha256: SHA-256 of the text and the way it is cut.
        fence: Entered around the write; may refuse by raising.
    """
    value = kept_value(islands, what, rated, text_sha256=text_sha256)
    if value is None:
        value = measure(rated)
        with fence():
            keep(islands, what, rated, value, text_sha256=text_sha256)
    return value


def kept_losses(islands: Islands, number: int, *, text_sha256: str) -> Losses:
    """
    The losses of a finalist on single windows of a text, as far as its study holds them.

    Args:
        islands: The record. The record ``losses:{number}`` of a study holds them and
            the text's hash.
        number: Number of the finalist's trial.
        text_sha256: SHA-256 of the text and the way it is cut.
    """
    study, there = islands.place(number)
    stored = record_of(study).get(f"losses:{there}") or {}
    if stored.get("text_sha256") != text_sha256:
        return {}
    return {int(window): blocks for window, blocks in stored["losses"].items()}


def keep_losses(islands: Islands, number: int, losses: Losses, *, text_sha256: str) -> None:
    """Keep in its study what :func:`kept_losses` gives of a finalist."""
    study, there = islands.place(number)
    by_window = {str(window): list(blocks) for window, blocks in losses.items()}
    keep_record(study, f"losses:{there}", {"text_sha256": text_sha256, "losses": by_window})


def kept_value(
    islands: Islands, what: What, rated: RatedCandidate, *, text_sha256: str
) -> float | None:
    """What the study of a finalist holds of it, see :func:`measure_once`; None if nothing."""
    study, number = islands.place(rated.number)
    stored = record_of(study).get(f"{what}:{number}") or {}
    return float(stored[what]) if stored.get("text_sha256") == text_sha256 else None


def confirm(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    perplexity: Callable[[RatedCandidate], float],
    *,
    text_sha256: str,
    advance: Callable[[int], None] = lambda _: None,
    fence: Fence = nullcontext,
) -> dict[int, float]:
    """
    Measure the perplexity of finalists; each is kept in its study at once.

    Args:
        islands: The record: see :func:`measure_once`.
        rated: The finalists.
        perplexity: Prunes with a candidate and measures.
        text_sha256: SHA-256 of the text and the way it is cut.
        advance: Called with 1 after each finalist.
        fence: Entered around each write; may refuse by raising.

    Returns:
        Perplexities by the number of the trial.
    """
    measured = {}
    for each in rated:
        measured[each.number] = measure_once(
            islands, "perplexity", each, perplexity, text_sha256=text_sha256, fence=fence
        )
        advance(1)
    return measured


def keep(
    islands: Islands,
    what: What,
    rated: RatedCandidate,
    value: float,
    *,
    text_sha256: str | None = None,
) -> None:
    """
    Keep what was measured of a finalist: in its study, as the record, and on its trial, to be read.

    Args:
        islands: The record.
        what: Was measured.
        rated: The finalist.
        value: Its value.
        text_sha256: SHA-256 of the text and how it is cut; without it the record is not continued.
    """
    study, number = islands.place(rated.number)
    of_text = {} if text_sha256 is None else {"text_sha256": text_sha256}
    document = {"method": rated.candidate.method, what: value, **of_text}
    note_trial(study, number, what, value)
    keep_record(study, f"{what}:{number}", document)  # last: with it nothing is measured again
