"""
`pho.calibrate` and `pho.search`: what is asked for in Python, and what was found.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property, wraps
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, get_type_hints

import optuna
from optuna.samplers import BaseSampler

from pho_service.errors import InvalidInput, StudyError
from pho_service.host.files import write_text
from pho_service.interface.inputs import (
    Choice,
    Model,
    calibrated,
    calibration_text_of,
    chosen,
    length_of,
    opened,
    opened_bundle,
    opened_for,
    parsed,
    run_on,
)
from pho_service.interface.minutes import calibration_sizes, search_clock, sized
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import CalibrationText, calibration_text
from pho_service.models.calibration import calibrate as make_bundle
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import GivenWindows
from pho_service.pipeline.objectives import OwnObjective
from pho_service.pipeline.search import (
    check_study_url,
    opened_study,
    origin,
    search_job,
)
from pho_service.pipeline.work import Work
from pho_service.progress import bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.shown.parts import Drawn, Shown, Table
from pho_service.shown.report import LayerCell, Report, layer_cells
from pho_service.shown.tables import configuration_rows, continuations_table, results_table
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration, Continuation, write_configuration
from pho_service.spec.curve import FEW_FINALISTS
from pho_service.spec.document import number, sentences_of
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import (
    Objective,
    ObjectiveName,
    Over,
    Sampler,
    SearchOptions,
    Weighting,
    options_of,
)
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.perplexity import REFERENCES, Perplexities, ReportedPerplexities
from pho_service.spec.space import DEFAULT_PRESET, Preset, SearchSpace
from pho_service.spec.steps import Allocation, Reconstruction, Steps, with_method
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import Callback
from storage.studies import note_trial, record_of

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts, Texts


# What a search is asked for in Python: the arguments of its functions, each said once, as the
# request that the command line makes of its options.
_SPACE = tuple(field.name for field in fields(SearchSpace))
_OBJECTIVE = Objective()
_STEPS = tuple(field.name for field in fields(Steps))

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
Patterns = str | Sequence[str]  # of the names of linears
Sparsities = Mapping[str, float | str]
Given = ProxyBundle | str | Path  # a bundle, or its file


def arguments(argument_class: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """
    Make a function of one dataclass take that dataclass's fields as its arguments.

    Its signature is the dataclass's, for `help`, notebooks and type checkers. Its docstring lists
    each argument with what the ``Attributes`` of the dataclass or of its bases say, or else with
    the description of the field.
    """

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        signature = inspect.signature(argument_class)
        types = _plain({name: param.annotation for name, param in signature.parameters.items()})
        parameters = [
            param.replace(annotation=types[name]) for name, param in signature.parameters.items()
        ]
        returned = inspect.signature(function).return_annotation

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in [keyword for keyword in kwargs if keyword not in signature.parameters]:
                near = "".join(f" Did you mean {n}?" for n in get_close_matches(name, types, 1))
                raise TypeError(f"{function.__name__}() has no argument {name!r}.{near}")
            return function(argument_class(*args, **kwargs))

        argument_class.__init__.__qualname__ = function.__name__  # for TypeErrors
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=returned
        )
        about, _, rest = (inspect.getdoc(function) or "").partition("\nRaises:")
        sentences = sentences_of(cast("type", argument_class))
        lines = [
            fill(
                f"    {name}: {sentences[name]}",
                100,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
            for name in signature.parameters
        ]
        call.__doc__ = "\n".join([about, "Args:", *lines, "", f"Raises:{rest}"])
        return call

    return decorate


def _plain(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Types without what pydantic reads of them; those that are text stay as they are."""
    plain_types = {name: kind for name, kind in annotations.items() if not isinstance(kind, str)}
    return {**annotations, **get_type_hints(type("", (), {"__annotations__": plain_types}))}


