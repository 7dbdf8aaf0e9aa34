"""
What makes a search over several models one: a candidate's value on all of them, and their origin.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pho_service.errors import NumericalError
from pho_service.pipeline.proxy_rating import proxy_value, rate_by_proxy
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.candidate import Candidate
from pho_service.spec.linears import Linears
from pho_service.spec.numbers import number
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import Evaluate, Outcome
from pho_service.tuning.result import SearchResult


def with_each_model(result: SearchResult, relative: Mapping[str, float]) -> SearchResult:
    """A joint search's result with its proxy on each model, RIA's being 1, and what to say."""
    objective = {**result.configuration.objective, "relative_to_ria": dict(relative)}
    worse = [
        f"On {model} the proxy of the result is {number(value)} times RIA's: it is good for the "
        "others only. Let the worst count instead of the mean (over), or leave that model out."
        for model, value in relative.items()
        if value >= 1
    ]
    return replace(
        result,
        configuration=result.configuration.model_copy(update={"objective": objective}),
        warnings=[*result.warnings, *worse],
    )


def rate_jointly(
    evaluators: Mapping[str, ProxyEvaluator],
    pattern: Pattern,
    objective: Objective,
    linears: Linears = Linears(),
) -> Evaluate:
    """
    A function for a search over several models.

    Args:
        evaluators: By name of the model.
        pattern: Pattern of the search.
        objective: How the models count.
        linears: What RIA prunes, as every candidate does.

    Raises:
        NumericalError: RIA has no value on one of them, or one of 0.
    """
    ria = reference_methods(pattern, linears)["ria"]
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
