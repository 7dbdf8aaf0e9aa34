"""
One search over several models: a configuration that is good on all of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pho_service.errors import BundleError, InvalidInput, NumericalError
from pho_service.pipeline.proxy_rating import proxy_value, rate_by_proxy
from pho_service.pipeline.search import check_study, compared_with_cold, opened_study, study_name
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.search.plan import Evaluate, Outcome
from pho_service.search.request import SearchRequest
from pho_service.search.result import (
    SearchResult,
    describe_study,
    mark_chosen,
    search_result,
)
from pho_service.search.search import run_search
from pho_service.spec.baselines import reference_methods
from pho_service.spec.candidate import Candidate
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern


def joint_search_job(
    request: SearchRequest,
    bundles: Mapping[str, ProxyBundle],
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> SearchResult:
    """
    Search on several bundles at once. Goes on with an interrupted search.

    A candidate's value is the mean, or the worst, over the models of its proxy
    relative to RIA's on the same model: below 1 it is better than RIA.

    Args:
        request: What is asked; its objective says how the models count.
        bundles: By a name for messages.
        device: For the proxies.
        progress: Is told of the search.

    Raises:
        BundleError: The bundles have no kernel size in common.
        InvalidInput: The request breaks a rule, or N:M does not divide a width.
        NumericalError: RIA has no value on a bundle.
        StudyError: The study holds another search's trials, or cannot be opened.
    """
    first, *others = (set(bundle.kernel_sizes) for bundle in bundles.values())
    common = tuple(sorted(first.intersection(*others)))
    if not common:
        raise BundleError(
            f"the bundles {', '.join(bundles)} have no kernel size in common. Calibrate them with "
            "the same --kernel-sizes."
        )
    if request.objective.over is None:
        raise InvalidInput("a search over several models needs to be told how they count: over.")
    plan = request.plan(common)
    for bundle in bundles.values():
        for layer in bundle.layers:
            plan.pattern.check_width(layer.in_features, layer.name)
    provenance = joint_provenance([bundle.origin for bundle in bundles.values()])
    name = study_name(request, plan, provenance)
    evaluators = {name: ProxyEvaluator(bundle, device) for name, bundle in bundles.items()}
    with opened_study(request.study_url, name, plan) as study:
        check_study(study, [*bundles.values()])
        describe_study(study, request, plan, provenance)
        with progress(f"Searching ({request.objective.label})", plan.trials) as advance:
            evaluate = rate_jointly(evaluators, plan.pattern, request.objective)
            rated = run_search(study, plan, evaluate, advance)
        saving = compared_with_cold(request, plan, rated, evaluate, progress)
        attributes = {t.number: t.user_attrs for t in study.get_trials(deepcopy=False)}
        done = sum(number < plan.trials for number in attributes)
        result = search_result(
            request,
            plan,
            provenance,
            name,
            rated,
            [],
            None,
            ended_after=done if done < plan.trials else None,
            saving=saving,
        )
        mark_chosen(study, result.configuration, name, result.trial)
    return with_each_model(result, attributes[rated[0].number]["relative_to_ria"])


def with_each_model(result: SearchResult, relative: Mapping[str, float]) -> SearchResult:
    """A joint search's result with its proxy on each model, RIA's being 1, and what to say."""
    objective = {**result.configuration.objective, "relative_to_ria": dict(relative)}
    worse = [
        f"On {model} the proxy of the result is {value:.3f} times RIA's: it is good for the others "
        "only. Let the worst count instead of the mean (over), or leave that model out."
        for model, value in relative.items()
        if value >= 1
    ]
    return replace(
        result,
        configuration=result.configuration.model_copy(update={"objective": objective}),
        warnings=[*result.warnings, *worse],
    )


def rate_jointly(
    evaluators: Mapping[str, ProxyEvaluator], pattern: Pattern, objective: Objective
) -> Evaluate:
    """
    A function for a search over several models.

    Raises:
        NumericalError: RIA has no value on one of them, or one of 0.
    """
    ria = reference_methods(pattern)["ria"]
    references = {}
    for name, evaluator in evaluators.items():
        (rating,) = evaluator.evaluate([ria])
        references[name] = proxy_value(rating, objective)
        if not references[name] > 0:
            raise NumericalError(f"{name}: the proxy of RIA is {references[name]}, no scale.")
    rates = {name: rate_by_proxy(each, objective) for name, each in evaluators.items()}

    def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
        outcomes = {name: rate(candidates) for name, rate in rates.items()}
        return [
            _joint({name: of[i] for name, of in outcomes.items()}, references, objective)
            for i in range(len(candidates))
        ]

    return rate


def _joint(
    outcomes: Mapping[str, Outcome], references: Mapping[str, float], objective: Objective
) -> Outcome:
    """One candidate's outcome on all models."""
    seconds = round(sum(o.attributes.get("seconds", 0.0) for o in outcomes.values()), 5)
    relative = {}
    for name, outcome in outcomes.items():
        if outcome.value is None:
            return Outcome(value=None, failure=f"{name}: {outcome.failure}")
        relative[name] = outcome.value / references[name]
    value = max(relative.values())
    if objective.over == "mean":
        value = sum(relative.values()) / len(relative)
    return Outcome(value=value, attributes={"relative_to_ria": relative, "seconds": seconds})


def joint_provenance(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """That of all bundles together, in the order in which they count."""
    keys = [provenance.get("key", "") for provenance in provenances]
    models = [provenance.get("model", {}) for provenance in provenances]
    names = [Path(model.get("name", "model")).name for model in models]
    return {
        "key": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        "model": {"name": " + ".join(names), "models": models},
        "bundles": [{k: v for k, v in p.items() if k != "model"} for p in provenances],
    }
