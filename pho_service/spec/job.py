"""
The document that a job is submitted as, checked field by field.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pho_service.host.access import Access
from pho_service.spec import job_rules as rules
from pho_service.spec.candidate import Candidate
from pho_service.spec.curve import MOST_PATTERNS, Target
from pho_service.spec.document import Document, Name, Shown, Title, printable
from pho_service.spec.fields import (
    CalibrationSpec,
    ConfirmSpec,
    ValidationSpec,
    WarmStartSpec,
    check_field,
    check_models,
)
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.points import (
    asked_patterns,
    check_several,
    curve_confirmation,
    first_of_kinds,
)
from pho_service.spec.presets import DEFAULT_PRESET, PresetName
from pho_service.spec.samplers import (
    MAX_TRIALS,
    Corrections,
    Sampler,
    SamplerSeed,
    SearchOptions,
    Trials,
    options_of,
)
from pho_service.spec.space import SearchSpaceSpec
from pho_service.spec.steps import Steps, StepsSpec
from pho_service.spec.tasks import MOST_TASKS, USUAL_TASKS
from pho_service.tuning.plan import SearchPlan
from pho_service.tuning.request import SearchRequest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PatternText = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(printable)]

# Sections of --help and of the form that several fields name; what names none is of the search.
_PRUNED, _REPORT = "What to prune", "Confirmation and report"
_AFTER, _JOB = "After it", "The job itself"


class JobSpec(Document):
    """A search job: a model, and a pattern, several, or a target; the rest has defaults."""

    model: Annotated[
        Name,
        Shown(section="Model", rank=1, option="", label="Model (needed)", picks="models"),
    ] = Field(description="Hub id, model folder or .gguf file.")
    more_models: Annotated[list[Name], Shown(section="Model", option="")] = Field(
        [],
        max_length=31,
        description="Other models that the same configuration is to be good for.",
    )
    patterns: Annotated[
        list[PatternText] | None,
        Shown(
            section=_PRUNED,
            rank=3,
            label="Or several patterns",
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
        Shown(section=_PRUNED, fold="Sparsities that are tried for a rise"),
    ] = Field(
        None,
        exclude_if=lambda target: target is None,
        description="How much the perplexity may rise, instead of a pattern: the highest sparsity "
        "within it is found.",
    )
    pattern: Annotated[PatternText | None, Shown(section=_PRUNED, rank=1, picks="patterns")] = (
        Field(
            None,
            validate_default=True,
            description="Share of weights to remove (0.5), or N kept of M (2:4).",
        )
    )
    scope: Annotated[Literal["row", "layer", "global"] | None, Shown(section=_PRUNED, rank=2)] = (
        Field(None, description="Where weights compete; layer by default, row for N:M.")
    )
    preset: Annotated[PresetName, Shown(section=_PRUNED, rank=5)] = Field(
        DEFAULT_PRESET,
        description="What is searched, and what candidates go through; steps and search_space "
        "say more. With score, a cheap look, by the score alone. With crepe, the score as "
        "published, without a gradient exponent. With crepe-plus, the best that leaves kept "
        "weights untouched. With best, kept weights are updated, too, and each block of the "
        "winner is trained.",
    )
    steps: Annotated[StepsSpec, Shown(section=_PRUNED)] = StepsSpec()
    # A study of `pho search` is named after what it searches.
    name: Annotated[Title | None, Shown(section=_JOB, service=True)] = Field(
        None, description="Name of the job's study; the model and the pattern by default."
    )
    revision: Annotated[Name | None, Shown(section="Model")] = Field(
        None, description="Branch, tag or commit of a hub model."
    )
    dtype: Annotated[Dtype, Shown(section="Model", label="Data type")] = Field(
        "auto", description="Data type that the weights are loaded in."
    )
    stream: Annotated[bool, Shown(section="Model")] = Field(
        False,
        description="Whether to leave the weights on disk, one block at a time on the device.",
    )
    calibration: Annotated[CalibrationSpec, Shown(section="Text and calibration")] = (
        CalibrationSpec()
    )
    confirm: Annotated[
        ConfirmSpec | None,
        Shown(
            section=_REPORT,
            option="--no-confirm",
            label="Confirm by perplexity",
            help="Measure no perplexity: the best by the objective alone.",
            kind="off",
        ),
    ] = Field(
        ConfirmSpec(),
        description="How the best candidates are confirmed; null takes the best by the objective "
        "alone.",
    )
    validation: Annotated[ValidationSpec | None, Shown(section=_REPORT)] = Field(
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
    sampler: Annotated[Sampler, Shown(rank=3)] = Field(
        "cmaes", description="Sampler that candidates come from."
    )
    search_space: Annotated[
        SearchSpaceSpec,
        Shown(
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
    islands: Annotated[int, Shown(rank=4, service=True)] = Field(
        1, ge=1, le=64, description="Number of searches, each with a seed of its own."
    )
    seed: SamplerSeed = SearchOptions.seed
    corrections: Corrections = SearchOptions.corrections
    # `pho evaluate --tasks` measures what was pruned.
    tasks: Annotated[
        list[Name] | None,
        Shown(
            section=_AFTER,
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
    tasks_dir: Annotated[Name | None, Shown(section=_AFTER, service=True)] = Field(
        None,
        exclude_if=lambda folder: folder is None,
        description="Folder with task files of one's own, which come before the harness's. What "
        "they name as !function is run: a service allows folders below PHO_TASK_ROOTS.",
    )
    tasks_limit: Annotated[int | None, Shown(section=_AFTER, option="--limit", service=True)] = (
        Field(
            None,
            ge=1,
            exclude_if=lambda limit: limit is None,
            description="Only the first N examples of each task.",
        )
    )
    # `pho prune` does it, with what was found.
    prune: Annotated[
        bool, Shown(section=_AFTER, rank=1, label="Write the pruned model", service=True)
    ] = Field(
        False,
        exclude_if=lambda wanted: not wanted,
        description="Whether the pruned model is written when the search is over, to be fetched "
        "with `pho pull`.",
    )
    notify: Annotated[Name | None, Shown(section=_AFTER, rank=2, service=True)] = Field(
        None,
        exclude_if=lambda url: url is None,
        description="URL of a webhook that is called when the job has ended; the service must "
        "allow its host.",
    )
    priority: Annotated[int, Shown(section=_JOB, service=True)] = Field(
        0, ge=-100, le=100, description="Place in the queue: higher goes first."
    )
    # An interrupted search goes on with the same command.
    timeout_s: Annotated[
        float | None, Shown(option="--timeout", label="Time limit in seconds", service=True)
    ] = Field(
        None,
        gt=0,
        le=1e7,
        description="Time limit in seconds for each island's search; the best result so far is "
        "used then.",
    )
    max_failed_trials: Annotated[int, Shown(service=True)] = Field(
        20, ge=0, le=MAX_TRIALS, description="Number of failed trials above which the job fails."
    )
    max_attempts: Annotated[int, Shown(section=_JOB, service=True)] = Field(
        3, ge=1, le=20, description="Number of attempts at each stage before the job fails."
    )

    _each_model_once = field_validator("more_models")(rules.each_model_once)
    _of_one_model = field_validator("revision")(rules.of_one_model)
    _of_one_text = field_validator("confirm")(rules.of_one_text)
    _are_patterns = field_validator("patterns")(rules.are_patterns)
    _is_pattern = field_validator("pattern")(rules.is_pattern)
    _fits_pattern = field_validator("scope")(rules.fits_pattern)
    _can_be_measured = field_validator("objective", "validation")(rules.can_be_measured)
    _was_calibrated = field_validator("search_space")(rules.was_calibrated)
    _more_than_baselines = field_validator("trials")(rules.more_than_baselines)
    _each_task_once = field_validator("tasks")(rules.each_task_once)
    _of_tasks = field_validator("tasks_dir", "tasks_limit")(rules.of_tasks)
    _has_one_model = field_validator("prune", "tasks")(rules.has_one_model)
    _differ = field_validator("islands")(rules.differ)
    _in_memory = field_validator("corrections")(rules.in_memory)

    @model_validator(mode="before")
    @classmethod
    def _confirmed_otherwise(cls, values: Any) -> Any:
        """
        Several models are not confirmed: there is no text that all of them are measured on. With
        several patterns, fewer candidates of each are.
        """
        if isinstance(values, dict) and values.get("more_models"):
            return {"confirm": None, **values}
        if isinstance(values, dict) and values.get("patterns"):
            return {**values, "confirm": curve_confirmation(values.get("confirm", {}))}
        return values

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.several:
            check_several(self)
        for pattern in first_of_kinds(self.points):
            self.of_pattern(pattern).plan(0)
        return self

    @property
    def models(self) -> list[str]:
        """All of them."""
        return [self.model, *self.more_models]

    def of_model(self, number: int) -> "JobSpec":
        """The same with one of the models alone, for what is done with each."""
        return self.model_copy(update={"model": self.models[number], "more_models": []})

    @property
    def several(self) -> bool:
        """Whether several sparsities are searched: given ones, or those that a target needs."""
        return self.pattern is None

    @property
    def points(self) -> list[Pattern]:
        """What may be pruned, by sparsity: one pattern, all of several, or any of a target's."""
        return asked_patterns(dict(self))

    @property
    def most_points(self) -> int:
        """The most patterns that are searched."""
        return len(self.points) if self.target is None else self.target.most_points

    def of_pattern(self, pattern: Pattern) -> "JobSpec":
        """The same with one of its patterns alone, for what is done with each."""
        if not self.several:
            return self
        return self.model_copy(
            update={
                "pattern": str(pattern),
                "patterns": None,
                "target": None,
                "scope": None if pattern.group else pattern.scope.value,
            }
        )

    def pruning(self) -> Pattern:
        """What is pruned; of several patterns the first."""
        return self.points[0]

    def request(self, island: int) -> SearchRequest:
        """
        In the form that a search takes; of several patterns, that of the first. The first island
        has the seed of the job.
        """
        if self.several:
            return self.of_pattern(self.pruning()).request(island)
        preset = rules.preset_of(dict(self), self.pruning())
        return SearchRequest(
            pattern=self.pruning(),
            objective=self.objective.over_models(len(self.models)),
            bounds=preset.bounds,
            steps=preset.steps,
            sampler=self.sampler,
            **{**options_of(self), "seed": island_seed(self.seed, island)},
            finalists=self.confirm.candidates if self.confirm else 1,
            warm_start=self._warm_points(preset.steps),
            validation=self.validation,
        )

    def _warm_points(self, steps: Steps) -> tuple[Candidate, ...]:
        found = (self.warm_start.found if self.warm_start else None) or []
        return tuple(
            Candidate(
                method="crepe",
                coefficients=point.coefficients,
                pattern=self.pruning(),
                steps=replace(steps, allocation=point.allocation),
            )
            for point in found
        )

    def plan(self, island: int) -> SearchPlan:
        """Return the plan of one island."""
        return self.request(island).plan(tuple(self.calibration.kernel_sizes))

    @property
    def title(self) -> str:
        """What the job is called before its id."""
        names = " + ".join(name.rstrip("/").rpartition("/")[2] or name for name in self.models)
        return self.name or f"{names[:200]} {self.asked}"

    @property
    def asked(self) -> str:
        """How sparse the model is to be, in words."""
        if self.target is not None:
            return f"within {self.target}"
        if self.patterns is not None:
            return f"at {', '.join(map(str, self.points))}"
        return f"{self.pattern} {self.pruning().scope.value}"

    @property
    def calibration_key(self) -> str:
        """The same for jobs that may share a bundle: they calibrate one after the other."""
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
        if self.tasks_dir is not None:
            yield partial(check_field, "tasks_dir", access.task_folder, self.tasks_dir)

    def check_access(self, access: Access) -> None:
        """
        Raises:
            FieldError: The model or a text is not allowed here; names the field.
        """
        for check in self.access_checks(access):
            check()

    def placed(self, access: Access) -> "JobSpec":
        """The same with ``./`` before what is local now; see :meth:`Access.placed_model`."""
        changes = {
            "model": access.placed_model(self.model),
            "more_models": [access.placed_model(name) for name in self.more_models],
            "calibration": self.calibration.placed(access),
        }
        return self.model_copy(update=changes)


def island_seed(seed: int, island: int) -> int:
    """The seed of an island: the job's own for the first, and far from it for the others."""
    if island == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {island}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
