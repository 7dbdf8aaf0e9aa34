"""
The perplexities of a job that its result is judged by: of the dense model, Wanda and RIA.
"""

from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Any

from pho_service.errors import NumericalError
from pho_service.pipeline.rating import Subject, measure
from pho_service.pipeline.references import (
    measured_as_trials,
    references,
    without_perplexity,
)
from pho_service.progress import Advance
from pho_service.spec.candidate import Candidate
from pho_service.spec.perplexities import REFERENCES as NAMES
from pho_service.tuning.finalists import Measurements, kept_losses
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate, SearchPlan
from pho_service.tuning.race import Losses
from storage.records import Job, NewStage, Stage
from storage.states import REFERENCES
from workers.stored import measurement, perplexities_of


def unjudged(
    plan: SearchPlan, rated: Sequence[RatedCandidate], measured: Container[int]
) -> list[NewStage]:
    """
    The stages of what a result is judged by, but for trials that have a perplexity or get one.

    Args:
        plan: Plan of the search.
        rated: Its finished trials.
        measured: The numbers of those.
    """
    return [
        measurement(REFERENCES + i, each.candidate, trial=each.trial)
        for i, each in enumerate(references(plan, rated))
        if each.trial is None or each.trial not in measured
    ]


def judged_by(
    job: Job, plan: SearchPlan, rated: Sequence[RatedCandidate], found: Measurements
) -> dict[str, float | str]:
    """The perplexities of what a result is judged by, or why there is none, by name."""
    wanted, stages = references(plan, rated), perplexities_of(job)
    measured: dict[str, float | str] = {**measured_as_trials(wanted, found.perplexities)}
    for i, each in enumerate(wanted):
        stage = stages.get(REFERENCES + i)
        if stage is not None and each.name not in measured:
            value = stage["perplexity"]
            measured[each.name] = stage["failure"] if value is None else float(value)
    return measured


def raced(stage: Stage, islands: Islands, text_sha256: str) -> Losses:
    """The losses that a race has measured of the trial whose perplexity a stage measures."""
    trial = (stage.params or {}).get("trial", stage.number)
    return {} if trial is None else kept_losses(islands, trial, text_sha256=text_sha256)


def measured_stage(
    subject: Subject,
    candidate: Candidate | None,
    number: int,
    advance: Advance,
    known: Losses,
) -> dict[str, Any]:
    """
    Measure the perplexity that a stage asks for.

    Args:
        subject: What is pruned and measured.
        candidate: Candidate of the stage; None is the dense model.
        number: Number of the stage. What a result is only judged by may have no perplexity.
        advance: Called with 1 after each window.
        known: Losses of windows that were measured before.
    """
    try:
        return asdict(measure(subject, candidate, advance, known=known))
    except NumericalError as error:
        if candidate is None or number < REFERENCES:
            raise
        name = NAMES[number - REFERENCES]
        failure = without_perplexity(name, error)
        return {"perplexity": None, "failure": failure, "seconds": 0.0}