def validation_of(candidates: int | None) -> ValidationSpec | None:
    """How a search's proxy is validated, on so many random candidates; None leaves it out."""
    if candidates is None:
        return None
    if not 8 <= candidates <= 1000:
        raise InvalidInput(
            f"validate={candidates} is not in 8..1000: so many random candidates get a perplexity. "
            "Give 40, say, or leave it out."
        )
    return ValidationSpec(candidates=candidates)


def given_bundles(bundle: Given | Mapping[str, Given]) -> Work:
    """One bundle, or several by the names of their models, each in memory or from its file."""
    if isinstance(bundle, Mapping):
        return Work(bundles={name: opened_bundle(source) for name, source in bundle.items()})
    return Work.of(opened_bundle(bundle))


@dataclass(frozen=True, kw_only=True)
class LinearArguments:
    """
    Which linears are pruned.

    Attributes:
        targets: Linears to prune, all by default: names, globs (``*.down_proj``), or regular
            expressions after ``re:``.
        ignore: Linears that stay dense, in the same form; they come before ``targets``.
        sparsities: Linears with a sparsity of their own, by the same patterns:
            ``{"*.layers.0.*": 0.3}``; for N:M the N to keep of the same M.
    """

    targets: Patterns = ()
    ignore: Patterns = ()
    sparsities: Sparsities | None = None

    @property
    def linears(self) -> Linears:
        """The same as one value; one pattern may stand for a list of one."""
        targets, ignore = self.targets, self.ignore
        return Linears(
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
            sparsities=dict(self.sparsities or {}),
        )


@dataclass(frozen=True, kw_only=True)
class MethodArguments(LinearArguments):
    """
    What candidates are, and how they are rated.

    Attributes:
        scope: Where weights compete: ``row``, ``layer`` or ``global``; None is ``layer``, and
            ``row`` for N:M.
        preset: ``score``, ``crepe``, ``crepe-plus`` or ``best``.
        objective: What candidates are rated by. With ``gini``, a study of one's own is to be
            created with ``direction="maximize"``. Or a function of a candidate and its rating,
            which has the proxies as ``rating.fisher`` and so on, and of the pruned model, if it
            has a third parameter: low values are good.
        weighting: How activation reconstruction adds up the errors of layers and rows.
        space: Bounds of the search by name, ``{"row_share": (0.2, 0.8), "kernel_sizes": (3, 5)}``;
            one number fixes a value.
        steps: What every candidate goes through, where it is not the preset's:
            ``{"allocation": "owl", "permutation": ..., "repruning": ..., "update": ...,
            "shrinkage": 1.0, "reconstruction": "block"}``.
    """

    scope: str | None = None
    preset: str = DEFAULT_PRESET
    objective: ObjectiveName | Callable[..., float] = _OBJECTIVE.name
    weighting: Weighting = _OBJECTIVE.weighting
    space: Mapping[str, Any] | None = None
    steps: Mapping[str, Any] | None = None

    def request(
        self,
        pattern: str | float | Pattern,
        *,
        bundles: int = 1,
        over: Over | None = None,
        **options: Any,
    ) -> SearchRequest:
        """The request for a pattern, with more of its fields as ``options``."""
        parts = parsed(pattern, self.scope)
        if options.get("finalists", 0) is None:
            options["finalists"] = FEW_FINALISTS if parts.structured else _ASKED.finalists
        if parts.structured:
            return self._cut_request(parts, **options)
        preset = Preset.of(self.preset, parts).changed(self._steps(), self._bounds())
        objective = (
            OwnObjective.of(self.objective)
            if callable(self.objective)
            else Objective(name=self.objective, weighting=self.weighting, over=over)
        )
        return SearchRequest(
            pattern=parts,
            objective=objective.over_models(bundles),
            bounds=preset.bounds,
            steps=preset.steps,
            **options,
        )

    def _cut_request(self, pattern: Pattern, **options: Any) -> SearchRequest:
        """The request for a cut of blocks, which has no score and no steps."""
        for part in fields(MethodArguments):
            if part.name != "scope" and getattr(self, part.name) != part.default:
                raise InvalidInput(
                    f"pattern {pattern} has no score, so {part.name} says nothing. Leave it out."
                )
        return SearchRequest(pattern=pattern, **options)

    def _steps(self) -> dict[str, Any]:
        steps = dict(self.steps or {})
        _check_names("steps", steps, _STEPS)
        if "reconstruction" in steps:
            steps["reconstruction"] = with_method(steps["reconstruction"])
        for name, part in (("allocation", Allocation), ("reconstruction", Reconstruction)):
            if isinstance(steps.get(name), str):
                steps[name] = part(method=steps[name])
            if isinstance(steps.get(name), Mapping):
                steps[name] = part(**steps[name])
        if linears := self.linears:
            if "linears" in steps:
                raise InvalidInput(
                    "steps has linears, and targets, ignore or sparsities are given too. Give one "
                    "of them."
                )
            steps["linears"] = linears
        if isinstance(steps.get("linears"), Mapping):
            steps["linears"] = Linears(**steps["linears"])
        return steps

    def _bounds(self) -> dict[str, Any]:
        space = dict(self.space or {})
        _check_names("space", space, _SPACE)
        return {
            name: (float(value), float(value))
            if isinstance(value, (int, float))
            else tuple(sorted(value))
            if name == "kernel_sizes"
            else tuple(value)
            for name, value in space.items()
        }


