"""
The table that every claim rests on: dense, the published methods, and what was found.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import BundleError, ConfigurationError, InvalidInput, field_name
from pho_service.host.machine import versions
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import scratch_folder
from pho_service.models.texts import RecoveryText, ReportText
from pho_service.pipeline.objectives import mask_proxy
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.rating import favoured, rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.progress import Advance, Run
from pho_service.pruning.hardware import peak_memory
from pho_service.pruning.masks import model_sparsity
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.shown.parts import Shown, Table
from pho_service.spec.baselines import (
    ALL,
    OWL_AT_NM,
    named_baselines,
    shown_baselines,
    step_by_step,
)
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number, seconds, with_error
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.perplexity import Perplexity, Ratio, in_words
from pho_service.spec.recovery import Recovery
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import SearchRequest


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    method: str  # ``dense``, a baseline, or a configuration's name
    scope: str | None  # Where weights competed; None for dense
    perplexity: float  # On the report text; over several calibrations, the mean
    sparsity: float  # Achieved, over the weights of all linears that are pruned
    # The objective's value; None for dense, for SparseGPT, whose mask no bundle knows, and where
    # the bundle lacks a kernel size.
    proxy: float | None
    seconds: float  # To prune and to measure, and to search where the row was searched
    # Most memory in use meanwhile, the model included; None where the system does not tell.
    memory_bytes: int | None
    # Standard deviation of the perplexity over the calibrations; None for one alone.
    deviation: float | None = None
    # Standard error of its rise over dense, as a share of that, by the windows of the text; None
    # for dense, and for the mean of several calibrations, which has the deviation instead.
    error: float | None = None
    # Standard error of the logarithm of its perplexity over that of the best row; None for this
    # one, for dense, and for the mean of several calibrations.
    behind: float | None = None
    calibrations: int = 1  # How many the row is the mean of
    # What else was measured of the pruned model, by name.
    extra: Mapping[str, float] = field(default_factory=dict)


STDERR = " stderr"  # ends the name of a number's standard error, which stands in its column

# Measures more of a model that is pruned, as numbers by name: columns of the table.
Also = Callable[[LanguageModel], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class ThenRecovered:
    """What is found is recovered, too: rows of their own, on windows that nothing else uses."""

    text: RecoveryText
    settings: Recovery
    names: Mapping[str, str]  # What such rows are called, by the rows that they come after

    def of(self, dense: LanguageModel, pruned: LanguageModel, run: Run) -> None:
        """Recover a model, in place."""
        from pho_service.pipeline.recover import PrunedModel, recover_model  # slow to import

        with tempfile.TemporaryDirectory(prefix="pho-", dir=scratch_folder(0)) as place:
            recover_model(
                PrunedModel.of(pruned), lambda: nullcontext(dense), self.text, self.settings,
                Path(place), run=Run(progress=run.progress),
            )  # fmt: skip


RECOVERED = ", recovered"  # ends the name of a row


def compare_candidates(
    work: Work,
    candidates: Sequence[tuple[str, Candidate]],
    *,
    also: Also | None = None,
    dense: ComparisonRow | None = None,
    beside: str | None = None,
    recovery: ThenRecovered | None = None,
    run: Run = Run(),
) -> list[ComparisonRow]:
    """Prune with each candidate and measure the perplexity on one text: a row each, dense first."""
    # ``behind`` of the rows is against the row that is called ``beside``, or else the best one.
    model, report = work.model, work.report
    assert report is not None
    work.bundle.check_model(model.linears)
    evaluator = ProxyEvaluator(work.bundle, run.device)
    recovered = {} if recovery is None else recovery.names
    steps = (len(candidates) + len(recovered) + (dense is None)) * len(report.windows)
    for _, each in candidates:  # of those that a text runs through, pruning takes long, too
        chosen = work.bundle.choose(each.steps.linears, each.pattern).names
        steps += len(chosen) if each.steps.needs_text else 0
    with run.progress("Measuring perplexities", steps) as advance:
        dense_rating = None
        if dense is None:  # else it is of another calibration
            dense, dense_rating = _dense_row(model, report, also, advance)
        rows, ratings = [dense], [dense_rating]
        for name, candidate in candidates:
            started = time.perf_counter()
            names = [name] if name not in recovered else [name, recovered[name]]
            then = recovery if name in recovered else None
            with peak_memory(*model.devices) as peak:
                measured = _measured(work, report, candidate, also, then, advance, run)
                for row, (rating, sparsity, extra) in zip(names, measured, strict=True):
                    ratings.append(rating)
                    over_dense = None if dense_rating is None else rating.against(dense_rating)
                    rows.append(
                        ComparisonRow(
                            method=row,
                            scope=candidate.pattern.scope.value,
                            perplexity=rating.perplexity,
                            error=None if over_dense is None else over_dense.rise_error,
                            sparsity=sparsity,
                            proxy=_proxy(evaluator, candidate),
                            seconds=time.perf_counter() - started,
                            memory_bytes=peak(),
                            extra=extra,
                        )
                    )
    if len(rows) < 3:
        return rows
    best = min(range(1, len(rows)), key=lambda number: rows[number].perplexity)
    if beside is not None:
        best = [row.method for row in rows].index(beside)
    reference = ratings[best]
    return [
        replace(row, behind=rating.against(reference).error)
        if rating and reference and number not in (0, best)
        else row
        for number, (row, rating) in enumerate(zip(rows, ratings, strict=True))
    ]


def _dense_row(
    model: LanguageModel, report: ReportText, also: Also | None, advance: Advance
) -> tuple[ComparisonRow, Perplexity]:
    started = time.perf_counter()
    with peak_memory(*model.devices) as peak:
        dense = measure_perplexity(model, report.windows, advance=advance)
        extra = also(model) if also else {}
    row = ComparisonRow(
        method="dense", scope=None, perplexity=dense.perplexity, sparsity=0.0, proxy=None,
        seconds=time.perf_counter() - started, memory_bytes=peak(), extra=extra,
    )  # fmt: skip
    return row, dense


def _measured(
    work: Work,
    report: ReportText,
    candidate: Candidate,
    also: Also | None,
    recovery: ThenRecovered | None,
    advance: Advance,
    run: Run,
) -> Iterator[tuple[Perplexity, float, Mapping[str, float]]]:
    """Measure the model pruned with a candidate, and then, if asked for, recovered as well."""
    model, statistics, calibration = work.model, work.bundle.statistics(), work.calibration
    if also is None and recovery is None and not candidate.steps.needs_text:
        result, sparsity = rate_pruned(
            model, statistics, candidate, report.windows, advance, calibration=calibration
        )
        yield result, sparsity, {}
        return

    def pruned(count: float) -> None:
        advance(count if candidate.steps.needs_text else 0)

    with pruned_model(model, statistics, candidate, calibration, pruned) as shares:
        result = measure_perplexity(model, report.windows, advance=advance)
        sparsity, extra = model_sparsity(model.linears, shares), also(model) if also else {}
        copy = deepcopy(model) if recovery else None
    yield result, sparsity, extra
    if recovery and copy:
        recovery.of(model, copy, run)
        result = measure_perplexity(copy, report.windows, advance=advance)
        yield result, sparsity, also(copy) if also else {}


def _proxy(evaluator: ProxyEvaluator, candidate: Candidate) -> float | None:
    try:
        return mask_proxy(evaluator, candidate, Objective())
    except BundleError:  # no window means for a configuration's kernel size
        return None


def common_linears(
    configurations: Sequence[tuple[str, Configuration]], pattern: Pattern, linears: Linears | None
) -> Linears:
    """The linears that all rows of a comparison prune."""
    candidates = [
        (name, fitting(name, configuration, pattern)) for name, configuration in configurations
    ]
    if linears is None:
        linears = candidates[0][1].steps.linears if candidates else Linears()
    for name, candidate in candidates:
        if candidate.steps.linears != linears:
            raise ConfigurationError(
                f"{name} prunes {candidate.steps.linears or 'all linears'}, but the comparison is "
                f"of {linears or 'all linears'}. Compare what prunes the same."
            )
    return linears


def fitting(name: str, configuration: Configuration, pattern: Pattern) -> Candidate:
    candidate = configuration.candidate()
    if str(candidate.pattern) != str(pattern):
        raise ConfigurationError(
            f"{name} is for the pattern {candidate.pattern}, but the comparison is for {pattern}. "
            f"Compare it with {field_name('pattern', str(candidate.pattern))}."
        )
    return candidate


def check_family(
    configuration: Configuration, model: LanguageModel, name: str, *, other_family: bool
) -> None:
    found_on = configuration.model
    origins = found_on.get("models", [found_on])
    families = [family for origin in origins if (family := origin.get("family"))]
    if families and model.family not in families and not other_family:
        raise ConfigurationError(
            f"{name} was found on {' and '.join(sorted(set(families)))}, but {model.name} is of "
            f"the family {model.family}, where it may be no better than a baseline. Search on this "
            f"model; or give {field_name('other_family', True)}, and compare it with the baselines."
        )


# A comparison with searches of its own, repeated over calibrations.
@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """Rows of a comparison, and what they share."""

    pattern: Pattern  # Pattern of all rows
    configurations: Sequence[tuple[str, Configuration]] = ()  # (name, configuration) pairs
    # Names of published methods; None is those that are shown by default.
    methods: Sequence[str] | None = None
    # Searches by name, usually that of a preset; what each finds has a row.
    searches: Mapping[str, SearchRequest] = field(default_factory=dict)
    linears: Linears | None = None  # What all rows prune; None is what the configurations prune
    ablation: bool = False  # Configurations and what is found have a row for each step more
    recovery: Recovery | None = None  # They have a row recovered, too

    def __post_init__(self) -> None:
        linears = common_linears(self.configurations, self.pattern, self.linears)
        shown_baselines(self.methods, self.pattern, linears)
        taken = {"dense", *named_baselines(self.pattern)}
        for name in (*(name for name, _ in self.configurations), *self.searches):
            if name in taken:
                raise InvalidInput(f"two rows would be called {name!r}. Give one another name.")
            taken.add(name)
        if self.configurations or self.searches:
            return
        if self.ablation or self.recovery:
            use = "taken apart" if self.ablation else "recovered"
            raise InvalidInput(
                f"configurations are {use}, and there is none. Give one, or a preset to search "
                f"with: {field_name('presets')}."
            )

    def rows(
        self, configurations: Sequence[tuple[str, Configuration]], *, has_text: bool
    ) -> tuple[list[tuple[str, Candidate]], dict[str, str]]:
        """
        The methods, without a text those that need none unless they are named, and configurations;
        and how rows of a model recovered are called, by those that they come after.
        """
        linears = common_linears(configurations, self.pattern, self.linears)
        shown = shown_baselines(self.methods, self.pattern, linears)
        taken = [c for c in shown if has_text or self.methods is not None or not c.steps.needs_text]
        candidates = [(name, configuration.candidate()) for name, configuration in configurations]
        recovered = {name: f"{name}{RECOVERED}" for name, _ in candidates}
        if self.ablation:
            apart = {name: step_by_step(name, candidate) for name, candidate in candidates}
            candidates = [row for rows in apart.values() for row in rows]
            recovered = {rows[0][0]: f"{name}: score + recovery" for name, rows in apart.items()}
            recovered |= {rows[-1][0]: f"{name}: + recovery" for name, rows in apart.items()}
        return [*((baseline.method, baseline) for baseline in taken), *candidates], recovered

    @property
    def shows_all_at_nm(self) -> bool:
        """Whether one would look for a row of OWL, which has none at N:M."""
        return bool(self.pattern.group) and (self.methods is None or ALL in self.methods)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Shown):
    """
    Perplexities of one model on one text: dense, the published methods, and what was found.

    ``comparison.configurations[seed][name]`` is what a search found.
    """

    pattern: str  # Pattern of all rows
    rows: Sequence[ComparisonRow]  # As `pho compare` prints them: means over the calibrations
    report: dict[str, Any]  # The text that they were measured on
    # Name, family, number of parameters, revision, hash of the weights, dtype.
    model: dict[str, Any]
    device: str  # Where it was measured
    versions: dict[str, str]  # Versions of the packages that measured
    notes: Sequence[str]  # What the rows do not say, in sentences
    seeds: dict[int, Sequence[ComparisonRow]]  # The rows of each calibration, by its seed
    # What the searches of each calibration found, by seed and name.
    configurations: dict[int, dict[str, Configuration]]

    def _records(self) -> Sequence[dict[str, Any]]:
        rows = [{**vars(row), **row.extra} for row in self.rows]
        return [{name: row[name] for name in row if name != "extra"} for row in rows]

    def _shown(self) -> Table:
        return replace(self.table, title=f"{self.title}: {self.summary}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON values that `pho compare --json` prints."""
        return {
            **asdict(self),
            "configurations": {
                seed: {name: best.model_dump(mode="json") for name, best in by_name.items()}
                for seed, by_name in self.configurations.items()
            },
        }

    @property
    def title(self) -> str:
        return f"{Path(self.model['name']).name} at {self.pattern}"

    @property
    def summary(self) -> str:
        """How good what was found is, in a line: dense, found, and the best of Wanda and RIA."""
        means = {row.method: row.perplexity for row in self.rows}
        baselines = named_baselines(Pattern.parse(self.pattern))
        results = {
            row.method: self.over_dense(row)
            for row in self.rows[1:]
            if row.method not in baselines and ": " not in row.method  # none of an ablation
        }
        methods = {}
        for family in ("wanda", "ria"):
            variants = [name for name in means if name in baselines and name.startswith(family)]
            if variants:  # by its own name: of which norms and scope it is
                best = min(variants, key=lambda name: means[name])
                methods[best] = means[best]
        return in_words(means["dense"], results, methods)

    @property
    def extra(self) -> list[str]:
        """The names of what else was measured."""
        names = (name for row in self.rows for name in row.extra if not name.endswith(STDERR))
        return [*dict.fromkeys(names)]

    @property
    def table(self) -> Table:
        """All rows, with the conditions of the numbers."""
        return Table(
            (
                "method", "scope", "perplexity", "against dense", "above the lowest", *self.extra,
                "sparsity", "proxy", "seconds", "peak memory",
            ),
            [
                [
                    row.method,
                    row.scope,
                    with_error(row.perplexity, row.deviation),
                    "" if row.method == "dense" else str(self.over_dense(row)),
                    self._behind(row),
                    *(with_error(row.extra.get(n), row.extra.get(n + STDERR)) for n in self.extra),
                    f"{row.sparsity:.4%}",
                    number(row.proxy),
                    seconds(row.seconds),
                    None if row.memory_bytes is None else f"{row.memory_bytes / 2**30:.2f} GiB",
                ]
                for row in self.rows
            ],
            title=self.title,
            notes=(self.caption,),
        ).without_empty()  # fmt: skip

    def over_dense(self, row: ComparisonRow) -> Ratio:
        """Return how far a row is above the dense model."""
        return Ratio.of_rise(row.perplexity, self.rows[0].perplexity, row.error)

    def _behind(self, row: ComparisonRow) -> str:
        if row.behind is None:
            return ""
        best = min(other.perplexity for other in self.rows if other.method != "dense")
        return str(Ratio(row.perplexity, best, row.behind))

    @property
    def caption(self) -> str:
        of_all = (
            f"; mean ± standard deviation over calibrations with the seeds "
            f"{', '.join(map(str, self.seeds))}"
            if len(self.seeds) > 1
            else "; ± is a standard error, of paired differences"
            if any(row.error is not None for row in self.rows)
            else ""
        )
        return (
            f"{self.report['windows']} windows of {self.report['context_length']} tokens of "
            f"{self.report['source']} (sha256 {self.report['sha256'][:12]}), "
            f"{self.model['dtype']} on {self.device}{of_all}"
            + "".join(f". {note.removesuffix('.')}" for note in self.notes)
        )


