"""
What the HTTP API answers, as the server writes it and the client reads it.
"""

import uuid
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pho_service.library import ModelFacts
from pho_service.spec.configuration import ProxyQuality
from pho_service.spec.pattern import Pattern
from pho_service.spec.perplexity import Perplexities, ReportedPerplexities
from pho_service.spec.recovery import Recovered
from pho_service.spec.tasks import TaskScores
from storage.records import Drain, JobState, StageKind

# In the warnings of a job that may work, and does not.
NO_WORKER = (
    "No worker is connected: the job waits until one is. Start one with `pho worker` on a machine "
    "that reaches the database."
)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")  # a newer server may say more


class Step(_Answer):
    """Current step of a running stage."""

    title: str
    done: int
    steps: int


class Pieces(_Answer):
    """How far the stages of one kind are."""

    stage: StageKind
    unit: str = Field(
        description="What is counted: trials of all islands or patterns, parts of a calibration, "
        "or the stages themselves, by what each is of."
    )
    done: int
    total: int = Field(description="As far as is known; of the patterns of a target, at most.")


class Progress(_Answer):
    """Progress of a job."""

    pieces: list[Pieces] = Field(
        description="What is known of each kind of stage, in the order of the work."
    )
    done: int = Field(
        description="How much of the present stage is done: steps of one that counts no pieces, or "
        "as in `pieces`; of the search, or of a transfer's models, while nothing runs."
    )
    total: int
    best_value: float | None = Field(
        description="Best objective so far; once there is a configuration, its own."
    )
    seconds_left: float | None = Field(
        description="Seconds that the search or the perplexities still take at the present pace; a "
        "hill climb may end earlier."
    )
    step: Step | None = Field(
        None,
        description="What a stage is at that counts no trials, such as the calibration; null if "
        "none runs, or it has not said anything yet.",
    )

    def of(self, stage: str) -> Pieces:
        """How far the stages of a kind are; 0 of 0 before anything is known of them."""
        none = Pieces(stage=StageKind(stage), unit="", done=0, total=0)
        return next((pieces for pieces in self.pieces if pieces.stage == stage), none)


class JobError(_Answer):
    """Why a job failed."""

    type: str
    message: str
    stage: StageKind
    attempts: int | None = None
    layer: str | None = None
    candidate: dict[str, Any] | None = Field(
        None, description="Candidate that failed: method, coefficients, scope and steps."
    )


class Best(_Answer):
    """The winner in short; the whole configuration is at the job's ``best``."""

    method: str
    objective: float | None
    perplexity: float | None
    perplexities: Perplexities | None = Field(
        None,
        description="Perplexities of the dense model, the pruned one, Wanda and RIA on the text "
        "that it was chosen on; null where none was measured.",
    )
    report: ReportedPerplexities | None = Field(
        None,
        description="The same on the job's report text, which nothing was chosen on; null without "
        "one.",
    )

    @property
    def headline(self) -> Perplexities | None:
        """How good the result is, on a report text if there is one."""
        return self.report or self.perplexities


class Point(_Answer):
    """One pattern of a job that has several. What is not measured yet is null."""

    pattern: str
    scope: str
    sparsity: float = Field(description="Share of the weights that the pattern removes.")
    state: Literal["waiting", "running", "done", "failed"]
    trials_done: int = Field(description="Number of finished trials of its search.")
    trials: int | None = None
    method: str | None = Field(
        None, description="crepe, or the baseline that no candidate was better than."
    )
    perplexity: float | None = Field(None, description="Perplexity of what was found, confirmed.")
    rise: float | None = Field(None, description="Its rise over dense, as a share of that.")
    rise_error: float | None = Field(None, description="Standard error of that rise.")
    errors: dict[str, float] = Field(
        default_factory=dict,
        description="Standard errors of the logarithms of ratios, as those of `perplexities`.",
    )
    measured_on: str | None = Field(
        None,
        description="What perplexities are of: `report text`, or another text, on which the "
        "result was chosen: `chosen on this text`.",
    )
    dense: float | None = Field(None, description="Perplexity of the dense model.")
    wanda: float | None = None
    ria: float | None = None
    proxy: float | None = Field(None, description="Value of the objective of what was found.")
    seconds: float | None = Field(None, description="Seconds of search and perplexities.")
    within: bool | None = Field(
        None, description="Whether it is within the job's target; null if the job has none."
    )


