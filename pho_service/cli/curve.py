"""
`pho curve` and `pho search --within`: several sparsities in one question.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.cli.document import DOCUMENT, DocumentCommand, Given
from pho_service.cli.minutes import Budget, budget_of
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    is_bundle,
    json_verb,
)
from pho_service.cli.terminal import print_json, progress, say, show_table, tell
from pho_service.errors import InvalidInput, OutputError
from pho_service.spec.curve import FEW_FINALISTS, Target, curve_patterns
from pho_service.spec.document import PRUNED, FieldShown, number, parse_bytes
from pho_service.spec.objective import SearchOptions, options_of
from pho_service.spec.pattern import Pattern
from pho_service.spec.verbs import Studied

if TYPE_CHECKING:
    from optuna import Study

    from pho_service.pipeline.curve import CurvePoint, CurvePoints, Within
    from pho_service.pipeline.work import Work
    from pho_service.spec.job import JobSpec
    from pho_service.tuning.plan import SearchRequest


@dataclass(frozen=True, kw_only=True)
class _CurveAsk(Studied):
    """
    The patterns of a curve, and where it is kept.

    Attributes:
        patterns: What to search at: shares of weights to remove and N:M, with commas between. The
            scope is of the shares.
        bytes: Instead of --patterns: the most that GGUF files of the model may have, with commas
            between, such as 80MB,95MB,110MB. For each the cut and the bits are told that cost least
            together, by estimates.
        out: Folder for the plot, the table and the configurations.
    """

    patterns: Annotated[Sequence[str], FieldShown(section=PRUNED, kind="words")] = ()
    bytes: Annotated[Sequence[str], FieldShown(section=PRUNED, kind="words")] = ()
    out: Annotated[str, FieldShown(kind="path")] = "curve"


@click.command(
    cls=DocumentCommand,
    fields=(
        "scope", "preset", "steps", "search_space", "calibration", "confirm/text",
        "confirm/windows", "confirm/finalists", "report", "validation", "objective", "sampler",
        "revision", "dtype", "stream", "minutes", *options_of(SearchOptions()),
    ),
    ask=_CurveAsk,
)  # fmt: skip
@click.argument("model")
@device_options
@json_verb
def curve(model: str, given: Given, ask: _CurveAsk, inputs: Terminal, as_json: bool) -> None:
    """
    Show how good MODEL still is at each of several sparsities, or in so many bytes.

    MODEL is calibrated once, and searched at each pattern. The folder --out gets
    the plot (curve.html), the table (curve.json) and the configuration of each
    point (0.5.json, 2-4.json, structured-20.json) for `pho prune`. An interrupted
    curve continues with the same command. With --bytes nothing is searched or cut:
    it gets bytes.json alone, in a minute or two.

    \b
    Example:
      pho curve HuggingFaceTB/SmolLM2-135M --text book.txt \\
          --patterns 0.3,0.4,0.5,0.6,0.7,2:4,4:8 --preset score
    """
    if bool(ask.patterns) == bool(ask.bytes):
        both = "--patterns and --bytes are both given"
        raise InvalidInput(
            f"{both if ask.bytes else 'neither --patterns nor --bytes is given'}. Give one: "
            "--patterns 0.3,0.5,2:4 searches at each sparsity, and --bytes 80MB,110MB tells what "
            "costs least in so many bytes."
        )
    if ask.bytes:
        _by_bytes(model, ask, given, inputs, as_json)
        return
    from pho_service.pipeline.curve import curve_document, find_points, point_warnings
    from pho_service.pipeline.search import check_study_url

    began, study = time.monotonic(), ask.study
    check_study_url(study)
    point_patterns = curve_patterns(ask.patterns, given("scope"))
    specs = [point_spec(model, given, pattern) for pattern in point_patterns]
    whole = _whole(model, given, {"patterns": [str(pattern) for pattern in point_patterns]})
    folder = _folder(ask.out)
    _refuse_bundle(model)
    check_models([model], given("revision"), given("confirm/text"), given("report/text"))
    with (
        open_curve(whole, specs, study, inputs, began) as opened,
        _points(opened, study, inputs) as (points, pareto),
    ):
        curve_points = find_points(points.find, opened.requests)
    name = pareto.study_name
    work = opened.work
    document = curve_document(
        curve_points, work, seconds=work.calibration_s, study={"url": study, "name": name}
    )
    _write(folder, document)
    for warning in point_warnings(curve_points):
        say(f"Note: {warning}")
    if as_json:
        print_json({**document, "out": str(folder)})
        return
    show_points(curve_points)
    tell(f"written      {folder}: curve.html, curve.json, and a configuration for each point")
    tell(f"study        {name!r} has the Pareto front; browse it with: optuna-dashboard {study}")


def _by_bytes(model: str, ask: _CurveAsk, given: Given, inputs: Terminal, as_json: bool) -> None:
    """Tell for each number of bytes what costs least, and write that down."""
    from pho_service.cli.searched import calibrated_few
    from pho_service.host.files import write_json
    from pho_service.models.gguf_file import converter_for
    from pho_service.pipeline.bits import bits_and_cuts, budgets_table

    _refuse_bundle(model)
    sizes = sorted(parse_bytes(size, "--bytes") for size in ask.bytes)
    folder, converter = _folder(ask.out), converter_for(["q8_0"])
    check_models([model], given("revision"), None)
    work = calibrated_few(model, given, inputs, least=sizes[0])
    costs = bits_and_cuts(work, converter, progress)
    budgets = [costs.ways_to(size) for size in sizes]
    document = {
        "model": model,
        "bytes": [{"most": ways[0].bytes, "ways": [way.to_dict() for way in ways]}
                  for ways in budgets],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bytes.json", document)
    if as_json:
        print_json({**document, "out": str(folder)})
        return
    show_table(budgets_table(budgets))
    say("`pho prune MODEL --bytes 95MB` makes one of them, and measures it.")
    tell(f"written      {folder / 'bytes.json'}: every way to each number of bytes")


def point_spec(model: str, given: Given, pattern: Pattern) -> "JobSpec":
    """The document of one point's search."""
    scope = {} if pattern.free_scope is None else {"scope": pattern.free_scope}
    document = given.document({"model": model, "confirm": {"finalists": FEW_FINALISTS}})
    document.pop("scope", None)
    return given.job({**document, "pattern": str(pattern), **scope})


