"""
Rate candidates: by the proxy on a bundle, or by the perplexity of the pruned model.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.jobs.pipeline import pruned_model
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextRecord, record_to_dict
from pho_service.progress import Advance
from pho_service.pruning.masks import model_sparsity
from pho_service.pruning.perplexity import Perplexity
from pho_service.pruning.proxy import ProxyEvaluator, ProxyRating
from pho_service.pruning.statistics import Statistics
from pho_service.search.search import Evaluate, Outcome
from pho_service.spec import Candidate, Objective


def proxy_value(rating: ProxyRating, objective: Objective) -> float:
    """The number that an objective takes from a rating."""
    value = rating.gini if objective.name == "gini" else getattr(rating, objective.weighting)
    assert isinstance(value, float)
    return value


def rate_by_proxy(evaluator: ProxyEvaluator, objective: Objective) -> Evaluate:
    """A function for the search that rates candidates on a bundle."""

    def rate(candidate: Candidate) -> Outcome:
        started = time.perf_counter()
        try:
            (rating,) = evaluator.evaluate([candidate], with_gini=objective.name == "gini")
        except NumericalError as error:
            return Outcome(value=None, failure=str(error))
        return Outcome(
            value=proxy_value(rating, objective),
            attributes={
                "fisher": rating.fisher,
                "relative": rating.relative,
                "absolute": rating.absolute,
                "error_by_kind": rating.error_by_kind,
                "seconds": round(time.perf_counter() - started, 4),
            },
        )

    return lambda candidates: [rate(candidate) for candidate in candidates]


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """
    A text to measure perplexity on, cut for one model.

    Attributes:
        windows: (windows, context_length), int64.
        record: Where it is from.
    """

    windows: Tensor
    record: TextRecord

    @property
    def key(self) -> str:
        """Hash of exactly these windows."""
        return hashlib.sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()

    def measured_on(self) -> dict[str, Any]:
        """The fields of a confirmation that say what was measured on."""
        return {
            "tokens": self.windows.shape[0] * (self.windows.shape[1] - 1),
            "context_length": self.windows.shape[1],
            "text": self.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """What is stored with every perplexity."""
        return record_to_dict(self.record, windows=len(self.windows))


def rate_pruned(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    windows: Tensor,
    advance: Advance = lambda _: None,
    *,
    calibration: Tensor | None = None,
) -> tuple[Perplexity, float]:
    """
    Prune a model with a candidate, measure its perplexity, and put the weights back.

    Args:
        model: Dense.
        statistics: Of it.
        candidate: What to prune with.
        windows: (windows, context_length), int64, to measure on.
        advance: Called with 1 after each of them, and with 0 while the model is pruned.
        calibration: Windows for candidates whose steps need a text.

    Raises:
        InvalidInput: They need one, and there is none.

    Returns:
        The perplexity, and the achieved sparsity over all prunable weights.
    """
    with pruned_model(
        model, statistics, candidate, calibration, advance=lambda _: advance(0)
    ) as sparsity:
        result = measure_perplexity(model, windows, advance=advance)
    return result, model_sparsity(model.linears, sparsity)


def rate_by_perplexity(
    model: LanguageModel, statistics: Statistics, windows: Tensor, calibration: Tensor | None
) -> Evaluate:
    """A function for the search that rates candidates by perplexity: slow, and the truth."""

    def rate(candidate: Candidate) -> Outcome:
        started = time.perf_counter()
        try:
            result, _ = rate_pruned(model, statistics, candidate, windows, calibration=calibration)
        except NumericalError as error:
            return Outcome(value=None, failure=str(error))
        seconds = round(time.perf_counter() - started, 4)
        return Outcome(value=result.perplexity, attributes={"seconds": seconds})

    def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
        return [rate(candidate) for candidate in candidates]

    return evaluate