@dataclass(frozen=True, kw_only=True)
class SearchArguments(SearchOptions, MethodArguments):
    """
    What every search takes besides.

    Attributes:
        tokenizer: The model's own; not needed with a bundle that ``pho.calibrate`` gave.
        confirm: Text for the final perplexities. Without it, windows of the calibration's text
            are used that were held out.
        texts: The calibration's text, for steps that run it through the model; not needed with a
            bundle that ``pho.calibrate`` gave.
        confirm_windows: Windows of the text for the final perplexities.
        report: Text that nothing was chosen on: results, the dense model, Wanda and RIA are
            measured on it in the end. Also a data set, or a usual name such as ``wikitext2``.
        report_windows: Windows of that text; those that the calibration or the confirmation has a
            part of are left out.
        progress: Show bars on stderr; None shows them in terminals and notebooks.
    """

    tokenizer: Any = None
    confirm: "Texts | None" = None
    texts: "MixedTexts | None" = None
    confirm_windows: int = 16
    report: "Texts | None" = None
    report_windows: int = 16
    progress: bool | None = None

    def request(self, pattern: str | float | Pattern, **more: Any) -> SearchRequest:
        """The request for a pattern, with the options of the search."""
        return super().request(pattern, **options_of(self), **more)


def _check_names(what: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise InvalidInput(f"{what}: {name!r} is not one of {', '.join(names)}.")


def check_study_is_of(study: optuna.Study, work: Work, request: SearchRequest) -> None:
    """See before anything is written that a study is new, or of this search on these bundles."""
    record = record_of(study)
    if "pattern" not in record:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name!r} holds trials that were not made by PHO. Give a new "
                "study."
            )
        return
    for what, value in (
        ("pattern", str(request.pattern)),
        ("scope", request.pattern.scope.value),
        ("objective", request.objective.label),
    ):
        if record.get(what) != value:
            raise StudyError(
                f"study {study.study_name!r} is of another search: its {what} is "
                f"{record.get(what)}, and this is {value}. Give another study."
            )
    theirs, ours = record.get("steps", {}).get("linears"), request.steps.to_dict().get("linears")
    if theirs != ours:
        raise StudyError(
            f"study {study.study_name!r} is of another search: its linears are "
            f"{theirs or 'all'}, and these are {ours or 'all'}. Give another study."
        )
    check_bundle_of(study, work)


def check_bundle_of(study: optuna.Study, work: Work) -> None:
    """See that a study does not say that it is of another bundle."""
    key = origin(work).get("key")
    study_key = record_of(study).get("calibration", {}).get("key")
    if study_key is not None and study_key != key:
        raise StudyError(
            f"study {study.study_name!r} is of another bundle, {study_key[:12]}, and this one is "
            f"{str(key)[:12]}: another model, or calibrated on another text or with other "
            "settings. Give the bundle of the study, or another study."
        )


