"""
Take a configuration to other models: what it is worth there, and what their own best would be.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.host.machine import versions
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.objectives import mask_proxy
from pho_service.pipeline.search import opened_study, search_job
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number
from pho_service.spec.objective import Objective, SearchOptions, options_of
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SearchRequest

MUCH = 0.5  # of the own best's gain: if more of it is lost, the transfer has a warning


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Result of a configuration on a target."""

    target: str  # Its name
    key: str  # Names everything that the numbers depend on
    # On the report text, by method: ``dense``, ``wanda``, ``ria``, ``transferred``, and ``own``, if
    # it was searched for; empty without a model.
    perplexities: dict[str, float]
    # By the same methods but ``dense``, lower is better; None where no proxy knows what happens to
    # the mask.
    proxies: dict[str, float | None]
    own: Configuration | None = None  # The target's own best
    # Name, revision, hash of the weights, dtype.
    model: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None  # The text, if perplexities were measured

    @property
    def gain(self) -> float | None:
        """By how much RIA's perplexity is above the transferred configuration's."""
        return _difference(self.perplexities, "ria", "transferred")

    @property
    def regret(self) -> float | None:
        """The share of the own best's gain over RIA that the transferred one loses; see below."""
        return regret(self.perplexities)

    @property
    def proxy_regret(self) -> float | None:
        return regret(self.proxies)

    def warnings(self) -> list[str]:
        """Plain sentences where the configuration does not hold on the target."""
        found = []
        way_out = f"Search there: pho search {self.target}"
        for what, values in (("perplexity", self.perplexities), ("proxy", self.proxies)):
            if no_better_than_ria(values):
                found.append(
                    f"{self.target}: the {what} of the transferred configuration, "
                    f"{number(values['transferred'])}, is no better than RIA's, "
                    f"{number(values['ria'])}: it does not transfer. {way_out}"
                )
        lost = self.regret if self.perplexities else self.proxy_regret
        if not found and lost is not None and lost > MUCH:
            found.append(
                f"{self.target}: {lost:.0%} of what the model's own best gains over RIA is lost. "
                "Use its own."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them as JSON values."""
        return {
            "target": self.target,
            "key": self.key,
            "model": self.model,
            "perplexities": self.perplexities,
            "proxies": self.proxies,
            "gain": self.gain,
            "regret": self.regret,
            "proxy_regret": self.proxy_regret,
            "own": None if self.own is None else self.own.model_dump(mode="json"),
            "report": self.report,
            "warnings": self.warnings(),
        }


def regret(values: Mapping[str, float | None]) -> float | None:
    """The share of the own best's gain over RIA that the transferred configuration loses."""
    # 0: as good as the own best. 1: as good as RIA. Below 0: better than the own best. None where
    # the own best is not known, or gains nothing.
    possible = _difference(values, "ria", "own")
    lost = _difference(values, "transferred", "own")
    return None if possible is None or lost is None or possible <= 0 else lost / possible


def _difference(values: Mapping[str, float | None], above: str, below: str) -> float | None:
    high, low = values.get(above), values.get(below)
    return None if high is None or low is None else high - low


def check_configuration(
    name: str, configuration: Configuration, pattern: str | None, scope: str | None
) -> None:
    """Refuse a configuration of another pattern or scope than is asked for; None is any."""
    mine = configuration.candidate().pattern
    asked = Pattern.parse(str(mine) if pattern is None else pattern, scope)
    if str(asked) != str(mine) or (scope is not None and asked.scope is not mine.scope):
        raise ConfigurationError(
            f"{name} is for {mine} in scope {mine.scope.value}, but {asked} in scope "
            f"{asked.scope.value} is asked for, and the best coefficients differ from pattern to "
            f"pattern. Take it for its own, or find another: `pho search MODEL --pattern {asked}`."
        )


def own_search(
    configuration: Configuration, options: SearchOptions, *, finalists: int
) -> SearchRequest:
    """
    How a model's own best is searched for: in the pattern, steps and space of a configuration.
    """
    # Offsets that a correction found on the configuration's own model are left out.
    candidate = configuration.candidate()
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
        steps=_uncorrected(configuration),
        finalists=finalists,
        **options_of(options),
    )


