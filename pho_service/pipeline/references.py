"""
What a result is judged by: the dense model, Wanda and RIA on the windows that chose the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pho_service.errors import NumericalError
from pho_service.spec.allocation import Allocation
from pho_service.spec.baselines import reference_methods
from pho_service.spec.candidate import Candidate
from pho_service.spec.perplexities import REFERENCES, Perplexities
from pho_service.tuning.plan import RatedCandidate, SearchPlan
from pho_service.tuning.result import SearchResult


@dataclass(frozen=True, kw_only=True)
class Reference:
    """
    Something that a result is judged by.

    Attributes:
        name: ``dense``, ``wanda`` or ``ria``.
        candidate: What the model is pruned with; None leaves it dense.
        trial: The trial of the search that is the same candidate; None if no trial is.
    """

    name: str
    candidate: Candidate | None
    trial: int | None = None


def references(plan: SearchPlan, rated: Sequence[RatedCandidate]) -> list[Reference]:
    """What the result of a search is judged by; published baselines may be trials of it."""
    methods = reference_methods(plan.pattern, plan.steps.linears)
    found = []
    for name in REFERENCES:
        candidate = methods.get(name)
        same = (r.number for r in rated if candidate and _prune_alike(r.candidate, candidate))
        found.append(Reference(name=name, candidate=candidate, trial=next(same, None)))
    return found


def _prune_alike(one: Candidate, other: Candidate) -> bool:
    """Whether two scores without a neighbourhood remove the same weights."""
    if one.coefficients.neighbourhood or one.pattern != other.pattern:
        return False
    sized = replace(one.coefficients, kernel_size=other.coefficients.kernel_size)
    even = replace(one.steps, allocation=Allocation())  # whose spread nothing uses
    steps = even if one.steps.allocation.is_even else one.steps
    return sized == other.coefficients and steps == other.steps


def without_perplexity(name: str, error: NumericalError) -> str:
    """Why a published method has no perplexity, which is not a fault of the result."""
    return f"The result is not compared with {name}, which has no perplexity here: {error}"


def with_perplexities(result: SearchResult, measured: Mapping[str, float | str]) -> SearchResult:
    """A confirmed result with the perplexities that it is judged by, or why there is none."""
    confirmation = result.configuration.confirmation
    values = {name: value for name, value in measured.items() if not isinstance(value, str)}
    found = confirmation and Perplexities.of(confirmation.perplexity, values)
    if not found:
        return result
    return replace(
        result,
        configuration=result.configuration.model_copy(update={"perplexities": found}),
        warnings=[*result.warnings, *(why for why in measured.values() if isinstance(why, str))],
    )
