"""
Does the proxy rank? Random candidates rated by every proxy and by perplexity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pho_service.models.loading import LanguageModel
from pho_service.pipeline.proxy_rating import proxy_value
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.progress import Advance, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.candidate import Candidate
from pho_service.spec.linears import Linears
from pho_service.spec.objective import WEIGHTINGS, Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.quality import ProxyQuality
from pho_service.spec.space import SearchSpace
from pho_service.tuning.validation import qualities, random_candidates

PROXIES = {
    **{
        f"activation-reconstruction/{weighting}": Objective(weighting=weighting)
        for weighting in WEIGHTINGS
    },
    "gini": Objective(name="gini"),
}


def rate_by_all_proxies(
    bundle: ProxyBundle,
    candidates: Sequence[Candidate],
    *,
    device: str,
    advance: Advance = lambda _: None,
) -> dict[str, list[float]]:
    """For each proxy, its value of each candidate."""
    evaluator = ProxyEvaluator(bundle, device)
    ratings = []
    for candidate in candidates:
        ratings += evaluator.evaluate([candidate], with_gini=True)
        advance(1)
    return {
        name: [proxy_value(rating, objective) for rating in ratings]
        for name, objective in PROXIES.items()
    }


def judge(
    bundle: ProxyBundle,
    candidates: Sequence[Candidate],
    perplexity: Sequence[float],
    *,
    seed: int,
    device: str,
) -> dict[str, ProxyQuality]:
    """How well each proxy ranks candidates whose perplexities are known."""
    return qualities(rate_by_all_proxies(bundle, candidates, device=device), perplexity, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """
    Attributes:
        candidates: What was rated.
        perplexity: Perplexity of each candidate.
        proxies: For each proxy, its value of each candidate.
        qualities: For each proxy, how well it ranks.
    """

    candidates: list[Candidate]
    perplexity: list[float]
    proxies: dict[str, list[float]]
    qualities: dict[str, ProxyQuality]


def validate_job(
    model: LanguageModel,
    bundle: ProxyBundle,
    text: ReportText,
    pattern: Pattern,
    *,
    linears: Linears = Linears(),
    bounds: Mapping[str, Any] | None = None,
    count: int = 40,
    seed: int = 0,
    calibration: Tensor | None = None,
    run: Run = Run(),
) -> Validation:
    """Rate random candidates both ways."""
    bundle.check_model(model.linears)
    space = SearchSpace(**{"kernel_sizes": bundle.kernel_sizes, **(bounds or {})}).fitted(pattern)
    candidates = random_candidates(space, pattern, count=count, seed=seed, linears=linears)
    with run.progress("Rating by the proxies", count) as advance:
        proxies = rate_by_all_proxies(bundle, candidates, device=run.device, advance=advance)
    perplexity = []
    statistics = bundle.statistics()
    with run.progress("Rating by perplexity", count) as advance:
        for candidate in candidates:
            result, _ = rate_pruned(
                model, statistics, candidate, text.windows, calibration=calibration
            )
            perplexity.append(result.perplexity)
            advance(1)
    return Validation(
        candidates=candidates,
        perplexity=perplexity,
        proxies=proxies,
        qualities=qualities(proxies, perplexity, seed=seed),
    )
