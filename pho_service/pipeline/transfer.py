"""
Take a configuration to other models: what it is worth there, and what their own best would be.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.host.machine import versions
from pho_service.pipeline.objectives import mask_proxy
from pho_service.pipeline.search import opened_study, search_job
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number
from pho_service.spec.objective import Objective, SearchOptions, options_of
from pho_service.spec.pattern import Pattern
from pho_service.spec.results import Transfer
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import SearchRequest


def check_configuration(
    name: str, configuration: Configuration, pattern: str | None, scope: str | None
) -> None:
    """Refuse a configuration of another pattern or scope than is asked for; None is any."""
    origin = configuration.candidate().pattern
    wanted = Pattern.parse(str(origin) if pattern is None else pattern, scope)
    if str(wanted) != str(origin) or (scope is not None and wanted.scope is not origin.scope):
        raise ConfigurationError(
            f"{name} is for {origin} in scope {origin.scope.value}, but {wanted} in scope "
            f"{wanted.scope.value} is asked for, and the best coefficients differ from pattern to "
            f"pattern. Take it for its own, or find another: `pho search MODEL --pattern {wanted}`."
        )


def own_search(
    configuration: Configuration, options: SearchOptions, *, finalists: int
) -> SearchRequest:
    """How a model's own best is searched for: in a configuration's pattern, steps and space."""
    candidate = configuration.for_size(0).candidate()
    bounds = configuration.search.get("space", {})
    try:
        SearchSpace(**{name: tuple(values) for name, values in bounds.items()})
    except (AttributeError, TypeError, InvalidInput) as error:
        raise ConfigurationError(
            f"the configuration's search.space is not a search space: {error}. Take search out of "
            "the file: then the usual space is searched."
        ) from error
    return SearchRequest(
        pattern=candidate.pattern,
        bounds={name: tuple(values) for name, values in bounds.items() if name != "kernel_sizes"},
        steps=candidate.steps,
        finalists=finalists,
        **options_of(options),
    )


def _taken(configuration: Configuration, bundle: ProxyBundle) -> Candidate:
    return configuration.for_size(bundle.provenance.get("model", {}).get("parameters")).candidate()


def _beside(configuration: Configuration, bundle: ProxyBundle) -> dict[str, Candidate]:
    """Wanda and RIA, and what is transferred."""
    candidate = _taken(configuration, bundle)
    methods = reference_methods(candidate.pattern, candidate.steps.linears)
    return {**methods, "transferred": candidate}


def transfer_key(work: Work, configuration: Configuration, search: SearchRequest | None) -> str:
    """Names everything that the numbers of a transfer depend on."""
    candidate = _taken(configuration, work.bundle)
    search_identity = None
    if search is not None:
        plan = search.plan(work.bundle.kernel_sizes)
        search_identity = [
            plan.sampler_name, plan.trials, *plan.identity().values(), search.finalists,
            search.objective.label, *([plan.in_full] if plan.in_full else []),
            plan.space.to_dict(), None if work.confirm is None else work.confirm.key,
        ]  # fmt: skip
    identity = [
        candidate.coefficients.to_dict(), candidate.steps.to_dict(), str(candidate.pattern),
        candidate.pattern.scope.value, work.bundle.key,
        None if work.report is None else work.report.key, search_identity,
        versions("torch", "transformers"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def proxies_of(
    bundle: ProxyBundle, configuration: Configuration, device: str = "cpu"
) -> dict[str, float | None]:
    """What a bundle says of a configuration, in milliseconds: as :attr:`Transfer.proxies`."""
    candidates = _beside(configuration, bundle)
    candidate = candidates["transferred"]
    bundle.choose(candidate.steps.linears, candidate.pattern)
    evaluator = ProxyEvaluator(bundle, device)
    return {name: mask_proxy(evaluator, each, Objective()) for name, each in candidates.items()}


def proxy_sentence(name: str, proxies: Mapping[str, float | None]) -> str:
    """Rate a configuration by proxies on the model ``name``."""
    warnings = Transfer(target=name, key="", proxies={**proxies}).judged().warnings
    if warnings:
        return f"Note: {warnings[0]}"
    ria, value = proxies["ria"], proxies["transferred"]
    if ria is None or value is None:
        return f"Note: no proxy knows what the steps do to the masks of {name}: measure it."
    return f"By the proxy it holds on {name}: {number(value)}, {1 - value / ria:.1%} below RIA's."


def transfer_job(
    name: str,
    work: Work,
    configuration: Configuration,
    *,
    search: SearchRequest | None = None,
    study_url: str | None = None,
    run: Run = Run(),
) -> Transfer:
    """Rate a configuration on another model, beside Wanda, RIA and the model's own best."""
    candidates = _beside(configuration, work.bundle)
    proxies = proxies_of(work.bundle, configuration, run.device)  # refuses what the bundle lacks
    own_configuration = None
    if search is not None:
        with opened_study(study_url, search, work) as study:
            searched = replace(work, report=None, cache_dir=None)  # no trained blocks are kept
            own_configuration = search_job(search, searched, study=study, run=run).configuration
        candidates["own"] = own_configuration.candidate()
        evaluator = ProxyEvaluator(work.bundle, run.device)
        proxies["own"] = mask_proxy(evaluator, candidates["own"], Objective())
    perplexities, errors, notes = {}, {}, []
    if work.dense is not None and work.report is not None:
        from pho_service.pipeline.compare import compare_candidates  # loads transformers
        from pho_service.pipeline.rating import favoured

        how = configuration.confirmation
        chosen_on = {} if how is None else {"the configuration": how.text}
        notes = favoured(work.report, work.calibration, chosen_on)
        rows = compare_candidates(work, list(candidates.items()), beside="ria", run=run)
        perplexities = {row.method: row.perplexity for row in rows}
        errors = {row.method: row.error for row in rows if row.error is not None}
        behind = {row.method: row.behind for row in rows if row.behind is not None}
        if "transferred" in behind:
            errors["transferred/ria"] = behind["transferred"]
    transfer = Transfer(
        target=name,
        key=transfer_key(work, configuration, search),
        perplexities=perplexities,
        errors=errors,
        proxies=proxies,
        own=None if own_configuration is None else own_configuration.model_dump(mode="json"),
        model=work.bundle.provenance.get("model", {}),
        report=None if work.report is None else work.report.measured_on(),
    ).judged()
    return replace(transfer, warnings=[*notes, *transfer.warnings])
