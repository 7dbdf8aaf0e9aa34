"""
The table that every claim rests on: dense, the published methods, and what was found.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pho_service.errors import BundleError, ConfigurationError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.proxy_rating import mask_proxy
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.progress import Advance, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import model_sparsity
from pho_service.pruning.memory import peak_memory
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import Statistics
from pho_service.spec.ablation import step_by_step
from pho_service.spec.baselines import shown_baselines
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
        perplexity: On the report text; over several calibrations, the mean.
        sparsity: Achieved, over the weights of all linears that are pruned.
        proxy: The objective's value; None for dense, for SparseGPT, whose
            mask no bundle knows, and where the bundle lacks a kernel size.
        seconds: To prune and to measure, and to search where the row was searched.
        memory_bytes: Most memory in use meanwhile, the model included; None
            where the system does not tell.
        deviation: Standard deviation of the perplexity over the calibrations; None for one alone.
        calibrations: How many the row is the mean of.
        extra: What else was measured of the pruned model, by name.
    """

    method: str
    scope: str | None
    perplexity: float
    sparsity: float
    proxy: float | None
    seconds: float
    memory_bytes: int | None
    deviation: float | None = None
    calibrations: int = 1
    extra: Mapping[str, float] = field(default_factory=dict)


STDERR = " stderr"  # ends the name of a number's standard error, which stands in its column

# Measures more of a model that is pruned, as numbers by name: columns of the table.
Also = Callable[[LanguageModel], Mapping[str, float]]


def compare_job(
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
    pattern: Pattern,
    configurations: Sequence[tuple[str, Configuration]],
    *,
    methods: Sequence[str] | None = None,
    ablation: bool = False,
    linears: Linears | None = None,
    calibration: Tensor | None = None,
    objective: Objective | None = None,
    also: Also | None = None,
    dense: ComparisonRow | None = None,
    run: Run = Run(),
) -> list[ComparisonRow]:
    """
    Prune with every method and measure the perplexity on one text.

    Args:
        model: Dense; it is given back dense.
        bundle: Bundle of this model.
        report: Not the text that anything was chosen on.
        pattern: Pattern of all rows.
        configurations: (name, configuration) pairs, in the pattern of the comparison.
        methods: Names of baselines; None is those that are shown by default.
        ablation: Each configuration has a row for the score alone, and one for each step more.
        linears: What the baselines prune; None is what the configurations prune.
        calibration: Windows for methods that need a text; without them such baselines are left
            out, unless they are named.
        objective: Whose proxy value is shown; activation reconstruction by default.
        also: What else is measured of each pruned model.
        dense: The row of the dense model, if it is known already.
        run: Where it runs, and who watches it.

    Raises:
        ConfigurationError: A configuration is for another pattern, or for other linears.
        InvalidInput: A method is not known, or needs a text where there is none.
        BundleError: The bundle is of another model.
    """
    linears = common_linears(configurations, pattern, linears)
    shown = shown_baselines(methods, pattern, linears)
    found = [(name, each.candidate()) for name, each in configurations]
    if ablation:
        found = [row for name, candidate in found for row in step_by_step(name, candidate)]
    candidates = [
        *(
            (c.method, c)
            for c in shown
            if methods is not None or calibration is not None or not c.steps.needs_text
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
        also=also,
        dense=dense,
        run=run,
    )


def compare_candidates(
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
    candidates: Sequence[tuple[str, Candidate]],
    *,
    calibration: Tensor | None = None,
    objective: Objective | None = None,
    also: Also | None = None,
    dense: ComparisonRow | None = None,
    run: Run = Run(),
) -> list[ComparisonRow]:
    """
    A row for the dense model, and one for each (name, candidate); see :func:`compare_job`.

    Raises:
        BundleError: The bundle is of another model.
        InvalidInput: A candidate needs a text, and there is none; or its N:M does not fit.
    """
    bundle.check_model(model.linears)
    evaluator = ProxyEvaluator(bundle, run.device)
    statistics = bundle.statistics()
    objective = objective or Objective()
    total = len(candidates) + (dense is None)
    with run.progress("Measuring perplexities", total * len(report.windows)) as advance:
        rows = [dense or _dense_row(model, report, also, advance)]
        for name, candidate in candidates:
            started = time.perf_counter()
            with peak_memory(*model.devices) as peak:
                perplexity, sparsity, extra = _measured(
                    model, statistics, candidate, report, calibration, also, advance
                )
            seconds = time.perf_counter() - started
            rows.append(
                ComparisonRow(
                    method=name,
                    scope=candidate.pattern.scope.value,
                    perplexity=perplexity,
                    sparsity=sparsity,
                    proxy=_proxy(evaluator, candidate, objective),
                    seconds=seconds,
                    memory_bytes=peak(),
                    extra=extra,
                )
            )
    return rows


def _dense_row(
    model: LanguageModel, report: ReportText, also: Also | None, advance: Advance
) -> ComparisonRow:
    started = time.perf_counter()
    with peak_memory(*model.devices) as peak:
        dense = measure_perplexity(model, report.windows, advance=advance)
        extra = also(model) if also else {}
    return ComparisonRow(
        method="dense", scope=None, perplexity=dense.perplexity, sparsity=0.0, proxy=None,
        seconds=time.perf_counter() - started, memory_bytes=peak(), extra=extra,
    )  # fmt: skip


def _measured(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    report: ReportText,
    calibration: Tensor | None,
    also: Also | None,
    advance: Advance,
) -> tuple[float, float, Mapping[str, float]]:
    """Perplexity, sparsity, and what else is measured of the model pruned with a candidate."""
    if also is None:
        result, sparsity = rate_pruned(
            model, statistics, candidate, report.windows, advance, calibration=calibration
        )
        return result.perplexity, sparsity, {}

    def pruned(_: int) -> None:
        advance(0)

    with pruned_model(model, statistics, candidate, calibration, pruned) as shares:
        perplexity = measure_perplexity(model, report.windows, advance=advance).perplexity
        return perplexity, model_sparsity(model.linears, shares), also(model)


def _proxy(evaluator: ProxyEvaluator, candidate: Candidate, objective: Objective) -> float | None:
    try:
        return mask_proxy(evaluator, candidate, objective)
    except BundleError:  # no window means for a configuration's kernel size
        return None


def common_linears(
    configurations: Sequence[tuple[str, Configuration]], pattern: Pattern, linears: Linears | None
) -> Linears:
    """
    The linears that all rows of a comparison prune.

    Args:
        configurations: (name, configuration) pairs.
        pattern: Pattern of the comparison.
        linears: What was asked for; None is what the configurations prune.

    Raises:
        ConfigurationError: A configuration is for another pattern, or for other linears.
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
    return linears


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


def check_family(
    configuration: Configuration, model: LanguageModel, name: str, *, other_family: bool
) -> None:
    """
    Raises:
        ConfigurationError: A configuration was found on another family of models.
    """
    found_on = configuration.model
    families = [each.get("family") for each in found_on.get("models", [found_on])]
    known = [family for family in families if family]
    if known and model.family not in known and not other_family:
        raise ConfigurationError(
            f"{name} was found on {' and '.join(sorted(set(known)))}, but {model.name} is of the "
            f"family {model.family}, where it may be no better than a baseline. Search on this "
            "model; or give --other-family, and compare it with the baselines."
        )
