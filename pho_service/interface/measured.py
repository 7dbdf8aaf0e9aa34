"""
`pho.evaluate`, `pho.compare` and `pho.bench`: how good and how fast models are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.interface.inputs import (
    Choice,
    Model,
    calibrated,
    calibration_text_of,
    chosen,
    length_of,
    measured_text,
    opened,
    opened_bundle,
    opened_for,
    parsed,
    run_on,
    settings_of,
    text_of,
)
from pho_service.interface.minutes import as_job, calibration_sizes
from pho_service.interface.search import LinearArguments, MethodArguments, arguments, calibrate
from pho_service.models.loading import LanguageModel
from pho_service.models.tasks import LoadedTasks, load_tasks
from pho_service.models.texts import RecoveryText
from pho_service.pipeline import bench as pipeline
from pho_service.pipeline import rating
from pho_service.pipeline.compare import (
    Comparison,
    ComparisonRequest,
    check_family,
    common_linears,
    compare_over_seeds,
)
from pho_service.pipeline.llama_bench import ReportedOn, bench_llama
from pho_service.pipeline.tasks import also_tasks, measure_tasks
from pho_service.pipeline.work import Work
from pho_service.planning.plan import SHORT_WINDOW, ComparedWork
from pho_service.progress import bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.shown.parts import Shown, Table
from pho_service.shown.tables import scores_table
from pho_service.spec.calibration import Bos, CalibrationSettings
from pho_service.spec.document import part_of, with_error
from pho_service.spec.fields import ConfirmSpec
from pho_service.spec.objective import SearchOptions, options_of
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.perplexity import beside_in_words
from pho_service.spec.recovery import Recovery
from pho_service.spec.tasks import TaskScore, task_names
from pho_service.spec.verbs import BenchSettings, CompareAsk, EvaluateAsk, LlamaAsk, Where
from pho_service.tuning.plan import SearchRequest

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts, Texts


_DEFAULT = CalibrationSettings()


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Shown):
    """
    The perplexity of a model on a text, what it scores in tasks, and all that this depends on.

    Attributes:
        perplexity: exp of the mean loss over predicted tokens; like all that is of the text,
            None if tasks alone were measured.
        error: Standard error of the perplexity, as of other texts of this kind.
        tokens: Predicted tokens: every window predicts all but its first.
        windows: How many were measured.
        context_length: Tokens of a window.
        bos: Whether BOS was put before every window, and every question.
        text: Where the text is from.
        text_sha256: Hash of the text; of windows that were given, of their tokens.
        model: Name, family, number of parameters, revision, hash of the weights, dtype.
        device: Where it was measured.
        tasks: A score for each task and metric.
        beside: The model that this one stands beside, its ``perplexity`` and ``error`` on the same
            windows, and ``rise``, the share by which this one's perplexity is above it, with
            ``rise_error``, its standard error, of paired differences.
        notes: A sentence where one of the two was calibrated or chosen on windows of the text.
    """

    perplexity: float | None
    error: float | None
    tokens: int | None
    windows: int | None
    context_length: int | None
    bos: bool
    text: str | None
    text_sha256: str | None
    model: dict[str, Any]
    device: str
    tasks: Sequence[TaskScore] = ()
    beside: dict[str, Any] | None = None
    notes: Sequence[str] = ()

    def _records(self) -> Sequence[Any]:
        if self.tasks:
            return self.tasks
        row = {**vars(self), "model": self.model["name"]}
        del row["tasks"], row["beside"], row["notes"]
        return [row | {f"beside_{name}": value for name, value in (self.beside or {}).items()}]

    def _shown(self) -> Table:
        where = f"{self.model['name']}, {self.model['dtype']} on {self.device}"
        if self.tasks:
            return self._scores(where)
        return Table(
            ("perplexity", with_error(self.perplexity, self.error)),
            [
                *([] if self.beside is None else [("beside", self._beside)]),
                ("tokens", f"{self.tokens} in {self.windows} windows of {self.context_length}"),
                ("BOS", "with" if self.bos else "without"),
                ("text", f"{self.text}, sha256 {(self.text_sha256 or '')[:12]}"),
                ("model", where),
            ],
            numbers=False,
            notes=self.notes,
        )

    def _scores(self, where: str) -> Table:
        table = scores_table(self.tasks)
        return replace(
            table,
            title="" if self.perplexity is None else self._perplexity,
            notes=(*table.notes, where, *self.notes),
        )

    @property
    def _perplexity(self) -> str:
        beside = f", {self._beside}" if self.beside else ""
        return f"perplexity {with_error(self.perplexity, self.error)}{beside}"

    @property
    def _beside(self) -> str:
        assert self.perplexity is not None
        assert self.beside is not None
        return beside_in_words(self.perplexity, self.beside)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskArguments:
    """
    Zero-shot tasks.

    Attributes:
        tasks: Names in lm-evaluation-harness, which comes with the extra ``eval``.
        tasks_dir: Folder with task files of one's own. What they name as ``!function`` is run.
        limit: Only the first so many examples of each task; None takes all.
        progress: Show bars on stderr; None shows them in terminals and notebooks.
    """

    tasks: str | Sequence[str] = ()
    tasks_dir: str | Path | None = None
    limit: int | None = None
    progress: bool | None = None

    def loaded_tasks(self) -> LoadedTasks | None:
        """Those that are asked for, before a model is opened."""
        if not self.tasks:
            return None
        folder = Path(self.tasks_dir).expanduser() if self.tasks_dir else None
        return load_tasks(task_names(self.tasks), folder)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluateArguments(TaskArguments, EvaluateAsk):
    """
    Arguments of ``pho.evaluate``.

    Attributes:
        model: As of ``pho.calibrate``.
        tokenizer: As of ``pho.calibrate``.
        texts: As of ``pho.calibrate``; no text is needed if there are tasks.
        context_length: Tokens of a window; None is 2048 or what the model reads, or the length of
            windows that are given.
        bos: Whether windows and questions start with BOS: ``auto``, ``always``, ``never``.
        beside: Another model, or its name, whose perplexity is measured on the same windows: such
            as the dense one beside the pruned one. A name has its own tokenizer.
    """

    model: Model = field(kw_only=False)
    tokenizer: Any = field(kw_only=False)
    texts: "Texts | None" = field(default=None, kw_only=False)
    context_length: int | None = None
    bos: Bos = _DEFAULT.bos
    beside: Model | None = None


@arguments(EvaluateArguments)
def evaluate(ask: EvaluateArguments) -> Evaluation:
    """
    Measure the perplexity of a model on a text, or its zero-shot tasks, as `pho evaluate` does.

    The text is joined, tokenised once and cut into windows that do not overlap; the tail is
    dropped.

    Raises:
        InvalidInput, ModelError, TextError: As of ``pho.calibrate``; there is neither a text nor a
            task, or a task is not known or cannot be read; ``beside`` has no text, or another
            tokenizer.
        ModuleNotFoundError: The extra ``eval`` is not installed.
        NumericalError: A loss is NaN or infinite.
    """
    texts, bos, beside = ask.texts, ask.bos, ask.beside
    if texts is None and not ask.tasks:
        raise InvalidInput("there is nothing to measure. Give texts, tasks, or both.")
    if texts is None and beside is not None:
        raise InvalidInput("beside compares perplexities, and no text is given. Give texts.")
    loaded_tasks, show = ask.loaded_tasks(), bars(ask.progress)
    loaded = opened(ask.model, ask.tokenizer)
    measured: dict[str, Any] = dict.fromkeys(
        ("perplexity", "error", "tokens", "windows", "context_length", "text", "text_sha256")
    )
    has_windows = isinstance(texts, Tensor)
    if texts is not None:
        length = length_of(loaded, texts, ask.context_length)
        how = replace(_DEFAULT, context_length=length, bos=bos)
        text = measured_text(loaded, texts, how, ask.max_windows)
        perplexity = rating.perplexity_on(text, loaded, show)
        measured = rating.evaluated(text, perplexity)
        measured["notes"] = rating.favoured_folder(loaded.name, loaded, text_of(texts), text)
        if beside is not None:
            other = opened(beside, None if isinstance(beside, (str, Path)) else ask.tokenizer)
            its = measured_text(other, texts, how, ask.max_windows)
            measured["beside"] = rating.beside(perplexity, text, other, its, show)
            measured["notes"] += rating.favoured_folder(other.name, other, text_of(texts), text)
    scores: Sequence[TaskScore] = ()
    if loaded_tasks is not None:
        scores = measure_tasks(loaded, loaded_tasks, bos=bos, limit=ask.limit, progress=show)
    return Evaluation(
        **measured,
        bos=not (has_windows and not scores) and bool(loaded.window_prefix(bos)),
        model=loaded.to_dict(),
        device=str(loaded.device),
        tasks=tuple(scores),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareArguments(TaskArguments, CompareAsk, SearchOptions, LinearArguments):
    """
    Arguments of ``pho.compare``.

    Attributes:
        model: As of ``pho.calibrate``.
        tokenizer: As of ``pho.calibrate``.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        report: The text that perplexities are measured on; nothing may have been chosen on it.
        texts: The text to calibrate on; not needed with a bundle that ``pho.calibrate`` gave.
        bundle: Bundle of the model, so that nothing is calibrated: its windows, and ``report``'s,
            are cut as its settings say.
        configurations: What else to compare, by name: what ``pho.search`` found, configurations,
            paths of config.json files.
        confirm: Text that the searches are confirmed on; without it, windows of the calibration's
            text are used that were held out.
        recovery: Recover what is found, for a row more each: ``{"tokens": 65_536}``, with the other
            settings of ``pho.recover`` beside; on windows of ``texts`` that nothing else uses.
        scope: ``row``, ``layer`` or ``global``: for CRePE with equal coefficients, and searches.
        targets: Linears that the published methods and searches prune, as of ``pho.search``; by
            default those of the configurations, which must agree.
        samples: Number of calibration windows where there is no bundle, 128 by default; for more
            settings, calibrate first.
        context_length: Tokens of a window, without a bundle.
        minutes: Time for all rows, on this machine: samples and context_length are chosen for it
            where they are not given. None: as given.
        seed: Seed of the calibration, without a bundle, and of searches.
        finalists: How many found candidates of a search are looked at again.
        confirm_windows: Windows of the text that searches are confirmed on.
        report_windows: Only the first windows of ``report``; None takes all.
    """

    model: Model = field(kw_only=False)
    tokenizer: Any = field(kw_only=False)
    pattern: str | Pattern = field(kw_only=False)
    report: "Texts"
    texts: "MixedTexts | None" = None
    bundle: ProxyBundle | str | Path | None = None
    configurations: Mapping[str, Choice] | None = None
    confirm: "Texts | None" = None
    recovery: Mapping[str, Any] | None = None
    scope: str | None = None
    samples: int | None = None
    context_length: int | None = None
    minutes: float | None = None
    finalists: int = ConfirmSpec().finalists
    confirm_windows: int = ConfirmSpec().windows
    report_windows: int | None = None

    def search(self, preset: str, pattern: Pattern, linears: Linears) -> SearchRequest:
        """A preset's search, with the defaults for all else."""
        method = MethodArguments(preset=preset, steps={"linears": linears} if linears else None)
        return method.request(pattern, finalists=self.finalists, **options_of(self))

    def sizes(self, model: LanguageModel, request: ComparisonRequest) -> tuple[int, int]:
        """Windows to calibrate on, and their length, both chosen for the minutes if not given."""
        assert self.texts is not None
        if self.minutes is None:
            samples = _DEFAULT.samples if self.samples is None else self.samples
            return samples, length_of(model, self.texts, self.context_length)
        pattern = str(request.pattern)
        document = {
            "model": model.name, "pattern": pattern, "scope": request.pattern.free_scope,
            "confirm": {"finalists": self.finalists, "windows": self.confirm_windows},
            "steps": {"linears": request.linears.to_dict()} if request.linears else {},
            "minutes": None, **options_of(self),
        }  # fmt: skip
        searches = [as_job({**document, "preset": name}) for name in self.presets]
        short = replace(_DEFAULT, context_length=min(SHORT_WINDOW, model.longest or SHORT_WINDOW))
        rows = [row.steps for _, row in request.rows(request.configurations, has_text=True)[0]]
        work = ComparedWork(
            rows=[*rows, *(search.steps for search in request.searches.values())],
            searches=searches,
            windows=len(measured_text(model, self.report, short, self.report_windows).windows),
            calibrations=max(1, len(self.seeds)),
        )
        return calibration_sizes(
            model, self.texts, self.minutes, self.samples, self.context_length,
            pattern=pattern, took=work.seconds,
        )  # fmt: skip


