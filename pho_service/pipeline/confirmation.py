"""
Which of the finalists is the best: by what the pruned model predicts, not by the proxy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pho_service.errors import NumericalError
from pho_service.pipeline.rating import Glances, ReportText, Subject, compared_count, racing_pays
from pho_service.progress import Advance, Run
from pho_service.spec.candidate import Candidate
from pho_service.tuning.finalists import Divergences, confirmed_before, finalists, united
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.race import Losses, race_looks, race_order, still_racing
from storage.studies import keep_record, kept, once


@dataclass(frozen=True, kw_only=True)
class Raced:
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


def choose_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    subject: Subject,
    run: Run,
    *,
    entered: Sequence[RatedCandidate] = (),
) -> Raced:
    """
    Choose the finalists that get a perplexity on the whole text: those that a race leaves.

    They are measured a few windows at a time, in an order that the search's seed gives, and
    whoever is behind the leader beyond chance is dropped, see :mod:`pho_service.tuning.race`. What
    was measured is kept at once, so that another attempt goes on. Where a race saves nothing,
    all finalists get a perplexity, see :func:`~pho_service.pipeline.rating.racing_pays`.

    What a shorter search has measured on the same text stays a finalist, beside those that this
    search would have had from the start.
    """
    before = confirmed_before(islands, rated, text_sha256=subject.text.key)
    pool = united(rated, finalists(rated, count), before, entered)
    pays = racing_pays([each.candidate for each in pool], stream=subject.model.stream)
    if len(pool) == 1 or not pays:
        return Raced(finalists=pool, evaluations=float(len(pool)))
    race = _Race(islands, pool, subject, run)
    with run.progress("Racing finalists", len(pool) * race.windows) as advance:
        left = united(rated, race.run(advance), before)
    return Raced(finalists=left, divergences=race.divergences(), evaluations=race.evaluations(left))


def known_losses(islands: Islands, number: int, text_sha256: str) -> Losses:
    """Losses of a trial on single windows of a text, as far as a race has measured them."""
    study, there = islands.place(number)
    stored = kept(study, f"losses:{there}", {"text_sha256": text_sha256})
    return {int(window): blocks for window, blocks in stored.get("losses", {}).items()}


class _Race:
    """A race of finalists over the windows of a text."""

    def __init__(
        self,
        islands: Islands,
        pool: Sequence[RatedCandidate],
        subject: Subject,
        run: Run,
    ) -> None:
        text = subject.text
        self.islands, self.pool, self.text = islands, pool, text
        self.on = run
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
        known = known_losses(self.islands, each.number, key)
        missing = [number for number in seen if number not in known]
        if missing:
            self.on.look()
            with named(each.candidate):
                glance = glances(each.candidate, missing)
            known = {**known, **glance.losses}
            study, there = self.islands.place(each.number)
            with self.on.fence():
                if glance.divergence is not None:
                    about, value = {"text_sha256": self.compared_key}, glance.divergence
                    once(
                        study, f"divergence:{there}", about, lambda: {"divergence": value},
                        note=(there, "divergence"),
                    )  # fmt: skip
                losses = {str(window): list(blocks) for window, blocks in known.items()}
                keep_record(study, f"losses:{there}", {"text_sha256": key, "losses": losses})
        advance(len(seen) - self.seen.get(each.number, 0))
        self.seen[each.number] = len(seen)
        return known

    def divergences(self) -> Divergences:
        """From the dense model, of all finalists."""
        by_number = {}
        for each in self.pool:
            study, there = self.islands.place(each.number)
            stored = kept(study, f"divergence:{there}", {"text_sha256": self.compared_key})
            if stored:
                by_number[each.number] = float(stored["divergence"])
        return Divergences(
            by_number=by_number, tokens=len(self.compared) * (self.text.windows.shape[1] - 1)
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
def named(candidate: Candidate) -> Iterator[None]:
    """Say of which candidate a number is NaN or infinite."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(
            str(error), layer=error.layer, candidate=candidate.to_dict()
        ) from error
