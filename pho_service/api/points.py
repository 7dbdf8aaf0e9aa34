"""
Jobs with several patterns as the API shows them: a point for each, and the curve of all.
"""

from collections.abc import Mapping
from typing import Any

from pho_service.api.answers import Point
from pho_service.api.problems import Conflict, wrong_parameter
from pho_service.errors import InvalidInput
from pho_service.spec.curve import Target
from pho_service.spec.pattern import Pattern
from storage import records as stored
from storage.states import StageKind, StageState


def is_several(spec: Mapping[str, Any]) -> bool:
    """Whether a job's document asks for several patterns, or for a target."""
    return bool(spec.get("patterns") or spec.get("target"))


def most_points(job: stored.Job) -> int:
    """The most patterns that a job searches; once it is over, those that it has."""
    target = job.spec.get("target")
    if target is None:
        return len(job.spec["patterns"])
    stages = job.of_kind(StageKind.POINT)
    done = bool(job.of_kind(StageKind.FINISH))
    return len(stages) if done else Target.model_validate(target).most_points


def points(job: stored.Job) -> list[Point] | None:
    """What there is of each pattern, by sparsity; None of a job with one pattern."""
    if not is_several(job.spec):
        return None
    found = [_point(job, stage) for stage in job.of_kind(StageKind.POINT)]
    return sorted(found, key=lambda each: (each.sparsity, each.pattern))


def _point(job: stored.Job, stage: stored.Stage) -> Point:
    text = str(stage.about)
    pattern = Pattern.parse(text, None if ":" in text else job.spec.get("scope"))
    known = {name: value for name, value in (stage.result or {}).items() if name in _MEASURED}
    target = job.spec.get("target")
    within = None
    if target is not None and known:
        limit = Target.model_validate(target).limit(known["dense"])
        within = bool(known["perplexity"] <= limit)
    return Point(
        pattern=text,
        scope=pattern.scope.value,
        sparsity=pattern.sparsity,
        state=stage.state.value,
        trials_done=stage.done,
        within=within,
        **known,
    )


_MEASURED = ("perplexity", "rise", "dense", "wanda", "ria", "proxy", "trials", "seconds")


def curve(job: stored.Job) -> dict[str, Any] | None:
    """The measured points as the curve.json of `pho curve` has them; None without any."""
    results = [s.result for s in job.of_kind(StageKind.POINT) if s.result is not None]
    if not results:
        return None
    ordered = sorted(results, key=lambda each: (each["sparsity"], each["pattern"]))
    (calibrated,) = (s.result or {} for s in job.of_kind(StageKind.CALIBRATE))
    return {
        "model": dict(calibrated["provenance"].get("model", {})),
        "dense": ordered[0]["dense"],
        "confirmation": ordered[0]["configuration"]["confirmation"],
        "calibration": {"seconds": calibrated.get("seconds")},
        "points": ordered,
    }


def answer_stage(job: stored.Job) -> stored.Stage | None:
    """The point that a target's answer is; None where there is no answer, or not one alone."""
    study = ((job.best or {}).get("search") or {}).get("study")
    stages = job.of_kind(StageKind.POINT)
    return next((s for s in stages if s.result and s.result["study"] == study), None)


def pattern_named(job: stored.Job, pattern: str) -> str | None:
    """
    One of a job's patterns as its stages name it; None if it is the only one.

    Raises:
        RequestValidationError: It is not a pattern.
        Conflict: The job does not have it, or has not searched it yet.
    """
    try:
        wanted = str(Pattern.parse(pattern))
    except InvalidInput as error:
        raise wrong_parameter("pattern", str(error)) from error
    if not is_several(job.spec) and wanted == str(Pattern.parse(job.spec["pattern"])):
        return None
    stages = {str(s.about): s for s in job.of_kind(StageKind.POINT)}
    if wanted not in stages:
        mine = ", ".join(stages) or job.spec.get("pattern") or "none yet"
        raise Conflict(
            "no_such_pattern", f"The job has no pattern {pattern}. Its patterns: {mine}.", job.state
        )
    if stages[wanted].state is not StageState.DONE:
        raise Conflict(
            "no_configuration",
            f"The job is {job.state} and has no configuration at {pattern} yet.",
            job.state,
        )
    return wanted


def several_found(job: stored.Job) -> dict[str, Any]:
    """
    What the target of a job with several patterns has found.

    Raises:
        Conflict: There is nothing yet; or each pattern has a configuration, and none is named.
    """
    if job.best is not None:
        return job.best
    done = [str(s.about) for s in job.of_kind(StageKind.POINT) if s.result is not None]
    if job.spec.get("target") or not done:
        raise Conflict(
            "no_configuration",
            f"The job is {job.state} and has no configuration yet. Its points show what was "
            "measured so far.",
            job.state,
        )
    raise Conflict(
        "several_patterns",
        "The job has a configuration for each of its patterns: say which, as "
        f"?pattern={done[0]}. Found: {', '.join(done)}.",
        job.state,
    )
