"""
Which configuration of a library is likely to be good on a model, and why.

A library is the store of a service, or a folder of files; what is here is the same for both.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from pho_service.library.entries import Entry, Gain, MeasuredBy, ModelFacts
from pho_service.spec.pattern import Pattern, Scope

# How much of a gain is expected to be left on a model of another kind. Judgement, not measured:
# they only order what was not measured on the asked family.
RELATED_FAMILY = 0.95  # gemma2 and gemma3_text
OTHER_FAMILY = 0.85
UNKNOWN = 0.85
PER_DOUBLING = 0.98  # of the number of parameters, up or down


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """
    What a configuration is looked for; None is any.

    Attributes:
        pattern: With its scope, if ``scope_matters`` and ``scope`` is None.
        scope: Where weights compete, of any pattern; one that the pattern never has fits nothing.
        scope_matters: Whether another scope is another thing.
        family: A ``model_type``, or the beginning of one: gemma.
        parameters: Number of parameters of the model.
    """

    pattern: Pattern | None = None
    scope: Scope | None = None
    scope_matters: bool = False
    family: str | None = None
    parameters: int | None = None

    @classmethod
    def parse(
        cls,
        pattern: str | None = None,
        scope: str | None = None,
        family: str | None = None,
        parameters: int | None = None,
    ) -> Self:
        """
        Return the target that a user describes.

        Raises:
            InvalidInput: There is no such pattern, no such scope, or the pattern never has it.
        """
        asked = None if scope is None else Pattern.parse("0.5", scope).scope
        return cls(
            pattern=None if pattern is None else Pattern.parse(pattern, scope),
            scope=asked,
            scope_matters=scope is not None,
            family=family,
            parameters=parameters,
        )


@dataclass(frozen=True, kw_only=True)
class Match:
    """
    An entry, and why it stands where it stands.

    Attributes:
        fits: It is of the asked pattern and scope, so that it can be used as it is.
        expected: Gain over RIA on the asked model, as a share; None where nothing is known.
        expected_by: What it is a share of, as of the gain that it comes from.
        reasons: Sentences without a full stop.
    """

    entry: Entry
    fits: bool
    expected: float | None
    expected_by: MeasuredBy | None
    reasons: tuple[str, ...]


def rank(entries: Sequence[Entry], wanted: Wanted) -> list[Match]:
    """
    Entries in the order in which they are worth trying.

    First comes the pattern, and the scope if it is asked for: coefficients of another one are of
    little use. Then what is better than RIA by perplexity (or by divergence, which is in the same
    unit), then by the proxy alone, then what nothing is known of, then what is no better. Within
    each, by the gain that is expected on the asked model: what was measured on its family, or else
    what was measured where it was found, less something for each difference.
    """
    matches = [(_order(entry, wanted), _match(entry, wanted)) for entry in entries]
    return [match for _, match in sorted(matches, key=lambda pair: pair[0])]


def _order(entry: Entry, wanted: Wanted) -> tuple[float, bool, int, float, str]:
    gain, share = _expected(entry, wanted)
    if gain is None:
        group = 2
    elif gain.value <= 0:
        group = 3
    else:
        group = 1 if gain.by == "proxy" else 0
    other_scope = wanted.scope_matters and not _same_scope(entry, wanted)
    return _distance(entry, wanted), other_scope, group, -(share or 0.0), entry.id


def _match(entry: Entry, wanted: Wanted) -> Match:
    gain, share = _expected(entry, wanted)
    fits = _distance(entry, wanted) == 0 and (
        not wanted.scope_matters or _same_scope(entry, wanted)
    )
    return Match(
        entry=entry,
        fits=fits,
        expected=share,
        expected_by=None if gain is None else gain.by,
        reasons=tuple(_reasons(entry, wanted)),
    )


def _distance(entry: Entry, wanted: Wanted) -> float:
    """0 for the asked pattern; ratios and N:M are further from each other than any of a kind."""
    if wanted.pattern is None or str(entry.pattern) == str(wanted.pattern):
        return 0.0
    other_kind = bool(entry.pattern.group) != bool(wanted.pattern.group)
    return 1e-6 + other_kind + abs(entry.pattern.sparsity - wanted.pattern.sparsity)


def _same_scope(entry: Entry, wanted: Wanted) -> bool:
    asked = _asked_scope(wanted)
    return asked is None or entry.pattern.scope is asked


def _asked_scope(wanted: Wanted) -> Scope | None:
    return wanted.scope or (wanted.pattern.scope if wanted.pattern else None)


def _expected(entry: Entry, wanted: Wanted) -> tuple[Gain | None, float | None]:
    """The measurement that counts for the asked model, and the gain that it makes likely there."""
    there = [m.gain for m in entry.measured if _kinship(m.model.family, wanted.family) == 1]
    if wanted.family is not None and there:
        worst = min(there, key=lambda gain: (gain.by == "proxy", gain.share))
        return worst, worst.share
    if entry.gain is None:
        return None, None
    left = max((_left(model, wanted) for model in entry.models), default=UNKNOWN)
    share = entry.gain.share
    return entry.gain, share * left if share > 0 else share


def _left(model: ModelFacts, wanted: Wanted) -> float:
    """The share of a gain on ``model`` that is expected to be left on the asked one."""
    kinship = 1.0 if wanted.family is None else _kinship(model.family, wanted.family)
    if wanted.parameters is None:
        return kinship
    if model.parameters is None:
        return kinship * UNKNOWN
    doublings = abs(math.log2(model.parameters) - math.log2(wanted.parameters))
    return float(kinship * PER_DOUBLING**doublings)


def _kinship(family: str | None, wanted: str | None) -> float:
    if wanted is None or family is None:
        return UNKNOWN
    if family.startswith(wanted) or family == wanted.removesuffix("_text"):
        return 1.0
    return RELATED_FAMILY if _stem(family) == _stem(wanted) else OTHER_FAMILY


def _stem(family: str) -> str:
    """The letters that a family's name begins with: gemma of gemma3_text."""
    found = re.match(r"[a-z]+", family.lower())
    return found.group() if found else family