class Job(_Answer):
    """A search, or a transfer of what a search has found."""

    id: uuid.UUID
    kind: Literal["search", "transfer"] = "search"
    name: str = Field(
        description="Name of the job and of its study; more islands or patterns have it with a "
        "number, and the study of all patterns with `Pareto front`."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Labels of its document.")
    state: JobState
    stage: StageKind | None = Field(description="Stage that runs, or that ran last.")
    priority: int
    progress: Progress
    best: Best | None = Field(
        description="Best configuration; null for a job with patterns, whose points have one each."
    )
    points: list[Point] | None = Field(
        None, description="Patterns of a job that has several, by sparsity; null if it has one."
    )
    validation: dict[str, ProxyQuality] | None = Field(
        description="Quality of each proxy, by its name, if asked for."
    )
    tasks: TaskScores | None = Field(
        None,
        description="What the dense model and the pruned one scored in zero-shot tasks; null: not "
        "asked for, or not measured yet.",
    )
    recovery: Recovered | None = Field(
        None, description="What the recovery of the pruned model came to; null: none, or not yet."
    )
    speed: str | None = Field(
        None,
        description="How fast the pruned model is beside the dense one on the worker; null: it was "
        "not cut for a speed, or is not there yet.",
    )
    pruned: Literal["waiting", "done", "removed"] | None = Field(
        None,
        description="Whether the pruned model is on its way, there, or deleted; null: not asked "
        "for.",
    )
    pruned_pattern: str | None = Field(
        None, description="Which of several patterns the pruned model is of."
    )
    error: JobError | None
    warnings: list[str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: dict[str, Any] = Field(description="Document that was submitted, with the defaults.")

    @property
    def title(self) -> str:
        """Its name without the part of its id, which stands beside it."""
        return self.name.removesuffix(f" {self.id.hex[:12]}")

    @property
    def short(self) -> str:
        """The beginning of its id, which every verb takes."""
        return str(self.id)[:8]

    @property
    def measured(self) -> list[Point]:
        """What is measured: its result, or a point for each of its patterns."""
        best = self.best
        done = [point for point in self.points or () if point.perplexity is not None]
        if best is None or done:
            answer = [point for point in done if best and point.perplexity == best.perplexity]
            return answer or done
        if best.perplexity is None:
            return []
        spec, good = self.spec.get("configuration", self.spec), best.headline
        pattern = Pattern.parse(str(spec["pattern"]), spec.get("scope"))
        trials = self.progress.of(StageKind.SEARCH).done
        return [
            Point(
                pattern=str(pattern), scope=pattern.scope.value, sparsity=pattern.sparsity,
                state="done", trials_done=trials, method=best.method,
                perplexity=best.perplexity if good is None else good.pruned,
                proxy=best.objective, **({} if good is None else good.point),
            )
        ]  # fmt: skip


class Submitted(_Answer):
    """A job that was submitted; `GET /v1/jobs/{id}` has all of it."""

    id: uuid.UUID
    name: str
    state: JobState
    warnings: list[str] = Field(
        description="What to know before it runs: a shorter context length, a model or a data set "
        "whose name is nearly a known one, a hub that cannot be reached, that no worker is "
        "connected."
    )
    links: dict[str, str] = Field(
        description="Paths of the `job`, of its `events`, and of its `page` for a browser."
    )


class UploadedText(_Answer):
    """A text that was uploaded with this key."""

    id: str = Field(description="What jobs name it by: `sha256:`, its SHA-256, and its ending.")
    name: str = Field(description="Name of the file that was uploaded first.")
    bytes: int
    created_at: datetime
    used_at: datetime = Field(description="When it was last uploaded, or named by a new job.")


class TextPage(_Answer):
    """Some texts, newest first."""

    texts: list[UploadedText]
    next_page_token: str | None
    most_bytes: int = Field(description="Bytes that a text may have.")


class Artifact(_Answer):
    """A file of a job's pruned model."""

    name: str = Field(description="Path in the model's folder.")
    bytes: int
    sha256: str
    href: str = Field(description="Path of its download.")


class ArtifactList(_Answer):
    """The files of a job's pruned model, by name."""

    job_id: uuid.UUID
    files: list[Artifact]
    bytes: int = Field(description="Bytes of all files.")
    archive: str = Field(description="Path of all files as one tar.")


class JobPage(_Answer):
    """Jobs, newest first."""

    jobs: list[Job]
    next_page_token: str | None = Field(description="Token of the next page, if any.")


class Trial(_Answer):
    """A candidate that was rated."""

    island: int
    number: int
    state: Literal["complete", "failed"]
    method: str = Field(description="crepe, or the baseline that it is.")
    value: float | None = Field(description="Value of the objective.")
    perplexity: float | None = Field(description="Perplexity, if it was confirmed.")
    scope: str
    coefficients: dict[str, Any]
    failure: str | None
    seconds: float | None


class TrialPage(_Answer):
    """Trials of one island by number."""

    trials: list[Trial]
    next_page_token: str | None


class Worker(_Answer):
    """A worker that reported recently."""

    id: uuid.UUID
    name: str
    device: str
    stages: list[StageKind]
    job_id: uuid.UUID | None = Field(description="Job that it is working on.")
    stage: StageKind | None
    started_at: datetime
    heartbeat_at: datetime
    drain: Drain | None = Field(
        None,
        description="It takes no more stages, and ends: `finish`, when the one in hand is done; "
        "`now`, when that one is handed back.",
    )
    other_store: bool = Field(
        False,
        description="It sees another artifact store than the API. If it started so, it takes no "
        "stages.",
    )


class WorkerList(_Answer):
    """All workers that reported recently."""

    workers: list[Worker]


class Gains(_Answer):
    """How much better than RIA a configuration is, by what was measured; null is not measured."""

    perplexity: float | None = Field(None, description="Share of RIA's perplexity that is saved.")
    divergence: float | None = Field(
        None,
        description="The same share, as the divergence from the dense model tells, where RIA's "
        "perplexity was not measured.",
    )
    proxy: float | None = Field(
        None,
        description="Share of RIA's proxy that is saved, where nothing else was measured.",
    )


class MeasuredElsewhere(_Answer):
    """What a configuration was worth on a model that it was not found on."""

    model: ModelFacts
    gains: Gains


class ConfigurationMatch(_Answer):
    """A configuration of the library, and why it stands where it stands."""

    id: uuid.UUID
    job_id: uuid.UUID | None = Field(description="Job that found it; null if it was imported.")
    created_at: datetime
    method: str
    pattern: str
    scope: str
    models: list[ModelFacts] = Field(description="Models that it was found on.")
    gains: Gains = Field(description="Gains on them.")
    measured: list[MeasuredElsewhere] = Field(description="Gains on other models.")
    fits: bool = Field(description="Whether it has the requested pattern and scope.")
    expected_gains: Gains = Field(
        description="Gain that is likely on the asked model, for the order, under the name of what "
        "it follows from."
    )
    reasons: list[str]


class ConfigurationMatches(_Answer):
    """Configurations, the most promising first."""

    configurations: list[ConfigurationMatch]
    considered: int = Field(
        description="Number of configurations that the library has to choose from."
    )


class MemoryPeak(_Answer):
    """Bytes at a peak."""

    device: int = Field(description="Bytes of the GPU's memory; 0 on a CPU.")
    host: int = Field(description="Bytes of main memory, without pages of mapped files.")
    disk: int = Field(description="Bytes of files that are written, temporary ones included.")


class PlannedStage(_Answer):
    """Time and memory of a stage of a job."""

    title: str
    seconds: tuple[float, float] = Field(description="Seconds, at least and at most.")
    peak: MemoryPeak


class PlannedModel(_Answer):
    """A model, as far as its configuration tells."""

    family: str
    parameters: int
    prunable: int = Field(description="Number of weights that can be pruned.")
    dtype: str = Field(description="Data type that it would be loaded in.")
    weights_bytes: int
    context_length: int | None = Field(description="Tokens of the longest window that it reads.")


class PlannedMachine(_Answer):
    """A machine that a plan is for."""

    name: str
    gpu: bool
    memory_bytes: int = Field(description="Memory of the card; on a CPU the main memory.")
    main_bytes: int = Field(description="Main memory.")
    measured: bool = Field(description="Whether its rates were measured, or come from data sheets.")


class PlannedFolder(_Answer):
    """What the pruned model will take on a disk."""

    saved_bytes: int = Field(description="Bytes of its weights and masks.")
    packed_bytes: int = Field(description="About so many once `pho pack` has packed them.")
    times_smaller: float | None = Field(
        None,
        description="Bytes of the dense model over those of a cut one: it is about so many times "
        "as fast where reading the weights takes the time. null where no bytes leave.",
    )


class PlanAnswer(_Answer):
    """What a job takes on a machine, from the configuration of its model alone."""

    model: PlannedModel
    machine: PlannedMachine
    choice: str | None = Field(
        None, description="What the minutes of the job choose there, and how long that takes."
    )
    fits: bool
    obstacles: list[str] = Field(description="Reasons why it does not fit.")
    ways_out: list[str] = Field(description="Changes that would make it fit; each was tried.")
    stream: bool
    windows_at_once: int = Field(description="Number of calibration windows that run at once.")
    recompute: bool = Field(description="Whether its blocks run twice to save memory.")
    pruned: PlannedFolder = Field(description="The pruned model.")
    peak: MemoryPeak = Field(description="Peak of all stages; the disk is their sum.")
    seconds: tuple[float, float] = Field(description="Seconds of all stages, at least and at most.")
    stages: list[PlannedStage]


class FieldProblem(_Answer):
    """One thing that is wrong with a request."""

    pointer: str | None = Field(None, description="JSON pointer into the body.")
    parameter: str | None = Field(
        None, description="Parameter of the query, the path or the headers."
    )
    detail: str


class Problem(_Answer):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable name of the problem, for programs.")
    request_id: str | None = Field(
        None, description="Id of the request, as in X-Request-ID and in the log."
    )
    state: JobState | None = Field(None, description="State of the job, in a conflict.")
    errors: list[FieldProblem] | None = None


class Health(_Answer):
    """State of the service and of what it needs."""

    status: Literal["ok"]
    warnings: list[str] = Field([], description="Faults that do not keep the service from working.")
    details: list[str] = Field(
        [], description="With `?verbose`: sizes, as `pho doctor` tells them."
    )
