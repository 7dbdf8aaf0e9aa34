"""
Settings of a recovery, and its result.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Strict

from pho_service.errors import InvalidInput
from pho_service.spec.configuration import Continuation
from pho_service.spec.document import (
    STRICT,
    FieldShown,
    JsonDocument,
    Number,
    Seed,
    Whole,
    check_choice,
    check_number,
    check_seed,
    number,
    percent,
)
from pho_service.spec.perplexity import Perplexities, Ratio

Shortening = Annotated[str, Field(pattern=r"^[0-9]{1,9}:[1-9][0-9]{0,8}$")]
Trains = Literal["kept", "norms", "lora"]
AdamBits = Literal[32, 8]
TRAINS: tuple[Trains, ...] = get_args(Trains)
MINUTES = 30.0
MOST_MINUTES = 100_000.0
MOST_TOKENS = 10**11
RANK = 16  # of the matrices that ``lora`` trains
WRITTEN_AT_ONCE = 16_384  # tokens that the dense model writes side by side
PASSES = 4  # over the windows at most: twice as many bring little more
CHECKS = 8  # how often the held-out windows are looked at
BEGINNING = 8  # what it writes begins with an eighth of a window of the text
RATES: dict[Trains, float] = {"kept": 2e-3, "norms": 7.5e-3, "lora": 1.5e-3}  # a nat of divergence


@dataclass(frozen=True, kw_only=True)
class Recovery(JsonDocument):
    """
    How a pruned model is trained towards what the dense one predicts; masks stay as they are.

    The loss is the Kullback-Leibler divergence of the next-token distributions. Every eighth window
    is held out, and says when a lower rate must go on, when to stop, and which weights are taken.
    """

    __pydantic_config__ = STRICT

    train: Annotated[
        Trains,
        FieldShown(option="--recover-train", service=True),
        Field(
            description="What is trained. kept: all weights of the linears that the masks keep. "
            "norms: norms and biases alone, which takes the least memory. lora: a low-rank change "
            "of each linear, merged under its mask, for models whose weights cannot be trained "
            "in memory."
        ),
    ] = "kept"
    minutes: Annotated[
        Number | None,
        FieldShown(option="--recover-minutes", default="", service=True),
        Field(
            gt=0,
            le=MOST_MINUTES,
            description=f"Time that all of it may take; {MINUTES:g} minutes by default. It is "
            "turned into a number of tokens by measuring a step; the result says how many.",
        ),
    ] = None
    tokens: Annotated[
        Whole | None,
        FieldShown(option="--recover-tokens", service=True),
        Field(
            ge=1,
            le=MOST_TOKENS,
            description="Tokens to train on, instead of a time: the same number gives the same "
            "weights. More than seven windows are rounded up to eighths of whole ones.",
        ),
    ] = None
    written: Annotated[
        Whole,
        FieldShown(option="--recover-written", service=True),
        Field(
            ge=0,
            le=MOST_TOKENS,
            description="Tokens that the dense model writes itself, to train on beside the text: "
            "windows that begin as those of the text and go on by chance, to many other things. "
            "Writing takes as long as training or, on a GPU, some times longer. It needs tokens, "
            "not a time.",
        ),
    ] = 0
    shortened: Annotated[
        tuple[Shortening, ...],
        Strict(False),  # JSON has lists alone
        FieldShown(option="--recover-shortened", kind="words", service=True),
        Field(
            exclude_if=lambda shortened: not shortened,
            description="How a recovery of so many minutes was shortened when it took longer than "
            "planned, so that tokens can repeat it: AFTER:STEPS, the step after which its rate "
            "began to fall faster, and the last one.",
        ),
    ] = ()
    rate: Annotated[
        Number | None,
        FieldShown(
            option="--recover-rate",
            default=", ".join(f"{rate:g} for {what}" for what, rate in RATES.items())
            + ", times the divergence before, in nats, or 1",
            service=True,
        ),
        Field(
            gt=0,
            le=1,
            description="Learning rate of Adam in the first step, as a share of the root mean "
            "square of a parameter's weights. It falls to 0, and to a third after a check that is "
            "no better than before the training.",
        ),
    ] = None
    adam_bits: Annotated[
        AdamBits,
        FieldShown(option="--recover-adam-bits", service=True),
        Field(
            description="Bits of each number that Adam remembers, two for each weight that is "
            "trained: with 8 they take a quarter of the memory (bitsandbytes), and end a "
            "little worse: 2 % more perplexity on SmolLM2-135M."
        ),
    ] = 32
    seed: Annotated[
        Seed,
        FieldShown(option="--recover-seed", service=True),
        Field(description="Seed of the windows and their order."),
    ] = 0

    def __post_init__(self) -> None:
        check_choice("train", self.train, TRAINS)
        if self.minutes is not None and self.tokens is not None:
            raise InvalidInput(
                f"minutes={self.minutes:g} and tokens={self.tokens} both say how long to train. "
                "Give one of them."
            )
        if self.minutes is not None:
            check_number("minutes", self.minutes, 1e-9, MOST_MINUTES)
        if self.tokens is not None:
            check_number("tokens", self.tokens, 1, MOST_TOKENS)
        check_number("written", self.written, 0, MOST_TOKENS)
        if self.shortened and self.tokens is None:
            raise InvalidInput(
                f"shortened={','.join(self.shortened)} repeats a recovery of so many tokens, and "
                "none are given. Give tokens, as they were planned."
            )
        if self.written and self.tokens is None:
            raise InvalidInput(
                f"written={self.written}: what is written is trained on as one of so many tokens, "
                "and none are given. Give tokens, those of the text included."
            )
        if self.rate is not None:
            check_number("rate", self.rate, 1e-9, 1)
        check_choice("adam_bits", str(self.adam_bits), ("32", "8"))
        check_seed(self.seed)

    def __str__(self) -> str:
        """In a few words, for people."""
        counted = "" if self.tokens is None else f"{self.tokens:,} tokens"
        counted += f", {self.written:,} of them written," if self.written else ""
        return f"{counted or f'{self.time_s / 60:g} minutes'}, training {self.train}"

    @property
    def time_s(self) -> float:
        """Seconds that all of it may take, where the number of tokens is not given."""
        return 60 * (self.minutes or MINUTES)

    def first_rate(self, before: float) -> float:
        """That of a model with so many nats of divergence."""
        return RATES[self.train] * min(1.0, before) if self.rate is None else self.rate


@dataclass(frozen=True, kw_only=True)
class Student(JsonDocument):
    """
    A model that is smaller than its teacher, as it was before its recovery.

    Attributes:
        model: The student, as results have it.
        parameters: Its parameters, those that it shares counted once.
        blocks: Its decoder blocks.
        teacher_parameters: Parameters of its teacher.
        teacher_blocks: Decoder blocks of its teacher.
    """

    __pydantic_config__ = STRICT

    model: dict[str, str | int | None]
    parameters: Whole
    blocks: Whole
    teacher_parameters: Whole
    teacher_blocks: Whole

    def __str__(self) -> str:
        """Both sizes in a few words."""
        blocks = f"{self.blocks} block{'s' * (self.blocks != 1)}"
        return (
            f"{self.parameters:,} parameters in {blocks}, "
            f"its teacher {self.teacher_parameters:,} in {self.teacher_blocks}"
        )


@dataclass(frozen=True, kw_only=True)
class Recovered(JsonDocument):
    """
    Result of a recovery.

    Attributes:
        train: What was trained.
        before: Divergence from the dense model on the held-out windows, in nats a token.
        after: The same of the model that was left.
        kept: Whether the trained weights were taken; otherwise the model is as it was before.
        tokens: Tokens that it was trained on, those counted again that came again in other windows.
        planned: Tokens that its minutes were planned for, if it was shortened.
        shortened: How: the step after which its rate began to fall faster, and the last one.
        windows: Windows that it was trained on, whose tokens may have come again in other cuts.
        written: How many of these the dense model wrote.
        held_out: Windows that were held out.
        context_length: Tokens of a window.
        rate: Learning rate of the first step, as a share.
        adam_bits: Bits of each number that Adam remembered.
        seed: Seed of the windows and their order.
        teacher: The dense model, as results have it.
        student: Sizes of the model and of its teacher, where the teacher is larger.
        text: What it was trained on: source and hash.
        measured: What perplexities were measured on, nothing of which was trained on: source, hash
            and windows.
        perplexities: Those of the models ``dense``, ``pruned`` and ``recovered``, where there was a
            text to measure them on.
        errors: Standard errors of the logarithms of their ratios, by paired differences on that
            text: ``pruned/dense``, ``recovered/dense`` and ``recovered/pruned``.
        continuations: What each of the three writes after beginnings of that text.
        seconds: What it took.
    """

    __pydantic_config__ = STRICT

    train: Trains
    before: Number
    after: Number
    kept: bool
    tokens: Whole
    planned: Annotated[Whole | None, Field(exclude_if=lambda planned: planned is None)] = None
    shortened: Annotated[
        tuple[Shortening, ...], Strict(False), Field(exclude_if=lambda shortened: not shortened)
    ] = ()
    windows: Whole
    written: Whole = 0
    held_out: Whole
    context_length: Whole
    rate: Number
    adam_bits: Whole = 32
    seed: Whole
    teacher: dict[str, str | int | None]
    student: Annotated[Student | None, Field(exclude_if=lambda student: student is None)] = None
    text: dict[str, Any]
    measured: Annotated[
        dict[str, Any] | None, Field(exclude_if=lambda measured: measured is None)
    ] = None
    perplexities: dict[str, Number] = field(default_factory=dict)
    errors: dict[str, Number] = field(default_factory=dict)
    continuations: list[Continuation] = field(default_factory=list)
    seconds: Number

    def headline(self, good: Perplexities) -> Perplexities:
        """A result with this model in place of the pruned one, if it has the same windows."""
        dense, now = (self.perplexities.get(name) for name in ("dense", "recovered"))
        if dense is None or now is None or not math.isclose(dense, good.dense, rel_tol=1e-3):
            return good
        errors = {name: error for name, error in good.errors.items() if "/" in name}
        if (error := self.errors.get("recovered/dense")) is not None:
            errors["dense"] = error
        return good.model_copy(update={"pruned": now, "errors": errors})

    @property
    def models_before(self) -> tuple[str, str]:
        """What the models ``dense`` and ``pruned`` are called."""
        return ("teacher", "student") if self.student else ("dense", "pruned")

    def __str__(self) -> str:
        """In a sentence, for people."""
        teacher = "teacher" if self.student else "dense model"
        how = f"{self.tokens:,} tokens in {self.seconds / 60:.1f} minutes, training {self.train}"
        if self.written:
            how += f"; the {teacher} wrote {self.written} of {self.windows} windows"
        if (times := self.tokens / self.context_length / self.windows) >= 1.1:
            how += f" (each of {self.windows} windows {times:.2g} times, in other cuts: more "
            how += "text would do more)"
        if self.planned is not None:
            how += f"; {self.planned:,} tokens were planned, and it took longer"
        if not self.kept:
            return (
                f"recovery over {how}, brought the divergence of held-out windows nowhere below "
                f"{number(self.before)} nats (a lower rate may); the weights are those from before"
            )
        gain = ""
        was, now = (self.perplexities.get(name) for name in ("pruned", "recovered"))
        if was and now:
            ratio = Ratio(now, was, self.errors.get("recovered/pruned"))
            gain = f"perplexity {number(was)} → {number(now)} ({ratio}), "
        return (
            f"{gain}divergence from the {teacher} {number(self.before)} → {number(self.after)} "
            f"nats ({percent(self.after / self.before - 1, signed=True)}) on held-out windows, by "
            f"{how}"
        )
