"""
The document that a job is submitted as, checked field by field.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pho_service.access import Access, check_data_file
from pho_service.configuration import AllocationDocument
from pho_service.search.presets import Preset
from pho_service.search.request import SearchRequest
from pho_service.search.search import SearchPlan
from pho_service.search.space import SearchSpace
from pho_service.spec import (
    ALLOCATIONS,
    C4_DATASET,
    C4_FILE,
    SEEDS,
    Allocation,
    AllocationMethod,
    CalibrationSettings,
    Objective,
    Pattern,
    Permutation,
    PresetName,
    Repruning,
    Update,
)

MAX_TRIALS = 10_000  # of an island; the dashboard draws every trial


def _printable(value: str) -> str:
    if not value.isprintable():  # nor NUL or half characters, which no database takes
        raise ValueError("control characters and unpaired surrogates are not allowed")
    return value


Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_printable)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
KernelSize = Annotated[int, Field(ge=3, le=999)]


class _Document(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CalibrationSpec(_Document):
    """
    What the model is calibrated on: a text file, or a data set (C4 if nothing is said).
    """

    text: Name | None = Field(None, description="A .txt, .jsonl or .parquet file.")
    dataset: Name | None = Field(None, description="Id on the hub, or a folder.")
    data_file: Name | None = Field(None, description="One file of the data set.")
    split: Name = "train"
    field: Name = Field("text", description="Field or column that holds the text.")
    samples: int = Field(128, ge=1, le=100_000, description="Windows of text.")
    context_length: int = Field(2048, ge=8, le=1_000_000, description="Tokens of a window.")
    fisher_samples: int | None = Field(
        None, ge=1, le=100_000, description="Windows run backward too; a quarter by default."
    )
    rows_per_layer: int = Field(16, ge=0, le=1_000_000, description="0 keeps all.")
    projection_rows: int = Field(128, ge=0, le=1_000_000, description="0 keeps the Gram matrix.")
    kernel_sizes: list[KernelSize] = Field([3, 5, 9, 15], min_length=1, max_length=20)
    bos: Literal["auto", "always", "never"] = "auto"
    seed: Seed = 0
    mixed_precision: bool = Field(
        False, description="Matrix products of a float32 model in bfloat16, sums in float32."
    )
    memory_bytes: int | None = Field(
        None, ge=1, le=2**50, description="At the peak, the model included; a GPU's free memory, "
        "and no limit on a CPU, by default.",
    )  # fmt: skip

    @field_validator("dataset")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("text") is not None:
            raise ValueError("text and dataset are both given; give one of them")
        return value

    @field_validator("data_file")
    @classmethod
    def _of_a_dataset(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("dataset") is None:
            raise ValueError("data_file is a file of a dataset, but no dataset is given")
        return value

    @field_validator("fisher_samples")
    @classmethod
    def _some_of_the_samples(cls, value: int | None, info: ValidationInfo) -> int | None:
        samples = info.data.get("samples")
        if value is not None and samples is not None and value > samples:
            raise ValueError(f"fisher_samples must not be above samples, which is {samples}")
        return value

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, value: list[int]) -> list[int]:
        return _odd_sizes(value)

    @model_validator(mode="after")
    def _c4_by_default(self) -> Self:
        if self.text is None and self.dataset is None:
            self.dataset, self.data_file = C4_DATASET, C4_FILE
        return self

    def settings(self) -> CalibrationSettings:
        """In the form that a calibration takes."""
        return CalibrationSettings(
            samples=self.samples,
            context_length=self.context_length,
            fisher_samples=self.fisher_samples,
            rows_per_layer=self.rows_per_layer,
            projection_rows=self.projection_rows,
            kernel_sizes=tuple(self.kernel_sizes),
            bos=self.bos,
            seed=self.seed,
            mixed_precision=self.mixed_precision,
            memory_bytes=self.memory_bytes,
        )


class ConfirmSpec(_Document):
    """How the best candidates are confirmed by perplexity."""

    text: Name | None = Field(
        None, description="A text file; by default windows that the calibration did not use."
    )
    candidates: int = Field(5, ge=1, le=100, description="Beside the baselines.")
    windows: int = Field(16, ge=1, le=100_000, description="At most, of that text.")


class ValidationSpec(_Document):
    """Random candidates rated by every proxy and by perplexity: does the proxy rank here?"""

    candidates: int = Field(40, ge=8, le=1000)
    seed: Seed = 0


class ObjectiveSpec(_Document):
    """What candidates are rated by."""

    name: Literal["activation-reconstruction", "gini", "perplexity"] = "activation-reconstruction"
    weighting: Literal["blend", "fisher", "relative", "absolute"] = Field(
        "blend", description="How activation reconstruction adds up the errors."
    )


class SearchSpaceSpec(_Document):
    """Bounds [low, high] of what is searched; equal ones fix a value."""

    neighbourhood_share: Bounds | None = Field(None, description="Within [0, 1].")
    row_share: Bounds | None = Field(None, description="Within [0, 1].")
    activation_exponent: Bounds | None = Field(None, description="Within [0, 4].")
    gradient_exponent: Bounds | None = Field(None, description="Within [0, 2].")
    kernel_sizes: list[KernelSize] | None = Field(None, min_length=1, max_length=20)
    allocations: list[AllocationMethod] | None = Field(
        None, min_length=1, max_length=4, description="Instead of steps.allocation.method."
    )
    allocation_spread: Bounds | None = Field(None, description="Within [0, 1].")

    @field_validator(
        "neighbourhood_share", "row_share", "activation_exponent", "gradient_exponent",
        "allocation_spread",
    )  # fmt: skip
    @classmethod
    def _in_range(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is not None:
            bounds: dict[str, Any] = {str(info.field_name): tuple(value)}
            SearchSpace(**bounds)  # raises with the rule
        return value

    @field_validator("allocations")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        return value and [method for method in ALLOCATIONS if method in value]

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, value: list[int] | None) -> list[int] | None:
        return value if value is None else _odd_sizes(value)

    def bounds(self) -> dict[str, Any]:
        """The fields of a search space that were given."""
        return {k: tuple(v) for k, v in self.model_dump().items() if v is not None}


class StepsSpec(_Document):
    """What candidates go through beside the score. What is null is the preset's."""

    allocation: AllocationDocument | None = Field(
        None, description="How the sparsity is spread; the only one that is searched then."
    )
    permutation: Permutation | None = Field(None, description="Of input channels, for N:M.")
    repruning: Repruning | None = Field(None, description="Of a finished mask.")
    update: Update | None = Field(None, description="Of the weights that stay.")

    def given(self) -> dict[str, Any]:
        """The fields of Steps that are not the preset's."""
        values = {k: v for k, v in self.model_dump().items() if v is not None}
        if "allocation" in values:
            values["allocation"] = Allocation(**values["allocation"])
        return values