@arguments(CompareArguments)
def compare(ask: CompareArguments) -> Comparison:
    """
    Measure a model on one text: dense, pruned by the published methods, and as was found.

    The model is left dense.

    Raises:
        ConfigurationError: A configuration is for another pattern or other linears, or of another
            family of models.
        InvalidInput: A method or preset is not known; seeds are given beside a bundle; a search
            has no text of its own to confirm on; neither a text nor a bundle is given; or as of
            ``pho.calibrate``.
        ModelError: The model has been pruned since it was calibrated.
        BundleError: The bundle is of another model.
        TextError: A text cannot be read, or does not fill one window.
    """
    pattern = parsed(ask.pattern, ask.scope)
    configurations = [(name, chosen(choice)) for name, choice in (ask.configurations or {}).items()]
    linears = common_linears(configurations, pattern, ask.linears or None)
    request = ComparisonRequest(
        pattern=pattern,
        configurations=configurations,
        methods=ask.methods,
        searches={name: ask.search(name, pattern, linears) for name in ask.presets},
        linears=linears,
        ablation=ask.ablation,
        recovery=None if ask.recovery is None else Recovery.from_dict(ask.recovery),
    )
    if ask.recovery is not None and ask.texts is None:
        raise InvalidInput("recovery trains on texts beyond the bundle's windows. Give texts, too.")
    loaded_tasks = ask.loaded_tasks()
    texts, bundle = ask.texts, _known_bundle(ask)
    loaded = (
        opened(ask.model, ask.tokenizer)
        if bundle is None
        else opened_for(bundle, ask.model, ask.tokenizer)
    )
    for name, configuration in configurations:
        check_family(configuration, loaded, name, other_family=ask.other_family)

    if bundle is None:
        assert texts is not None
        samples, length = ask.sizes(loaded, request)
        bos: Bos = "never" if isinstance(texts, Tensor) else _DEFAULT.bos  # as pho.calibrate
        how = replace(_DEFAULT, samples=samples, context_length=length, bos=bos)
        numbers = [*ask.seeds] or [ask.seed]
    else:
        how = settings_of(bundle)
        numbers = [how.seed]

    def drawn(number: int) -> Work:
        seed_bundle, seed_texts = bundle, texts
        if seed_bundle is None:
            assert texts is not None
            seed_bundle, seed_texts = calibrate(
                loaded, None, texts, samples=how.samples, context_length=how.context_length,
                seed=number, progress=ask.progress,
            ), None  # fmt: skip
        most = ask.confirm_windows if ask.presets else None
        return calibrated(loaded, seed_bundle, seed_texts, ask.confirm, most)

    compared = compare_over_seeds(
        loaded,
        measured_text(loaded, ask.report, how, ask.report_windows),
        request,
        {number: partial(drawn, number) for number in numbers},
        text=None
        if ask.texts is None
        else RecoveryText(
            source=calibration_text_of(ask.texts), context_length=how.context_length, bos=how.bos
        ),
        also=also_tasks(loaded_tasks, bos=_DEFAULT.bos, limit=ask.limit),
        run=run_on(loaded, ask.progress),
    )
    if ask.minutes is None:
        return compared
    note = (
        f"For minutes={ask.minutes:g}, samples={how.samples} and "
        f"context_length={how.context_length} were chosen. They do the same anywhere."
    )
    return replace(compared, notes=[*compared.notes, note])


