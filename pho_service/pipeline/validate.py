"""
Does the proxy rank? Random candidates rated by every proxy and by perplexity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from torch import Tensor

from pho_service.models.loading import LanguageModel
from pho_service.pipeline.proxy_rating import proxy_value
from pho_service.pipeline.rating import ReportText, Subject, measure, rate_pruned
from pho_service.progress import Advance, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.candidate import Candidate
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.linears import Linears
from pho_service.spec.objective import WEIGHTINGS, Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.quality import ProxyQuality
from pho_service.spec.space import SearchSpace
from pho_service.tuning.plan import SearchPlan
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.validation import (
    finalists_wanted,
    planned_candidates,
    qualities,
    random_candidates,
)
from storage.studies import keep_record, record_of

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
    """
    How well each proxy ranks candidates whose perplexities are known.

    Args:
        bundle: Bundle of the model.
        candidates: At least 8.
        perplexity: Perplexity of each.
        seed: Seed of the bootstrap.
        device: For the proxies.
    """
    return qualities(rate_by_all_proxies(bundle, candidates, device=device), perplexity, seed=seed)


def validate_search(
    subject: Subject,
    study: optuna.Study,
    plan: SearchPlan,
    asked: ValidationSpec,
    run: Run,
) -> dict[str, ProxyQuality]:
    """
    How well each proxy ranks random candidates of a search, measured on its confirmation text.

    Args:
        subject: What is pruned and measured.
        study: The record: each perplexity is kept in it at once, and not measured again.
        plan: Plan of the search.
        asked: How many candidates, and their seed.
        run: Where it runs, and who watches it.
    """
    candidates = planned_candidates(plan, asked)
    perplexity = []
    with run.progress("Validating the proxy by perplexity", len(candidates)) as advance:
        for number, candidate in enumerate(candidates):
            key = f"validation:{asked.seed}:{number}"
            known = record_of(study).get(key, {})
            if known.get("text_sha256") != subject.text.key:
                value = measure(subject, candidate).perplexity
                known = {"perplexity": value, "text_sha256": subject.text.key}
                keep_record(study, key, known)
            perplexity.append(float(known["perplexity"]))
            advance(1)
    return judge(subject.bundle, candidates, perplexity, seed=asked.seed, device=run.device)


def doubted(
    request: SearchRequest,
    plan: SearchPlan,
    study: optuna.Study,
    subject: Subject,
    run: Run,
) -> tuple[dict[str, ProxyQuality], int, str | None]:
    """
    What :func:`validate_search` found, how many finalists that asks for, and why if they are more.
    """
    assert request.validation is not None
    judged = validate_search(subject, study, plan, request.validation, run)
    name = request.objective.label
    return judged, *finalists_wanted(request.finalists, name, judged[name])


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
    """
    Rate random candidates both ways.

    Args:
        model: Dense; it is given back dense.
        bundle: Bundle of this model.
        text: For the perplexities; not the calibration windows.
        pattern: What is pruned.
        linears: Where.
        bounds: Fields of the search space that differ from its defaults.
        count: Candidates, at least 8.
        seed: Seed of the candidates and of the bootstrap.
        calibration: Windows for a streamed model, which is pruned while they run through it.
        run: Where it runs, and who watches it.

    Raises:
        InvalidInput: A bound breaks a rule, or what is said of linears does not fit the model.
        BundleError: The bundle is of another model.
    """
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
