"""
How a model is calibrated.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.spec.seed import check_seed

# What a model is calibrated on if nothing is said: the literature's choice.
C4_DATASET = "allenai/c4"
C4_FILE = "en/c4-train.00000-of-01024.json.gz"
SHARDS = 8  # parts of a calibration
SHARDED_FROM = 2**17  # tokens: half of the default's


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """
    How a model is calibrated. The defaults are the literature's 128 x 2048 tokens.

    Attributes:
        samples: Windows of text for the forward pass.
        context_length: Tokens of a window.
        fisher_samples: Windows that are run backward too; None is a quarter of
            ``samples``.
        rows_per_layer: Output rows of each linear that the bundle keeps; 0 keeps all.
        projection_rows: Rows of the random projection of the activations; 0
            keeps the full Gram matrix.
        kernel_sizes: Windows that candidates may use, odd.
        bos: Whether windows start with BOS: ``auto``, ``always``, ``never``.
        seed: Of the text sample, the row sample and the projection.
        mixed_precision: Matrix products of a float32 model are in bfloat16, all sums in float32.
        memory_bytes: What the model's device may have in use at the peak, the model included.
            None is a GPU's free memory, and no limit on a CPU. Results depend on it by their
            rounding at most, so bundles of different limits are one.
    """

    samples: int = 128
    context_length: int = 2048
    fisher_samples: int | None = None
    rows_per_layer: int = 16
    projection_rows: int = 128
    kernel_sizes: tuple[int, ...] = (3, 5, 9, 15)
    bos: str = "auto"
    seed: int = 0
    mixed_precision: bool = False
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise InvalidInput(f"memory_bytes={self.memory_bytes} is below 1.")
        for name, least in (
            ("samples", 1), ("context_length", 8), ("rows_per_layer", 0), ("projection_rows", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidInput(f"{name}={getattr(self, name)} is below {least}.")
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
        it takes to gather it anew.
        """
        small = self.samples * self.context_length < SHARDED_FROM
        return 1 if small or stream or not self.projection_rows else min(SHARDS, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, all that decides what a bundle holds."""
        values = asdict(self) | {"kernel_sizes": list(self.kernel_sizes)}
        del values["memory_bytes"]
        return values
