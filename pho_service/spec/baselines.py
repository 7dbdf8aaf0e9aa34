"""
The published methods that results are measured by, and a configuration taken apart.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.spec.pattern import Coefficients, Linears, Pattern, Scope
from pho_service.spec.steps import Allocation, Candidate, Steps

_MAGNITUDE = Coefficients(
    row=1, column=0, neighbourhood=0, activation_exponent=0, normalisation="none"
)
_WANDA = replace(_MAGNITUDE, activation_exponent=1)
_RIA = Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum")
_EQUAL = Coefficients(row=1, column=1, neighbourhood=1)
_FISHER = replace(_WANDA, gradient_exponent=0.5)
# The published scores, each in its own scope; None is that of the pattern.
_SCORES = (
    ("magnitude", _MAGNITUDE, Scope.LAYER),
    ("wanda", _WANDA, Scope.ROW),
    ("ria-row", _RIA, Scope.ROW),
    ("ria-layer", _RIA, Scope.LAYER),
    ("crepe-equal", _EQUAL, None),
)
BASELINES = (*(method for method, _, _ in _SCORES), "fisher", "fisher-bounded")

ALL = "all"  # stands for the name of every method
SEQUENTIAL, PERMUTED = "-sequential", "-permuted"
# Shown only where they are named: variants of what is there, or methods that take much longer.
_DEAR = ("dsnot", "admm", "alps", "owl-sparsegpt")
_AS_PUBLISHED = ("wanda", "ria-row", "ria-layer")  # with norms from the pruned blocks before
OWL_AT_NM = (
    "OWL has no row at N:M: its code removes N of M nearly everywhere and less in the last blocks "
    "(46.7 % of SmolLM2 at 2:4), so its sparsity is not that of the other rows."
)


def score_baselines(pattern: Pattern) -> list[Candidate]:
    """
    The published scores that every comparison shows, each in its own scope.

    Wanda compares within output rows, magnitude within a layer; RIA is shown
    both ways. CRePE with equal coefficients takes the scope of ``pattern``.

    Source:
        Sun et al. 2023, arXiv:2306.11695 (Wanda); Zhang et al. 2024, ICLR
        "Plug-and-Play" (RIA: sums, exponent 0.5).
    """
    return [
        Candidate(method=method, coefficients=c, pattern=pattern.within(scope or pattern.scope))
        for method, c, scope in _SCORES
    ]


def comparison_baselines(pattern: Pattern, linears: Linears = Linears()) -> list[Candidate]:
    """
    The published methods: scores, OWL (not at N:M), DSnoT, and those that update weights.

    Source:
        As :func:`score_baselines`.
        Yin et al. 2024, arXiv:2310.05175 (OWL, with its lambda of 0.08 and one sparsity a block).
        Zhang et al. 2023, arXiv:2310.08915 (DSnoT on Wanda's masks, of sequential norms).
        Frantar & Alistarh 2023, arXiv:2301.00774 (SparseGPT).
        Boza 2024, arXiv:2401.02938 (ADMM). Meng et al. 2024, arXiv:2406.07831 (ALPS).
    """
    owl = Allocation(method="owl", unit="block", spread=0.08)
    with_wanda = [
        Candidate(method=method, coefficients=_WANDA, pattern=pattern.within(scope), steps=steps)
        for method, scope, steps in (
            ("owl-wanda", Scope.ROW, Steps(allocation=owl)),
            ("dsnot", Scope.ROW, Steps(statistics="sequential", repruning="dsnot")),
            ("sparsegpt", Scope.LAYER, Steps(update="sparsegpt")),
            ("owl-sparsegpt", Scope.LAYER, Steps(allocation=owl, update="sparsegpt")),
            ("admm", Scope.LAYER, Steps(update="admm")),
            ("alps", Scope.LAYER, Steps(update="alps")),
        )
    ]
    return [
        replace(candidate, steps=replace(candidate.steps, linears=linears))
        for candidate in (*score_baselines(pattern), *with_wanda)
        if not (pattern.group and candidate.method.startswith("owl"))
    ]


def named_baselines(pattern: Pattern, linears: Linears = Linears()) -> dict[str, Candidate]:
    """
    All methods that a comparison can show, and a model be pruned with, by their names.

    Beside each method of :func:`comparison_baselines` stand its variants: ``-sequential`` takes
    the activation norms of its score from the pruned blocks before, ``-permuted`` cuts the groups
    of N:M in the channel order that keeps the most score.
    """
    candidates: dict[str, Candidate] = {}
    for plain in comparison_baselines(pattern, linears):
        variants = [plain]
        if plain.coefficients.activation_exponent and not plain.steps.needs_text:
            variants.append(_variant(plain, SEQUENTIAL, statistics="sequential"))
        if pattern.group:
            variants += [_variant(c, PERMUTED, permutation="score") for c in variants]
        candidates.update((c.method, c) for c in variants)
    return candidates


def _variant(candidate: Candidate, ending: str, **steps: str) -> Candidate:
    changed = replace(candidate.steps, **steps)  # type: ignore[arg-type]
    return replace(candidate, method=candidate.method + ending, steps=changed)


def shown_baselines(
    names: Sequence[str] | None, pattern: Pattern, linears: Linears = Linears()
) -> list[Candidate]:
    """The rows of a comparison that are not the user's own."""
    candidates = named_baselines(pattern, linears)
    if names is None:
        return [candidate for name, candidate in candidates.items() if _shown(name, pattern)]
    if ALL in names:
        return list(candidates.values())
    return [baseline(name, pattern, linears) for name in dict.fromkeys(names)]


def _shown(name: str, pattern: Pattern) -> bool:
    plain = name.removesuffix(PERMUTED)
    if plain.endswith(SEQUENTIAL):
        plain = plain.removesuffix(SEQUENTIAL)
        if plain not in _AS_PUBLISHED:
            return False
    # Groups of N:M are the same in both scopes of RIA.
    return plain not in _DEAR and not (pattern.group and plain == "ria-layer")


def baseline(name: str, pattern: Pattern, linears: Linears = Linears()) -> Candidate:
    """A published method by its name."""
    candidates = named_baselines(pattern, linears)
    if name in candidates:
        return candidates[name]
    if pattern.group and name.startswith("owl"):
        raise InvalidInput(f"method {name!r} at {pattern}: {OWL_AT_NM} Leave it out.")
    plain = name.removesuffix(PERMUTED)
    if name.endswith(PERMUTED) and not pattern.group and plain in candidates:
        raise InvalidInput(
            f"method {name!r} at {pattern}: the order of channels only matters to N:M. Take "
            f"{plain!r}."
        )
    plain = plain.removesuffix(SEQUENTIAL)
    if plain in candidates:
        raise InvalidInput(
            f"method {name!r}: {plain} reads no activation norms, or has them from the pruned "
            f"blocks before in any case. Take {plain!r}."
        )
    near = get_close_matches(name, [*candidates], 3, cutoff=0.5)
    raise InvalidInput(
        f"method {name!r} is not one of those at {pattern}. "
        + (f"Near: {', '.join(near)}. All: " if near else "They are ")
        + f"{', '.join(candidates)}."
    )


def search_baselines(
    pattern: Pattern,
    *,
    kernel_size: int,
    fisher: bool,
    steps: Steps = Steps(),
    allocations: tuple[str, ...] = ("uniform",),
) -> list[Candidate]:
    """The baselines that may win a search in ``pattern``: none is counted in a wider scope."""
    uniform = replace(steps, allocation=replace(steps.allocation, method="uniform"))
    narrow: dict[tuple[Coefficients, Pattern], Candidate] = {}
    for candidate in score_baselines(pattern):
        fitted = _within(pattern, candidate, kernel_size=kernel_size, steps=uniform)
        narrow.setdefault((fitted.coefficients, fitted.pattern), fitted)
    baselines = list(narrow.values())
    plain = replace(_FISHER, kernel_size=kernel_size)
    if fisher and pattern.scope is not Scope.ROW:
        baselines.append(
            Candidate(method="fisher", coefficients=plain, pattern=pattern, steps=uniform)
        )
    if "fisher" in allocations:
        bounded = replace(steps, allocation=replace(steps.allocation, method="fisher"))
        baselines.append(
            Candidate(method="fisher-bounded", coefficients=plain, pattern=pattern, steps=bounded)
        )
    return baselines


def _within(pattern: Pattern, candidate: Candidate, *, kernel_size: int, steps: Steps) -> Candidate:
    """A published score in no wider scope than that of a pattern."""
    scope = min(candidate.pattern.scope, pattern.scope, key=lambda s: s.width)
    coefficients = replace(candidate.coefficients, kernel_size=kernel_size)
    return replace(candidate, pattern=pattern.within(scope), coefficients=coefficients, steps=steps)


def reference_methods(pattern: Pattern, linears: Linears = Linears()) -> dict[str, Candidate]:
    """``wanda``, and ``ria`` in the widest scope of a pattern: what results are measured by."""
    scores = {candidate.method: candidate for candidate in score_baselines(pattern)}
    ria = "ria-row" if pattern.scope is Scope.ROW else "ria-layer"
    steps = Steps(linears=linears)
    return {
        name: _within(pattern, scores[method], kernel_size=3, steps=steps)
        for name, method in (("wanda", "wanda"), ("ria", ria))
    }


_WORDS = {"repruning": "re-pruning"}


def step_by_step(name: str, candidate: Candidate) -> list[tuple[str, Candidate]]:
    """
    Give the score alone, then with one step more each time, in the order of the pipeline.

    A step that has no meaning without the next is added together with it.
    """
    steps = Steps(linears=candidate.steps.linears)
    rows = [(f"{name}: score", replace(candidate, steps=steps))]
    added: dict[str, Any] = {}
    for field in fields(Steps):
        value = getattr(candidate.steps, field.name)
        if value == getattr(steps, field.name):
            continue
        added[field.name] = value
        try:
            row = replace(candidate, steps=replace(steps, **added))
        except InvalidInput:
            continue
        words = (f"{_WORDS.get(n, n)} {getattr(v, 'method', v)}" for n, v in added.items())
        rows.append((f"{name}: + {', '.join(words)}", row))
        steps, added = row.steps, {}
    return rows
