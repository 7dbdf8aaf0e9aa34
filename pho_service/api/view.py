"""
A job as every face of the service shows it: its JSON, the list, its page, stages and report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from pho_service.api.answers import NO_WORKER, Best, Job, JobError, Pieces, Point, Progress, Step
from pho_service.api.problems import Conflict, wrong_parameter
from pho_service.errors import InvalidInput
from pho_service.spec.curve import Target
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import is_maximised
from pho_service.spec.pattern import Pattern
from pho_service.spec.recovery import Recovered
from pho_service.spec.results import Calibration, Chosen, Finished, Measured
from pho_service.spec.structure import is_structured
from pho_service.spec.tasks import TaskScores
from pho_service.spec.transfer import TransferSpec
from storage.jobs import REMOVED, chosen
from storage.records import VERBS, JobRecord, JobState, Stage, StageKind, StageState
from storage.studies import pareto_study_name, study_name

_BUTTONS = ("pause", "resume", "cancel")  # the other verbs need more than a button
# Kinds whose pieces are alike, so that those that are done tell how long the others take.
_PACED = (StageKind.SEARCH, StageKind.POINT, StageKind.PERPLEXITY)
_LATER = {"confirm": StageKind.PERPLEXITY, "tasks": StageKind.TASKS, "prune": StageKind.PRUNE}
# Making one takes longer than all that it then reads.
_CALIBRATION = TypeAdapter(Calibration)
_CHOSEN = TypeAdapter(Chosen)
_FINISHED = TypeAdapter(Finished)
_MEASURED = TypeAdapter(Measured)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobDocument:
    """
    What lists and pages show of a document, whichever version wrote it. :class:`JobSpec` has its
    rules, and takes milliseconds to check them.
    """

    models: Sequence[str]
    patterns: Sequence[str]  # More than one, or a target, makes several points
    target: Target | None
    pattern: str | None  # Of a transfer, that of the configuration
    scope: str | None
    preset: str
    islands: int
    fork_of: str | None  # The job whose trials it began with
    source: str | None  # The job whose configuration a transfer measures
    is_maximised: bool  # Whether high values of its objective are good
    is_cut: bool  # Whether neurons, heads and blocks are cut out
    labels: Mapping[str, str]
    later: frozenset[StageKind]  # Kinds of stages that some field asks for

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "JobDocument":
        is_transfer = document.get("kind") == "transfer"
        if is_transfer:
            models, candidate = document["models"], document["configuration"]
        else:
            models, candidate = [document["model"], *document.get("more_models", ())], document
        target = document.get("target")
        first = document.get("pattern") or (document.get("patterns") or [None])[0]
        of_cuts = is_structured(first) or bool((target or {}).get("structured"))
        is_cut = of_cuts and not is_transfer
        preset = document.get("preset", "score")
        if is_transfer or is_cut:  # which have none
            preset = "transfer" if is_transfer else "cut"
        return cls(
            models=models,
            patterns=document.get("patterns") or (),
            target=None if target is None else Target.model_validate(target),
            pattern=candidate.get("pattern"),
            scope=candidate.get("scope"),
            preset=preset,
            islands=document.get("islands", 0),
            fork_of=document.get("fork_of"),
            source=document["source"] if is_transfer else None,
            is_maximised=is_maximised(document.get("objective", {}).get("name")),
            is_cut=is_cut,
            labels=document.get("labels") or {},
            later=frozenset(kind for field, kind in _LATER.items() if document.get(field)),
        )

    @property
    def is_transfer(self) -> bool:
        """Whether it measures a configuration on other models, and searches nothing."""
        return self.source is not None

    @property
    def several(self) -> bool:
        """Whether it asks for several patterns, or for a target."""
        return bool(self.patterns) or self.target is not None

    @property
    def sparsity(self) -> tuple[str, str]:
        """How sparse a model is to be: a name and a value."""
        if self.patterns:
            return ("Patterns", ", ".join(self.patterns))
        if self.target is not None:
            return ("Target", f"within {self.target}")
        return ("Pattern", str(self.pattern))

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was asked for, in some words: a name and a value each."""
        scope = [("Scope", self.scope)] if self.scope else []
        last = ("Preset", self.preset)
        if self.is_transfer:
            last = ("Transfer of", f"job {self.source}")
        fork = [] if self.fork_of is None else [("Fork of", f"job {self.fork_of}")]
        labels = [("Labels", listed_labels(self.labels))] if self.labels else []
        return [self.sparsity, *([] if self.is_cut else [*scope, last]), *fork, *labels]


