"""
Jobs as the API shows them, those with several patterns included.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter

from pho_service.api.answers import Best, Job, JobError, Pieces, Point, Progress, Step
from pho_service.api.problems import Conflict, wrong_parameter
from pho_service.errors import InvalidInput
from pho_service.spec.configuration import ProxyQuality
from pho_service.spec.curve import Target
from pho_service.spec.pattern import Pattern
from pho_service.spec.recovery import Recovered
from pho_service.spec.tasks import TaskScores
from storage import records as stored
from storage.jobs import REMOVED, chosen
from storage.records import JobState, StageKind, StageState
from storage.studies import pareto_study_name, study_name


# Jobs with several patterns as the API shows them: a point for each, and the curve of all.
def is_several(spec: Mapping[str, Any]) -> bool:
    """Whether a job's document asks for several patterns, or for a target."""
    return bool(spec.get("patterns") or spec.get("target"))


def most_points(job: stored.JobRecord) -> int:
    """The most patterns that a job searches; once it is over, those that it has."""
    target = job.spec.get("target")
    if target is None:
        return len(job.spec["patterns"])
    stages = job.of_kind(StageKind.POINT)
    done = bool(job.of_kind(StageKind.FINISH))
    return len(stages) if done else Target.model_validate(target).most_points


def points(job: stored.JobRecord) -> list[Point] | None:
    """What there is of each pattern, by sparsity; None of a job with one pattern."""
    if not is_several(job.spec):
        return None
    found = [_point(job, stage) for stage in job.of_kind(StageKind.POINT)]
    return sorted(found, key=lambda each: (each.sparsity, each.pattern))


def _point(job: stored.JobRecord, stage: stored.Stage) -> Point:
    text = str(stage.about)
    pattern = Pattern.parse(text, None if ":" in text else job.spec.get("scope"))
    known = {name: value for name, value in (stage.result or {}).items() if name in _MEASURED}
    if stage.result is not None:
        known["method"] = stage.result["configuration"]["method"]
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


_MEASURED = (
    "perplexity", "rise", "rise_error", "errors", "dense", "wanda", "ria", "proxy", "trials",
    "seconds",
)  # fmt: skip


def curve(job: stored.JobRecord) -> dict[str, Any] | None:
    """The measured points as the curve.json of `pho curve` has them; None without any."""
    results = [s.result for s in job.of_kind(StageKind.POINT) if s.result is not None]
    if not results:
        return None
    ordered = sorted(results, key=lambda each: (each["sparsity"], each["pattern"]))
    *_, calibrated = (s.result or {} for s in job.of_kind(StageKind.CALIBRATE))
    return {
        "model": dict(calibrated["provenance"].get("model", {})),
        "dense": ordered[0]["dense"],
        "confirmation": ordered[0]["configuration"]["confirmation"],
        "calibration": {"seconds": calibrated.get("seconds")},
        "points": ordered,
    }


def answer_stage(job: stored.JobRecord) -> stored.Stage | None:
    """The point that a target's answer is; None where there is no answer, or not one alone."""
    study = ((job.best or {}).get("search") or {}).get("study")
    stages = job.of_kind(StageKind.POINT)
    return next((s for s in stages if s.result and s.result["study"] == study), None)


def pattern_named(job: stored.JobRecord, pattern: str) -> str | None:
    """One of a job's patterns as its stages name it; None if it is the only one."""
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


def several_found(job: stored.JobRecord) -> dict[str, Any]:
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


_QUALITIES = TypeAdapter(dict[str, ProxyQuality])  # by proxy


