"""
Which linears of a model are pruned, and which of them lose a share of their own.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Number, Shown, Stored
from pho_service.spec.pattern import Pattern

REGULAR = "re:"  # begins a regular expression
LONGEST = 512  # characters of a pattern
MOST = 256  # patterns of each kind
SECONDS = 1.0  # that a regular expression may take for all names of a model
_NEAR = 3  # names that a message lists


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """
    The linears of one model that are pruned.

    Attributes:
        shared: Names of those that lose the pattern's share together, in the order of the model.
        own: The pattern of each of the others, by name.
    """

    shared: tuple[str, ...]
    own: Mapping[str, Pattern]

    @cached_property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.shared) | self.own.keys()


@dataclass(frozen=True, kw_only=True)
class Linears(Stored):
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
        Shown(label="Linears to prune"),
        Field(
            description="Linears to prune, all by default: full names, globs (*.down_proj), or "
            "regular expressions after re: (re:.*[qk]_proj), each of which matches whole names."
        ),
    ] = ()
    ignore: Annotated[
        tuple[str, ...],
        Shown(label="Linears that stay dense"),
        Field(description="Linears that stay dense, in the same form; they come before targets."),
    ] = ()
    sparsities: Annotated[
        dict[str, Number | str],
        Shown(option="--sparsity", label="Linears with a sparsity of their own"),
        Field(
            description="Linears with a sparsity of their own, by the same patterns: for a ratio "
            "the share of weights to remove (0.3); for N:M the N to keep of the same M (3:4)."
        ),
    ] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind in ("targets", "ignore"):
            given = getattr(self, kind)
            object.__setattr__(self, kind, (given,) if isinstance(given, str) else tuple(given))
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
        """Whether anything is said; if not, all linears are pruned alike."""
        return bool(self.targets or self.ignore or self.sparsities)

    def __str__(self) -> str:
        """In one line, for people; empty if nothing is said."""
        own = [f"{pattern}={value}" for pattern, value in self.sparsities.items()]
        parts = {"only": self.targets, "without": self.ignore, "by hand": own}
        return ", ".join(f"{word} {' '.join(values)}" for word, values in parts.items() if values)

    def check_pattern(self, pattern: Pattern) -> None:
        """
        Raises:
            InvalidInput: A sparsity by hand has no meaning in ``pattern``.
        """
        for name, value in self.sparsities.items():
            _own(name, value, pattern)

    def choose(self, names: Sequence[str], pattern: Pattern, *, model: str = "the model") -> Chosen:
        """
        Find out which linears of a model are meant.

        Args:
            names: Full names of all its linears.
            pattern: Pattern of those that have no sparsity by hand.
            model: For messages.

        Raises:
            InvalidInput: A pattern matches nothing, a linear has two sparsities, or nothing is
                left to prune; or a sparsity has no meaning in ``pattern``.
        """
        if not self:
            return Chosen(shared=tuple(names), own={})
        of = f"of the {len(names)} linears of {model}"
        targets = _matched("targets", self.targets, names, of) if self.targets else set(names)
        pruned = targets - _matched("ignore", self.ignore, names, of)
        if not pruned:
            raise InvalidInput(
                f"targets and ignore leave none {of} to prune. Leave a pattern of ignore out."
            )
        rest = [name for name in names if name in pruned]
        among = of if len(rest) == len(names) else f"of the {len(rest)} pruned linears of {model}"
        given: dict[str, str] = {}
        own: dict[str, Pattern] = {}
        for text, value in self.sparsities.items():
            for name in _matched("sparsities", [text], rest, among):
                if name in given:
                    raise InvalidInput(
                        f"{name} has two sparsities by hand: {given[name]!r} and {text!r} both "
                        "match it. Give each linear one."
                    )
                given[name] = text
                own[name] = _own(text, value, pattern)
        return Chosen(
            shared=tuple(name for name in rest if name not in own),
            own={name: own[name] for name in rest if name in own},
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


def _own(name: str, value: float | str, pattern: Pattern | None) -> Pattern:
    """The pattern that a sparsity by hand stands for, in the scope of ``pattern`` if given."""
    what = f"sparsities: {name}={value}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidInput(f"{what} is not a sparsity. Give a share (0.3) or N:M (3:4).")
    try:
        own = Pattern.parse(str(value))
    except InvalidInput as error:
        raise InvalidInput(f"{what}: {error} To keep a linear dense, ignore it.") from error
    if pattern is None:
        return own
    if own.group != pattern.group:
        rule = f"N:{pattern.group}, the N to keep" if pattern.group else "a share to remove, 0.3"
        raise InvalidInput(f"{what} does not fit the pattern {pattern}. Give {rule}.")
    return replace(own, scope=pattern.scope)


def _matched(kind: str, patterns: Iterable[str], names: Sequence[str], of: str) -> set[str]:
    """The names that one of the patterns matches; each must match some."""
    found: set[str] = set()
    for pattern in patterns:
        matched = _matches(kind, pattern, names)
        if not matched:
            raise InvalidInput(f"{kind}: {pattern!r} matches none {of}. {_nearest(pattern, names)}")
        found |= matched
    return found


def _matches(kind: str, pattern: str, names: Sequence[str]) -> set[str]:
    if not pattern.startswith(REGULAR):
        return {name for name in names if fnmatchcase(name, pattern)}
    import regex  # only where models are; Python's own cannot be stopped, and holds all threads

    end = time.monotonic() + SECONDS
    try:
        expression = regex.compile(pattern.removeprefix(REGULAR))
        return {
            name
            for name in names
            if expression.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))
        }
    except TimeoutError as error:
        raise InvalidInput(
            f"{kind}: {pattern!r} takes more than {SECONDS:g} s on {len(names)} names. Write it "
            "without repeats in repeats, or as globs."
        ) from error


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """What may have been meant, in a sentence."""
    ends = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names)
    near = get_close_matches(pattern.removeprefix(REGULAR), [*ends, *names], _NEAR, cutoff=0.5)
    return f"Near: {', '.join(near or [*ends][:_NEAR])}."
