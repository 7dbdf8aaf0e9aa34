"""
The document that a job is submitted as, checked field by field.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pho_service.host.access import Access
from pho_service.spec.candidate import Candidate
from pho_service.spec.document import Document, Name, Title, printable
from pho_service.spec.fields import (
    CalibrationSpec,
    ConfirmSpec,
    ValidationSpec,
    WarmStartSpec,
    check_field,
    check_models,
)
from pho_service.spec.limits import JobLimits
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.presets import (
    DEFAULT_PRESET,
    FIRST_PRESET,
    Preset,
    PresetMeaning,
    PresetName,
)
from pho_service.spec.quality import WIDER
from pho_service.spec.samplers import (
    MAX_CORRECTIONS,
    MAX_TRIALS,
    Sampler,
    SearchOptions,
    corrected_windows,
    options_of,
)
from pho_service.spec.seed import Seed
from pho_service.spec.space import SearchSpaceSpec
from pho_service.spec.steps import Steps, StepsSpec
from pho_service.tuning.plan import SearchPlan
from pho_service.tuning.request import SearchRequest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class JobSpec(Document):
    """A search job. All but ``model`` and ``pattern`` have defaults."""

    model: Name = Field(description="Hub id, model folder or .gguf file.")
    more_models: list[Name] = Field(
        [],
        max_length=31,
        description="Other models that the same configuration shall be good for.",
    )
    pattern: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(printable)] = Field(
        description="Share of weights to remove (0.5), or N kept of M (2:4)."
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        None, description="Where weights compete; layer by default, row for N:M."
    )
    preset: PresetName = Field(
        DEFAULT_PRESET,
        description="What is searched, and what candidates go through; steps and search_space "
        "say more. score: a cheap look, by the score alone. crepe: as published, without a "
        "gradient exponent. crepe-plus: the best that leaves kept weights untouched. best: kept "
        "weights are updated, too. best-reconstructed: and each block of the winner is trained.",
    )
    preset_meaning: PresetMeaning | None = Field(
        None,
        exclude_if=lambda meaning: meaning is None,
        description="What the preset meant when the job was submitted, so that the job keeps its "
        "meaning in later versions. The service writes it down; leave it out in a new job.",
    )
    steps: StepsSpec = StepsSpec()
    name: Title | None = Field(
        None, description="Name of the job's study; the model and the pattern by default."
    )
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Dtype = Field("auto", description="Data type that the weights are loaded in.")
    stream: bool = Field(
        False,
        description="Whether to leave the weights on disk, one block at a time on the device.",
    )
    calibration: CalibrationSpec = CalibrationSpec()
    confirm: ConfirmSpec | None = Field(
        ConfirmSpec(),
        description="How the best candidates are confirmed; null takes the best by the objective "
        "alone.",
    )
    validation: ValidationSpec | None = Field(
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
    sampler: Sampler = Field("cmaes", description="Sampler that candidates come from.")
    search_space: SearchSpaceSpec = SearchSpaceSpec()
    trials: int = Field(
        SearchOptions.trials,
        ge=1,
        le=MAX_TRIALS,
        description="Number of trials of each island, baselines included; a hill climb may end "
        "before.",
    )
    islands: int = Field(
        1, ge=1, le=64, description="Number of searches, each with a seed of its own."
    )
    seed: Seed = Field(0, description="Seed of the sampler.")
    corrections: int = Field(
        SearchOptions.corrections,
        ge=0,
        le=MAX_CORRECTIONS,
        description="Number of allocations that are compared with the dense model on calibration "
        "windows after the search, to correct the best one where the proxy is wrong; 0 leaves it "
        "as it is.",
    )
    prune: bool = Field(
        False,
        exclude_if=lambda wanted: not wanted,
        description="Whether the pruned model is written when the search is over, to be fetched "
        "with `pho pull`.",
    )
    notify: Name | None = Field(
        None,
        exclude_if=lambda url: url is None,
        description="URL of a webhook that is called when the job has ended; the service must "
        "allow its host.",
    )
    priority: int = Field(0, ge=-100, le=100, description="Place in the queue: higher goes first.")
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=1e7,
        description="Time limit in seconds for each island's search; the best result so far is "
        "used then.",
    )
    max_failed_trials: int = Field(
        20, ge=0, le=MAX_TRIALS, description="Number of failed trials above which the job fails."
    )
    max_attempts: int = Field(
        3, ge=1, le=20, description="Number of attempts at each stage before the job fails."
    )

    @field_validator("more_models")
    @classmethod
    def _each_model_once(cls, value: list[str], info: ValidationInfo) -> list[str]:
        names = [info.data.get("model"), *value]
        twice = [name for name in value if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        return value

    @field_validator("revision")
    @classmethod
    def _of_one_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("more_models"):
            raise ValueError("a revision is of one model: leave it out where there are several")
        return value

    @field_validator("calibration")
    @classmethod
    def _whole_where_streamed(cls, value: CalibrationSpec, info: ValidationInfo) -> CalibrationSpec:
        if value.stop == "early" and info.data.get("stream"):
            raise ValueError("the calibration of a streamed model cannot stop early")
        return value

    @field_validator("confirm")
    @classmethod
    def _of_one_text(cls, value: ConfirmSpec | None, info: ValidationInfo) -> ConfirmSpec | None:
        if value is not None and info.data.get("more_models"):
            raise ValueError(
                "several models are searched by the proxy alone: leave it out, and measure the "
                "result on each of them afterwards, with `pho transfer` or :transfer"
            )
        return value

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        Pattern.parse(value)
        return value

    @field_validator("scope")
    @classmethod
    def _fits_pattern(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and "pattern" in info.data:
            Pattern.parse(info.data["pattern"], value)
        return value

    @field_validator("preset_meaning")
    @classmethod
    def _of_this_preset(
        cls, value: PresetMeaning | None, info: ValidationInfo
    ) -> PresetMeaning | None:
        given = info.data
        if value is not None and {"pattern", "scope", "preset"} <= given.keys():
            pattern = Pattern.parse(given["pattern"], given["scope"])
            mine = PresetMeaning.words(given["preset"], given["pattern"], pattern)
            if value.of != mine:
                raise ValueError(
                    f"preset_meaning is that of {value.of}, but the job is for {mine}: leave it "
                    "out, for what the preset means now"
                )
        return value

    @field_validator("objective", "validation")
    @classmethod
    def _can_be_measured(cls, value: Any, info: ValidationInfo) -> Any:
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

    @field_validator("search_space")
    @classmethod
    def _was_calibrated(cls, value: SearchSpaceSpec, info: ValidationInfo) -> SearchSpaceSpec:
        calibration = info.data.get("calibration")
        missing = set(value.kernel_sizes or ()) - set(
            calibration.kernel_sizes if calibration else ()
        )
        if calibration is not None and missing:
            raise ValueError(
                f"kernel_sizes has {min(missing)}, which is not in calibration.kernel_sizes: "
                f"{', '.join(map(str, calibration.kernel_sizes))}. Calibrate with it "
                "(--kernel-sizes)"
            )
        return value

    @field_validator("trials")
    @classmethod
    def _more_than_baselines(cls, value: int, info: ValidationInfo) -> int:
        needed = {
            "pattern", "scope", "preset", "preset_meaning", "steps", "calibration", "search_space",
        }  # fmt: skip
        if needed <= info.data.keys():
            given = info.data
            pattern = Pattern.parse(given["pattern"], given["scope"])
            preset = _preset(given, pattern)
            request = SearchRequest(
                pattern=pattern, trials=value, steps=preset.steps, bounds=preset.bounds
            )
            request.plan(tuple(given["calibration"].kernel_sizes))
        return value

    @field_validator("prune")
    @classmethod
    def _has_one_model(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("more_models"):
            raise ValueError(
                "one model is pruned, and this job searches for several: prune each of them with "
                "the result, `pho prune MODEL --config`"
            )
        return value

    @field_validator("islands")
    @classmethod
    def _differ(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("sampler") == "hill-climb":
            raise ValueError(
                "a hill climb draws nothing at random, so all islands would be the same: give 1"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _not_confirmed(cls, values: Any) -> Any:
        """Several models are not confirmed: there is no text that all of them are measured on."""
        if isinstance(values, dict) and values.get("more_models"):
            return {"confirm": None, **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, values: Any) -> Any:
        """A job that was stored without a preset meant the default of then."""
        if isinstance(values, dict) and values.get("preset_meaning") is not None:
            return {"preset": FIRST_PRESET, **values}
        return values

    @field_validator("corrections")
    @classmethod
    def _in_memory(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("stream"):
            raise ValueError(
                "a streamed model is read anew for each correction, which takes as long as a "
                "calibration: give 0, or do not stream"
            )
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        self.plan(0)
        return self

    @property
    def models(self) -> list[str]:
        """All of them."""
        return [self.model, *self.more_models]

    def of_model(self, number: int) -> "JobSpec":
        """The same with one of the models alone, for what is done with each."""
        return self.model_copy(update={"model": self.models[number], "more_models": []})

    def pruning(self) -> Pattern:
        """What is pruned."""
        return Pattern.parse(self.pattern, self.scope)

    def request(self, island: int) -> SearchRequest:
        """In the form that a search takes. The first island has the seed of the job."""
        preset = _preset(dict(self), self.pruning())
        return SearchRequest(
            pattern=self.pruning(),
            objective=self.objective.over_models(len(self.models)),
            bounds=preset.bounds,
            steps=preset.steps,
            sampler=self.sampler,
            **{**options_of(self), "seed": island_seed(self.seed, island)},
            finalists=self.confirm.candidates if self.confirm else 1,
            warm_start=self._warm_points(preset.steps),
            compare_cold=self.warm_start is not None and self.warm_start.compare_cold,
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
        """Of one island."""
        return self.request(island).plan(tuple(self.calibration.kernel_sizes))

    @property
    def title(self) -> str:
        """What the job is called before its id."""
        names = " + ".join(name.rstrip("/").rpartition("/")[2] or name for name in self.models)
        return self.name or f"{names[:200]} {self.pattern} {self.pruning().scope.value}"

    @property
    def calibration_key(self) -> str:
        """The same for jobs that may share a bundle: they calibrate one after the other."""
        calibration = self.calibration.model_dump(exclude={"memory_bytes"})
        document = [self.model, self.revision, self.dtype, self.stream, calibration]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()

    def check_access(self, access: Access) -> None:
        """
        Raises:
            FieldError: The model or a text is not allowed here; names the field.
        """
        more = {f"more_models/{number}": name for number, name in enumerate(self.more_models)}
        check_models({"model": self.model, **more}, access)
        self.calibration.check_access(access)
        if self.confirm is not None and self.confirm.text is not None:
            check_field("confirm/text", access.text, self.confirm.text)

    def placed(self, access: Access) -> "JobSpec":
        """The same with ``./`` before what is local now; see :meth:`Access.placed_model`."""
        changes = {
            "model": access.placed_model(self.model),
            "more_models": [access.placed_model(name) for name in self.more_models],
            "calibration": self.calibration.placed(access),
        }
        return self.model_copy(update=changes)

    def settled(self) -> "JobSpec":
        """The same with what its preset means now written down, unless it says what it meant."""
        if self.preset_meaning is not None:
            return self
        meaning = PresetMeaning.now(self.preset, self.pattern, self.pruning())
        return self.model_copy(update={"preset_meaning": meaning})

    def check_size(self, limits: JobLimits, *, more_trials: int = 0) -> None:
        """
        Count what the job asks for: trials, and tokens of the calibrations, of every candidate
        that gets a perplexity, and of a reconstruction's passes. Baselines and the dense model are
        not counted.

        Args:
            limits: Of the service.
            more_trials: Of an extension, for each island.

        Raises:
            FieldError: It is too much; names the field and the limit.
        """
        trials = self.trials + more_trials
        limits.check_trials("/trials", trials, self.islands, "islands")
        tokens = self.calibration.tokens * len(self.models)
        limits.check_tokens("/calibration/samples", tokens)
        if self.confirm is not None:
            measured = self.confirm.candidates
            if self.validation is not None:
                measured = WIDER * measured + self.validation.candidates
            measured += trials * self.islands if self.objective.name == "perplexity" else 0
            tokens += measured * self.confirm.windows * self.calibration.context_length
            trained = self.request(0).steps.reconstruction
            tokens += trained.passes * self.calibration.tokens if trained.wanted else 0
            limits.check_tokens("/confirm/windows", tokens)
        length = self.calibration.context_length
        tokens += self.corrections * corrected_windows(length) * length
        limits.check_tokens("/corrections", tokens)


def _preset(given: Mapping[str, Any], pattern: Pattern) -> Preset:
    """The preset of a job with these fields, with its steps and bounds."""
    meaning = given["preset_meaning"]
    preset = Preset.of(given["preset"], pattern) if meaning is None else meaning.preset()
    return preset.changed(given["steps"].given(), given["search_space"].bounds())


def island_seed(seed: int, island: int) -> int:
    """The seed of an island: the job's own for the first, and far from it for the others."""
    if island == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {island}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