def compare_over_seeds(
    model: LanguageModel,
    report: ReportText,
    request: ComparisonRequest,
    calibrations: Mapping[int, Callable[[], Work]],
    *,
    text: RecoveryText | None = None,
    also: Also | None = None,
    run: Run = Run(),
) -> Comparison:
    """Compare on each calibration, and give the means. ``text`` is what is recovered on."""
    if request.recovery and model.stream:
        raise InvalidInput(
            f"{model.name} is streamed, and what is recovered must be in memory. Load it without "
            "streaming, or leave the recovery out."
        )
    fitted = [(name, given.for_size(model.parameters)) for name, given in request.configurations]
    request = replace(request, configurations=fitted)
    seeds: dict[int, Sequence[ComparisonRow]] = {}
    configurations: dict[int, dict[str, Configuration]] = {}
    dense, notes = None, [OWL_AT_NM] if request.shows_all_at_nm else []
    chosen_on = {n: c.confirmation.text for n, c in request.configurations if c.confirmation}
    for seed, calibrate in calibrations.items():
        work = replace(calibrate(), dense=model, report=report)
        _check_texts(request, work, report)
        _check_draws(work, len(calibrations))
        notes += favoured(report, work.calibration, chosen_on)
        searches = {
            name: _searched(work, replace(search, seed=seed), run)
            for name, search in request.searches.items()
        }
        results = {name: search.configuration for name, search in searches.items()}
        rows_of = [*request.configurations, *results.items()]
        candidates, names = request.rows(rows_of, has_text=work.calibration is not None)
        rows = compare_candidates(
            work,
            candidates,
            also=also,
            dense=dense,
            recovery=_then_recovered(request.recovery, text, names, seed, work, report),
            run=run,
        )
        dense = rows[0]
        seeds[seed] = [
            _with_search(row, searches.get(row.method.removesuffix(RECOVERED))) for row in rows
        ]
        configurations[seed] = results
    return Comparison(
        pattern=str(request.pattern),
        rows=mean_rows([*seeds.values()]),
        report={
            **report.to_dict(),
            "context_length": report.windows.shape[1],
            "tokens": report.windows.shape[0] * (report.windows.shape[1] - 1),
        },
        model=model.to_dict(),
        device=str(model.device),
        versions=versions("torch", "transformers"),
        notes=[*dict.fromkeys(notes)],
        seeds=seeds,
        configurations=configurations,
    )


