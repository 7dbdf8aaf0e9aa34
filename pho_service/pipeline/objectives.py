"""
What candidates of a search are rated by: a proxy on one or several bundles, or perplexity.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.pipeline.joint_search import rate_jointly
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.objective import Objective
from pho_service.tuning.plan import Evaluate, SearchPlan
from pho_service.tuning.request import SearchRequest

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.pipeline.rating import ReportText


def objective_function(
    objective: Objective,
    plan: SearchPlan,
    bundles: Mapping[str, ProxyBundle],
    model: "LanguageModel | None",
    text: "ReportText | None",
    device: str,
    calibration: Tensor | None = None,
) -> Evaluate:
    """
    What a search rates candidates by: a proxy on one or several bundles, or perplexity.

    Raises:
        InvalidInput: The objective is perplexity, and the model or the text is missing.
        NumericalError: RIA has no value on one of several bundles, or one of 0.
    """
    if objective.over is not None:
        evaluators = {name: ProxyEvaluator(bundle, device) for name, bundle in bundles.items()}
        return rate_jointly(evaluators, plan.pattern, objective, plan.steps.linears)
    bundle = only_one(bundles, f"the objective {objective.name}")
    if objective.name != "perplexity":
        return rate_by_proxy(ProxyEvaluator(bundle, device), objective)
    if model is None or text is None:
        raise _needs_text()
    from pho_service.pipeline.rating import rate_by_perplexity

    return rate_by_perplexity(model, bundle.statistics(), text.windows, calibration)


def only_one(bundles: Mapping[str, ProxyBundle], what: str) -> ProxyBundle:
    """
    The bundle of the only model.

    Raises:
        InvalidInput: There are several.
    """
    if len(bundles) > 1:
        raise InvalidInput(
            f"{what} is given for a search on the bundles of {len(bundles)} models, "
            f"{', '.join(bundles)}. Leave it out, or search on one of them."
        )
    return next(iter(bundles.values()))


def rated_on(request: SearchRequest, text: "ReportText | None") -> str:
    """
    Hash of the text that candidates are rated on; empty if a proxy rates them.

    Raises:
        InvalidInput: They are rated by perplexity, and there is no text.
    """
    if request.objective.name != "perplexity":
        return ""
    if text is None:
        raise _needs_text()
    return text.key


def _needs_text() -> InvalidInput:
    return InvalidInput(
        "the objective perplexity needs the model and a text to measure it on: give a model "
        "instead of a bundle, and --confirm-text."
    )