def _known_bundle(ask: CompareArguments) -> ProxyBundle | None:
    """The bundle, if there is one."""
    texts, bundle, seeds, minutes = ask.texts, ask.bundle, ask.seeds, ask.minutes
    if bundle is None and texts is None:
        raise InvalidInput(
            "there is nothing to calibrate on. Give texts, or the bundle that pho.calibrate gave."
        )
    if bundle is not None and seeds:
        raise InvalidInput(
            "each seed draws windows of its own, but a bundle has its windows already. Give texts "
            "instead of the bundle, or leave seeds out."
        )
    if bundle is not None and minutes is not None:
        raise InvalidInput(
            f"minutes={minutes} choose how much is calibrated on, and the bundle was calibrated "
            "already. Give texts instead of the bundle, or leave minutes out."
        )
    return None if bundle is None else opened_bundle(bundle)


@dataclass(frozen=True, kw_only=True)
class BenchArguments(BenchSettings, Where, LlamaAsk):
    """
    Arguments of ``pho.bench``.

    Attributes:
        models: Folders, packed or not, hub ids or .gguf files; all are in memory at once, and the
            others are compared with the first.
        report: With ``runtime="llama.cpp"``, a text to measure on how good each file is.
        report_windows: Only the first so many windows of it.
        progress: Show bars on stderr; None shows them in terminals and notebooks.
    """

    models: str | Path | Sequence[str | Path] = field(kw_only=False)
    report: "Texts | None" = None
    report_windows: int | None = None
    progress: bool | None = None


@arguments(BenchArguments)
def bench(ask: BenchArguments) -> pipeline.Bench:
    """
    Measure how fast models load, read a prompt and write, beside each other, as `pho bench`.

    Raises:
        InvalidInput: A number is below 1, a model is given twice, or reads fewer tokens.
        ModelError: A model cannot be loaded.
    """
    models = [ask.models] if isinstance(ask.models, (str, Path)) else ask.models
    if not models:
        raise InvalidInput("no model is given. Name at least one.")
    settings = part_of(ask, BenchSettings)
    if ask.runtime != "torch":
        report = None
        if ask.report is not None:
            report = ReportedOn(text_of(ask.report), ask.report_windows)
        names = [str(model) for model in models]
        return bench_llama(names, settings, ask, report, where=ask, progress=bars(ask.progress))
    if ask.report is not None:
        raise InvalidInput(
            'report is for runtime="llama.cpp". For models in torch, pho.evaluate gives the '
            "perplexity."
        )
    return pipeline.bench(
        [str(model) for model in models], settings, device=ask.device, dtype=ask.dtype,
        progress=bars(ask.progress),
    )  # fmt: skip