def describe(job: stored.JobRecord, notes: Sequence[str] = ()) -> Job:
    """A job as the API shows it, with notes beside its warnings."""
    best = None
    if job.best is not None:
        confirmation = job.best.get("confirmation") or {}
        best = Best(
            method=job.best["method"],
            objective=job.best["objective"].get("value"),
            perplexity=confirmation.get("perplexity"),
            perplexities=job.best.get("perplexities"),
        )
    return Job(
        id=job.id,
        kind="transfer" if is_transfer(job) else "search",
        name=job.name,
        state=job.state,
        stage=job.stage,
        priority=job.priority,
        progress=_progress(job),
        best=best,
        points=points(job),
        validation=_validation(job),
        tasks=None if job.tasks is None else TaskScores.model_validate(job.tasks),
        recovery=recovery(job),
        pruned=_pruned(job),
        pruned_pattern=None if job.pruning is None else job.pruning.about,
        error=None if job.error is None else JobError.model_validate(job.error),
        warnings=[*(job.warnings or _warnings(job)), *notes],
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        spec=job.spec,
    )


def configuration_of(job: stored.JobRecord, pattern: str | None = None) -> dict[str, Any]:
    check_search(job)
    named = None if pattern is None else pattern_named(job, pattern)
    if named is not None:
        return chosen(job, named)
    if is_several(job.spec):
        return several_found(job)
    if job.best is None:
        raise Conflict(
            "no_configuration",
            f"The job is {job.state} and has no configuration yet. Its progress shows the best "
            "value so far.",
            job.state,
        )
    return job.best


def check_search(job: stored.JobRecord) -> None:
    if is_transfer(job):
        raise Conflict(
            "not_a_search",
            "The job is a transfer: it has no trials and finds no configuration of its own. GET "
            f"/v1/jobs/{job.id}/transfer has what it measured.",
            job.state,
        )


def failure(job: stored.JobRecord) -> str | None:
    """Why a job failed, as a sentence."""
    if job.error is None:
        return None
    error = JobError.model_validate(job.error)
    where = f" at {error.layer}" if error.layer else ""
    return f"The job failed in {error.stage}{where}: {error.message} ({error.type})"


def is_transfer(job: stored.JobRecord) -> bool:
    """Whether a job measures a configuration on other models, and searches nothing."""
    return job.spec.get("kind") == "transfer"


def check_one_pattern(job: stored.JobRecord) -> None:
    if is_several(job.spec):
        raise Conflict(
            "several_patterns",
            "The job has several patterns, each with a search of its own, and cannot be extended: "
            "submit it again with more trials.",
            job.state,
        )


def islands(job: stored.JobRecord) -> int:
    """How many studies a job has: of its islands, or of its patterns; a transfer has none."""
    if is_several(job.spec):
        return len(job.of_kind(StageKind.POINT))
    return int(job.spec.get("islands", 0))


def study_names(job: stored.JobRecord) -> list[str]:
    """The names of its studies, island by island."""
    return [study_name(job.name, island) for island in range(islands(job))]


def studies_in_words(job: stored.JobRecord) -> dict[str, str]:
    """What to call each study of a job, by the study's name; some may not have begun."""
    if is_several(job.spec):
        about = {
            study_name(job.name, each.number): f"Study of {each.about}"
            for each in job.of_kind(StageKind.POINT)
        }
        return {pareto_study_name(job.name): "Pareto front", **about}
    return {
        name: f"Study, island {island}" if island else "Study"
        for island, name in enumerate(study_names(job))
    }


def _warnings(job: stored.JobRecord) -> list[str]:
    results = (stage.result or {} for stage in job.of_kind(StageKind.TRANSFER))
    return [warning for result in results for warning in result.get("warnings", [])]


def _validation(job: stored.JobRecord) -> dict[str, ProxyQuality] | None:
    for stage in job.of_kind(StageKind.FINISH):
        found = (stage.result or {}).get("validation")
        if found is not None:
            return _QUALITIES.validate_python(found)
    return None


def recovery(job: stored.JobRecord) -> Recovered | None:
    """Result of the recovery of a job's pruned model; None without one."""
    result = (job.pruning.result if job.pruning else None) or {}
    return Recovered.from_dict(found) if (found := result.get("recovery")) else None


