"""
Which of the finalists is the best: by what the pruned model predicts, not by the proxy.
"""

from collections.abc import Sequence

import optuna
from torch import Tensor

from pho_service.models.loading import LanguageModel
from pho_service.pipeline.rating import Comparison, ReportText, comparing_pays, rate_pruned
from pho_service.progress import Progress
from pho_service.pruning.bundle import ProxyBundle
from pho_service.search.finalists import (
    Divergences,
    best_by_divergence,
    confirm,
    confirmed_before,
    finalists,
    measure_once,
    united,
)
from pho_service.search.plan import RatedCandidate
from pho_service.spec.candidate import Candidate


def confirm_finalists(
    study: optuna.Study,
    rated: Sequence[RatedCandidate],
    count: int,
    bundle: ProxyBundle,
    model: LanguageModel,
    text: ReportText,
    calibration: Tensor | None,
    progress: Progress,
) -> tuple[list[tuple[float, RatedCandidate]], Divergences]:
    """
    Compare finalists with the dense model where that pays, then measure the few best.

    What a shorter search has measured on the same text stays a finalist, beside those that this
    search would have had from the start.

    Args:
        study: The record; what it holds is not measured again.
        rated: Every finished trial, best first by the objective.
        count: How many found candidates are finalists, see :func:`finalists`.
        bundle: Of the model.
        model: Dense; it is given back dense.
        text: To compare and to measure on.
        calibration: Windows for steps that need a text.
        progress: Is told of both steps.

    Returns:
        (perplexity, candidate) of those that got one, best first; and the divergences.
    """
    statistics = bundle.statistics()
    divergences = Divergences()
    chosen = finalists(rated, count)
    before = confirmed_before(study, rated, text_sha256=text.key)
    if comparing_pays([c.candidate for c in chosen], stream=model.stream):
        pool = united(rated, chosen, before)
        with progress("Comparing with the dense model", len(pool)) as advance:
            compare = Comparison(model, statistics, text, advance)
            by_number = {}
            for each in pool:
                by_number[each.number] = measure_once(
                    study, "divergence", each.number, each.candidate, compare,
                    text_sha256=compare.key,
                )  # fmt: skip
                advance(1)
        divergences = Divergences(by_number=by_number, tokens=compare.tokens)
        chosen = best_by_divergence(chosen, by_number)
    chosen = united(rated, chosen, before)

    def perplexity(candidate: Candidate) -> float:
        return rate_pruned(model, statistics, candidate, text.windows, calibration=calibration)[
            0
        ].perplexity

    with progress("Confirming by perplexity", len(chosen)) as advance:
        measured = confirm(study, chosen, perplexity, text_sha256=text.key, advance=advance)
    return measured, divergences
