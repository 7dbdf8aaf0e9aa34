"""
Which of the finalists is the best: by what the pruned model predicts, not by the proxy.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from pho_service.errors import NumericalError
from pho_service.pipeline.rating import Comparison, Subject, comparing_pays, measure
from pho_service.progress import Progress
from pho_service.spec.candidate import Candidate
from pho_service.tuning.finalists import (
    Divergences,
    Measurements,
    best_by_divergence,
    confirm,
    confirmed_before,
    finalists,
    measure_once,
    united,
)
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate


def confirm_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    subject: Subject,
    progress: Progress,
    corrected: Sequence[RatedCandidate] = (),
) -> Measurements:
    """
    Compare finalists with the dense model where that pays, then measure the few best.

    What a shorter search has measured on the same text stays a finalist, beside those that this
    search would have had from the start.

    Args:
        islands: The record; what it holds is not measured again.
        rated: Every finished trial, best first by the objective.
        count: How many found candidates are finalists, see
            :func:`~pho_service.tuning.finalists.finalists`.
        subject: What is pruned and measured.
        progress: Is told of both steps.
        corrected: Candidates beside those of the search that are measured, too.
    """
    text = subject.text
    rated = [*rated, *corrected]
    known = confirmed_before(islands, rated, text_sha256=text.key)
    before = united(rated, known, corrected)
    chosen, divergences = compare_finalists(
        islands,
        rated,
        count,
        before,
        lambda: subject,
        stream=subject.model.stream,
        progress=progress,
    )

    def perplexity(candidate: Candidate) -> float:
        return measure(subject, candidate).perplexity

    with progress("Confirming by perplexity", len(chosen)) as advance:
        perplexities = confirm(islands, chosen, perplexity, text_sha256=text.key, advance=advance)
    return Measurements(
        perplexities=perplexities, measured_on=text.measured_on(), divergences=divergences
    )


def compare_finalists(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    count: int,
    before: Sequence[RatedCandidate],
    subject: Callable[[], Subject],
    *,
    stream: bool,
    progress: Progress,
    look: Callable[[], None] = lambda: None,
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[list[RatedCandidate], Divergences]:
    """
    Choose the finalists that get a perplexity: by their divergence from the dense model.

    Each divergence is kept at once, so that another attempt goes on. Where comparing saves no
    perplexity, all finalists get one, see
    :func:`~pho_service.pipeline.rating.comparing_pays`.

    Args:
        islands: The record; what it holds is not measured again.
        rated: Every finished trial, best first by the objective.
        count: How many found candidates are finalists.
        before: Those that got a perplexity in a shorter search: they stay.
        subject: Gives what is pruned and compared; called only if anything is.
        stream: Whether the model is streamed.
        progress: Is told of the comparison.
        look: Called before each candidate; may refuse by raising.
        fence: Entered around each write; may refuse by raising.

    Returns:
        The finalists that get a perplexity, in the order of ``rated``; and the divergences.

    Raises:
        NumericalError: A candidate gives NaN or infinity; the error says which.
    """
    chosen = finalists(rated, count)
    pool = united(rated, chosen, before)
    if not comparing_pays([each.candidate for each in pool], stream=stream):
        return pool, Divergences()
    dense = subject()
    by_number = {}
    with progress("Comparing with the dense model", len(pool)) as advance:
        compare = Comparison(dense.model, dense.bundle.statistics(), dense.text, advance)
        for each in pool:
            look()
            try:
                by_number[each.number] = measure_once(
                    islands, "divergence", each, compare, text_sha256=compare.key, fence=fence
                )
            except NumericalError as error:
                failed = each.candidate.to_dict()
                raise NumericalError(str(error), layer=error.layer, candidate=failed) from error
            advance(1)
    chosen = united(rated, best_by_divergence(chosen, by_number), before)
    return chosen, Divergences(by_number=by_number, tokens=compare.tokens)
