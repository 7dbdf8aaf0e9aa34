"""
The table that every claim rests on: dense, the published methods, and what was found.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pho_service.errors import BundleError, ConfigurationError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.proxy_rating import mask_proxy
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.memory import peak_memory
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.candidate import Candidate
from pho_service.spec.configuration import Configuration
from pho_service.spec.linears import Linears
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """
    Attributes:
        method: ``dense``, a baseline, or a configuration's name.
        scope: Where weights competed; None for dense.
        perplexity: On the report text.
        sparsity: Achieved, over the weights of all linears that are pruned.
        proxy: The objective's value; None for dense, for SparseGPT, whose
            mask no bundle knows, and where the bundle lacks a kernel size.
        seconds: To prune and to measure.
        memory_bytes: Most memory in use meanwhile, the model included; None
            where the system does not tell.
    """

    method: str
    scope: str | None
    perplexity: float
    sparsity: float
    proxy: float | None
    seconds: float
    memory_bytes: int | None


def compare_job(
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
    pattern: Pattern,
    configurations: Sequence[tuple[str, Configuration]],
    *,
    linears: Linears | None = None,
    calibration: Tensor | None = None,
    objective: Objective | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[ComparisonRow]:
    """
    Prune with every method and measure the perplexity on one text.

    Args:
        model: Dense; it is given back dense.
        bundle: Of this model.
        report: Not the text that anything was chosen on.
        pattern: Of all rows.
        configurations: (name, configuration) pairs, in the pattern of the comparison.
        linears: What the baselines prune; None is what the configurations prune.
        calibration: Windows for methods that need a text; without them SparseGPT is left out.
        objective: Whose proxy value is shown; activation reconstruction by default.
        device: For the proxy.
        progress: Is told of each row.

    Raises:
        ConfigurationError: A configuration is for another pattern, or for other linears.
        BundleError: The bundle is of another model.
    """
    found = [(name, fitting(name, each, pattern)) for name, each in configurations]
    if linears is None:
        linears = found[0][1].steps.linears if found else Linears()
    for name, candidate in found:
        if candidate.steps.linears != linears:
            raise ConfigurationError(
                f"{name} prunes {candidate.steps.linears or 'all linears'}, but the comparison is "
                f"of {linears or 'all linears'}. Compare what prunes the same."
            )
    candidates = [
        *(
            (c.method, c)
            for c in comparison_baselines(pattern, linears)
            if calibration is not None or not c.steps.needs_text
        ),
        *found,
    ]
    return compare_candidates(
        model,
        bundle,
        report,
        candidates,
        calibration=calibration,
        objective=objective,
        device=device,
        progress=progress,
    )


def compare_candidates(
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
    candidates: Sequence[tuple[str, Candidate]],
    *,
    calibration: Tensor | None = None,
    objective: Objective | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[ComparisonRow]:
    """
    A row for the dense model, and one for each (name, candidate); see :func:`compare_job`.

    Raises:
        BundleError: The bundle is of another model.
        InvalidInput: A candidate needs a text, and there is none; or its N:M does not fit.
    """
    bundle.check_model(model.linears)
    evaluator = ProxyEvaluator(bundle, device)
    statistics = bundle.statistics()
    objective = objective or Objective()
    with progress("Measuring perplexities", (len(candidates) + 1) * len(report.windows)) as advance:
        started = time.perf_counter()
        with peak_memory(*model.devices) as peak:
            dense = measure_perplexity(model, report.windows, advance=advance)
        rows = [
            ComparisonRow(
                method="dense", scope=None, perplexity=dense.perplexity, sparsity=0.0, proxy=None,
                seconds=time.perf_counter() - started, memory_bytes=peak(),
            )
        ]  # fmt: skip
        for name, candidate in candidates:
            started = time.perf_counter()
            with peak_memory(*model.devices) as peak:
                result, sparsity = rate_pruned(
                    model, statistics, candidate, report.windows, advance, calibration=calibration
                )
            seconds = time.perf_counter() - started
            rows.append(
                ComparisonRow(
                    method=name,
                    scope=candidate.pattern.scope.value,
                    perplexity=result.perplexity,
                    sparsity=sparsity,
                    proxy=_proxy(evaluator, candidate, objective),
                    seconds=seconds,
                    memory_bytes=peak(),
                )
            )
    return rows


def _proxy(evaluator: ProxyEvaluator, candidate: Candidate, objective: Objective) -> float | None:
    try:
        return mask_proxy(evaluator, candidate, objective)
    except BundleError:  # no window means for a configuration's kernel size
        return None


def fitting(name: str, configuration: Configuration, pattern: Pattern) -> Candidate:
    """
    The candidate of a configuration that is to be compared in a pattern.

    Raises:
        ConfigurationError: It is for another pattern.
    """
    candidate = configuration.candidate()
    if str(candidate.pattern) != str(pattern):
        raise ConfigurationError(
            f"{name} is for the pattern {candidate.pattern}, but the comparison is for {pattern}. "
            f"Compare it with --pattern {candidate.pattern}."
        )
    return candidate
