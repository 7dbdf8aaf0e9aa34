"""
The parts of the documents that jobs are submitted as, each checked field by field.
"""

from collections.abc import Callable, Mapping
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

from pho_service.errors import InvalidInput
from pho_service.host.access import Access, check_data_file
from pho_service.spec.calibration import C4_DATASET, C4_FILE, CalibrationSettings
from pho_service.spec.configuration import AllocationDocument, CoefficientsDocument
from pho_service.spec.objective import Objective
from pho_service.spec.seed import SEEDS
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import (
    ALLOCATIONS,
    Allocation,
    AllocationMethod,
    Permutation,
    Repruning,
    Update,
)

MAX_TRIALS = 10_000  # of an island; the dashboard draws every trial


def printable(value: str) -> str:
    """The text, if it has nothing in it that cannot be printed; for names of all kinds."""
    if not value.isprintable():  # nor NUL or half characters, which no database takes
        raise ValueError("control characters and unpaired surrogates are not allowed")
    return value


Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(printable)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
KernelSize = Annotated[int, Field(ge=3, le=999)]


class Document(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FieldError(ValueError):
    """
    A field breaks a rule that only this machine knows.

    Attributes:
        pointer: JSON pointer of the field.
        code: Of the problem, for programs.
    """

    def __init__(self, pointer: str, message: str, *, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.pointer = pointer
        self.code = code


def check_field(field: str, check: Callable[[str], object], value: str) -> None:
    """Raise FieldError if ``check`` raises ValueError for the value of a field."""
    try:
        check(value)
    except ValueError as error:
        raise FieldError(f"/{field}", str(error)) from error


def check_models(names: Mapping[str, str], access: Access) -> None:
    """
    Check the models of a document, each of them once.

    Args:
        names: By field.
        access: The rules of this machine.

    Raises:
        FieldError: One is not allowed here, or is another one in other letters.
    """
    seen: dict[str, str] = {}

    def once(name: str) -> None:
        model = access.model(name)
        if model in seen:
            raise InvalidInput(f"{name!r} is the same model as {seen[model]!r}. Give each once.")
        seen[model] = name

    for field, name in names.items():
        check_field(field, once, name)


class CalibrationSpec(Document):
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

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.samples * self.context_length

    def check_access(self, access: Access) -> None:
        """
        Raises:
            FieldError: A text is not allowed here; names the field.
        """
        if self.text is not None:
            check_field("calibration/text", access.text, self.text)
        if self.dataset is not None:
            check_field("calibration/dataset", access.dataset, self.dataset)
        if self.data_file is not None:
            check_field("calibration/data_file", check_data_file, self.data_file)

    def placed(self, access: Access) -> "CalibrationSpec":
        """The same with ``./`` before a data set that is local now."""
        if self.dataset is None:
            return self
        return self.model_copy(update={"dataset": access.placed_dataset(self.dataset)})


class ConfirmSpec(Document):
    """How the best candidates are confirmed by perplexity."""

    text: Name | None = Field(
        None, description="A text file; by default windows that the calibration did not use."
    )
    candidates: int = Field(5, ge=1, le=100, description="Beside the baselines.")
    windows: int = Field(16, ge=1, le=100_000, description="At most, of that text.")


class ValidationSpec(Document):
    """Random candidates rated by every proxy and by perplexity: does the proxy rank here?"""

    candidates: int = Field(40, ge=8, le=1000)
    seed: Seed = 0


class ObjectiveSpec(Document):
    """What candidates are rated by."""

    name: Literal["activation-reconstruction", "gini", "perplexity"] = "activation-reconstruction"
    weighting: Literal["blend", "fisher", "relative", "absolute"] = Field(
        "blend", description="How activation reconstruction adds up the errors."
    )
    over: Literal["mean", "worst"] | None = Field(
        None, description="How more_models count, each relative to RIA on it; mean by default."
    )

    def objective(self, *, several: bool) -> Objective:
        """
        In the form that a search takes.

        Args:
            several: Whether there is more than one model.

        Raises:
            InvalidInput: It has no common scale for several.
        """
        over = self.over or ("mean" if several else None)
        return Objective(name=self.name, weighting=self.weighting, over=over)


class SearchSpaceSpec(Document):
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


class StepsSpec(Document):
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


class WarmPoint(Document):
    """A score that was found elsewhere."""

    id: Name | None = Field(None, description="Of the library's entry.")
    coefficients: CoefficientsDocument
    allocation: AllocationDocument = AllocationDocument()
    reasons: list[str] = Field([], max_length=100, description="Why it was chosen.")


class WarmStartSpec(Document):
    """A search that begins with what was found for similar models."""

    count: int = Field(3, ge=1, le=20, description="Configurations of the library, at most.")
    compare_cold: bool = Field(
        False, description="Search without them, too, and say how many trials they saved."
    )
    found: list[WarmPoint] | None = Field(
        None,
        max_length=20,
        description="What to begin with; null: the library is asked when the search begins, and "
        "its answer is written here.",
    )


def _odd_sizes(value: list[int]) -> list[int]:
    for size in value:
        if size % 2 == 0:
            raise ValueError(f"{size} is even, but a window must have a middle: give odd sizes")
    return sorted(set(value))
