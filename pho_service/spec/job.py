"""
The document that a job is submitted as, checked field by field, and the rules between its fields.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pho_service.host.access import Access
from pho_service.spec.configuration import WIDER
from pho_service.spec.curve import (
    FEW_FINALISTS,
    MOST_PATTERNS,
    Target,
    asked_patterns,
    curve_patterns,
    first_of_kinds,
    one_of,
)
from pho_service.spec.document import (
    AFTER,
    JOB,
    MODEL,
    PRUNED,
    REPORT,
    SEARCH,
    TEXT,
    Document,
    FieldShown,
    JobId,
    Labels,
    Name,
    Number,
    Title,
)
from pho_service.spec.export import BITS_WINDOWS, MOST_FILES, GgufWanted, file_bytes
from pho_service.spec.fields import (
    CalibrationSpec,
    ConfirmSpec,
    JobLimits,
    RecoverySpec,
    SearchReportSpec,
    ValidationSpec,
    WarmStartSpec,
    check_cut,
    check_field,
    check_models,
    check_several,
)
from pho_service.spec.minutes import (
    MINUTES,
    MOST_MINUTES,
    MOST_PASSES,
    REST,
    SizeName,
    of_minutes,
    sizes_of,
    with_minutes,
    with_sizes,
)
from pho_service.spec.objective import (
    MAX_TRIALS,
    InFull,
    Objective,
    Sampler,
    SamplerSeed,
    SearchOptions,
    Trials,
    options_of,
)
from pho_service.spec.pattern import Pattern, PatternText, ScopeName
from pho_service.spec.recovery import Recovery
from pho_service.spec.space import DEFAULT_PRESET, Preset, PresetName, SearchSpaceSpec
from pho_service.spec.steps import Candidate, Steps, StepsSpec
from pho_service.spec.structure import is_structured
from pho_service.spec.tasks import MOST_TASKS, USUAL_TASKS, task_names
from pho_service.tuning.plan import SearchPlan, SearchRequest

_PATTERN = {"patterns", "target", "pattern", "scope"}  # what says which patterns are searched


def each_model_once(value: list[str], info: ValidationInfo) -> list[str]:
    """No model is given twice."""
    names = [info.data.get("model"), *value]
    twice = [name for name in value if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return value


def of_one_model(value: str | None, info: ValidationInfo) -> str | None:
    """A revision is of one model."""
    if value is not None and info.data.get("more_models"):
        raise ValueError("a revision is of one model: leave it out where there are several")
    return value


def of_confirmed(value: SearchReportSpec | None, info: ValidationInfo) -> SearchReportSpec | None:
    """What is reported was confirmed, at one pattern."""
    if value is not None and info.data.get("confirm", 0) is None:
        raise ValueError("what is reported was confirmed before: confirm must not be null")
    return value


def of_one_text(value: Any, info: ValidationInfo) -> Any:
    """Several models have no text that all of them are measured on."""
    if value is not None and info.data.get("more_models"):
        raise ValueError(
            "several models are searched by the proxy alone: leave it out, and measure the "
            "result on each of them afterwards, with `pho transfer` or :transfer"
        )
    return value


def are_patterns(value: list[str] | None) -> list[str] | None:
    """Each is a pattern, and none is given twice."""
    if value is not None:
        curve_patterns(value, None)
    return value


def is_pattern(value: str | None, info: ValidationInfo) -> str | None:
    """It is a pattern, or something else says how sparse the model is to be."""
    if value is not None:
        Pattern.parse(value)
    if {"patterns", "target"} <= info.data.keys():
        one_of(value, info.data["patterns"], info.data["target"])
    return value


def fits_pattern(value: str | None, info: ValidationInfo) -> str | None:
    """The scope is one of the pattern."""
    if value is not None and info.data.get("pattern") is not None:
        Pattern.parse(info.data["pattern"], value)
    return value


def can_be_measured(value: Any, info: ValidationInfo) -> Any:
    """Perplexities need a text."""
    needed = isinstance(value, ValidationSpec) or (
        isinstance(value, Objective) and value.name == "perplexity"
    )
    if needed and info.data.get("confirm", 0) is None:
        raise ValueError("perplexities need a text: confirm must not be null")
    if isinstance(value, Objective):
        more = info.data.get("more_models") or []
        if value.over is not None and not more:
            raise ValueError(f"over={value.over} is for several models: give more_models")
        value.over_models(1 + len(more))  # raises with the rule
    return value


def was_calibrated(value: SearchSpaceSpec, info: ValidationInfo) -> SearchSpaceSpec:
    """Only kernel sizes that are calibrated can be searched."""
    calibration = info.data.get("calibration")
    sizes = value.given().get("kernel_sizes", ())
    missing = set(sizes) - set(calibration.kernel_sizes if calibration else ())
    if calibration is not None and missing:
        raise ValueError(
            f"kernel_sizes has {min(missing)}, which is not in calibration.kernel_sizes: "
            f"{', '.join(map(str, calibration.kernel_sizes))}. Add it there"
        )
    return value


def more_than_baselines(value: int, info: ValidationInfo) -> int:
    """The plan of the search is one."""
    needed = {"preset", "steps", "calibration", "search_space"}
    if _PATTERN | needed <= info.data.keys():
        fields = info.data
        for pattern in first_of_kinds(asked_patterns(fields)):
            if pattern.structured:
                continue
            preset = preset_of(fields, pattern)
            request = SearchRequest(
                pattern=pattern, trials=value, steps=preset.steps, bounds=preset.bounds
            )
            request.plan(tuple(fields["calibration"].kernel_sizes))
    return value


def has_one_model(value: Any, info: ValidationInfo) -> Any:
    """One model is pruned, and measured on tasks."""
    if value and info.data.get("more_models"):
        what = "pruned" if info.field_name == "prune" else "measured on tasks"
        raise ValueError(
            f"one model is {what}, and this job searches for several: prune each of them with "
            "the result, `pho prune MODEL --config`"
            + (", and measure it, `pho evaluate FOLDER --tasks`" * (info.field_name == "tasks"))
        )
    return value


def each_task_once(value: list[str] | None) -> list[str] | None:
    """No task is named twice."""
    return None if value is None else [*task_names(value)]


def of_tasks(value: Any, info: ValidationInfo) -> Any:
    """Settings of how tasks are measured need some tasks."""
    if value is not None and info.data.get("tasks", ()) is None:
        raise ValueError("it is of tasks, but none is named: give tasks, or leave it out")
    return value


def of_pruned(value: RecoverySpec | None, info: ValidationInfo) -> RecoverySpec | None:
    """A pruned model is recovered, in memory."""
    if value is not None and not info.data.get("prune", True):
        raise ValueError("the pruned model is recovered, and none is written: give prune, too")
    if value is not None and info.data.get("stream"):
        raise ValueError("a streamed model cannot be trained: leave it out, or do not stream")
    return value


def also_pruned(value: list[str], info: ValidationInfo) -> list[str]:
    """A pruned model is written as GGUF files, each once."""
    if value and not info.data.get("prune", True):
        raise ValueError("the pruned model is exported, and none is written: give prune, too")
    if len({*value}) < len(value):
        raise ValueError("a type or size is given twice: give each once")
    return value


def differ(value: int, info: ValidationInfo) -> int:
    """Islands are not all the same."""
    if value > 1 and info.data.get("sampler") == "hill-climb":
        raise ValueError(
            "a hill climb draws nothing at random, so all islands would be the same: give 1"
        )
    return value


def preset_of(fields: Mapping[str, Any], pattern: Pattern) -> Preset:
    """The preset of a job with these fields, with its steps and bounds."""
    preset = Preset.of(fields["preset"], pattern)
    return preset.changed(fields["steps"].given(), fields["search_space"].given())


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


_SEVERAL = "Several patterns, or the highest sparsity that is good enough"  # a fold of the form


class JobSpec(Document):
    """A search job: a model, and a pattern, several, or a target; the rest has defaults."""

    model: Annotated[
        Name,
        FieldShown(section=MODEL, rank=1, option="", label="Model (needed)", picks="models"),
    ] = Field(description="Hub id, model folder or .gguf file.")
    more_models: Annotated[list[Name], FieldShown(section=MODEL, option="")] = Field(
        [],
        max_length=31,
        description="Other models that the same configuration is to be good for.",
    )
    patterns: Annotated[
        list[PatternText] | None,
        FieldShown(
            section=PRUNED,
            fold=_SEVERAL,
            label="Several patterns",
            help="Instead of --pattern: several, with commas between, each searched and confirmed.",
            kind="words",
            service=True,  # `pho curve` searches at several
        ),
    ] = Field(
        None,
        min_length=1,
        max_length=MOST_PATTERNS,
        exclude_if=lambda patterns: patterns is None,
        description="Patterns instead of one: each is searched and confirmed, with one calibration "
        "for all.",
    )
    target: Annotated[
        Target | None,
        FieldShown(section=PRUNED, fold=_SEVERAL),
    ] = Field(
        None,
        exclude_if=lambda target: target is None,
        description="How much the perplexity may rise, instead of a pattern: the highest sparsity "
        "within it is found.",
    )
    pattern: Annotated[
        PatternText | None,
        FieldShown(
            section=PRUNED,
            rank=2,
            picks="patterns",
            help="Share of weights to remove (0.5), N kept of M (2:4), or a cut of neurons, heads "
            "and blocks (structured:20%, smaller:20%, bytes:95MB, faster:1.2x).",
        ),
    ] = Field(
        None,
        validate_default=True,
        description="Share of weights to remove (0.5), N kept of M (2:4), or a cut of neurons, "
        "heads and blocks. That is of a share of their weights (structured:20%) or of the file "
        "(smaller:20%), for a GGUF file's size (bytes:95MB), or for a speed (faster:1.2x).",
    )
    scope: Annotated[ScopeName | None, FieldShown(section=PRUNED)] = Field(
        None, description="Where weights compete; layer by default, row for N:M."
    )
    preset: Annotated[PresetName, FieldShown(section=PRUNED, rank=4)] = Field(
        DEFAULT_PRESET,
        description="What is searched, and what candidates go through. "
        "With score, a cheap look, by the score alone. With crepe, the score as "
        "published, without a gradient exponent. With crepe-plus, the best that leaves kept "
        "weights untouched. With best, kept weights are updated, too, and each block of the "
        "winner is trained.",
    )
    steps: Annotated[StepsSpec, FieldShown(section=PRUNED)] = StepsSpec()
    # A study of `pho search` is named after what it searches.
    name: Annotated[Title | None, FieldShown(section=JOB, service=True)] = Field(
        None, description="Name of the job's study; the model and the pattern by default."
    )
    labels: Labels = Field({})
    revision: Annotated[Name | None, FieldShown(section=MODEL)] = Field(
        None, description="Branch, tag or commit of a hub model."
    )
    dtype: Annotated[Dtype, FieldShown(section=MODEL, label="Data type")] = Field(
        "auto", description="Data type that the weights are loaded in."
    )
    stream: Annotated[bool, FieldShown(section=MODEL)] = Field(
        False,
        description="Whether to leave the weights on disk, one block at a time on the device.",
    )
    calibration: Annotated[CalibrationSpec, FieldShown(section=TEXT)] = CalibrationSpec()
    confirm: Annotated[
        ConfirmSpec | None,
        FieldShown(
            section=REPORT,
            option="--no-confirm",
            label="Confirm by perplexity",
            help="Measure no perplexity: the best by the objective alone.",
            kind="off",
        ),
    ] = Field(
        ConfirmSpec(),
        description="How the finalists are confirmed; null takes the best by the objective alone.",
    )
    report: Annotated[SearchReportSpec | None, FieldShown(section=REPORT, prefix="report-")] = (
        Field(
            None,
            exclude_if=lambda report: report is None,
            description="How the result is measured on a text that nothing was chosen on; null: it "
            "is told on the text that chose it.",
        )
    )
    validation: Annotated[ValidationSpec | None, FieldShown(section=REPORT)] = Field(
        None,
        description="Rating of random candidates by each proxy and by perplexity on the text that "
        "confirms, as `pho validate` does it. Where the search's own proxy does not rank, four "
        "times as many finalists are confirmed.",
    )
    objective: Objective = Objective()
    warm_start: WarmStartSpec | None = Field(
        None,
        description="Start from what the library has for similar models; {} is enough.",
    )
    # Its trials are in the study of this one from the beginning.
    fork_of: Annotated[
        JobId | None,
        FieldShown(section=SEARCH, option="", argument="", label="Fork of the job with this id"),
    ] = Field(
        None,
        exclude_if=lambda job: job is None,
        description="Id of a job whose trials inside the search space this search begins with, "
        "with their values. What these depend on must be as in that job.",
    )
    sampler: Sampler = Field("cmaes", description="Sampler that candidates come from.")
    search_space: Annotated[
        SearchSpaceSpec,
        FieldShown(
            fold="Search space",
            option="--space",
            help="Bounds of the search, name=low:high, or name=value, which fixes it; may be "
            "given several times. Names: neighbourhood_share, row_share, activation_exponent, "
            "gradient_exponent, kernel_sizes=3,5, allocations=uniform,fisher, allocation_spread.",
            kind="bounds",
        ),
    ] = SearchSpaceSpec()
    trials: Trials = SearchOptions.trials
    # One process is one island.
    islands: Annotated[int, FieldShown(service=True)] = Field(
        1, ge=1, le=64, description="Number of searches, each with a seed of its own."
    )
    seed: SamplerSeed = SearchOptions.seed
    in_full: InFull = SearchOptions.in_full
    minutes: Annotated[
        Number | None, FieldShown(section=JOB, rank=5, kind="minutes", default="")
    ] = Field(
        None,
        gt=0,
        le=MOST_MINUTES,
        exclude_if=lambda minutes: minutes is None,
        description="Minutes that it may take: sizes that are not given are chosen for that, on "
        f"the machine that does it. By default {MINUTES:g}, or no limit where calibration "
        "windows or their length are given; none takes 128 windows of 2,048 tokens, as papers do.",
    )
    # Written down, so that a document that is read again has the same ones.
    free_sizes: Annotated[list[SizeName], FieldShown(option="", argument="")] = Field(
        [],
        exclude_if=lambda sizes: not sizes,
        description="Sizes that the minutes choose: by default those that are not given.",
    )
    # `pho evaluate --tasks` measures what was pruned.
    tasks: Annotated[
        list[Name] | None,
        FieldShown(
            section=AFTER,
            help="Zero-shot tasks of lm-evaluation-harness, with commas between; papers report "
            f"{','.join(USUAL_TASKS)}. Needs the extra eval.",
            kind="words",
            service=True,
        ),
    ] = Field(
        None,
        min_length=1,
        max_length=MOST_TASKS,
        exclude_if=lambda names: names is None,
        description="Zero-shot tasks of lm-evaluation-harness that the dense model and the pruned "
        "one are measured on, such as boolq or arc_easy. Needs the extra eval.",
    )
    tasks_dir: Annotated[Name | None, FieldShown(section=AFTER, service=True)] = Field(
        None,
        exclude_if=lambda folder: folder is None,
        description="Folder with task files of one's own, which come before the harness's. What "
        "they name as !function is run: a service allows folders below PHO_TASK_ROOTS.",
    )
    tasks_limit: Annotated[
        int | None, FieldShown(section=AFTER, option="--limit", service=True)
    ] = Field(
        None,
        ge=1,
        exclude_if=lambda limit: limit is None,
        description="Only the first N examples of each task.",
    )
    # `pho prune` does it, with what was found.
    prune: Annotated[
        bool, FieldShown(section=AFTER, label="Write the pruned model", service=True)
    ] = Field(
        False,
        exclude_if=lambda wanted: not wanted,
        description="Whether the pruned model is written when the search is over, to be fetched "
        "with `pho pull`.",
    )
    gguf: Annotated[
        list[GgufWanted], FieldShown(section=AFTER, label="GGUF files", service=True)
    ] = Field(
        [],
        max_length=MOST_FILES,
        exclude_if=lambda types: not types,
        description="Types in which the pruned model is also written, for llama.cpp, such as "
        "q8_0; or sizes, such as 105MB: then each linear has the type that costs least.",
    )
    recovery: Annotated[RecoverySpec | None, FieldShown(section=AFTER, service=True)] = Field(
        None,
        exclude_if=lambda recovery: recovery is None,
        description="How the pruned model is recovered before it is written: trained towards the "
        "dense one, masks fixed. With minutes, {} is a recovery in what they leave, and the "
        "default where best or a cut changes the weights anyway; null is none.",
    )
    notify: Annotated[Name | None, FieldShown(section=AFTER, service=True)] = Field(
        None,
        exclude_if=lambda url: url is None,
        description="URL of a webhook that is called when the job has ended; the service must "
        "allow its host.",
    )
    priority: Annotated[int, FieldShown(section=JOB, service=True)] = Field(
        0, ge=-100, le=100, description="Place in the queue: higher goes first."
    )
    # An interrupted search goes on with the same command.
    timeout_s: Annotated[
        float | None, FieldShown(option="--timeout", label="Time limit in seconds", service=True)
    ] = Field(
        None,
        gt=0,
        le=1e7,
        description="Time limit in seconds for each island's search; the best result so far is "
        "used then.",
    )
    max_failed_trials: Annotated[int, FieldShown(service=True)] = Field(
        20, ge=0, le=MAX_TRIALS, description="Number of failed trials above which the job fails."
    )
    max_attempts: Annotated[int, FieldShown(section=JOB, service=True)] = Field(
        3, ge=1, le=20, description="Number of attempts at each stage before the job fails."
    )

    _each_model_once = field_validator("more_models")(each_model_once)
    _of_one_model = field_validator("revision")(of_one_model)
    _of_one_text = field_validator("confirm", "report")(of_one_text)
    _of_confirmed = field_validator("report")(of_confirmed)
    _are_patterns = field_validator("patterns")(are_patterns)
    _is_pattern = field_validator("pattern")(is_pattern)
    _fits_pattern = field_validator("scope")(fits_pattern)
    _can_be_measured = field_validator("objective", "validation")(can_be_measured)
    _was_calibrated = field_validator("search_space")(was_calibrated)
    _more_than_baselines = field_validator("trials")(more_than_baselines)
    _each_task_once = field_validator("tasks")(each_task_once)
    _of_tasks = field_validator("tasks_dir", "tasks_limit")(of_tasks)
    _has_one_model = field_validator("prune", "tasks")(has_one_model)
    _of_pruned = field_validator("recovery")(of_pruned)
    _also_pruned = field_validator("gguf")(also_pruned)
    _differ = field_validator("islands")(differ)
    _of_minutes = field_validator("free_sizes")(of_minutes)

    @model_validator(mode="before")
    @classmethod
    def _confirmed_otherwise(cls, values: Any) -> Any:
        """
        Several models are not confirmed: there is no text that all of them are measured on. With
        several patterns, and where blocks are cut, there are fewer finalists.
        """
        if isinstance(values, dict) and values.get("more_models"):
            return with_minutes({"confirm": None, **values})
        if isinstance(values, dict):
            values = with_minutes(values)
        if isinstance(values, dict) and (values.get("patterns") or _cuts(values)):
            confirm = values.get("confirm", {})
            if isinstance(confirm, dict):
                return {**values, "confirm": {"finalists": FEW_FINALISTS, **confirm}}
        return values

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.several:
            check_several(self)
        if self.is_cut:
            check_cut(self)
            return self
        for pattern in first_of_kinds(self.points):
            self.of_pattern(pattern).plan(0)
        return self

    def sized(self, sizes: Mapping[SizeName, int | None]) -> "JobSpec":
        """With sizes that were chosen for the minutes, so that they are free no more."""
        return type(self).model_validate(with_sizes(self.model_dump(mode="json"), sizes))

    @property
    def sizes(self) -> dict[SizeName, int | None]:
        """Those of its sizes that it has a use for."""
        return sizes_of(self.model_dump(mode="json"))

    @property
    def recovers_in_rest(self) -> bool:
        """Whether it recovers in what its minutes leave."""
        return self.minutes is not None and self.recovery is not None and self.recovery.is_open

    @property
    def most_passes(self) -> int:
        """
        Passes of the winner's training: the preset's number may grow into its minutes, unless a
        recovery takes what they leave. 0 if nothing is trained.
        """
        how = self.request(0).steps.reconstruction
        if not how.wanted:
            return 0
        fixed = self.minutes is None or self.recovers_in_rest
        fixed = fixed or "reconstruction" in self.steps.given()
        return how.passes if fixed else max(how.passes, MOST_PASSES)

    def recovery_settings(self, share: float = REST) -> Recovery | None:
        """How it recovers; in what its minutes leave, this is planned to be a share of them."""
        return None if self.recovery is None else self.recovery.settings(self.minutes, share)

    @property
    def texts_measured_on(self) -> list[str]:
        """The files of their own that perplexities are measured on."""
        parts = (self.confirm, self.report)
        return [part.text for part in parts if part is not None and part.text is not None]

    @property
    def models(self) -> list[str]:
        """All of them."""
        return [self.model, *self.more_models]

    def of_model(self, number: int) -> "JobSpec":
        return self.model_copy(update={"model": self.models[number], "more_models": []})

    @property
    def is_cut(self) -> bool:
        """Return whether neurons, heads and blocks are cut out, and no coefficients searched."""
        return self.pruning().structured

    @property
    def several(self) -> bool:
        """Return whether several sparsities are searched: given ones, or those of a target."""
        return self.pattern is None

    @property
    def points(self) -> list[Pattern]:
        """Patterns that may be pruned in, by sparsity: one, all of several, or a target's."""
        return asked_patterns(dict(self))

    @property
    def most_points(self) -> int:
        """The most patterns that are searched."""
        return len(self.points) if self.target is None else self.target.most_points

    def of_pattern(self, pattern: Pattern) -> "JobSpec":
        if not self.several:
            return self
        return self.model_copy(
            update={
                "pattern": str(pattern),
                "patterns": None,
                "target": None,
                "scope": pattern.free_scope,
            }
        )

    def pruning(self) -> Pattern:
        """The pattern to prune in; of several the first."""
        return self.points[0]

    def request(self, island: int) -> SearchRequest:
        """
        In the form that a search takes; of several patterns, that of the first. The first island
        has the seed of the job.
        """
        if self.several:
            return self.of_pattern(self.pruning()).request(island)
        if self.is_cut:
            assert self.confirm is not None  # cuts are compared by perplexity
            finalists = self.confirm.finalists
            return SearchRequest(pattern=self.pruning(), seed=self.seed, finalists=finalists)
        preset = preset_of(dict(self), self.pruning())
        return SearchRequest(
            pattern=self.pruning(),
            objective=self.objective.over_models(len(self.models)),
            bounds=preset.bounds,
            steps=preset.steps,
            sampler=self.sampler,
            **{**options_of(self), "seed": island_seed(self.seed, island)},
            finalists=self.confirm.finalists if self.confirm else 1,
            warm_start=self._warm_points(preset.steps),
            validation=self.validation,
        )

    def _warm_points(self, steps: Steps) -> tuple[Candidate, ...]:
        points = (self.warm_start.found if self.warm_start else None) or []
        return tuple(
            Candidate(
                method="crepe",
                coefficients=point.coefficients,
                pattern=self.pruning(),
                steps=replace(steps, allocation=point.allocation),
            )
            for point in points
        )

    def plan(self, island: int) -> SearchPlan:
        """Return the plan of one island."""
        return self.request(island).plan(tuple(self.calibration.kernel_sizes))

    @property
    def title(self) -> str:
        """The name of the job before its id."""
        names = " + ".join(name.rstrip("/").rpartition("/")[2] or name for name in self.models)
        return self.name or f"{names[:200]} {self.asked}"

    @property
    def asked(self) -> str:
        """The asked sparsity in words."""
        if self.target is not None:
            return f"within {self.target}"
        if self.patterns is not None:
            return f"at {', '.join(map(str, self.points))}"
        return str(self.pattern) if self.is_cut else f"{self.pattern} {self.pruning().scope.value}"

    @property
    def calibration_key(self) -> str:
        calibration = self.calibration.model_dump(exclude={"memory_bytes"})
        document = [self.model, self.revision, self.dtype, self.stream, calibration]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()

    def access_checks(self, access: Access) -> Iterator[Callable[[], None]]:
        """Checks whether what is named is allowed here; each raises FieldError if it is not."""
        more = {f"more_models/{number}": name for number, name in enumerate(self.more_models)}
        yield partial(check_models, {"model": self.model, **more}, access)
        yield partial(self.calibration.check_text, "calibration", access)
        if self.confirm is not None and self.confirm.text is not None:
            yield partial(check_field, "confirm/text", access.text, self.confirm.text)
        if self.report is not None:
            yield partial(self.report.check_text, "report", access)
        if self.recovery is not None and self.recovery.text is not None:
            yield partial(check_field, "recovery/text", access.text, self.recovery.text)
        if self.tasks_dir is not None:
            yield partial(check_field, "tasks_dir", access.task_folder, self.tasks_dir)

    def check_size(self, limits: JobLimits, *, more_trials: int = 0, timed: int = 0) -> int:
        """
        Count what a job asks for: trials, and tokens of the calibrations, of every candidate that
        gets a perplexity, of a reconstruction's passes, and of a recovery, whose minutes are
        planned for ``timed`` ones. Baselines and the dense model are not counted. Returns the
        tokens.
        """
        trials, points = self.trials + more_trials, self.most_points
        things = "patterns" if self.several else "islands"
        limits.check_trials("/trials", trials, self.islands * points, things)
        tokens = self.calibration.tokens * len(self.models)
        limits.check_tokens("/calibration/samples", tokens)
        if self.confirm is not None:
            measured = self.confirm.finalists
            if self.validation is not None:
                measured = WIDER * measured + self.validation.candidates
            measured += trials * self.islands if self.objective.name == "perplexity" else 0
            tokens += points * measured * self.confirm.windows * self.calibration.context_length
            tokens += points * self.most_passes * self.calibration.tokens
            if self.is_cut:  # each runs the calibration's text, and so does the rating of all
                tokens += points * (measured + 1) * self.calibration.tokens
            limits.check_tokens("/confirm/windows", tokens)
        if self.report is not None:
            tokens += points * self.report.windows * self.calibration.context_length
            limits.check_tokens("/report/windows", tokens)
        if (how := self.recovery_settings(share=1)) is not None:  # the most that it can be
            given = "recovery/minutes" if how.tokens is None else "recovery/tokens"
            pointer = "/minutes" if self.recovers_in_rest else f"/{given}"
            if how.tokens is None:
                limits.check_minutes(pointer, how.time_s / 60)
            tokens += self._recovered(timed)
            limits.check_tokens(pointer, tokens)
        tokens += self._tokens_of_bits if self.prune else 0
        limits.check_tokens("/gguf", tokens)
        return tokens

    @property
    def files(self) -> list[str]:
        """What the pruned model is written as for llama.cpp, with the bytes that it is cut for."""
        goal = self.pruning().goal
        size = [goal.size] if goal is not None and goal.size else []
        return [*dict.fromkeys([*self.gguf, *size])]

    @property
    def sized_files(self) -> int:
        """How many GGUF files of so many bytes it writes."""
        return sum(file_bytes(name) is not None for name in self.files)

    @property
    def _tokens_of_bits(self) -> int:
        """Those that the types of such files are chosen on: once for all of them."""
        windows = min(BITS_WINDOWS, self.calibration.samples) if self.sized_files else 0
        return windows * self.calibration.context_length

    def _recovered(self, timed: int) -> int:
        """Tokens of the recovery, whose minutes are planned for ``timed`` ones."""
        if self.recovery is None:
            return 0
        tokens = timed if self.recovery.tokens is None else self.recovery.tokens
        return tokens + self.recovery.written

    def extension(self, trials: int, limits: JobLimits, *, timed: int = 0) -> int:
        """Check so many trials more, and count the tokens of what is done for them."""
        self.check_size(limits, more_trials=trials, timed=timed)
        alone = self.model_copy(update={"trials": trials}).check_size(limits, timed=timed)
        return alone - self.calibration.tokens * len(self.models)

    def tokens_to_prune(self, timed: int = 0) -> int:
        """Those of writing a pruned model when it is asked for by itself."""
        pruned = self.calibration.tokens * (1 + self.most_passes)
        return pruned + self._recovered(timed) + self._tokens_of_bits

    def placed(self, access: Access) -> "JobSpec":
        changes = {
            "model": access.placed_model(self.model),
            "more_models": [access.placed_model(name) for name in self.more_models],
            "calibration": self.calibration.placed(access),
            "report": self.report and self.report.placed(access),
        }
        return self.model_copy(update=changes)


def island_seed(seed: int, island: int) -> int:
    """The seed of an island: the job's own for the first, and far from it for the others."""
    if island == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {island}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _cuts(values: Mapping[str, Any]) -> bool:
    """Whether a document that is not checked yet asks for one cut, or for a target of cuts."""
    target = values.get("target")
    of_cuts = isinstance(target, dict) and target.get("structured") is True
    return of_cuts or is_structured(values.get("pattern"))
