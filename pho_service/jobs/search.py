"""
The main job: search a bundle, confirm the winner by perplexity, give a configuration.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import optuna

from pho_service.configuration import (
    CoefficientsDocument,
    Configuration,
    Confirmation,
    Rating,
)
from pho_service.errors import InvalidInput, StudyError
from pho_service.jobs.rating import ReportText, rate_by_perplexity, rate_by_proxy, rate_pruned
from pho_service.models.loading import LanguageModel
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.search.search import (
    Evaluate,
    RatedCandidate,
    SearchPlan,
    confirm,
    finalists,
    run_search,
)
from pho_service.search.space import SearchSpace
from pho_service.spec import Candidate, Objective, Pattern
from pho_service.versions import versions
from storage.studies import StorageError, check_url, open_storage, open_study


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """
    What a user asks a search for, besides the model and the texts.

    Attributes:
        pattern: What is pruned.
        objective: What candidates are rated by.
        bounds: Changes to the search space, as :meth:`SearchSpace.with_bounds` reads them.
        sampler: Where candidates come from.
        trials: How many, baselines included.
        seed: Of the sampler.
        study_url: The database of the study.
        finalists: How many found candidates get a perplexity, beside the baselines.
    """

    pattern: Pattern
    objective: Objective = field(default_factory=Objective)
    bounds: tuple[str, ...] = ()
    sampler: str = "cmaes"
    trials: int = 200
    seed: int = 0
    study_url: str = "sqlite:///study.db"
    finalists: int = 5

    def __post_init__(self) -> None:
        if self.finalists < 1:
            raise InvalidInput(f"finalists={self.finalists} is below 1.")
        try:
            check_url(self.study_url)
        except StorageError as error:
            raise StudyError(f"--study {self.study_url}: {error}") from error

    def plan(self, kernel_sizes: tuple[int, ...]) -> SearchPlan:
        """
        The plan on a bundle that has these kernel sizes.

        Raises:
            InvalidInput: Anything in the request breaks a rule.
        """
        space = SearchSpace(kernel_sizes=kernel_sizes).with_bounds(self.bounds)
        missing = sorted(set(space.kernel_sizes) - set(kernel_sizes))
        if missing:
            raise InvalidInput(
                f"search space kernel_sizes: {missing[0]} is not in the bundle, which has "
                f"{', '.join(map(str, kernel_sizes))}. Calibrate with --kernel-sizes."
            )
        return SearchPlan(
            pattern=self.pattern,
            space=space.fitted(self.pattern),
            sampler=self.sampler,
            trials=self.trials,
            seed=self.seed,
            direction=self.objective.direction,
            fisher=space.gradient_exponent[1] > 0,
        )


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """
    Attributes:
        configuration: The best, and how it was found.
        study_name: In the request's database.
        warnings: Plain sentences that a user must read.
    """

    configuration: Configuration
    study_name: str
    warnings: list[str]


def search_job(
    request: SearchRequest,
    bundle: ProxyBundle,
    *,
    model: LanguageModel | None = None,
    confirm_text: ReportText | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> SearchResult:
    """
    Search, confirm, and say what was found. Goes on with an interrupted search.

    Args:
        request: What is asked.
        bundle: To search on.
        model: The bundle's model; needed for perplexities.
        confirm_text: For perplexities; not the calibration windows. Without
            it, or without the model, the best by the objective is not confirmed.
        device: For the proxy.
        progress: Is told of each long step.

    Raises:
        InvalidInput: The request breaks a rule, or asks for perplexity without a model.
        BundleError: The bundle is of another model.
        StudyError: The study holds another search's trials, or cannot be opened.
    """
    plan = request.plan(bundle.kernel_sizes)
    for layer in bundle.layers:
        plan.pattern.check_width(layer.in_features, layer.name)
    if model is not None:
        bundle.check_model(model.linears)
    evaluate = _evaluate(request.objective, bundle, model, confirm_text, device)
    name = study_name(request, plan, bundle, confirm_text)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _opened(request.study_url, name, plan) as study:
        _describe(study, request, plan, bundle)
        with progress(f"Searching ({request.objective.label})", plan.trials) as advance:
            rated = run_search(study, plan, evaluate, advance)
        if request.objective.name == "perplexity":
            measured = [(r.value, r) for r in rated]
        elif model is not None and confirm_text is not None:
            measured = _confirm(study, request, rated, bundle, model, confirm_text, progress)
        else:
            measured = []
    return _result(request, plan, bundle, name, rated, measured, confirm_text)


def _evaluate(
    objective: Objective,
    bundle: ProxyBundle,
    model: LanguageModel | None,
    text: ReportText | None,
    device: str,
) -> Evaluate:
    if objective.name != "perplexity":
        return rate_by_proxy(ProxyEvaluator(bundle, device), objective)
    if model is None or text is None:
        raise InvalidInput(
            "the objective perplexity needs the model and a text to measure it on: give a model "
            "instead of a bundle, and --confirm-text."
        )
    return rate_by_perplexity(model, bundle.statistics(), text.windows)


def study_name(
    request: SearchRequest, plan: SearchPlan, bundle: ProxyBundle, text: ReportText | None
) -> str:
    """
    Names a study after what it searches, so that the same request finds it again.

    The number of trials is left out: a longer search goes on with a shorter one.
    """
    key = bundle.provenance.get("key", "")
    rated_on = text.key if text and request.objective.name == "perplexity" else ""
    identity = [
        key, str(plan.pattern), plan.pattern.scope, request.objective.label, plan.space.to_dict(),
        plan.sampler, plan.seed, plan.fisher, rated_on,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    model_name = Path(bundle.provenance.get("model", {}).get("name", "model")).name
    return f"{model_name} {plan.pattern} {plan.pattern.scope.value} {plan.sampler} {digest}"


@contextmanager
def _opened(url: str, name: str, plan: SearchPlan) -> Iterator[optuna.Study]:
    """The study, with what its storage says turned into ours."""
    try:
        with open_storage(url) as storage:
            yield open_study(storage, name, direction=plan.direction)
    except StorageError as error:
        raise StudyError(f"--study {url}: {error}") from error


def _describe(
    study: optuna.Study, request: SearchRequest, plan: SearchPlan, bundle: ProxyBundle
) -> None:
    """Keep in the study what it is a record of."""
    known = study.user_attrs
    for key, value in {
        "pattern": str(plan.pattern),
        "scope": plan.pattern.scope.value,
        "objective": request.objective.label,
        "space": plan.space.to_dict(),
        "sampler": plan.sampler,
        "seed": plan.seed,
        "calibration": bundle.provenance,
    }.items():
        if key not in known:
            study.set_user_attr(key, value)


def _confirm(
    study: optuna.Study,
    request: SearchRequest,
    rated: list[RatedCandidate],
    bundle: ProxyBundle,
    model: LanguageModel,
    text: ReportText,
    progress: Progress,
) -> list[tuple[float, RatedCandidate]]:
    chosen = finalists(rated, request.finalists)
    statistics = bundle.statistics()

    def perplexity(candidate: Candidate) -> float:
        return rate_pruned(model, statistics, candidate, text.windows)[0].perplexity

    with progress("Confirming by perplexity", len(chosen)) as advance:
        return confirm(study, chosen, perplexity, text_sha256=text.key, advance=advance)


def _result(
    request: SearchRequest,
    plan: SearchPlan,
    bundle: ProxyBundle,
    name: str,
    rated: list[RatedCandidate],
    measured: list[tuple[float, RatedCandidate]],
    text: ReportText | None,
) -> SearchResult:
    best = measured[0][1] if measured else rated[0]
    by_number = {candidate.number: perplexity for perplexity, candidate in measured}
    confirmation = None
    if measured and text is not None:
        confirmation = Confirmation(
            perplexity=measured[0][0],
            tokens=text.windows.shape[0] * (text.windows.shape[1] - 1),
            context_length=text.windows.shape[1],
            text=text.to_dict(),
        )
    border = plan.space.on_border(best.params) if best.candidate.method == "crepe" else []

    def rating(candidate: RatedCandidate) -> Rating:
        return Rating(
            method=candidate.candidate.method,
            trial=candidate.number,
            proxy=candidate.value,
            perplexity=by_number.get(candidate.number),
        )

    configuration = Configuration(
        method=best.candidate.method,
        coefficients=CoefficientsDocument.model_validate(best.candidate.coefficients.to_dict()),
        pattern=str(plan.pattern),
        scope=best.candidate.pattern.scope.value,
        objective={
            "name": request.objective.label,
            "direction": request.objective.direction,
            "value": best.value,
        },
        confirmation=confirmation,
        candidates=[rating(candidate) for _, candidate in measured[:20]],
        baselines=[
            rating(c)
            for c in sorted(rated, key=lambda c: c.number)
            if c.candidate.method != "crepe"
        ],
        border=border,
        search={
            "sampler": plan.sampler,
            "trials": plan.trials,
            "seed": plan.seed,
            "space": plan.space.to_dict(),
            "study": name,
        },
        model=bundle.provenance.get("model", {}),
        calibration={k: v for k, v in bundle.provenance.items() if k != "model"},
        versions=versions("optuna", "cmaes", "torch", "transformers"),
    )
    return SearchResult(
        configuration=configuration,
        study_name=name,
        warnings=_warnings(configuration, plan, confirmed=bool(measured)),
    )


def _warnings(configuration: Configuration, plan: SearchPlan, *, confirmed: bool) -> list[str]:
    warnings = []
    if not confirmed:
        warnings.append(
            "Not confirmed: no perplexity was measured, so this is the best by the proxy alone. "
            "Search from the model with --confirm-text to confirm it."
        )
    if configuration.method != "crepe":
        warnings.append(
            f"No candidate of the search was better than the baseline {configuration.method}, "
            "which is the result. More trials or a wider --space may change that."
        )
    for name in configuration.border:
        values = getattr(plan.space, "kernel_sizes" if name == "kernel_size" else name)
        natural = name.endswith("_share") and values == (0.0, 1.0)
        hope = "a share has no wider one" if natural else "a wider one may hold a better value"
        warnings.append(
            f"The best {name} lies on the border of its range ({values[0]:g} to {values[-1]:g}); "
            f"{hope}."
        )
    return warnings