def plain_bundle(bundle: ProxyBundle) -> ProxyBundle:
    """The bundle alone, without what is kept beside it in memory."""
    return ProxyBundle(layers=bundle.layers, inputs=bundle.inputs, provenance=bundle.provenance)


_ASKED = SearchRequest(pattern=Pattern(sparsity=0.5))  # for its defaults


def drawn(page: str, path: str | Path | None) -> Drawn:
    """A page for a notebook, written to a path if one is given."""
    if path is not None:
        write_text(Path(path), page)
    return Drawn(page)


@dataclass(frozen=True, kw_only=True)
class FoundRow:
    """
    A line of the table of a search; all perplexities are of one text.

    Attributes:
        method: ``dense``, ``wanda``, ``ria``, or a finalist's method.
        trial: Number of the finalist's trial; None for the others.
        perplexity: None where it was not measured.
        divergence: Mean Kullback-Leibler divergence from the dense model, in nats; None where it
            was not measured.
        proxy: The objective's value; None where the study has none.
        error: Standard error of the logarithm of a finalist's perplexity over the best one's.
    """

    method: str
    trial: int | None = None
    perplexity: float | None = None
    divergence: float | None = None
    proxy: float | None = None
    error: float | None = None


@dataclass(frozen=True, repr=False)
class Written(Shown):
    """
    What the dense and the pruned model write, each next token the likeliest.

    Attributes:
        rows: A ``prompt`` each, and how ``dense`` and ``pruned`` go on.
    """

    rows: Sequence[Continuation]

    def _records(self) -> Sequence[Any]:
        return [row.model_dump() for row in self.rows]

    def _shown(self) -> Table:
        return continuations_table(self.rows)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Found(Shown, SearchResult):
    """
    Result of a search.

    Attributes:
        study: The record of the search.
        table: Dense, Wanda, RIA and the finalists, also as ``found.to_dataframe()``.
        bundles: What candidates were rated on, by the names of their models.
    """

    study: optuna.Study
    table: Sequence[FoundRow]
    bundles: Mapping[str, ProxyBundle]

    @property
    def perplexities(self) -> Perplexities | None:
        """
        How good the result is: ``dense``, ``pruned``, ``wanda``, ``ria`` and the ``rise``.

        It is of the text that the result was chosen on. None where no perplexity was measured; as
        text it is one line.
        """
        return self.configuration.perplexities

    @property
    def report(self) -> ReportedPerplexities | None:
        """The same on the report text, which nothing was chosen on; None without one."""
        return self.configuration.report

    @property
    def continuations(self) -> Written:
        """How the dense and the pruned model go on with three prompts of the confirmation text."""
        return Written(self.configuration.continuations)

    def write(self, path: str | Path) -> None:
        """
        Write the config.json that `pho search` writes.

        Raises:
            OutputError: The file cannot be written.
        """
        write_configuration(self.configuration, Path(path))

    @cached_property
    def layers(self) -> dict[str, list[LayerCell]]:
        """
        Sparsity and error of each model's linears by block and kind, before later steps; nothing
        of a cut.
        """
        cells: dict[str, list[LayerCell]] = {}
        if self.configuration.cut is not None:
            return cells
        candidate = self.configuration.candidate()
        for name, bundle in self.bundles.items():
            evaluator = ProxyEvaluator(bundle)
            errors = evaluator.layer_errors(candidate)
            cells[name] = layer_cells(errors, evaluator.layer_sparsities(candidate))
        return cells

    def plot(self, path: str | Path | None = None) -> Drawn:
        """
        Draw the page of `pho report`: the trials, and a map of sparsity and error by layer.

        A notebook shows what is returned; with ``path`` the page is written there, too.

        Raises:
            OutputError: The file cannot be written.
        """
        from pho_service.shown.page import render, study_report

        report = replace(study_report(self.study, self.configuration), layers=self.layers)
        return drawn(render(report), path)

    def _records(self) -> Sequence[FoundRow]:
        return self.table

    def _shown(self) -> Table:
        configuration = self.configuration
        table = results_table(Report.of(configuration))
        assert table is not None  # it has its own trial
        lines = [(name, value) for name, value in configuration_rows(configuration) if value]
        headline = configuration.headline
        good = "" if headline is None else f"perplexity: {headline}\n"
        return replace(
            table,
            title=f"{good}trial {self.trial} of study {self.study_name!r}",
            notes=(
                *(f"{name}: {value}" if name else value for name, value in lines),
                *table.notes,
                *(f"Note: {warning}" for warning in self.warnings),
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundArguments(SearchArguments):
    """
    Arguments of ``pho.search``.

    Attributes:
        bundle: What ``pho.calibrate`` gave, or the path of its file; several by the names of
            their models for coefficients that are good on all of them.
        pattern: Share of the weights to remove (``"0.5"``), N kept of M (``"2:4"``), or a share of
            the blocks' weights (``"structured:20%"``) or of the model's file (``"smaller:20%"``)
            to cut out. A cut may also be for the bytes of a GGUF file (``"bytes:95MB"``) or for a
            speed (``"faster:1.2x"``). A cut needs the model, and has no preset
            and no other options of scores.
        model: That of the bundle, in memory or by its name. Without it nothing is confirmed.
        over: How several models count: their ``mean``, or the ``worst``.
        sampler: Its name, or a sampler of Optuna, which has a seed of its own.
        finalists: How many found candidates are looked at again, beside the baselines; None takes
            5, and 2 of a cut.
        validate: Random candidates, 8 or more, that the proxy is validated on by perplexity before
            the confirmation: where it does not rank, four times as many finalists are looked at.
        warm_start: What was found elsewhere in the same pattern and scope: rated first.
        study: The record: one of Optuna, or the URL of a database, is gone on with. None: a new
            one in memory.
        callbacks: As Optuna's: called with the study and a frozen trial after each new trial;
            ``study.stop()`` ends the search early.
        minutes: Time for the search on this machine, without the calibration: finalists, those
            pruned in full and the passes of a training are chosen for it where they are not given.
            None: as many as the other arguments say. Needs the model.
    """

    bundle: Given | Mapping[str, Given] = field(kw_only=False)
    pattern: str | float | Pattern = field(kw_only=False)
    model: Model | None = None
    over: Over | None = None
    sampler: Sampler | BaseSampler = "cmaes"
    finalists: int | None = None
    validate: int | None = None
    warm_start: Sequence[Choice] = ()
    study: optuna.Study | str | None = None
    callbacks: Sequence[Callback] | Callback = ()
    minutes: float | None = None


@arguments(FoundArguments)
def search(ask: FoundArguments) -> Found:
    """
    Find the best coefficients for a model, and confirm them by perplexity.

    The model is left dense. The same bundle, texts, options and seed give the configuration of
    `pho search`, byte for byte. ``found.perplexities`` says how good the result is: beside the
    finalists the dense model, Wanda and RIA are measured.

    Raises:
        InvalidInput: An option breaks a rule, a pattern matches no linear, or a text is given
            without the model.
        ModelError: The model has been pruned already, or the tokenizer is of another model.
        BundleError: The bundle is of another model.
        TextError: A text cannot be read, or does not fill one window.
        StudyError: The study is of another search or of another bundle, or cannot be opened.
    """
    work, study = given_bundles(ask.bundle), ask.study
    request = ask.request(
        ask.pattern,
        bundles=len(work.bundles),
        over=ask.over,
        sampler=ask.sampler,
        finalists=ask.finalists,
        warm_start=tuple(chosen(choice).candidate() for choice in ask.warm_start),
        validation=validation_of(ask.validate),
    )
    if isinstance(study, str):
        check_study_url(study)
    elif study is not None:
        check_study_is_of(study, work, request)
    if ask.model is not None:
        loaded = opened_for(work.bundle, ask.model, ask.tokenizer)
        report = None if ask.report is None else (ask.report, ask.report_windows)
        work = replace(
            calibrated(loaded, work.bundle, ask.texts, ask.confirm, ask.confirm_windows, report),
            bundles=work.bundles,
        )
        if report is not None and work.confirm is None:
            raise InvalidInput(
                "a report text is given, and there is no text to confirm on before. Give confirm=, "
                "too."
            )
    elif any(text is not None for text in (ask.confirm, ask.texts, ask.report)):
        raise InvalidInput(
            "a text is given, but no perplexity can be measured without the model. Give model=, "
            "too, or leave the text out."
        )
    run = run_on(work.dense, ask.progress)
    if ask.minutes is not None:
        pattern = request.pattern
        clock = search_clock(ask, request, work, pattern=str(pattern), scope=pattern.free_scope)
        request, run = sized(request, clock), clock.watched(run)
    record: AbstractContextManager[optuna.Study]
    if isinstance(study, optuna.Study):
        record = nullcontext(study)
    else:
        record = opened_study(study, request, work)
    with record as search_study:
        result = search_job(
            request,
            work,
            study=search_study,
            run=run,
            callbacks=[ask.callbacks] if callable(ask.callbacks) else ask.callbacks,
        )
        _note_ratings(search_study, result.configuration)
    parts = {part.name: getattr(result, part.name) for part in fields(SearchResult)}
    table = _table(result.configuration, result.trial)
    return Found(**parts, study=search_study, table=table, bundles=work.bundles)


def _note_ratings(study: optuna.Study, configuration: Configuration) -> None:
    """Give trials that were searched by perplexity what was measured of them."""
    trials = study.get_trials(deepcopy=False)
    for rating in configuration.finalists:
        for what in ("perplexity", "divergence"):
            value = getattr(rating, what)
            if value is not None and trials[rating.trial].user_attrs.get(what) != value:
                note_trial(study, rating.trial, what, value)


def _table(configuration: Configuration, trial: int) -> list[FoundRow]:
    """The references, and every finalist; where nothing was measured, the baselines instead."""
    ratings, good = configuration.finalists, configuration.perplexities
    references = [
        FoundRow(method=name, perplexity=getattr(good, name)) for name in REFERENCES if good
    ]
    if not ratings:
        proxy = configuration.objective["value"]
        best = [FoundRow(method=configuration.method, trial=trial, proxy=proxy)]
        baselines = [baseline for baseline in configuration.baselines if baseline.trial != trial]
    else:
        best, baselines = [], []
    return [
        *references,
        *(FoundRow(**rating.model_dump()) for rating in [*baselines, *ratings]),
        *best,
    ]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Bundle(Shown, ProxyBundle):
    """
    A proxy bundle that was made in this process.

    Attributes:
        text: The windows that it was made of, and some that were held out; not in its file.
        tokenizer: That cut them; None where windows were given as tokens.
    """

    text: CalibrationText = field(kw_only=True)
    tokenizer: Any = None

    def write(self, path: str | Path) -> None:
        """
        Write the file that `pho calibrate` writes; the windows are not in it.

        Raises:
            OutputError: The file cannot be written.
        """
        write_bundle(self, Path(path))

    def _shown(self) -> Table:
        model, settings = self.provenance["model"], self.provenance["settings"]
        windows, length = self.text.calibration.shape
        dense = self.provenance["dense"]
        return Table(
            ("bundle", ""),
            [
                ("model", f"{model['name']} ({model['family']}, {model['parameters']:,})"),
                ("linears", f"{len(self.layers)}, {self.weights:,} weights"),
                ("text", f"{windows} windows of {length} tokens of {self.text.record.source}"),
                ("rows", settings["rows_per_layer"] or "all"),
                ("kernel sizes", ", ".join(map(str, self.kernel_sizes))),
                ("dense", f"perplexity {number(dense['perplexity'])} on {dense['tokens']} tokens"),
                ("key", self.key[:12]),
            ],
            numbers=False,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrateArguments(CalibrationSettings):
    """
    Arguments of ``pho.calibrate``.

    Attributes:
        model: A model of transformers in memory, on any device; or a folder, a hub id or a .gguf
            file, which is loaded for this call.
        tokenizer: The model's own. None where texts are token windows, or where the model is
            loaded by its name.
        texts: The path of a .txt, .jsonl or .parquet file; a list of documents; a data set of the
            library ``datasets`` with a column ``text``; or token windows, (windows,
            context_length), whole numbers, which are taken in their order. Or several with their
            shares of the windows: ``[("a.jsonl", 3), ("b.jsonl", 1)]``.
        samples: Windows of text for the forward pass, 128 by default; fewer if the text is short.
        context_length: Tokens of a window; None is 2048 or what the model reads, or the length of
            windows that are given.
        minutes: Time for this and for a search by its defaults at 50 %, on this machine: samples
            and context_length are chosen for it where they are not given. None: as given.
        bos: Whether windows start with BOS: ``auto`` (as the tokenizer does), ``always``,
            ``never``. Windows that are given as tokens are not changed.
        progress: Show bars on stderr; None shows them in terminals and notebooks.
    """

    model: Model = field(kw_only=False)
    tokenizer: Any = field(kw_only=False)
    texts: "MixedTexts" = field(kw_only=False)
    samples: int | None = None  # type: ignore[assignment]
    context_length: int | None = None  # type: ignore[assignment]  # until the texts are seen
    minutes: float | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Leave the checks to :meth:`settings`."""

    def settings(self, model: LanguageModel, **changes: Any) -> CalibrationSettings:
        """The settings alone, with what the model and the texts say."""
        values = {part.name: getattr(self, part.name) for part in fields(CalibrationSettings)}
        samples, length = self.samples, self.context_length
        if self.minutes is not None:
            samples, length = calibration_sizes(model, self.texts, self.minutes, samples, length)
        chosen_sizes = {
            "samples": CalibrationSettings.samples if samples is None else samples,
            "context_length": length_of(model, self.texts, length),
            "kernel_sizes": tuple(self.kernel_sizes),
        }
        return CalibrationSettings(**{**values, **chosen_sizes, **changes})


@arguments(CalibrateArguments)
def calibrate(ask: CalibrateArguments) -> Bundle:
    """
    Run a dense model once over a text, and keep what a search needs of it.

    The model computes what it did; fused experts get modules of their own, which see the same
    weights. The same model, text and settings give the bundle of
    `pho calibrate`.

    Raises:
        InvalidInput: A setting breaks a rule; or the model is in training mode, has hooks or
            adapters, or is quantised.
        ModelError: It cannot be pruned as a whole, or the tokenizer is of another model.
        TextError: The text cannot be read, or does not fill one window.
        NumericalError: A weight, an activation or a gradient is NaN or infinite.
        OutOfMemory: It does not fit.
    """
    source = calibration_text_of(ask.texts)
    has_windows = isinstance(source, GivenWindows)
    if has_windows and ask.bos == "always":
        raise InvalidInput(
            "bos='always' has no effect on windows that are given as tokens. Put BOS into "
            "them, or give the text."
        )
    loaded = opened(ask.model, ask.tokenizer)
    # Nothing is put before windows that are given.
    settings = ask.settings(loaded, **({"bos": "never"} if has_windows else {}))
    text = calibration_text(loaded, source, settings)
    bundle = make_bundle(loaded, text, settings, bars(ask.progress))
    parts = {part.name: getattr(bundle, part.name) for part in fields(bundle)}
    # As its file has it, so that what comes of it has the bytes of the command line.
    parts["provenance"] = json.loads(json.dumps(bundle.provenance, sort_keys=True))
    return Bundle(**parts, text=text, tokenizer=loaded.tokenizer)
