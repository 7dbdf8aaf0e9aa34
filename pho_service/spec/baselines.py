"""
The published methods that a search and a comparison measure themselves by.
"""

from dataclasses import replace

from pho_service.spec.candidate import Candidate
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.score import Coefficients
from pho_service.spec.steps import Allocation, Steps

_MAGNITUDE = Coefficients(
    row=1, column=0, neighbourhood=0, activation_exponent=0, normalisation="none"
)
_WANDA = replace(_MAGNITUDE, activation_exponent=1)
_RIA = Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum")
_EQUAL = Coefficients(row=1, column=1, neighbourhood=1)
_FISHER = replace(_WANDA, gradient_exponent=0.5)
BASELINES = (
    "magnitude", "wanda", "ria-row", "ria-layer", "crepe-equal", "fisher", "fisher-bounded",
)  # fmt: skip


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
        Candidate(method=method, coefficients=coefficients, pattern=pattern.within(scope))
        for method, coefficients, scope in (
            ("magnitude", _MAGNITUDE, Scope.LAYER),
            ("wanda", _WANDA, Scope.ROW),
            ("ria-row", _RIA, Scope.ROW),
            ("ria-layer", _RIA, Scope.LAYER),
            ("crepe-equal", _EQUAL, pattern.scope),
        )
    ]


def comparison_baselines(pattern: Pattern, linears: Linears = Linears()) -> list[Candidate]:
    """
    The published methods that every comparison shows: scores, OWL, DSnoT, and those that update.

    Args:
        pattern: Of all of them.
        linears: What each of them prunes.

    Source:
        As :func:`score_baselines`; Yin et al. 2024, arXiv:2310.05175 (OWL, with its
        lambda of 0.08 and one sparsity a block; for N:M it mixes N of M over the blocks);
        Zhang et al. 2023, arXiv:2310.08915 (DSnoT on Wanda's masks);
        Frantar & Alistarh 2023, arXiv:2301.00774 (SparseGPT);
        Boza 2024, arXiv:2401.02938 (ADMM); Meng et al. 2024, arXiv:2406.07831 (ALPS).
    """
    spread = max(0.08, 1 / pattern.group) if pattern.group else 0.08  # N moves by one at least
    owl = Allocation(method="owl", unit="block", spread=spread)
    with_wanda = [
        Candidate(method=method, coefficients=_WANDA, pattern=pattern.within(scope), steps=steps)
        for method, scope, steps in (
            ("owl-wanda", Scope.ROW, Steps(allocation=owl)),
            ("dsnot", Scope.ROW, Steps(repruning="dsnot")),
            ("sparsegpt", Scope.LAYER, Steps(update="sparsegpt")),
            ("owl-sparsegpt", Scope.LAYER, Steps(allocation=owl, update="sparsegpt")),
            ("admm", Scope.LAYER, Steps(update="admm")),
            ("alps", Scope.LAYER, Steps(update="alps")),
        )
    ]
    return [
        replace(each, steps=replace(each.steps, linears=linears))
        for each in (*score_baselines(pattern), *with_wanda)
    ]


def search_baselines(
    pattern: Pattern,
    *,
    kernel_size: int,
    fisher: bool,
    steps: Steps = Steps(),
    allocations: tuple[str, ...] = ("uniform",),
) -> list[Candidate]:
    """
    The baselines that may win a search in ``pattern``: none is counted in a wider scope.

    Args:
        pattern: What the user asked for.
        kernel_size: For CRePE with equal coefficients; the others have no window.
        fisher: Add the plain second-order score A * x * sqrt(g) (method
            ``fisher``), which needs Fisher row weights and a scope beyond rows.
        steps: What every candidate of the search goes through; the baselines with one
            sparsity everywhere.
        allocations: Of the search; with ``fisher`` among them, the plain second-order
            score with that allocation is added (method ``fisher-bounded``).
    """
    uniform = replace(steps, allocation=replace(steps.allocation, method="uniform"))
    narrow: dict[tuple[Coefficients, Pattern], Candidate] = {}
    for candidate in score_baselines(pattern):
        scope = min(candidate.pattern.scope, pattern.scope, key=lambda s: s.width)
        coefficients = replace(candidate.coefficients, kernel_size=kernel_size)
        fitted = replace(
            candidate, pattern=pattern.within(scope), coefficients=coefficients, steps=uniform
        )
        narrow.setdefault((fitted.coefficients, fitted.pattern), fitted)
    found = list(narrow.values())
    plain = replace(_FISHER, kernel_size=kernel_size)
    if fisher and pattern.scope is not Scope.ROW:
        found.append(Candidate(method="fisher", coefficients=plain, pattern=pattern, steps=uniform))
    if "fisher" in allocations:
        bounded = replace(steps, allocation=replace(steps.allocation, method="fisher"))
        found.append(
            Candidate(method="fisher-bounded", coefficients=plain, pattern=pattern, steps=bounded)
        )
    return found


def reference_methods(pattern: Pattern, linears: Linears = Linears()) -> dict[str, Candidate]:
    """``wanda``, and ``ria`` in the widest scope of a pattern: what results are measured by."""
    steps = Steps(linears=linears)
    baselines = search_baselines(pattern, kernel_size=3, fisher=False, steps=steps)
    return {
        name: next(c for c in reversed(baselines) if c.method.startswith(name))
        for name in ("wanda", "ria")
    }