def _then_recovered(
    settings: Recovery | None,
    text: RecoveryText | None,
    names: Mapping[str, str],
    seed: int,
    work: Work,
    report: ReportText,
) -> ThenRecovered | None:
    """The recoveries of a calibration."""
    if settings is None or text is None:
        return None
    seen = [report.windows, work.calibration, work.confirm and work.confirm.windows]
    unlike = torch.cat([windows for windows in seen if isinstance(windows, Tensor)])
    return ThenRecovered(
        text=replace(text, unlike=unlike), settings=replace(settings, seed=seed), names=names
    )


def _check_texts(request: ComparisonRequest, work: Work, report: ReportText) -> None:
    if not request.searches:
        return
    if work.confirm is None:
        raise InvalidInput(
            f"the preset {next(iter(request.searches))} is searched, and what it finds confirmed "
            f"on a text of its own. Give {field_name('confirm/text')}."
        )
    shown = {window.numpy().tobytes() for window in report.windows}
    if any(window.numpy().tobytes() in shown for window in work.confirm.windows):
        raise InvalidInput(
            f"the text that searches are confirmed on, {work.confirm.record.source}, has windows "
            "of the report text: what is chosen on a text must not be reported on it. Give "
            f"another {field_name('confirm/text')}."
        )


def _check_draws(work: Work, count: int) -> None:
    """See that another seed draws other windows."""
    if count > 1 and work.unused_windows == 0 and work.calibration is not None:
        raise InvalidInput(
            f"the calibration text fills {len(work.calibration)} windows, and all of them are "
            "drawn with each seed, so the deviation would say nothing. Give a longer text, or "
            f"fewer windows: {field_name('calibration/samples')}."
        )


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What a search found, and what it took."""

    configuration: Configuration
    seconds: float
    memory_bytes: int | None


def _searched(work: Work, request: SearchRequest, run: Run) -> _Search:
    started = time.perf_counter()
    with peak_memory(*work.model.devices) as peak:  # no trained blocks are kept: nothing prunes
        result = search_job(request, replace(work, report=None, cache_dir=None), run=run)
    return _Search(
        configuration=result.configuration,
        seconds=time.perf_counter() - started,
        memory_bytes=peak(),
    )


def _with_search(row: ComparisonRow, search: _Search | None) -> ComparisonRow:
    """A row of what was found, with what it took to find it; none of an ablation has its name."""
    if search is None:
        return row
    return replace(
        row,
        seconds=row.seconds + search.seconds,
        memory_bytes=_most([row.memory_bytes, search.memory_bytes]),
    )


def mean_rows(tables: Sequence[Sequence[ComparisonRow]]) -> list[ComparisonRow]:
    """Give one row for each method of several tables: means, and the spread of the perplexity."""
    # The standard deviation is that of a sample (n - 1); memory is the most of all.
    together: dict[str, list[ComparisonRow]] = {}
    for table in tables:
        for row in table:
            together.setdefault(row.method, []).append(row)
    return [_mean(rows) for rows in together.values()]


def _mean(rows: Sequence[ComparisonRow]) -> ComparisonRow:
    if len(rows) == 1:
        return rows[0]
    proxies = [row.proxy for row in rows if row.proxy is not None]
    return replace(
        rows[0],
        perplexity=fmean(row.perplexity for row in rows),
        deviation=None if rows[0].method == "dense" else stdev(row.perplexity for row in rows),
        error=None,
        behind=None,
        sparsity=fmean(row.sparsity for row in rows),
        proxy=fmean(proxies) if len(proxies) == len(rows) else None,
        seconds=fmean(row.seconds for row in rows),
        memory_bytes=_most([row.memory_bytes for row in rows]),
        calibrations=len(rows),
        extra={name: fmean(row.extra[name] for row in rows) for name in rows[0].extra},
    )


def _most(sizes: Sequence[int | None]) -> int | None:
    known_sizes = [size for size in sizes if size is not None]
    return max(known_sizes) if known_sizes else None
