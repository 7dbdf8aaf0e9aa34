"""
How far can a proxy be trusted? Rank correlation and regret against perplexity, with intervals.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from pho_service.spec.configuration import WIDER, Interval, ProxyQuality
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import is_maximised
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate, Steps
from pho_service.tuning.plan import SearchPlan

RANKS = 0.5  # rank correlation with perplexity, from which on a proxy is trusted
ORDERS = 0.25  # the same among the better half of the candidates
RESAMPLES = 2000
BATCH = 2**22  # pairs of candidates that are looked at together: some 100 MiB
Values = npt.NDArray[np.float64]


def random_candidates(
    space: SearchSpace,
    pattern: Pattern,
    *,
    count: int,
    seed: int,
    linears: Linears = Linears(),
) -> list[Candidate]:
    """Draw candidates evenly over a search space; score and allocation, no further steps."""
    generator = random.Random(seed)  # noqa: S311 - a sample, not a secret
    candidates = []
    for _ in range(count):
        params: dict[str, Any] = {
            name: generator.uniform(*getattr(space, name))
            for name in (
                "neighbourhood_share", "row_share", "activation_exponent", "gradient_exponent",
            )
        }  # fmt: skip
        params["kernel_size"] = generator.choice(space.kernel_sizes)
        params["allocation"], params["allocation_spread"] = "uniform", space.allocation_spread[0]
        if space.allocations != ("uniform",):
            params["allocation"] = generator.choice(space.allocations)
            params["allocation_spread"] = generator.uniform(*space.allocation_spread)
        candidates.append(space.candidate(params, pattern, Steps(linears=linears)))
    return candidates


def planned_candidates(plan: SearchPlan, validation: ValidationSpec) -> list[Candidate]:
    """The random candidates that a search's proxy is validated on: of its space and its linears."""
    return random_candidates(
        plan.space,
        plan.pattern,
        count=validation.candidates,
        seed=validation.seed,
        linears=plan.steps.linears,
    )


def proxy_quality(
    proxy: Sequence[float], perplexity: Sequence[float], *, higher_is_better: bool, seed: int
) -> ProxyQuality:
    """Compare a proxy with perplexity over the same candidates."""
    x, y = np.asarray(proxy, dtype=float), np.asarray(perplexity, dtype=float)
    top_k = min(5, len(x) // 4)
    sign = -1 if higher_is_better else 1

    def regret(x: Values, y: Values, axis: int = -1) -> Values:
        chosen = np.argsort(sign * x, axis=axis, kind="stable").take(range(top_k), axis=axis)
        best: Values = np.take_along_axis(y, chosen, axis=axis).min(axis=axis)
        excess: Values = best / y.min(axis=axis) - 1
        return excess

    def interval(statistic: Callable[..., Values]) -> Interval:
        result = stats.bootstrap(
            (x, y), statistic, paired=True, n_resamples=RESAMPLES, method="percentile",
            batch=max(1, BATCH // len(x) ** 2), rng=np.random.default_rng(seed),
        )  # fmt: skip
        bounds = result.confidence_interval
        return float(bounds.low), float(bounds.high)

    better = y <= np.median(y)
    return ProxyQuality(
        spearman=float(_spearman(x, y)),
        spearman_interval=interval(_spearman),
        spearman_better_half=float(_spearman(x[better], y[better])),
        kendall=float(_kendall(x, y)),
        kendall_interval=interval(_kendall),
        regret=float(regret(x, y)),
        regret_interval=interval(regret),
        top_k=top_k,
    )


def _spearman(x: Values, y: Values, axis: int = -1) -> Values:
    """Correlate each sample; 0 where one side is constant, which a resample can be."""
    # SciPy's own takes one sample at a time, of which a bootstrap needs thousands.
    ranks = [stats.rankdata(side, axis=axis) for side in (x, y)]
    return _cosine(*(rank - rank.mean(axis=axis, keepdims=True) for rank in ranks), axes=(axis,))


def _kendall(x: Values, y: Values, axis: int = -1) -> Values:
    """Tau-b: how the signs of the differences of all pairs go together; 0 as above."""
    sides = [np.moveaxis(side, axis, -1) for side in (x, y)]
    signs = (np.sign(side[..., :, None] - side[..., None, :]) for side in sides)
    return _cosine(*signs, axes=(-2, -1))


def _cosine(a: Values, b: Values, *, axes: tuple[int, ...]) -> Values:
    norm: Values = np.sqrt((a * a).sum(axis=axes) * (b * b).sum(axis=axes))
    ratio: Values = np.divide((a * b).sum(axis=axes), norm, out=np.zeros_like(norm), where=norm > 0)
    return ratio


def verdict(name: str, quality: ProxyQuality) -> str | None:
    """One plain sentence if a proxy does not rank, or not where a search ends; None if it does."""
    sign = -1 if is_maximised(name) else 1
    whole, better_half = sign * quality.spearman, sign * quality.spearman_better_half
    evidence = f"rank correlation with perplexity is {quality.spearman:+.2f}"
    if whole < RANKS:
        worth = "worse than chance" if whole <= -RANKS else "little better than chance"
        return (
            f"The proxy {name} does not rank candidates on this model: its {evidence}, so what it "
            f"finds is {worth}."
        )
    if better_half < ORDERS:
        return (
            f"The proxy {name} tells good candidates from bad ones on this model, but does not "
            f"order the better half of them: its {evidence}, and "
            f"{quality.spearman_better_half:+.2f} in that half, where a search ends."
        )
    return None


def finalists_wanted(count: int, name: str, quality: ProxyQuality) -> tuple[int, str | None]:
    """Number of finalists to confirm; and why, if they are more than were asked for."""
    doubt = verdict(name, quality)
    if doubt is None:
        return count, None
    wider = WIDER * count
    return wider, f"{doubt} So the best {wider} by it are finalists instead of {count}."


def qualities(
    proxies: Mapping[str, Sequence[float]], perplexity: Sequence[float], *, seed: int
) -> dict[str, ProxyQuality]:
    """:func:`proxy_quality` of every proxy, by name."""
    return {
        name: proxy_quality(values, perplexity, higher_is_better=is_maximised(name), seed=seed)
        for name, values in proxies.items()
    }