def _pruned(job: stored.JobRecord) -> Literal["waiting", "done", "removed"] | None:
    if job.pruning is None:
        return None
    if job.pruning.result is None:
        return "waiting"
    return "removed" if REMOVED in job.pruning.result else "done"


def _pieces(job: stored.JobRecord) -> list[Pieces]:
    """What is known of each kind of stage, in the order of the work: how much of it is done."""
    at_most = " at most" if job.spec.get("target") else ""
    return [
        Pieces(
            stage=kind, unit=kind.unit + at_most * (kind is StageKind.POINT), done=done, total=total
        )
        for kind in StageKind
        for done, total in [_counted(job, kind)]
        if total
    ]


def _counted(job: stored.JobRecord, kind: StageKind) -> tuple[int, int]:
    mine = [stage for stage in job.stages if stage.kind is kind]
    done, total = sum(stage.state is StageState.DONE for stage in mine), len(mine)
    several = is_several(job.spec)
    if kind is StageKind.POINT and several:
        return done, most_points(job)
    if kind is StageKind.SEARCH and not is_transfer(job):
        total = job.trials * (most_points(job) if several else islands(job))
        return sum(stage.done for stage in _searches(job)), total
    if kind is StageKind.CALIBRATE and job.shards:
        return sum(stage.state is StageState.DONE for stage in job.shards), len(job.shards)
    return done, total


def _searches(job: stored.JobRecord) -> list[stored.Stage]:
    return job.of_kind(StageKind.POINT) or job.of_kind(StageKind.SEARCH)


def _progress(job: stored.JobRecord) -> Progress:
    known = {each.stage: each for each in _pieces(job)}
    step = next((found for found in map(step_of, job.stages) if found is not None), None)
    searched = StageKind.TRANSFER if is_transfer(job) else StageKind.SEARCH
    at = known.get(job.stage or searched) if job.state is JobState.RUNNING else known.get(searched)
    done, total = (0, 0) if at is None else (at.done, at.total)
    if step is not None and job.stage not in (StageKind.SEARCH, StageKind.POINT):
        done, total = step.done, step.steps
    values = [s.best_value for s in _searches(job) if s.best_value is not None]
    chosen = None if job.best is None else job.best["objective"].get("value")
    better = max if job.spec.get("objective", {}).get("name") == "gini" else min
    return Progress(
        pieces=[*known.values()],
        done=done,
        total=total,
        best_value=better(values, default=None) if chosen is None else chosen,
        seconds_left=_seconds_left(job, known),
        step=step,
    )


def step_of(stage: stored.Stage) -> Step | None:
    """What a stage is at, if it runs and has said so."""
    if stage.state is not StageState.RUNNING or stage.step is None:
        return None
    return Step.model_validate(stage.step)


def _seconds_left(job: stored.JobRecord, known: Mapping[StageKind, Pieces]) -> float | None:
    """How long the present stage takes at its pace so far, with the workers that are at it."""
    paced = (StageKind.SEARCH, StageKind.POINT, StageKind.PERPLEXITY)
    if job.state is not JobState.RUNNING or job.stage not in paced:
        return None
    at_it, counted = job.of_kind(job.stage), known[job.stage]
    left, workers = counted.total - counted.done, sum(map(_runs, at_it))
    if not counted.done or not workers:  # whoever waits for one does not know for how long
        return None
    if job.stage is StageKind.SEARCH:  # a hill climb may have ended early
        left = sum(job.trials - s.done for s in at_it if s.state is not StageState.DONE)
    return round(worked_s(job, job.stage) / counted.done * left / workers, 1)


def worked_s(job: stored.JobRecord, kind: StageKind) -> float:
    """Seconds of work on the searches, or on the points or perplexities that are done."""
    stages = job.of_kind(kind)
    if kind is StageKind.SEARCH:
        return sum(stage.elapsed_s for stage in stages)
    return float(sum((stage.result or {}).get("seconds", 0.0) for stage in stages))


def _runs(stage: stored.Stage) -> bool:
    return stage.state is StageState.RUNNING
