"""
The pattern of a pruning, its score, and its linears.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property, lru_cache
from math import prod
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import (
    STRICT,
    FieldShown,
    JsonDocument,
    Number,
    Whole,
    check_choice,
    printable,
)
from pho_service.spec.structure import (
    GOAL_SHARE,
    BlockShapes,
    Goal,
    Structure,
    is_structured,
    share_of_blocks,
    split,
    structured_pattern,
    structured_share,
)

ScopeName = Literal["row", "layer", "global"]


class Scope(StrEnum):
    """Which weights compete with each other for the places that stay."""

    ROW = "row"  # the weights of one output row
    LAYER = "layer"  # the weights of one linear
    GLOBAL = "global"  # the weights of all linears

    @property
    def width(self) -> int:
        """0 for row, 1 for layer, 2 for global: a narrow scope satisfies every wider one."""
        return list(Scope).index(self)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """
    How many weights are removed, and where they are counted: a ratio, N:M, or a cut of blocks.

    Attributes:
        sparsity: Share of weights removed, in (0, 1). For N:M it is 1 - N/M; for a cut about the
            share of the weights of all blocks, or of the model's file.
        scope: Where ``sparsity`` holds exactly. Always ``row`` for N:M.
        keep: N of N:M, the weights kept in a group; 0 for unstructured.
        group: M of N:M, neighbouring input channels; 0 for unstructured.
        structured: Whether whole neurons, heads and blocks leave instead of single weights.
        of_file: Whether ``sparsity`` is a share of the file, of which embeddings are a part.
        goal: What a cut is to reach, whose share is found out on the model; ``sparsity`` is what is
            planned until then.
    """

    sparsity: float
    scope: Scope = Scope.ROW
    keep: int = 0
    group: int = 0
    structured: bool = False
    of_file: bool = False
    goal: Goal | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InvalidInput(
                f"sparsity {self.sparsity:g} is not between 0 and 1. It is the share of weights "
                "removed: write 0.5 to remove half of them."
            )
        if self.group and self.scope is not Scope.ROW:
            raise InvalidInput(
                f"pattern {self} counts inside groups of {self.group} input channels, so scope "
                f"{self.scope.value!r} has no meaning for it. Leave the scope out."
            )
        if self.structured and self.scope is not Scope.LAYER:
            raise InvalidInput(
                f"pattern {self} cuts neurons, heads and blocks, among which scope "
                f"{self.scope.value!r} has no meaning. Leave the scope out."
            )

    @classmethod
    def parse(cls, text: str, scope: str | None = None) -> Self:
        """
        Read ``"0.5"``, ``"2:4"`` (N kept of M), ``"structured:20%"`` (cut out of blocks) or
        ``"smaller:20%"`` (the same, of the model's file). ``"bytes:95MB"`` cuts for a GGUF file of
        so many bytes, and ``"faster:1.2x"`` for a speed.

        Args:
            text: A sparsity in (0, 1), N:M with 1 <= N < M <= 64, or a share to cut.
            scope: ``row``, ``layer`` or ``global``. None takes ``row`` for N:M
                and ``layer`` otherwise.

        Raises:
            InvalidInput: Anything else.
        """
        rule = (
            "Give the share of weights to remove (0.5), N:M, N kept of M (2:4), or a share to cut "
            "of the blocks (structured:20%) or of the file (smaller:20%); or what a cut is for "
            "(bytes:95MB, faster:1.2x)."
        )
        try:
            parsed_scope = None if scope is None else Scope(scope)
        except ValueError:
            names = ", ".join(Scope)
            raise InvalidInput(f"scope {scope!r} is not one of {names}.") from None
        if is_structured(text):
            goal, scope_of_cuts = Goal.parse(text), parsed_scope or Scope.LAYER
            share, of_file = (GOAL_SHARE, False) if goal else structured_share(text)
            return cls(
                sparsity=share, scope=scope_of_cuts, structured=True, of_file=of_file, goal=goal
            )
        if ":" in text:
            keep_text, _, group_text = text.partition(":")
            try:
                keep, group = int(keep_text), int(group_text)
            except ValueError:
                raise InvalidInput(f"pattern {text!r} is not N:M. {rule}") from None
            if not (1 <= keep < group <= 64):
                raise InvalidInput(
                    f"pattern {text!r} keeps N={keep} of M={group}, but 1 <= N < M <= 64 "
                    f"must hold. {rule}"
                )
            sparsity = float(1 - Fraction(keep, group))
            return cls(sparsity=sparsity, scope=parsed_scope or Scope.ROW, keep=keep, group=group)
        try:
            sparsity = float(text)
        except ValueError:
            raise InvalidInput(f"pattern {text!r} is neither a number nor N:M. {rule}") from None
        return cls(sparsity=sparsity, scope=parsed_scope or Scope.LAYER)

    def removed(self, count: int) -> int:
        """
        How many of ``count`` weights are removed: the exact product, rounded down.

        Wanda's and RIA's published code round down too. The decimal digits of
        ``sparsity`` count, not its binary value: 0.29 of 100 is 29.
        """
        if self.group:
            return (self.group - self.keep) * count // self.group
        return int(Fraction(repr(self.sparsity)) * count)

    def cut_share(self, *, parameters: int, prunable: int) -> float:
        """
        The share of its blocks' weights that is cut out of a model; 0 if nothing is cut.

        Raises:
            InvalidInput: It is one of the file, and more than half of the blocks would have to go.
        """
        if self.of_file:
            return share_of_blocks(self.sparsity, parameters=parameters, prunable=prunable)
        return self.sparsity if self.structured else 0.0

    def splits(self, shapes: BlockShapes, share: float = 0.0) -> list[Structure]:
        """
        The uniform structures that a cut may be of a model with these shapes; of a goal those of
        the ``share`` of the blocks that it takes.
        """
        if self.goal is not None:
            return split(share, shapes) if share else [Structure()]
        share = self.cut_share(parameters=shapes.parameters, prunable=shapes.weights)
        return split(share, shapes)

    def within(self, scope: Scope) -> "Pattern":
        return self if self.group or self.structured else replace(self, scope=scope)

    @property
    def free_scope(self) -> str | None:
        """The scope, where there is a choice: N:M and cuts have but one."""
        return None if self.group or self.structured else self.scope.value

    def check_width(self, in_features: int, layer: str) -> None:
        """Raise InvalidInput if ``layer`` cannot be cut into groups of M input channels."""
        if self.group and in_features % self.group:
            raise InvalidInput(
                f"{layer}: in_features={in_features} is not a multiple of M={self.group}. "
                "Choose an M that divides the input width of every linear, or a ratio such as 0.5."
            )

    def __str__(self) -> str:
        if self.goal is not None:
            return self.goal.pattern
        if self.structured:
            return structured_pattern(self.sparsity, of_file=self.of_file)
        return f"{self.keep}:{self.group}" if self.group else repr(self.sparsity)

    def refuse_structured(self, why: str) -> None:
        """
        Raises:
            InvalidInput: It is a cut of blocks, which whoever asks cannot take.
        """
        if self.structured:
            raise InvalidInput(
                f"pattern {self} cuts neurons, heads and blocks out of a model: {why}. Give the "
                "share of weights to remove (0.5) or N:M (2:4)."
            )


def _share_as_text(value: object) -> object:
    """A share that is given as a number, as Python takes it, too."""
    return str(value) if isinstance(value, (int, float)) and value is not True else value


_PATTERN_TEXT = Annotated[str, Field(min_length=1, max_length=64)]
_SHARE = Annotated[float, Field(gt=0, lt=1)]
PatternText = Annotated[
    _PATTERN_TEXT,
    AfterValidator(printable),
    BeforeValidator(_share_as_text, json_schema_input_type=_PATTERN_TEXT | _SHARE),
]


KERNEL_SIZES = (3, 5, 9, 15)  # that a bundle is made for, and that a search chooses from
Normalisation = Literal["mean", "sum", "none"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


@dataclass(frozen=True, kw_only=True)
class Coefficients(JsonDocument):
    """
    One importance score: how much each part of it counts.

    With A = |W|, x the activation norm and g the Fisher row weight:

        R = row * A/mean_row(A) + column * A/mean_col(A)
            + neighbourhood * A/mean_kxk(A)
        score = R * x**activation_exponent * g**gradient_exponent

    A common factor of the three coefficients changes nothing.
    """

    __pydantic_config__ = STRICT

    row: Annotated[
        Number, Field(description="Weight of the magnitude relative to its output row, >= 0.")
    ]
    column: Annotated[
        Number, Field(description="Weight of the magnitude relative to its input channel, >= 0.")
    ]
    neighbourhood: Annotated[
        Number,
        Field(description="Weight of the magnitude relative to the k x k window around it, >= 0."),
    ]
    kernel_size: Annotated[Whole, Field(description="k, odd, 3 to 999.")] = 3
    activation_exponent: Annotated[
        Number, Field(description="0 ignores the activations, 1 is Wanda's choice.")
    ] = 0.5
    gradient_exponent: Annotated[
        Number,
        Field(
            description="0 is CRePE as published, 0.5 the second-order choice. It cancels within "
            "one output row."
        ),
    ] = 0.0
    normalisation: Annotated[
        Normalisation,
        Field(
            description="mean as in the formula; sum divides the row and column terms by sums, as "
            "RIA does; none leaves R = A."
        ),
    ] = "mean"

    def __post_init__(self) -> None:
        for name in (
            "row", "column", "neighbourhood", "activation_exponent", "gradient_exponent",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InvalidInput(f"coefficient {name}={value!r} is not a number.")
            if not 0 <= value <= 1e30:
                raise InvalidInput(
                    f"coefficient {name}={value} is not allowed: it must lie between 0 and 1e30."
                )
        if self.row + self.column + self.neighbourhood <= 0:
            raise InvalidInput(
                "the coefficients row, column and neighbourhood are all zero, so every weight "
                "would score 0. At least one must be positive."
            )
        k = self.kernel_size
        if not isinstance(k, int) or isinstance(k, bool) or not 3 <= k < 1000 or k % 2 == 0:
            raise InvalidInput(
                f"kernel_size={k!r} is not an odd whole number from 3 to 999: the window must "
                "have a middle."
            )
        check_choice("normalisation", self.normalisation, NORMALISATIONS)


REGULAR = "re:"  # begins a regular expression
LONGEST = 512  # characters of a pattern
MOST = 256  # patterns of each kind
REPEATS = 1_000  # product of the counts of a regular expression, which are written out to match
SECONDS = 1.0  # that all regular expressions may take for the names of a model
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_NEAR = 3  # names that a message lists


@dataclass(frozen=True, kw_only=True)
class ChosenLinears:
    """The linears of one model that are pruned."""

    # Names of those that lose the pattern's share together, in the order of the model
    shared: tuple[str, ...]
    patterns: Mapping[str, Pattern]  # The pattern of each of the others, by name

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.shared) | self.patterns.keys()


@dataclass(frozen=True, kw_only=True)
class Linears(JsonDocument):
    """
    Which linears are pruned, by their full names (``model.layers.3.mlp.up_proj``).

    A pattern is a name; or a glob, in which ``*`` stands for any characters, dots too; or, after
    ``re:``, a regular expression. All of them match whole names.

    The linears that are left out stay dense. What a pattern removes, an allocation shares out and
    a result reports is counted over the linears that are pruned. Those with a sparsity by hand
    have exactly that, and no part in an allocation or in the competition of scope ``global``.

    """

    __pydantic_config__ = STRICT

    targets: Annotated[
        tuple[str, ...],
        FieldShown(label="Linears to prune"),
        Field(
            description="Linears to prune, all by default: full names, globs (*.down_proj), or "
            "regular expressions after re: (re:.*[qk]_proj), each of which matches whole names."
        ),
    ] = ()
    ignore: Annotated[
        tuple[str, ...],
        FieldShown(label="Linears that stay dense"),
        Field(description="Linears that stay dense, in the same form; they come before targets."),
    ] = ()
    sparsities: Annotated[
        dict[str, Number | str],
        FieldShown(option="--sparsity", label="Linears with a sparsity of their own"),
        Field(
            description="Linears with a sparsity of their own, by the same patterns: for a ratio "
            "the share of weights to remove (0.3); for N:M the N to keep of the same M (3:4)."
        ),
    ] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind in ("targets", "ignore"):
            globs = getattr(self, kind)
            object.__setattr__(self, kind, (globs,) if isinstance(globs, str) else tuple(globs))
        object.__setattr__(self, "sparsities", dict(self.sparsities))
        for kind, patterns in self._patterns():
            if len(patterns) > MOST:
                raise InvalidInput(
                    f"{kind} has {len(patterns)} patterns, and {MOST} are the most. Take globs "
                    "(*.down_proj) instead of single names."
                )
            for pattern in patterns:
                _check(kind, pattern)
        for pattern, value in self.sparsities.items():
            _own(pattern, value, None)

    def __bool__(self) -> bool:
        """Return whether anything is said; if not, all linears are pruned alike."""
        return bool(self.targets or self.ignore or self.sparsities)

    def __str__(self) -> str:
        """In one line, for people; empty if nothing is said."""
        by_hand = [f"{pattern}={value}" for pattern, value in self.sparsities.items()]
        parts = {"only": self.targets, "without": self.ignore, "by hand": by_hand}
        return ", ".join(f"{word} {' '.join(values)}" for word, values in parts.items() if values)

    def check_pattern(self, pattern: Pattern) -> None:
        for name, value in self.sparsities.items():
            _own(name, value, pattern)

    def choose(
        self, names: Sequence[str], pattern: Pattern, *, model: str = "the model"
    ) -> ChosenLinears:
        """Find out which linears of a model are meant."""
        if not self:
            return ChosenLinears(shared=tuple(names), patterns={})
        rest, given = _named(self, tuple(names), model)
        return ChosenLinears(
            shared=tuple(name for name in rest if name not in given),
            patterns={
                name: _own(given[name], self.sparsities[given[name]], pattern)
                for name in rest
                if name in given
            },
        )

    def _patterns(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield "targets", self.targets
        yield "ignore", self.ignore
        yield "sparsities", list(self.sparsities)


def _check(kind: str, pattern: str) -> None:
    """Raise InvalidInput if a pattern cannot match anything, whatever the model."""
    if not isinstance(pattern, str) or not pattern or not pattern.isprintable():
        raise InvalidInput(
            f"{kind} has {pattern!r}, which is not the name of a linear. Give names, globs "
            "(*.down_proj) or regular expressions (re:.*[02468]\\.mlp.*)."
        )
    if len(pattern) > LONGEST:
        raise InvalidInput(
            f"{kind} has a pattern of {len(pattern)} characters, {pattern[:40]!r}..., and "
            f"{LONGEST} are the most. Give several."
        )
    if pattern.startswith(REGULAR):
        try:
            re.compile(pattern.removeprefix(REGULAR))
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"{kind} has {pattern!r}, which is not a regular expression: {error}. For a glob, "
                f"leave {REGULAR} out."
            ) from error
        # Spaces do not count in an expression that says so. Where one count is inside of another,
        # the expression is as long as their product.
        counts = _COUNT.findall(pattern.replace(" ", ""))
        repeats = prod(max(1, *(int(count or 1) for count in both)) for both in counts)
        if repeats > REPEATS:
            raise InvalidInput(
                f"{kind} has {pattern!r}, whose counted repeats come to {repeats} together, and "
                f"{REPEATS} are the most. Write * or + instead, or give several patterns."
            )


def _own(name: str, value: float | str, pattern: Pattern | None) -> Pattern:
    """The pattern that a sparsity by hand stands for, in the scope of ``pattern`` if given."""
    what = f"sparsities: {name}={value}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidInput(f"{what} is not a sparsity. Give a share (0.3) or N:M (3:4).")
    try:
        parsed = Pattern.parse(str(value))
    except InvalidInput as error:
        raise InvalidInput(f"{what}: {error} To keep a linear dense, ignore it.") from error
    if pattern is None:
        return parsed
    if parsed.group != pattern.group:
        rule = f"N:{pattern.group}, the N to keep" if pattern.group else "a share to remove, 0.3"
        raise InvalidInput(f"{what} does not fit the pattern {pattern}. Give {rule}.")
    return replace(parsed, scope=pattern.scope)


@lru_cache(maxsize=16)  # all points and candidates of a job ask the same
def _named(
    linears: Linears, names: tuple[str, ...], model: str
) -> tuple[list[str], dict[str, str]]:
    """The names of those that are pruned, and what gives some of them a sparsity of their own."""
    end = time.monotonic() + SECONDS
    of = f"of the {len(names)} linears of {model}"
    targets = set(names)
    if linears.targets:
        targets = _matched("targets", linears.targets, names, of, end)
    pruned = targets - _matched("ignore", linears.ignore, names, of, end)
    if not pruned:
        raise InvalidInput(
            f"targets and ignore leave none {of} to prune. Leave a pattern of ignore out."
        )
    rest = [name for name in names if name in pruned]
    among = of if len(rest) == len(names) else f"of the {len(rest)} pruned linears of {model}"
    given: dict[str, str] = {}
    for text in linears.sparsities:
        for name in _matched("sparsities", [text], rest, among, end):
            if name in given:
                raise InvalidInput(
                    f"{name} has two sparsities by hand: {given[name]!r} and {text!r} both "
                    "match it. Give each linear one."
                )
            given[name] = text
    return rest, given


def _matched(
    kind: str, patterns: Iterable[str], names: Sequence[str], of: str, end: float
) -> set[str]:
    """The names that one of the patterns matches; each must match some."""
    all_matched: set[str] = set()
    for pattern in patterns:
        matched = _matches(kind, pattern, names, end)
        if not matched:
            raise InvalidInput(f"{kind}: {pattern!r} matches none {of}. {_nearest(pattern, names)}")
        all_matched |= matched
    return all_matched


def _matches(kind: str, pattern: str, names: Sequence[str], end: float) -> set[str]:
    if not pattern.startswith(REGULAR):
        return {name for name in names if fnmatchcase(name, pattern)}
    import regex  # only where models are; Python's own cannot be stopped, and holds all threads

    matched = set()
    try:
        expression = regex.compile(pattern.removeprefix(REGULAR), cache_pattern=False)
        for name in names:
            # One without time left stops at its first look at the clock.
            if expression.fullmatch(name, timeout=max(end - time.monotonic(), 1e-9)):
                matched.add(name)
    except TimeoutError as error:
        raise InvalidInput(
            f"the regular expressions up to {pattern!r} of {kind} take more than {SECONDS:g} s on "
            f"{len(names)} names. Write them without repeats in repeats, or as globs."
        ) from error
    return matched


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Say in a sentence what may have been meant."""
    ends = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names)
    near = get_close_matches(pattern.removeprefix(REGULAR), [*ends, *names], _NEAR, cutoff=0.5)
    return f"Near: {', '.join(near or [*ends][:_NEAR])}."