def _whole(model: str, given: Given, asked: dict[str, Any]) -> "JobSpec":
    """The document of all searches together, which share the minutes."""
    document = given.document({"model": model, **asked})
    return given.job({name: value for name, value in document.items() if name != "pattern"})


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A calibrated model, and the searches on it."""

    work: "Work"
    specs: "Sequence[JobSpec]"  # With their sizes
    budget: "Budget"

    @property
    def requests(self) -> "list[SearchRequest]":
        return [spec.request(0) for spec in self.specs]


@contextmanager
def open_curve(
    whole: "JobSpec", specs: "Sequence[JobSpec]", study: str, inputs: Terminal, began: float
) -> Iterator[Opened]:
    """
    Load the model of several searches, see that all patterns fit, and calibrate it. Inside, one bar
    stands for all of them.
    """
    _refuse_bundle(whole.model)
    source = calibration_source(whole.calibration)
    budget = budget_of(whole, source, study, inputs, began)
    with budget.bar():
        work = inputs.calibrated(
            budget.model,
            source,
            budget.spec.calibration.settings(),
            budget.spec.confirm,
            report=budget.spec.report,
            requests=[spec.request(0) for spec in specs],
        )
        sizes = budget.calibrated(whole, work).sizes
        sized = [spec.sized({path: sizes[path] for path in spec.free_sizes}) for spec in specs]
        yield Opened(work=work, specs=sized, budget=budget)


def _points(
    opened: Opened, study: str, inputs: Terminal, target: Target | None = None
) -> "AbstractContextManager[tuple[CurvePoints, Study]]":
    """What finds the points; the study of each keeps the document of its search."""
    from pho_service.pipeline.curve import opened_points
    from storage.studies import keep_record

    work, requests = opened.work, opened.requests
    documents = {str(spec.pruning()): spec.model_dump(mode="json") for spec in opened.specs}

    def note(point_study: "Study", request: "SearchRequest") -> None:
        keep_record(point_study, DOCUMENT, documents[str(request.pattern)])
        opened.budget.note(point_study)

    run = inputs.run(work.model)
    return opened_points(study, requests, work, run=run, target=target, note=note)


def show_points(points: "Sequence[CurvePoint]") -> None:
    from pho_service.pipeline.curve import table_of

    show_table(table_of(points), spare=("trials", "seconds", "proxy", "scope"))


def _refuse_bundle(name: str) -> None:
    """Raise InvalidInput for a bundle."""
    if is_bundle(name):
        raise InvalidInput(
            f"{name} is a bundle: each point is measured by perplexity, which needs the model. "
            "Give the model instead; its calibration is taken from the cache."
        )


def _folder(name: str) -> Path:
    """The folder for all results; see before any long work that it can be made."""
    from pho_service.host.files import check_file

    folder = Path(name).expanduser()
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(f"the folder {name} cannot be made: {there} cannot be written.")
    if folder.is_dir():
        check_file(folder / "curve.json")
    return folder


def _write(folder: Path, document: dict[str, Any]) -> None:
    """The plot, the table, and the configuration of each point."""
    from pho_service.host.files import write_json, write_text
    from pho_service.shown.page import curve_page

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "curve.json", document)
    write_text(folder / "curve.html", curve_page(document))
    for point in document["points"]:
        name = point["pattern"].replace(":", "-").removesuffix("%")
        write_json(folder / f"{name}.json", point["configuration"])


def search_within(
    models: tuple[str, ...],
    given: Given,
    target: Target,
    study: str,
    inputs: Terminal,
    began: float,
) -> "Within":
    """Find the highest sparsity that is within a target."""
    from pho_service.pipeline.curve import find_points, target_found

    if len(models) > 1:
        raise InvalidInput(
            "--within is of one model's perplexity, and several models are given. Search for each "
            "of them alone."
        )
    specs = [_spec(models[0], given, pattern) for pattern in target.patterns(given("scope"))]
    whole = _whole(models[0], given, {})
    with (
        open_curve(whole, specs, study, inputs, began) as opened,
        _points(opened, study, inputs, target) as (points, _),
    ):
        return target_found(target, find_points(points.find, opened.requests, target))


def _spec(model: str, given: Given, pattern: Pattern) -> "JobSpec":
    document = given.document({"model": model, "pattern": str(pattern)})
    del document["target"]
    return given.job(document)


def show_target(target_result: "Within") -> None:
    from pho_service.shown.tables import rise_of

    answer, limit = target_result.answer, target_result.target.limit(target_result.answer.dense)
    show_points(target_result.points)
    outside = ""
    if (point := target_result.outside) is not None:
        perplexity = number(point.perplexity)
        outside = f"; {point.pattern} is outside, with {perplexity} ({rise_of(point)})"
    tell(
        f"target       at most {number(limit)}, {target_result.target}\n"
        f"answer       {answer.pattern}, with {number(answer.perplexity)} "
        f"({rise_of(answer)}){outside}; "
        f"steps of {target_result.target.step:g} were looked at"
    )


def target_document(target_result: "Within", path: Path, study: str) -> dict[str, Any]:
    result = target_result.result
    return {
        "configuration": result.configuration.model_dump(mode="json"),
        "out": str(path),
        "study": {"url": study, "name": result.study_name},
        "target": target_result.target.model_dump(),
        "dense": target_result.answer.dense,
        "limit": target_result.target.limit(target_result.answer.dense),
        "points": [point.to_dict() for point in target_result.points],
        "warnings": result.warnings,
    }