def listed_labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


class JobView:
    """A job at a moment, with notes beside its warnings, and whether a worker is connected."""

    def __init__(
        self,
        record: JobRecord,
        *,
        now: datetime | None = None,
        notes: Sequence[str] = (),
        manned: bool = True,
    ) -> None:
        self.record = record
        self.now = now or datetime.now(UTC)
        self.notes = notes
        self.manned = manned and NO_WORKER not in notes
        self.document = JobDocument.of(record.spec)

    @cached_property
    def spec(self) -> JobSpec:
        """The whole document of a search."""
        return JobSpec.model_validate(self.record.spec)

    @property
    def transfer(self) -> TransferSpec:
        """The whole document of a transfer."""
        return TransferSpec.model_validate(self.record.spec)

    @cached_property
    def answer(self) -> Job:
        """As JSON."""
        job = self.record
        tasks, pruning = job.tasks, job.pruning
        return Job(
            id=job.id,
            kind="transfer" if self.document.is_transfer else "search",
            name=job.name,
            labels=dict(self.document.labels),
            state=job.state,
            stage=job.stage,
            priority=job.priority,
            progress=self.progress,
            best=self._best,
            points=self.points,
            validation=self.finished.validation,
            tasks=None if tasks is None else TaskScores.model_validate(tasks),
            recovery=self.recovery,
            speed=self.speed,
            pruned=self.pruned,
            pruned_pattern=None if pruning is None else pruning.about,
            error=self.error,
            warnings=[*(job.warnings or self._transfer_warnings), *self.notes],
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            spec=job.spec,
        )

    # What its stages have given.

    def _results(self, kind: StageKind, values: TypeAdapter[T]) -> dict[int, T]:
        """The results of the stages of a kind, by number."""
        return {
            stage.number: values.validate_python(stage.result)
            for stage in self.record.of_kind(kind)
            if stage.result is not None
        }

    @cached_property
    def finished(self) -> Finished:
        return self._results(StageKind.FINISH, _FINISHED).get(0, Finished())

    @property
    def perplexities(self) -> dict[int, float | None]:
        """What was measured of trials, by the number of their stages."""
        measured = self._results(StageKind.PERPLEXITY, _MEASURED)
        return {number: result.perplexity for number, result in measured.items()}

    @property
    def divergences(self) -> dict[int, float]:
        """How far trials are from the dense model, by number."""
        choices = self._results(StageKind.CONFIRM, _CHOSEN).values()
        return {number: value for c in choices for number, value in c.divergences.items()}

    @property
    def transfers(self) -> list[dict[str, Any]]:
        """What was measured on other models, as transfer.json has it."""
        stages = self.record.of_kind(StageKind.TRANSFER)
        return [stage.result for stage in stages if stage.result]

    @property
    def _transfer_warnings(self) -> list[str]:
        return [warning for result in self.transfers for warning in result.get("warnings", ())]

    @property
    def recovery(self) -> Recovered | None:
        """What the recovery of the pruned model came to; None without one."""
        kept = self._pruning.get("recovery")
        return Recovered.from_dict(kept) if kept else None

    @property
    def speed(self) -> str | None:
        """How fast the pruned model is, if it was cut for a speed."""
        speed: str | None = self._pruning.get("speed")
        return speed

    @property
    def _pruning(self) -> Mapping[str, Any]:
        """What writing the pruned model gave; nothing before that."""
        return (self.record.pruning.result if self.record.pruning else None) or {}

    @property
    def pruned(self) -> Literal["waiting", "done", "removed"] | None:
        if self.record.pruning is None:
            return None
        if self.record.pruning.result is None:
            return "waiting"
        return "removed" if REMOVED in self.record.pruning.result else "done"

    @property
    def _best(self) -> Best | None:
        best = self.record.best
        if best is None:
            return None
        return Best(
            method=best["method"],
            objective=best["objective"].get("value"),
            perplexity=(best.get("confirmation") or {}).get("perplexity"),
            perplexities=best.get("perplexities"),
            report=best.get("report"),
        )

    @cached_property
    def error(self) -> JobError | None:
        error = self.record.error
        return None if error is None else JobError.model_validate(error)

    @property
    def failure(self) -> str | None:
        """Why it failed, as a sentence."""
        error = self.error
        if error is None:
            return None
        layer = f" at {error.layer}" if error.layer else ""
        return f"The job failed in {error.stage}{layer}: {error.message} ({error.type})"

    # Several patterns: a point for each, the curve of all, and the configuration of one.

    @cached_property
    def points(self) -> list[Point] | None:
        """What there is of each pattern, by sparsity; None of a job with one pattern."""
        if not self.document.several:
            return None
        points = map(self._point, self.record.of_kind(StageKind.POINT))
        return sorted(points, key=lambda point: (point.sparsity, point.pattern))

    def _point(self, stage: Stage) -> Point:
        text, target = str(stage.about), self.document.target
        pattern = Pattern.parse(text, None if ":" in text else self.document.scope)
        values = dict(stage.result or {})
        if values:
            values["method"] = values["configuration"]["method"]
            if target is not None:
                values["within"] = values["perplexity"] <= target.limit(values["dense"])
        return Point.model_validate(
            {
                **values,
                "pattern": text,
                "scope": pattern.scope.value,
                "sparsity": pattern.sparsity,
                "state": stage.state.value,
                "trials_done": stage.done,
            }
        )

    @property
    def most_points(self) -> int:
        """The most patterns that it searches; once it is over, those that it has."""
        target = self.document.target
        if target is None:
            return len(self.document.patterns)
        answered = bool(self.record.of_kind(StageKind.FINISH))
        return len(self.record.of_kind(StageKind.POINT)) if answered else target.most_points

    @property
    def curve(self) -> dict[str, Any] | None:
        """The measured points as the curve.json of `pho curve` has them; None without any."""
        results = [s.result for s in self.record.of_kind(StageKind.POINT) if s.result is not None]
        if not results:
            return None
        ordered = sorted(results, key=lambda result: (result["sparsity"], result["pattern"]))
        *_, calibration = self._results(StageKind.CALIBRATE, _CALIBRATION).values()
        return {
            "model": dict(calibration.provenance.get("model", {})),
            "dense": ordered[0]["dense"],
            **{name: ordered[0]["configuration"].get(name) for name in ("confirmation", "report")},
            "calibration": {"seconds": calibration.seconds},
            "points": ordered,
        }

    @property
    def answer_stage(self) -> Stage | None:
        """The point that a target's answer is; None where there is no answer, or not one alone."""
        study = ((self.record.best or {}).get("search") or {}).get("study")
        stages = self.record.of_kind(StageKind.POINT)
        return next((s for s in stages if s.result and s.result["study"] == study), None)

    def pattern_named(self, pattern: str) -> str | None:
        """One of its patterns as its stages name it; None if it is the only one."""
        try:
            name = str(Pattern.parse(pattern))
        except InvalidInput as error:
            raise wrong_parameter("pattern", str(error)) from error
        alone = self.document.pattern
        if not self.document.several and name == str(Pattern.parse(str(alone))):
            return None
        stages = {str(stage.about): stage for stage in self.record.of_kind(StageKind.POINT)}
        if name not in stages:
            names = ", ".join(stages) or alone or "none yet"
            raise self.conflict(
                "no_such_pattern", f"The job has no pattern {pattern}. Its patterns: {names}."
            )
        if stages[name].state is not StageState.DONE:
            raise self.conflict(
                "no_configuration",
                f"The job is {self.record.state} and has no configuration at {pattern} yet.",
            )
        return name

    def configuration(self, pattern: str | None = None) -> dict[str, Any]:
        """The configuration that it has found; of several patterns, that of one."""
        self.check_search()
        name = None if pattern is None else self.pattern_named(pattern)
        if name is not None:
            return chosen(self.record, name)
        if self.record.best is not None:
            return self.record.best
        nothing = f"The job is {self.record.state} and has no configuration yet."
        if not self.document.several:
            raise self.conflict(
                "no_configuration", f"{nothing} Its progress shows the best value so far."
            )
        stages = self.record.of_kind(StageKind.POINT)
        done = [str(stage.about) for stage in stages if stage.result is not None]
        if self.document.target is not None or not done:
            raise self.conflict(
                "no_configuration", f"{nothing} Its points show what was measured so far."
            )
        raise self.conflict(
            "several_patterns",
            "The job has a configuration for each of its patterns: say which, as "
            f"?pattern={done[0]}. Found: {', '.join(done)}.",
        )

    def conflict(self, code: str, message: str) -> Conflict:
        return Conflict(code, message, self.record.state)

    def check_search(self) -> None:
        if self.document.is_transfer:
            raise self.conflict(
                "not_a_search",
                "The job is a transfer: it has no trials and finds no configuration of its own. "
                f"GET /v1/jobs/{self.record.id}/transfer has what it measured.",
            )

    def check_scored(self) -> None:
        """See that it searches coefficients, which can be transferred, and given more trials."""
        if self.document.is_cut:
            raise self.conflict(
                "a_cut",
                f"The job has {self.document.sparsity[1]}: every split of its share was "
                "rated, and it is of the blocks of this model. Submit a job for another model or "
                "another share.",
            )

    def check_one_pattern(self) -> None:
        if self.document.several:
            raise self.conflict(
                "several_patterns",
                "The job has several patterns, each with a search of its own, and cannot be "
                "extended: submit it again with more trials.",
            )

    @property
    def islands(self) -> int:
        """How many studies it has: of its islands, or of its patterns; a transfer has none."""
        if self.document.several:
            return len(self.record.of_kind(StageKind.POINT))
        return self.document.islands

    @property
    def study_names(self) -> list[str]:
        """The names of its studies, island by island."""
        return [study_name(self.record.name, island) for island in range(self.islands)]

    @property
    def studies_in_words(self) -> dict[str, str]:
        """What to call each study, by the study's name; some may not have begun."""
        if self.document.several:
            headings = {
                study_name(self.record.name, stage.number): f"Study of {stage.about}"
                for stage in self.record.of_kind(StageKind.POINT)
            }
            return {pareto_study_name(self.record.name): "Pareto front", **headings}
        return {
            name: f"Study, island {island}" if island else "Study"
            for island, name in enumerate(self.study_names)
        }

    # How far it is.

    @property
    def kinds(self) -> list[StageKind]:
        """The kinds of stages that it has, or will have, in the order of the work."""
        kinds = {stage.kind for stage in self.record.stages}
        if self.record.state is not JobState.SUCCEEDED and not self.document.is_transfer:
            kinds |= {StageKind.CALIBRATE, StageKind.FINISH, *self.document.later}
            if self.document.several:  # whose points have their perplexities
                kinds = kinds - {StageKind.PERPLEXITY} | {StageKind.POINT}
            else:
                kinds |= {StageKind.SEARCH, StageKind.CONFIRM}
        return [kind for kind in StageKind if kind in kinds]

    @cached_property
    def progress(self) -> Progress:
        job = self.record
        pieces = {kind: counted for kind in StageKind if (counted := self._pieces(kind))}
        step = next(filter(None, map(step_of, job.stages)), None)
        searched = StageKind.TRANSFER if self.document.is_transfer else StageKind.SEARCH
        present = (job.stage or searched) if job.state is JobState.RUNNING else searched
        done, total = (pieces[present].done, pieces[present].total) if present in pieces else (0, 0)
        if step is not None and job.stage not in (StageKind.SEARCH, StageKind.POINT):
            done, total = step.done, step.steps
        best_value = None if job.best is None else job.best["objective"].get("value")
        if best_value is None:
            values = [s.best_value for s in self._searches if s.best_value is not None]
            best_value = (max if self.document.is_maximised else min)(values, default=None)
        return Progress(
            pieces=[*pieces.values()],
            done=done,
            total=total,
            best_value=best_value,
            seconds_left=self._seconds_left(pieces),
            step=step,
        )

    def _pieces(self, kind: StageKind) -> Pieces | None:
        """How many of the pieces of a kind are done; None where nothing is known of them."""
        job, unit = self.record, kind.unit
        stages = [stage for stage in job.stages if stage.kind is kind]
        if kind is StageKind.CALIBRATE and job.shards:
            stages = job.shards
        done, total = sum(stage.state is StageState.DONE for stage in stages), len(stages)
        if kind is StageKind.POINT and self.document.several:
            total = self.most_points
            unit += " at most" if self.document.target is not None else ""
        elif kind is StageKind.SEARCH and not (self.document.is_transfer or self.document.is_cut):
            done = sum(stage.done for stage in self._searches)
            searches = self.most_points if self.document.several else self.islands
            total = job.trials * searches
        return Pieces(stage=kind, unit=unit, done=done, total=total) if total else None

    @property
    def _searches(self) -> list[Stage]:
        return self.record.of_kind(StageKind.POINT) or self.record.of_kind(StageKind.SEARCH)

    def _seconds_left(self, pieces: Mapping[StageKind, Pieces]) -> float | None:
        """How long the present stage takes at its pace so far, with the workers that are at it."""
        job, kind = self.record, self.record.stage
        if job.state is not JobState.RUNNING or kind not in _PACED or kind not in pieces:
            return None
        if not self.manned:
            return None
        stages, counted = job.of_kind(kind), pieces[kind]
        workers = sum(stage.state is StageState.RUNNING for stage in stages)
        if not counted.done or not workers:  # whoever waits for one does not know for how long
            return None
        left = counted.total - counted.done
        if kind is StageKind.SEARCH and not self.document.is_cut:  # a climb may have ended early
            left = sum(job.trials - s.done for s in stages if s.state is not StageState.DONE)
        return round(self.worked_s(kind) / counted.done * left / workers, 1)

    def worked_s(self, kind: StageKind) -> float:
        """Seconds of work on the searches, or on the points or perplexities that are done."""
        stages = self.record.of_kind(kind)
        if kind is StageKind.SEARCH:
            return sum(stage.elapsed_s for stage in stages)
        return sum((result_seconds(stage) or 0.0 for stage in stages), 0.0)

    @property
    def time(self) -> str:
        """How long it takes still, or took."""
        job, left = self.record, self.progress.seconds_left
        if left is not None:
            return f"{job.stage}: about {span(left)} left"
        if job.started_at is None:
            return "not begun"
        if job.finished_at is None:
            return f"{span((self.now - job.started_at).total_seconds())} since it began"
        return f"took {span((job.finished_at - job.started_at).total_seconds())}"

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return not (self.record.state.is_over or self.record.state is JobState.PAUSED)

    # What can be asked of it.

    @property
    def verbs(self) -> list[str]:
        """What has a button, because it changes something."""
        state = self.record.state
        verbs = [verb for verb in _BUTTONS if VERBS[verb].get(state, state) is not state]
        prunable = state is JobState.SUCCEEDED and not self.document.is_transfer
        one_model = len(self.document.models) == 1
        if prunable and one_model and self.record.best is not None and self.pruned != "done":
            verbs.append("prune")
        return verbs

    @property
    def deletable(self) -> bool:
        return self.record.state in VERBS["delete"]

    @property
    def is_search(self) -> bool:
        """Whether it has a study of coefficients at one pattern, or of several islands."""
        document = self.document
        return not (document.is_transfer or document.several or document.is_cut)

    @property
    def extensible(self) -> bool:
        """Whether it can be given more trials."""
        return self.record.state in VERBS["extend"] and self.is_search

    @property
    def forkable(self) -> bool:
        """Whether another search may begin with its trials."""
        return self.is_search and bool(self.record.of_kind(StageKind.SEARCH))


def step_of(stage: Stage) -> Step | None:
    """What a stage is at, if it runs and has said so."""
    if stage.state is not StageState.RUNNING or stage.step is None:
        return None
    return Step.model_validate(stage.step)


def result_seconds(stage: Stage) -> float | None:
    """Return the seconds that a stage says it took."""
    seconds = (stage.result or {}).get("seconds")
    return None if seconds is None else float(seconds)


def span(seconds: float) -> str:
    """A time in words, as exact as one cares."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours < 72:
        return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours} h"
    return f"{round(hours / 24)} days"
