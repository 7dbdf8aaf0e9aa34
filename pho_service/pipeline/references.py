"""
What a result is judged by: the dense model, Wanda and RIA on the windows that chose the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import optuna

from pho_service.errors import NumericalError
from pho_service.pipeline.rating import ReportText, Subject, measure
from pho_service.progress import Advance, Run
from pho_service.spec.allocation import Allocation
from pho_service.spec.baselines import reference_methods
from pho_service.spec.candidate import Candidate
from pho_service.spec.perplexities import REFERENCES, Perplexities
from pho_service.tuning.finalists import Measurements, kept_losses
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate, SearchPlan
from pho_service.tuning.race import Losses
from pho_service.tuning.result import SearchResult
from storage.studies import keep_record, record_of


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
    """
    What the result of a search is judged by, in the order of ``REFERENCES``.

    Args:
        plan: Plan of the search.
        rated: Its finished trials. A baseline that is pruned as published is such a reference.
    """
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


def measure_references(
    islands: Islands,
    rated: Sequence[RatedCandidate],
    measurements: Measurements,
    subject: Subject,
    run: Run,
) -> dict[str, float | str]:
    """
    Measure what a result is judged by; each is kept in the first study at once.

    Args:
        islands: The record; what it holds is not measured again.
        rated: Every finished trial.
        measurements: Measurements of the finalists, on the subject's text.
        subject: What is pruned and measured.
        run: Who is told of each window.

    Returns:
        Perplexities by name; a sentence that says why instead, where there is none.
    """
    study, key = islands.studies[0], subject.text.key
    wanted = references(islands.plan, rated)
    found: dict[str, float | str] = {**measured_as_trials(wanted, measurements.perplexities)}
    for each in wanted:
        kept = record_of(study).get(f"reference:{each.name}", {})
        if kept.get("text_sha256") == key and each.name not in found:
            found[each.name] = kept["perplexity"]
    missing = [each for each in wanted if each.name not in found]
    if not missing:
        return found
    steps = len(missing) * len(subject.text.windows)
    with run.progress("Measuring what the result is judged by", steps) as advance:
        for each in missing:
            found[each.name] = value = _measured(islands, each, subject, advance)
            _keep(study, each.name, value, key)
    return found


def keep_dense(study: optuna.Study, perplexity: float, text: ReportText) -> None:
    """Keep in a study what another search has measured of the dense model on the same windows."""
    _keep(study, "dense", perplexity, text.key)


def _keep(study: optuna.Study, name: str, perplexity: float | str, text_sha256: str) -> None:
    document = {"perplexity": perplexity, "text_sha256": text_sha256}
    if record_of(study).get(f"reference:{name}") != document:
        keep_record(study, f"reference:{name}", document)


def measured_as_trials(
    wanted: Sequence[Reference], perplexities: Mapping[int, float]
) -> dict[str, float]:
    """The perplexities of references that are trials with one, by name."""
    return {
        each.name: perplexities[each.trial]
        for each in wanted
        if each.trial is not None and each.trial in perplexities
    }


def _measured(
    islands: Islands, reference: Reference, subject: Subject, advance: Advance
) -> float | str:
    if reference.candidate is None:
        return measure(subject, None, advance).perplexity
    known: Losses = {}
    if reference.trial is not None:  # a race may have dropped it
        known = kept_losses(islands, reference.trial, text_sha256=subject.text.key)
        advance(len(known))
    try:
        return measure(subject, reference.candidate, advance, known=known).perplexity
    except NumericalError as error:
        return without_perplexity(reference.name, error)


def without_perplexity(name: str, error: NumericalError) -> str:
    """Why a published method has no perplexity, which is not a fault of the result."""
    return f"The result is not compared with {name}, which has no perplexity here: {error}"


def with_perplexities(result: SearchResult, measured: Mapping[str, float | str]) -> SearchResult:
    """
    A result with the perplexities that it is judged by.

    Args:
        result: Confirmed; one that is not is given back as it is.
        measured: What :func:`measure_references` gave; without the dense model's perplexity
            nothing is added.
    """
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
