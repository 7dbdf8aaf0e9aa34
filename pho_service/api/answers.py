"""
What the HTTP API answers, as the server writes it and the client reads it.
"""

import uuid
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal[
    "queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"
]
StageName = Literal["transfer", "calibrate", "search", "confirm", "perplexity", "finish"]
OVER: tuple[State, ...] = ("cancelled", "succeeded", "failed")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")  # a newer server may say more


class Progress(_Answer):
    """How far a job is."""

    trials_done: int = Field(description="Of all islands.")
    trials: int = Field(description="Of all islands.")
    best_value: float | None = Field(
        description="Best objective so far; once there is a configuration, its own."
    )
    perplexities_done: int
    perplexities: int = Field(description="Known once the search is over.")
    shards_done: int = Field(0, description="Of the calibrations, summed up already or not.")
    shards: int = Field(0, description="That large calibrations are shared out in; 0 for none.")
    models_done: int = Field(0, description="Of a transfer: measured, or found impossible.")
    models: int = Field(0, description="Of a transfer.")
    seconds_left: float | None = Field(
        description="Of the search or of the perplexities, at the present pace; a hill climb may "
        "end before."
    )


class JobError(_Answer):
    """Why a job failed."""

    type: str
    message: str
    stage: StageName
    attempts: int | None = None
    layer: str | None = None
    candidate: dict[str, Any] | None = Field(None, description="Method, coefficients, scope.")


class Best(_Answer):
    """The winner in short; the whole configuration is at the job's ``best``."""

    method: str
    objective: float | None
    perplexity: float | None


class ProxyQuality(_Answer):
    """How well a proxy ranks, against perplexity; intervals are 95 %."""

    spearman: float
    spearman_interval: tuple[float, float]
    spearman_better_half: float
    kendall: float
    kendall_interval: tuple[float, float]
    regret: float = Field(description="Of the best among the proxy's top k.")
    regret_interval: tuple[float, float]
    top_k: int


class Job(_Answer):
    """A search, or a transfer of what a search has found."""

    id: uuid.UUID
    kind: Literal["search", "transfer"] = "search"
    name: str = Field(description="Also of its study; more islands have it with a number.")
    state: State
    stage: StageName | None = Field(description="What is being done, or was done last.")
    priority: int
    progress: Progress
    best: Best | None
    validation: dict[str, ProxyQuality] | None = Field(description="By proxy, if asked for.")
    error: JobError | None
    warnings: list[str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: dict[str, Any] = Field(description="What was submitted, with the defaults.")


class JobPage(_Answer):
    """Jobs, newest first."""

    jobs: list[Job]
    next_page_token: str | None = Field(description="null: there are no more.")


class Trial(_Answer):
    """A candidate that was rated."""

    island: int
    number: int
    state: Literal["complete", "failed"]
    method: str = Field(description="crepe, or the baseline that it is.")
    value: float | None = Field(description="Of the objective.")
    perplexity: float | None = Field(description="If it was confirmed.")
    scope: str
    coefficients: dict[str, Any]
    failure: str | None
    seconds: float | None


class TrialPage(_Answer):
    """Trials of one island by number."""

    trials: list[Trial]
    next_page_token: str | None


class Worker(_Answer):
    """A worker that reported lately."""

    id: uuid.UUID
    name: str
    device: str
    stages: list[StageName]
    job_id: uuid.UUID | None = Field(description="What it is working on.")
    stage: StageName | None
    started_at: datetime
    heartbeat_at: datetime


class WorkerList(_Answer):
    """All workers that reported lately."""

    workers: list[Worker]


class ModelFacts(_Answer):
    """A model, as far as a library knows it."""

    name: str
    family: str | None = Field(description="model_type; null: an older PHO did not write it down.")
    parameters: int | None


class Gain(_Answer):
    """How much better than RIA a configuration was."""

    share: float = Field(description="Of RIA's perplexity, or proxy, that is saved.")
    by: Literal["perplexity", "divergence", "proxy"] = Field(
        description="divergence: perplexity as the divergence from the dense model tells."
    )


class MeasuredElsewhere(_Answer):
    """What a configuration was worth on a model that it was not found on."""

    model: ModelFacts
    gain: Gain


class ConfigurationMatch(_Answer):
    """A configuration of the library, and why it stands where it stands."""

    id: uuid.UUID
    job_id: uuid.UUID | None = Field(description="That found it; null: it was imported.")
    created_at: datetime
    method: str
    pattern: str
    scope: str
    models: list[ModelFacts] = Field(description="That it was found on.")
    gain: Gain | None = Field(description="On them; null: RIA was not measured beside it.")
    measured: list[MeasuredElsewhere] = Field(description="On other models.")
    fits: bool = Field(description="It is of the asked pattern and scope.")
    expected_gain: float | None = Field(description="Share, on the asked model; for the order.")
    reasons: list[str]


class ConfigurationMatches(_Answer):
    """Configurations, the most promising first."""

    configurations: list[ConfigurationMatch]
    considered: int = Field(description="How many the library has to choose from.")


class MemoryPeak(_Answer):
    """Bytes at a peak."""

    device: int = Field(description="Of the GPU; 0 on a CPU.")
    host: int = Field(description="Of main memory, without pages of mapped files.")
    disk: int = Field(description="In files that are written, temporary ones included.")


class PlannedStage(_Answer):
    """What a stage of a job takes."""

    title: str
    seconds: tuple[float, float] = Field(description="At least and at most.")
    peak: MemoryPeak


class PlannedModel(_Answer):
    """A model, as far as its configuration tells."""

    family: str
    parameters: int
    prunable: int = Field(description="Weights that can be pruned.")
    dtype: str = Field(description="That it would be loaded in.")
    weights_bytes: int
    context_length: int | None = Field(description="The longest window that it reads.")


class PlannedMachine(_Answer):
    """A machine that a plan is for."""

    name: str
    gpu: bool
    memory_bytes: int = Field(description="Of the card; of a CPU the main memory.")
    main_bytes: int = Field(description="Main memory.")
    measured: bool = Field(description="Whether its rates were measured; else from data sheets.")


class PlanAnswer(_Answer):
    """What a job takes on a machine, from the configuration of its model alone."""

    model: PlannedModel
    machine: PlannedMachine
    fits: bool
    obstacles: list[str] = Field(description="Why it does not fit.")
    ways_out: list[str] = Field(description="What would make it fit; each was tried.")
    stream: bool
    windows_at_once: int = Field(description="Windows of the calibration that run at once.")
    recompute: bool = Field(description="Whether its blocks run twice to save memory.")
    peak: MemoryPeak = Field(description="Of all stages; the disk is their sum.")
    seconds: tuple[float, float] = Field(description="Of all stages, at least and at most.")
    stages: list[PlannedStage]


class FieldProblem(_Answer):
    """One thing that is wrong with a request."""

    pointer: str | None = Field(None, description="JSON pointer into the body.")
    parameter: str | None = Field(None, description="Of the query, the path or the headers.")
    detail: str


class Problem(_Answer):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, for programs.")
    request_id: str | None = Field(None, description="As X-Request-ID, and in the log.")
    state: State | None = Field(None, description="Of the job, in a conflict.")
    errors: list[FieldProblem] | None = None


class Health(_Answer):
    """Whether the service works."""

    status: Literal["ok"]