def _reasons(entry: Entry, wanted: Wanted) -> Iterable[str]:
    mine = f"pattern {entry.pattern}, scope {entry.pattern.scope.value}"
    if wanted.pattern is not None and _distance(entry, wanted) > 0:
        yield f"{mine}, but {wanted.pattern} is asked for: search again, beginning with it or not"
    elif wanted.scope_matters and not _same_scope(entry, wanted):
        yield f"{mine}, but scope {_asked_scope(wanted)} is asked"
    else:
        yield mine
    for model in entry.models:
        yield _model_reason(model, wanted)
    found = " + ".join(model.name for model in entry.models)
    yield f"where it was found, {entry.gain or 'RIA was not measured beside it'} ({found})"
    for measured in entry.measured:
        yield f"on {measured.model.name}, {measured.gain}"
    if entry.method != "crepe":
        yield f"it is the baseline {entry.method}: the search found nothing better"


def _size(parameters: int) -> str:
    if parameters < 1_000_000:
        return f"{parameters:,} parameters"
    return f"{parameters / 1e6:.0f} M parameters"


def _model_reason(model: ModelFacts, wanted: Wanted) -> str:
    size = _size(model.parameters) if model.parameters else "unknown size"
    said = f"found on {model.name}, {model.family or 'unknown family'}, {size}"
    if wanted.family is None:
        return said
    if model.family is None:
        return f"{said}; asked for is {wanted.family}"
    kin = {1.0: "the family", RELATED_FAMILY: "a family related to the one"}
    return f"{said}: {kin.get(_kinship(model.family, wanted.family), 'not the family')} asked for"