def _odd_sizes(value: list[int]) -> list[int]:
    for size in value:
        if size % 2 == 0:
            raise ValueError(f"{size} is even, but a window must have a middle: give odd sizes")
    return sorted(set(value))


class JobSpec(_Document):
    """A search job. All but ``model`` and ``pattern`` have defaults."""

    model: Name = Field(description="Hub id, model folder or .gguf file.")
    pattern: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)] = Field(
        description="Share of weights to remove (0.5), or N kept of M (2:4)."
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        None, description="Where weights compete; layer by default, row for N:M."
    )
    preset: PresetName = Field(
        "score",
        description="What is searched, and what candidates go through; steps and search_space "
        "say more.",
    )
    steps: StepsSpec = StepsSpec()
    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)] | None = (
        Field(None, description="Of its study; the model and the pattern by default.")
    )
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    stream: bool = Field(
        False, description="Leave the weights on disk, one block at a time on the device."
    )
    calibration: CalibrationSpec = CalibrationSpec()
    confirm: ConfirmSpec | None = Field(
        ConfirmSpec(), description="null: the best by the objective alone."
    )
    validation: ValidationSpec | None = Field(
        None, description="As `pho validate` does; on the text that confirms."
    )
    objective: ObjectiveSpec = ObjectiveSpec()
    sampler: Literal["cmaes", "tpe", "random", "qmc", "gp", "hill-climb"] = "cmaes"
    search_space: SearchSpaceSpec = SearchSpaceSpec()
    trials: int = Field(
        200,
        ge=1,
        le=MAX_TRIALS,
        description="Of each island, with baselines; a hill climb may end before.",
    )
    islands: int = Field(1, ge=1, le=64, description="Searches with seeds of their own.")
    seed: Seed = 0
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first.")
    timeout_s: float | None = Field(
        None, gt=0, le=1e7, description="Of each island's search; then the best so far counts."
    )
    max_failed_trials: int = Field(
        20, ge=0, le=MAX_TRIALS, description="With more of them the job fails."
    )
    max_attempts: int = Field(3, ge=1, le=20, description="Of each stage, before the job fails.")

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

    @field_validator("objective", "validation")
    @classmethod
    def _can_be_measured(cls, value: Any, info: ValidationInfo) -> Any:
        needed = isinstance(value, ValidationSpec) or (
            isinstance(value, ObjectiveSpec) and value.name == "perplexity"
        )
        if needed and info.data.get("confirm", 0) is None:
            raise ValueError("perplexities need a text: confirm must not be null")
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
                f"{', '.join(map(str, calibration.kernel_sizes))}"
            )
        return value

    @field_validator("trials")
    @classmethod
    def _more_than_baselines(cls, value: int, info: ValidationInfo) -> int:
        needed = {"pattern", "scope", "preset", "steps", "calibration", "search_space"}
        if needed <= info.data.keys():
            given = info.data
            pattern = Pattern.parse(given["pattern"], given["scope"])
            preset = _preset(given["preset"], pattern, given["steps"], given["search_space"])
            request = SearchRequest(
                pattern=pattern, trials=value, steps=preset.steps, bounds=preset.bounds
            )
            request.plan(tuple(given["calibration"].kernel_sizes))
        return value

    @field_validator("islands")
    @classmethod
    def _differ(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("sampler") == "hill-climb":
            raise ValueError(
                "a hill climb draws nothing at random, so all islands would be the same: give 1"
            )
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        self.plan(0)
        return self

    def pruning(self) -> Pattern:
        """What is pruned."""
        return Pattern.parse(self.pattern, self.scope)

    def request(self, island: int) -> SearchRequest:
        """In the form that a search takes. The first island has the seed of the job."""
        preset = _preset(self.preset, self.pruning(), self.steps, self.search_space)
        return SearchRequest(
            pattern=self.pruning(),
            objective=Objective(name=self.objective.name, weighting=self.objective.weighting),
            bounds=preset.bounds,
            steps=preset.steps,
            sampler=self.sampler,
            trials=self.trials,
            seed=island_seed(self.seed, island),
            finalists=self.confirm.candidates if self.confirm else 1,
        )

    def plan(self, island: int) -> SearchPlan:
        """Of one island."""
        return self.request(island).plan(tuple(self.calibration.kernel_sizes))

    @property
    def title(self) -> str:
        """What the job is called before its id."""
        model_name = self.model.rstrip("/").rpartition("/")[2] or self.model
        return self.name or f"{model_name[:200]} {self.pattern} {self.pruning().scope.value}"

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
        _at("model", access.model, self.model)
        if self.calibration.text is not None:
            _at("calibration/text", access.text, self.calibration.text)
        if self.calibration.dataset is not None:
            _at("calibration/dataset", access.dataset, self.calibration.dataset)
        if self.calibration.data_file is not None:
            _at("calibration/data_file", check_data_file, self.calibration.data_file)
        if self.confirm is not None and self.confirm.text is not None:
            _at("confirm/text", access.text, self.confirm.text)


def _preset(name: str, pattern: Pattern, steps: StepsSpec, space: SearchSpaceSpec) -> Preset:
    """The preset of a job, with its steps and bounds."""
    return Preset.of(name, pattern).changed(steps.given(), space.bounds())


class FieldError(ValueError):
    """
    A field breaks a rule that only this machine knows.

    Attributes:
        pointer: JSON pointer of the field.
    """

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(message)
        self.pointer = pointer


def _at(field: str, check: Callable[[str], object], value: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise FieldError(f"/{field}", str(error)) from error


def island_seed(seed: int, island: int) -> int:
    """The seed of an island: the job's own for the first, and far from it for the others."""
    if island == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {island}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
