"""
What a model is exported as: the types of a GGUF file, and what was written.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, WithJsonSchema

from pho_service.spec.document import JsonDocument, format_bytes, number, parse_bytes

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0",
    "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "iq4_nl", "iq4_xs",
]  # fmt: skip
RuntimeName = Literal["torch", "llama.cpp"]
SIZE = "[0-9]{1,6}([.][0-9]{1,6})?[kMGT]i?B"
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
BY_CONVERTER: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
BY_GGUF: tuple[GgufType, ...] = ("q5_1", "q5_0", "q4_1", "q4_0")  # of the package gguf
MOST_FILES = 20  # of a job: each is as large as a model
BITS_WINDOWS = 16  # of a calibration's, that the types of a file of so many bytes are chosen on
OUTER_TOKENS = 2048  # of them, that the types of the embedding and the head are chosen on
LEVELS: tuple[GgufType, ...] = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # of a linear, by bits


def file_bytes(name: str) -> int | None:
    """The most that a file may have that is asked for as ``105MB``; None for a type."""
    return parse_bytes(name, "gguf") if name[:1].isdigit() else None


def _type_or_size(name: str) -> str:
    if name not in GGUF_TYPES and not re.fullmatch(SIZE, name):
        raise ValueError(
            f"{name!r} is neither a type ({', '.join(GGUF_TYPES)}) nor a size: 105MB, 1.5GB"
        )
    return name


# What a job writes a GGUF file as: a type, or the most that the file may have.
GgufWanted = Annotated[
    str,
    AfterValidator(_type_or_size),
    WithJsonSchema(
        {"type": "string", "anyOf": [{"enum": [*GGUF_TYPES]}, {"pattern": f"^{SIZE}$"}]}
    ),
]


@dataclass(frozen=True, kw_only=True)
class Level:
    """What a matrix can be written as: its type, its bytes, and what its rounding costs."""

    type: str
    bytes: int
    nats: float


@dataclass(frozen=True, kw_only=True)
class ChosenTypes(JsonDocument):
    """
    What matrices are written as in a file of so many bytes.

    Attributes:
        types: How many linears have which type, by bits.
        nats: What rounding costs a token: of linears estimated to second order.
        others: The types of the embedding and of a head of its own, where they were chosen.
    """

    types: dict[str, int]
    nats: float
    others: Annotated[dict[str, str], Field(exclude_if=lambda others: not others)] = field(
        default_factory=dict
    )

    def __str__(self) -> str:
        """In a few words, for people."""
        counts = ", ".join(f"{count} {each}" for each, count in self.types.items())
        others = "".join(f", {name} {each}" for name, each in self.others.items())
        return f"linears {counts}{others} (estimated {number(self.nats)} nats)"


@dataclass(frozen=True, kw_only=True)
class Exported(JsonDocument):
    """
    A GGUF file, read back and compared with the folder that it was made of.

    Attributes:
        file: Where it is.
        type: Type of its matrices; of most of them, where each has its own.
        bytes: Size of the file.
        folder_bytes: Size of the folder's weights.
        divergence: Mean Kullback-Leibler divergence of its next-token predictions from the
            folder's, in nats.
        tokens: Predicted tokens that this is the mean of.
        converter: Program that converted it.
        chosen: The types of a file of so many bytes.
        note: What is to be known of it; empty: nothing.
    """

    file: str
    type: str
    bytes: int
    folder_bytes: int
    divergence: float
    tokens: int
    converter: str
    chosen: Annotated[ChosenTypes | None, Field(exclude_if=lambda chosen: chosen is None)] = None
    note: str = ""

    def __str__(self) -> str:
        share = self.bytes / self.folder_bytes
        note = f" {self.note}" if self.note else ""
        return (
            f"{self.file}: {self.chosen or self.type}, {format_bytes(self.bytes)}, {share:.2f} of "
            f"the folder's weights. Read back, its predictions differ by {number(self.divergence)} "
            f"nats (KL, {self.tokens} tokens).{note}"
        )
