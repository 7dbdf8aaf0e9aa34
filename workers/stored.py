"""
What the stages of a job have stored, in the form that the next stage takes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pho_service.pipeline.search import origin_of
from pho_service.pipeline.validate import judge
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.candidate import Candidate
from pho_service.spec.job import JobSpec
from pho_service.spec.quality import ProxyQuality
from pho_service.tuning.correction import Correction
from pho_service.tuning.finalists import Divergences, Measurements
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.validation import finalists_wanted, planned_candidates
from storage.records import Job, NewStage
from storage.states import VALIDATION, StageKind


def provenances(job: Job) -> list[dict[str, Any]]:
    """Return what the calibration of each model recorded."""
    return [(stage.result or {})["provenance"] for stage in job.of_kind(StageKind.CALIBRATE)]


def provenance(job: Job) -> dict[str, Any]:
    """The same of all models together."""
    return origin_of(provenances(job))


def measurement(number: int, candidate: Candidate | None, **more: Any) -> NewStage:
    """A stage that measures the perplexity of a candidate; None is the dense model."""
    params = {"candidate": candidate and candidate.to_dict(), **more}
    return NewStage(kind=StageKind.PERPLEXITY, number=number, params=params)


def measured_finalist(rated: RatedCandidate) -> NewStage:
    """A stage that measures the perplexity of a trial."""
    return measurement(rated.number, rated.candidate)


def measured_before(job: Job) -> set[int]:
    """The trials that have a perplexity from before the job was extended: they stay finalists."""
    return {number for number in perplexities_of(job) if number < VALIDATION}


def measurements(job: Job, rated: Sequence[RatedCandidate]) -> Measurements:
    """What was measured of the finalists of a search by a proxy."""
    (planned,) = (stage.result or {} for stage in job.of_kind(StageKind.CONFIRM))
    stages = perplexities_of(job)
    chosen = set(planned.get("finalists", ()))
    perplexities = {
        r.number: float(stages[r.number]["perplexity"]) for r in rated if r.number in chosen
    }
    best = min(perplexities, key=perplexities.__getitem__, default=None)
    return Measurements(
        perplexities=perplexities,
        measured_on=None if best is None else stages[best]["measured_on"],
        divergences=Divergences(
            by_number={int(n): float(d) for n, d in planned.get("divergences", {}).items()},
            tokens=planned.get("divergence_tokens"),
        ),
        evaluations=planned.get("evaluations"),
    )


def corrected(job: Job) -> Correction | None:
    """What corrections of the best came to; None if there were none."""
    (confirmed,) = job.of_kind(StageKind.CONFIRM)
    correction = (confirmed.result or {}).get("correction")
    return None if correction is None else Correction.from_dict(correction)


def validated(spec: JobSpec) -> list[Candidate]:
    """The random candidates of a validation; none if it was not asked for."""
    if spec.validation is None:
        return []
    return planned_candidates(spec.plan(0), spec.validation)


def unvalidated(job: Job, spec: JobSpec) -> list[NewStage]:
    """The stages of a validation that have no result yet."""
    measured = perplexities_of(job)
    return [
        measurement(VALIDATION + i, candidate)
        for i, candidate in enumerate(validated(spec))
        if VALIDATION + i not in measured
    ]


def after_search(job: Job, spec: JobSpec) -> list[NewStage]:
    """The stages after the searches: of the validation, and then the confirmation."""
    return unvalidated(job, spec) or [NewStage(kind=StageKind.CONFIRM)]


def after_perplexity(job: Job) -> list[NewStage]:
    """The stage after the last perplexity: of the finalists, or of a validation before them."""
    confirmed = job.of_kind(StageKind.CONFIRM)
    return [NewStage(kind=StageKind.FINISH if confirmed else StageKind.CONFIRM)]


def judged(
    job: Job, spec: JobSpec, bundles: Mapping[str, ProxyBundle], device: str
) -> dict[str, ProxyQuality]:
    """How well each proxy ranks the random candidates of the validation; empty without one."""
    if spec.validation is None:
        return {}
    return judge(
        bundles[spec.model],
        validated(spec),
        validation_perplexities(job, spec),
        seed=spec.validation.seed,
        device=device,
    )


def wanted_finalists(
    job: Job, spec: JobSpec, bundles: Callable[[], Mapping[str, ProxyBundle]], device: str
) -> tuple[int, str | None]:
    """How many finalists are confirmed; and why, if a validation found that they must be more."""
    count = 0 if spec.confirm is None else spec.confirm.candidates
    if spec.validation is None:
        return count, None
    name = spec.request(0).objective.label
    return finalists_wanted(count, name, judged(job, spec, bundles(), device)[name])


def doubts(job: Job) -> list[str]:
    """What to know of a proxy that does not rank, in a sentence; nothing if it ranks."""
    (planned,) = (stage.result or {} for stage in job.of_kind(StageKind.CONFIRM))
    return [planned["doubt"]] if "doubt" in planned else []


def validation_perplexities(job: Job, spec: JobSpec) -> list[float]:
    """Those of the random candidates, in their order."""
    measured = perplexities_of(job)
    return [float(measured[VALIDATION + i]["perplexity"]) for i, _ in enumerate(validated(spec))]


def perplexities_of(job: Job) -> dict[int, dict[str, Any]]:
    """What was measured, by the number of the stage: of a trial, or of a random candidate."""
    return {s.number: s.result for s in job.of_kind(StageKind.PERPLEXITY) if s.result}