def _uncorrected(configuration: Configuration) -> Steps:
    """The steps without offsets that were found on the configuration's own model."""
    steps = configuration.steps
    if "correction" not in configuration.search:
        return steps
    return replace(steps, allocation=replace(steps.allocation, offsets={}, depth=()))


def transfer_key(
    target: Calibrated, configuration: Configuration, search: SearchRequest | None
) -> str:
    """Names everything that the numbers of a transfer depend on."""
    candidate = configuration.candidate()
    own = None
    if search is not None:
        plan = search.plan(target.bundle.kernel_sizes)
        own = [
            plan.sampler_name, plan.trials, *plan.identity().values(), search.finalists,
            search.objective.label,
            plan.space.to_dict(), *([plan.corrections] if plan.corrections else []),
            None if target.confirm is None else target.confirm.key,
        ]  # fmt: skip
    identity = [
        candidate.coefficients.to_dict(), candidate.steps.to_dict(), str(candidate.pattern),
        candidate.pattern.scope.value, target.bundle.key,
        None if target.report is None else target.report.key, own,
        versions("torch", "transformers"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def proxies_of(
    bundle: ProxyBundle, configuration: Configuration, device: str = "cpu"
) -> dict[str, float | None]:
    """
    What a model's bundle says of a configuration, in milliseconds: as :attr:`Transfer.proxies`.
    """
    candidate = configuration.candidate()
    bundle.choose(candidate.steps.linears, candidate.pattern)
    evaluator = ProxyEvaluator(bundle, device)
    candidates = {
        **reference_methods(candidate.pattern, candidate.steps.linears),
        "transferred": candidate,
    }
    return {name: mask_proxy(evaluator, each, Objective()) for name, each in candidates.items()}


def no_better_than_ria(values: Mapping[str, float | None]) -> bool:
    """Whether a transferred configuration is judged so; not where one of the two is not known."""
    ria, mine = values.get("ria"), values.get("transferred")
    return ria is not None and mine is not None and mine >= ria


def proxy_sentence(name: str, proxies: Mapping[str, float | None]) -> str:
    """Rate a configuration by proxies on the model ``name``."""
    warnings = Transfer(target=name, key="", perplexities={}, proxies={**proxies}).warnings()
    if warnings:
        return f"Note: {warnings[0]}"
    ria, mine = proxies["ria"], proxies["transferred"]
    if ria is None or mine is None:
        return f"Note: no proxy knows what the steps do to the masks of {name}: measure it."
    return f"By the proxy it holds on {name}: {number(mine)}, {1 - mine / ria:.1%} below RIA's."


def transfer_job(
    target: Calibrated,
    configuration: Configuration,
    *,
    search: SearchRequest | None = None,
    study_url: str | None = None,
    run: Run = Run(),
) -> Transfer:
    """
    Rate a configuration on a model that it was not found on, beside Wanda, RIA and the own best.
    """
    candidate = configuration.candidate()
    candidates = {
        **reference_methods(candidate.pattern, candidate.steps.linears),
        "transferred": candidate,
    }
    proxies = proxies_of(target.bundle, configuration, run.device)  # refuses what the bundle lacks
    own = None
    if search is not None:
        opened = (
            nullcontext()
            if study_url is None
            else opened_study(study_url, search, target.bundle, target.confirm)
        )
        with opened as study:
            own = search_job(
                search,
                target.bundle,
                study=study,
                model=target.model,
                confirm_text=target.confirm,
                calibration=target.calibration,
                run=run,
            ).configuration
        candidates["own"] = own.candidate()
        evaluator = ProxyEvaluator(target.bundle, run.device)
        proxies["own"] = mask_proxy(evaluator, candidates["own"], Objective())
    perplexities = {}
    if target.model is not None and target.report is not None:
        from pho_service.pipeline.compare import compare_candidates  # loads transformers

        rows = compare_candidates(
            target.model,
            target.bundle,
            target.report,
            list(candidates.items()),
            calibration=target.calibration,
            run=run,
        )
        perplexities = {row.method: row.perplexity for row in rows}
    return Transfer(
        target=target.name,
        key=transfer_key(target, configuration, search),
        perplexities=perplexities,
        proxies=proxies,
        own=own,
        model=target.bundle.provenance.get("model", {}),
        report=None if target.report is None else target.report.measured_on(),
    )
