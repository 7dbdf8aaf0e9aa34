"""
Settings of a calibration.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict

from pho_service.errors import InvalidInput
from pho_service.host.data_sets import USUAL_TEXTS
from pho_service.spec.document import STRICT, FieldShown, Flag, Seed, Whole, check_seed
from pho_service.spec.pattern import KERNEL_SIZES

Bos = Literal["auto", "always", "never"]

# What a model is calibrated on if nothing is said: the literature's choice.
C4_DATASET = USUAL_TEXTS["c4"].dataset
C4_FILE = USUAL_TEXTS["c4"].calibration.data_file
SHARDS = 8  # parts of a calibration
SHARDED_FROM = 2**17  # tokens: half of the default's


def windows_of(shares: Sequence[float], count: int) -> list[int]:
    """Number of windows of ``count`` that each share gets, by the largest remainders."""
    quotas = [share * count / sum(shares) for share in shares]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(shares)), key=lambda number: counts[number] - quotas[number])
    for number in order[: count - sum(counts)]:
        counts[number] += 1
    return counts


def with_shares(names: Iterable[str], shares: Sequence[float]) -> str:
    """Several texts in words: ``a.jsonl (75%) and b.jsonl (25%)``."""
    total = sum(shares)
    return " and ".join(
        f"{name} ({100 * share / total:.3g}%)" for name, share in zip(names, shares, strict=True)
    )


def odd_sizes(value: Sequence[int]) -> tuple[int, ...]:
    """Return kernel sizes in order, each once. Raise ValueError if one of them is even."""
    for size in value:
        if size % 2 == 0:
            raise ValueError(f"{size} is even, but a window must have a middle: give odd sizes")
    return tuple(sorted(set(value)))


KernelSizes = Annotated[
    tuple[Annotated[Whole, Field(ge=3, le=999)], ...],
    Strict(False),  # JSON has lists alone
    Field(min_length=1, max_length=20),
    AfterValidator(odd_sizes),
]


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """
    How a model is calibrated. The defaults are the literature's 128 x 2048 tokens.

    Results depend on ``memory_bytes`` by their rounding at most, so bundles of different limits
    are one.
    """

    __pydantic_config__ = STRICT

    samples: Annotated[
        Whole,
        Field(ge=1, le=100_000, description="Number of calibration windows."),
    ] = 128
    context_length: Annotated[
        Whole,
        Field(
            ge=8,
            le=1_000_000,
            description="Tokens of a window; by default what the model reads, if that is less.",
        ),
    ] = 2048
    fisher_samples: Annotated[
        Whole | None,
        Field(
            ge=1,
            le=100_000,
            description="Windows that are run backward, too; a quarter of samples by default.",
        ),
    ] = None
    rows_per_layer: Annotated[
        Whole,
        Field(
            ge=0,
            le=1_000_000,
            description="Output rows of each linear that the bundle keeps; 0 keeps all.",
        ),
    ] = 16
    projection_rows: Annotated[
        Whole,
        Field(
            ge=0,
            le=1_000_000,
            description="Rows of the random projection of the activations; 0 keeps the full Gram "
            "matrix.",
        ),
    ] = 128
    kernel_sizes: Annotated[
        KernelSizes, Field(description="Sizes of the windows that candidates may use, odd.")
    ] = KERNEL_SIZES
    bos: Annotated[
        Bos,
        FieldShown(label="BOS"),
        Field(description="Whether windows begin with BOS; auto: as the tokenizer does."),
    ] = "auto"
    seed: Annotated[
        Seed,
        FieldShown(option="--calibration-seed", label="Seed of the calibration"),
        Field(description="Seed of the text sample, the row sample and the projection."),
    ] = 0
    mixed_precision: Annotated[
        Flag,
        Field(
            description="Whether matrix products of a float32 model are in bfloat16; all sums are "
            "in float32."
        ),
    ] = False
    memory_bytes: Annotated[
        Whole | None,
        FieldShown(option="--calibration-memory", label="Memory in bytes", kind="size"),
        Field(
            ge=1,
            le=2**50,
            description="Memory of the model's device that may be in use at the peak, the model "
            "included; by default a GPU's free memory, and no limit on a CPU.",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise InvalidInput(f"memory_bytes={self.memory_bytes} is below 1.")
        for name, least in (
            ("samples", 1), ("context_length", 8), ("rows_per_layer", 0), ("projection_rows", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidInput(f"{name}={value!r} is not a whole number.")
            if value < least:
                raise InvalidInput(f"{name}={value} is below {least}.")
        check_seed(self.seed)
        if self.fisher_samples is not None and not 1 <= self.fisher_samples <= self.samples:
            raise InvalidInput(
                f"fisher_samples={self.fisher_samples} is not in 1..{self.samples}, the samples."
            )
        if not self.kernel_sizes or any(k < 3 or k % 2 == 0 for k in self.kernel_sizes):
            raise InvalidInput(
                f"kernel_sizes={self.kernel_sizes} are not odd whole numbers of at least 3."
            )

    def shards(self, *, stream: bool) -> int:
        """
        Into how many parts the windows are cut whose sums are added up one after the other.

        Several workers can do them at a time. So that the number of workers changes nothing, it
        depends on the settings alone, and all who calibrate cut alike. A streamed model is not cut,
        since each part would read all of it; nor is a full Gram matrix, which is larger than what
        it takes to gather it again.
        """
        small = self.samples * self.context_length < SHARDED_FROM
        return 1 if small or stream or not self.projection_rows else min(SHARDS, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values of all that decides what a bundle holds."""
        values = asdict(self) | {"kernel_sizes": list(self.kernel_sizes)}
        del values["memory_bytes"]
        return values
