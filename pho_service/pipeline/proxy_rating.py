"""
Rate candidates by the proxy, on a bundle: no model is needed, and transformers is not loaded.
"""

import time
from collections.abc import Sequence

from pho_service.errors import NumericalError
from pho_service.pruning.proxy import ProxyEvaluator, ProxyRating
from pho_service.spec.candidate import Candidate
from pho_service.spec.objective import Objective
from pho_service.tuning.plan import SECOND_OPINION, Evaluate, Outcome


def proxy_value(rating: ProxyRating, objective: Objective) -> float:
    """The number that an objective takes from a rating."""
    value = rating.gini if objective.name == "gini" else getattr(rating, objective.weighting)
    assert isinstance(value, float)
    return value


def mask_proxy(
    evaluator: ProxyEvaluator, candidate: Candidate, objective: Objective
) -> float | None:
    """
    A candidate's value, or None if its update chooses the mask, which no bundle knows.

    Raises:
        BundleError: The bundle lacks what the candidate needs.
    """
    if candidate.steps.chooses_mask:
        return None
    (rating,) = evaluator.evaluate([candidate], with_gini=objective.name == "gini")
    return proxy_value(rating, objective)


def rate_by_proxy(evaluator: ProxyEvaluator, objective: Objective) -> Evaluate:
    """A function for the search that rates candidates on a bundle."""

    def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
        started = time.perf_counter()
        try:
            ratings = evaluator.evaluate(candidates, with_gini=objective.name == "gini")
        except NumericalError as error:
            if len(candidates) == 1:
                return [Outcome(value=None, failure=str(error))]
            return [outcome for candidate in candidates for outcome in rate([candidate])]
        seconds = round((time.perf_counter() - started) / len(candidates), 5)
        second = objective.second_weighting
        return [
            Outcome(
                value=proxy_value(rating, objective),
                attributes={
                    "fisher": rating.fisher,
                    "relative": rating.relative,
                    "absolute": rating.absolute,
                    "error_by_kind": rating.error_by_kind,
                    "seconds": seconds,
                    **({} if second is None else {SECOND_OPINION: getattr(rating, second)}),
                },
            )
            for rating in ratings
        ]

    return rate
