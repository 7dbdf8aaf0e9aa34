"""
The main job: search a bundle, confirm the winner by perplexity, give a configuration.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from torch import Tensor

from pho_service.errors import InvalidInput, StudyError
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.search.finalists import Divergences
from pho_service.search.plan import Evaluate, RatedCandidate, SearchPlan
from pho_service.search.request import SearchRequest
from pho_service.search.result import (
    SearchResult,
    describe_study,
    mark_chosen,
    search_result,
)
from pho_service.search.search import run_search
from pho_service.search.warm_start import Saving, measure_saving
from pho_service.spec.configuration import Confirmation
from pho_service.spec.objective import Objective
from storage.studies import StorageError, open_storage, open_study

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.pipeline.rating import ReportText

_ROWS = "bundle_rows_sha256"  # user attribute of a study


def search_job(
    request: SearchRequest,
    bundle: ProxyBundle,
    *,
    model: "LanguageModel | None" = None,
    confirm_text: "ReportText | None" = None,
    calibration: Tensor | None = None,
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
        calibration: Windows that the bundle was made of, for steps that need a text.
        device: For the proxy.
        progress: Is told of each long step.

    Raises:
        InvalidInput: The request breaks a rule, or asks for perplexity without a model.
        BundleError: The bundle is of another model.
        StudyError: The study holds the trials of another search or of another bundle, or cannot
            be opened.
    """
    plan = request.plan(bundle.kernel_sizes)
    for layer in bundle.layers:
        plan.pattern.check_width(layer.in_features, layer.name)
    if model is not None:
        bundle.check_model(model.linears)
    evaluate = objective_function(
        request.objective, bundle, model, confirm_text, device, calibration
    )
    rated_on = confirm_text.key if confirm_text and request.objective.name == "perplexity" else ""
    name = study_name(request, plan, bundle.origin, rated_on)
    with opened_study(request.study_url, name, plan) as study:
        check_study(study, [bundle])
        describe_study(study, request, plan, bundle.origin)
        with progress(f"Searching ({request.objective.label})", plan.trials) as advance:
            rated = run_search(study, plan, evaluate, advance)
        saving = compared_with_cold(request, plan, rated, evaluate, progress)
        done = sum(t.number < plan.trials for t in study.get_trials(deepcopy=False))
        divergences = Divergences()
        if request.objective.name == "perplexity":
            measured = [(r.value, r) for r in rated]
        elif model is not None and confirm_text is not None:
            from pho_service.pipeline.confirmation import confirm_finalists  # loads transformers

            measured, divergences = confirm_finalists(
                study,
                rated,
                request.finalists,
                bundle,
                model,
                confirm_text,
                calibration,
                progress,
            )
        else:
            measured = []
        confirmation = None
        if measured and confirm_text is not None:
            confirmation = Confirmation(
                perplexity=measured[0][0], **confirm_text.measured_on(divergences.tokens)
            )
        result = search_result(
            request,
            plan,
            bundle.origin,
            name,
            rated,
            measured,
            confirmation,
            divergences,
            ended_after=done if done < plan.trials else None,
            saving=saving,
        )
        mark_chosen(study, result.configuration, name, result.trial)
    return result


def compared_with_cold(
    request: SearchRequest,
    plan: SearchPlan,
    rated: Sequence[RatedCandidate],
    evaluate: Evaluate,
    progress: Progress,
) -> Saving | None:
    """What the warm start saved, if that is asked and there was one."""
    if not request.compare_cold or not plan.warm_start:
        return None
    with progress("Searching without the warm start", plan.trials) as advance:
        return measure_saving(plan, rated, evaluate, advance)


def objective_function(
    objective: Objective,
    bundle: ProxyBundle,
    model: "LanguageModel | None",
    text: "ReportText | None",
    device: str,
    calibration: Tensor | None = None,
) -> Evaluate:
    """
    What a search rates candidates by.

    Raises:
        InvalidInput: The objective is perplexity, and the model or the text is missing.
    """
    if objective.name != "perplexity":
        return rate_by_proxy(ProxyEvaluator(bundle, device), objective)
    if model is None or text is None:
        raise InvalidInput(
            "the objective perplexity needs the model and a text to measure it on: give a model "
            "instead of a bundle, and --confirm-text."
        )
    from pho_service.pipeline.rating import rate_by_perplexity  # loads transformers

    return rate_by_perplexity(model, bundle.statistics(), text.windows, calibration)


def study_name(
    request: SearchRequest, plan: SearchPlan, provenance: Mapping[str, Any], rated_on: str = ""
) -> str:
    """
    Names a study after what it searches, so that the same request finds it again.

    The number of trials is left out: a longer search goes on with a shorter one.

    Args:
        request: What is asked.
        plan: Of the search.
        provenance: Of the bundle.
        rated_on: Hash of the text, if candidates are rated by perplexity.
    """
    identity = [
        provenance.get("key", ""), str(plan.pattern), plan.pattern.scope,
        request.objective.label, plan.space.to_dict(),
        plan.sampler, plan.seed, plan.fisher, rated_on, plan.steps.to_dict(),
        *([list(plan.warm_start)] if plan.warm_start else []),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    model_name = Path(provenance.get("model", {}).get("name", "model")).name
    return f"{model_name} {plan.pattern} {plan.pattern.scope.value} {plan.sampler} {digest}"


def check_study(study: optuna.Study, bundles: Sequence[ProxyBundle]) -> None:
    """
    See that a study is of these bundles and no others, and note it in a new one.

    The key of a bundle is in the study's name. Who puts bundles together by hand may give two
    of them the same, so the sampled weights are compared, too.

    Raises:
        StudyError: Its trials are of a bundle with other weights.
    """
    rows = [bundle.rows_sha256 for bundle in bundles]
    known = study.user_attrs.get(_ROWS)
    if known is None:  # new, or of an older version
        study.set_user_attr(_ROWS, rows)
    elif known != rows:
        raise StudyError(
            f"study {study.study_name!r} is of a bundle with other weights under the same key, "
            f"{', '.join(bundle.key for bundle in bundles)}. Give each bundle's provenance a key "
            "of its own, or none, which names it by its contents; or use another --study."
        )


@contextmanager
def opened_study(url: str, name: str, plan: SearchPlan) -> Iterator[optuna.Study]:
    """
    The study, with what its storage says turned into ours.

    Raises:
        StudyError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with open_storage(url) as storage:
            yield open_study(storage, name, direction=plan.direction)
    except StorageError as error:
        raise StudyError(f"--study {url}: {error}") from error
