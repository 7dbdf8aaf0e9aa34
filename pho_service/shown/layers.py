"""
What a configuration does to each linear, by block and kind: small enough to be kept with a job.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

_DIGITS = 6  # that are kept


@dataclass(frozen=True, kw_only=True)
class LayerCell:
    """
    The linears of one kind (``self_attn.q_proj``) in a block (``model.layers.3``): one, or all
    experts, with the means of the output's error relative to its energy, and of the sparsity.
    """

    block: str
    kind: str
    error: float
    sparsity: float

    def to_list(self) -> list[Any]:
        """As JSON values; a job keeps hundreds of these."""
        return [self.block, self.kind, self.error, self.sparsity]

    @classmethod
    def of(cls, values: list[Any]) -> Self:
        """What :meth:`to_list` has written."""
        block, kind, error, sparsity = values
        return cls(block=block, kind=kind, error=error, sparsity=sparsity)


def layer_cells(errors: Mapping[str, float], sparsities: Mapping[str, float]) -> list[LayerCell]:
    """Sort linears by block and kind, in the order of the model."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in errors:
        members.setdefault(_place(name), []).append(name)
    return [
        LayerCell(
            block=block,
            kind=kind,
            error=_mean([errors[name] for name in names]),
            sparsity=_mean([sparsities[name] for name in names]),
        )
        for (block, kind), names in members.items()
    ]


def _place(name: str) -> tuple[str, str]:
    """The block and the kind of a linear: its name up to the first number, and what follows."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return "", name
    rest = [part for part in parts[first + 1 :] if not part.isdecimal()]
    return ".".join(parts[: first + 1]), ".".join(rest)


def _mean(values: list[float]) -> float:
    return float(f"{sum(values) / len(values):.{_DIGITS}g}")
