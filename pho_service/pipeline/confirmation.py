"""
Which of the finalists is the best: by what the pruned model predicts, not by the proxy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pho_service.errors import NumericalError
from pho_service.pipeline.rating import (
    Glances,
    ReportText,
    Subject,
    compared_count,
    measure,
    racing_pays,
)
from pho_service.progress import Advance, Run
from pho_service.tuning.finalists import (
    Divergences,
    Measurements,
    confirm,
    confirmed_before,
    finalists,
    keep,
    keep_losses,
    kept_losses,
    kept_value,
    united,
)
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.race import (
    Losses,
    race_looks,
    race_order,
    still_racing,
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """
    The finalists that are left, and what choosing them took.

    Attributes:
        finalists: Best first by the objective; each gets a perplexity on the whole text.
        divergences: From the dense model, of all that were compared.
        evaluations: What choosing and these perplexities take, in perplexities of the whole text.
    """

    finalists: Sequence[RatedCandidate]
    divergences: Divergences = field(default_factory=Divergences)
    evaluations: float


def confirm_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    subject: Subject,
    corrected: Sequence[RatedCandidate] = (),
    run: Run = Run(),
) -> Measurements:
    """
    Let finalists race where that pays, then measure what is left of them on the whole text.

    What a shorter search has measured on the same text stays a finalist, beside those that this
    search would have had from the start.

    Args:
        islands: The record; what it holds is not measured again.
        rated: Every finished trial, best first by the objective.
        count: How many found candidates are finalists, see
            :func:`~pho_service.tuning.finalists.finalists`.
        subject: What is pruned and measured.
        corrected: Candidates beside those of the search that are measured, too.
        run: Who watches it.
    """
    text = subject.text
    rated = [*rated, *corrected]
    before = confirmed_before(islands, rated, text_sha256=text.key)
    chosen = choose_finalists(
        islands,
        rated,
        count,
        before,
        lambda: subject,
        stream=subject.model.stream,
        entered=corrected,
        run=run,
    )

    def perplexity(each: RatedCandidate) -> float:
        known = kept_losses(islands, each.number, text_sha256=text.key)
        with _named(each):
            return measure(subject, each.candidate, known=known).perplexity

    with run.progress("Confirming by perplexity", len(chosen.finalists)) as advance:
        perplexities = confirm(
            islands,
            chosen.finalists,
            perplexity,
            text_sha256=text.key,
            advance=advance,
            fence=run.fence,
        )
    return Measurements(
        perplexities=perplexities,
        measured_on=text.measured_on(),
        divergences=chosen.divergences,
        evaluations=chosen.evaluations,
    )


def choose_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    before: Sequence[RatedCandidate],
    subject: Callable[[], Subject],
    *,
    stream: bool,
    entered: Sequence[RatedCandidate] = (),
    run: Run,
) -> Chosen:
    """
    Choose the finalists that get a perplexity on the whole text: those that a race leaves.

    They are measured a few windows at a time, in an order that the search's seed gives, and
    whoever is behind the leader beyond chance is dropped, see :mod:`pho_service.tuning.race`. What
    was measured is kept at once, so that another attempt goes on. Where a race saves nothing,
    all finalists get a perplexity, see :func:`~pho_service.pipeline.rating.racing_pays`.

    Args:
        islands: The record; what it holds is not measured again.
        rated: Every finished trial, best first by the objective.
        count: How many found candidates are finalists.
        before: Those that got a perplexity in a shorter search: they stay.
        subject: Gives what is pruned and measured; called only if anything is.
        stream: Whether the model is streamed.
        entered: Those that are finalists whatever their objective is.
        run: Who watches it.

    Raises:
        NumericalError: A candidate gives NaN or infinity; the error says which.
    """
    pool = united(rated, finalists(rated, count), before, entered)
    if len(pool) == 1 or not racing_pays([each.candidate for each in pool], stream=stream):
        return Chosen(finalists=pool, evaluations=float(len(pool)))
    race = _Race(islands, pool, subject(), run)
    with run.progress("Racing finalists", len(pool) * race.windows) as advance:
        left = united(rated, race.run(advance), before)
    return Chosen(
        finalists=left, divergences=race.divergences(), evaluations=race.evaluations(left)
    )


class _Race:
    """
    A race of finalists over the windows of a text.

    Args:
        islands: The record.
        pool: The finalists.
        subject: What is pruned and measured.
        run: As for :func:`choose_finalists`.
    """

    def __init__(
        self,
        islands: Islands,
        pool: Sequence[RatedCandidate],
        subject: Subject,
        run: Run,
    ) -> None:
        text = subject.text
        self.islands, self.pool, self.text = islands, pool, text
        self.look, self.fence = run.look, run.fence
        self.windows = len(text.windows)
        self.order = race_order(self.windows, islands.plan.seed)
        self.compared = self.order[: compared_count(text.windows)]
        self.compared_key = ReportText(windows=text.windows[self.compared], record=text.record).key
        self.subject = subject
        self.seen: dict[int, int] = {}  # windows by number of the trial

    def run(self, advance: Advance) -> list[RatedCandidate]:
        """Those that cannot be told from the best before all windows are seen."""
        looks = race_looks(self.windows, len(self.compared))
        glances = Glances(self.subject, lambda _: advance(0), self.compared)
        left = [*self.pool]
        for windows in looks[:-1]:
            if len(left) == 1:
                break
            seen = self.order[:windows]
            losses = {each.number: self._measured(each, seen, glances, advance) for each in left}
            numbers = still_racing(losses, seen, windows=self.windows)
            advance((len(left) - len(numbers)) * (self.windows - windows))  # not to be run
            left = [each for each in left if each.number in numbers]
        return left

    def _measured(
        self, each: RatedCandidate, seen: Sequence[int], glances: Glances, advance: Advance
    ) -> Losses:
        """The losses of a finalist on some windows; those that are not known are measured."""
        key = self.text.key
        known = kept_losses(self.islands, each.number, text_sha256=key)
        missing = [number for number in seen if number not in known]
        if missing:
            self.look()
            with _named(each):
                glance = glances(each.candidate, missing)
            known = {**known, **glance.losses}
            with self.fence():
                if glance.divergence is not None:
                    keep(
                        self.islands, "divergence", each, glance.divergence,
                        text_sha256=self.compared_key,
                    )  # fmt: skip
                keep_losses(self.islands, each.number, known, text_sha256=key)
        advance(len(seen) - self.seen.get(each.number, 0))
        self.seen[each.number] = len(seen)
        return known

    def divergences(self) -> Divergences:
        """From the dense model, of all finalists."""
        by_number = {
            each.number: kept_value(self.islands, "divergence", each, text_sha256=self.compared_key)
            for each in self.pool
        }
        return Divergences(
            by_number={n: value for n, value in by_number.items() if value is not None},
            tokens=len(self.compared) * (self.text.windows.shape[1] - 1),
        )

    def evaluations(self, left: Sequence[RatedCandidate]) -> float:
        """What was run and what is still to be run, in perplexities of the whole text."""
        whole = {each.number for each in left}
        dense = len(self.compared) if self.seen else 0  # none for a text of one window
        runs = sum(
            self.windows if each.number in whole else self.seen[each.number] for each in self.pool
        )
        return (dense + runs) / self.windows


@contextmanager
def _named(each: RatedCandidate) -> Iterator[None]:
    """Say of which candidate a number is NaN or infinite."""
    try:
        yield
    except NumericalError as error:
        failed = each.candidate.to_dict()
        raise NumericalError(str(error), layer=error.layer, candidate=failed) from error
