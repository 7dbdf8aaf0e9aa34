"""`pho search`."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pho_service.cli import curve as within_target
from pho_service.cli import library
from pho_service.cli.document import DOCUMENT, WARM, DocumentCommand, Given, given_target
from pho_service.cli.minutes import Budget, budget_of
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    is_bundle,
    json_verb,
    out_file,
)
from pho_service.cli.terminal import print_json, say, show_table
from pho_service.errors import InvalidInput
from pho_service.pipeline.work import Work
from pho_service.spec.verbs import Studied

if TYPE_CHECKING:
    from pho_service.pipeline.curve import Within
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.job import JobSpec
    from pho_service.tuning.result import SearchResult


@dataclass(frozen=True, kw_only=True)
class _SearchAsk(Studied):
    """
    Where a search is kept, and what it gives.

    Attributes:
        out: The configuration.
    """

    out: str = "config.json"


@click.command(
    cls=DocumentCommand, fields=("",), needed="--within", of_a_service=False, ask=_SearchAsk
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@device_options
@json_verb
def search(
    models: tuple[str, ...], given: Given, ask: _SearchAsk, inputs: Terminal, as_json: bool
) -> None:
    """
    Find the best coefficients for a model, and confirm them by perplexity.

    MODEL is a hub id, a local folder, a .gguf file, or a bundle of `pho
    calibrate` (.safetensors), which needs no text and is not confirmed. An
    interrupted search continues with the same command.

    With several models the search is for coefficients that are good on all of
    them. With --within instead of --pattern it finds the highest sparsity that is
    still good enough.

    \b
    Example:
      pho search HuggingFaceTB/SmolLM2-135M --pattern 0.5 --scope global \\
          --text book.txt --trials 200 --study sqlite:///study.db
      pho search HuggingFaceTB/SmolLM2-135M --within 5% --text book.txt
    """
    from pho_service.pipeline.search import check_study_url, opened_study, search_job
    from storage.studies import keep_record

    began = time.monotonic()
    path, study = out_file(ask.out), ask.study
    check_study_url(study)
    texts = ("confirm/text", "report/text") if len(models) == 1 else ()  # several take none
    check_models(models, given("revision"), *map(given, texts))
    target = given_target(given)
    if target is not None:
        answer = within_target.search_within(models, given, target, study, inputs, began)
        _finish(answer.result, path, study, as_json, answer)
        return
    bundles = _bundles(models, given)
    spec = _asked(models, given, bundles)
    warm_start = tuple(library.of_files(given, spec))
    budget = _budget(spec, study, bundles, inputs, began)
    with budget.bar():
        work = _opened(budget, spec, bundles, inputs)
        spec = budget.spec
        request = replace(spec.request(0), warm_start=warm_start)
        about = {} if spec.more_models else work.bundle.provenance.get("model", {})
        candidates = library.of_libraries(given, request.pattern, about)
        request = replace(request, warm_start=(*request.warm_start, *candidates))
        with opened_study(study, request, work) as record:
            keep_record(record, DOCUMENT, spec.model_dump(mode="json"))
            budget.note(record)
            keep_record(record, WARM, given("warm_start/found") or [])
            result = search_job(request, work, study=record, run=budget.run(inputs, work, record))
    _finish(result, path, study, as_json)


def _bundles(models: tuple[str, ...], given: Given) -> "dict[str, ProxyBundle]":
    names = [name for name in models if is_bundle(name)]
    if not names:
        return {}
    texts = {"calibration/text", "calibration/dataset", "confirm/text", "report/text"}
    if len(models) == 1 and texts & {*given.said}:
        raise InvalidInput(
            f"{names[0]} is a bundle: it needs no text, and no perplexity can be measured without "
            "the model. Leave the text out, or give the model instead of the bundle."
        )
    from pho_service.models.bundle_file import read_bundle

    return {name: read_bundle(Path(name)) for name in names}


def _asked(
    models: tuple[str, ...], given: Given, bundles: "Mapping[str, ProxyBundle]"
) -> "JobSpec":
    """The document that `pho submit` would send, with the kernel sizes that bundles have."""
    document = given.document({"model": models[0], "more_models": [*models[1:]]})
    if bundles:
        if "minutes" in given.said:
            raise InvalidInput(
                f"{given.names['minutes']} chooses how a model is calibrated, and "
                f"{next(iter(bundles))} is a bundle, which is made already. Leave it out."
            )
        document["minutes"] = None
        sizes = [{*bundle.kernel_sizes} for bundle in bundles.values()]
        if len(bundles) < len(models):
            sizes.append({*given.calibration().kernel_sizes})
        common = sorted(set.intersection(*sizes))
        if common:  # if not, the search says of which bundles
            document.setdefault("calibration", {})["kernel_sizes"] = common
    return given.job(document)


def _budget(
    asked: "JobSpec",
    study: str,
    bundles: "Mapping[str, ProxyBundle]",
    inputs: Terminal,
    began: float,
) -> Budget:
    """What a search chooses for its minutes; there is nothing to choose for bundles alone."""
    if asked.models == [*bundles] or (asked.more_models and asked.minutes is None):
        return Budget(spec=asked, model=asked.model)
    return budget_of(asked, calibration_source(asked.calibration), study, inputs, began)


def _opened(
    budget: Budget, asked: "JobSpec", bundles: "Mapping[str, ProxyBundle]", inputs: Terminal
) -> Work:
    """The bundles of a search, made of the models that are none, with its only model, if it has."""
    if asked.models == [*bundles]:
        return Work(bundles={**bundles})
    all_bundles, source = {**bundles}, calibration_source(asked.calibration)
    spec, alone = budget.spec, not asked.more_models
    settings = spec.calibration.settings()
    for name in spec.models:
        if name not in bundles:
            confirm, requests = spec.confirm if alone else None, [spec.request(0)]
            model, budget.model = budget.model if name == spec.model else name, name
            work = inputs.calibrated(
                model, source, settings, confirm, report=spec.report, requests=requests
            )
            del model
            if alone:
                budget.calibrated(asked, work)
                return work
            all_bundles[name] = work.bundle
            del work  # two may not fit
    return Work(bundles={name: all_bundles[name] for name in spec.models})


def _finish(
    result: "SearchResult",
    path: Path,
    study: str,
    as_json: bool,
    target: "Within | None" = None,
) -> None:
    from pho_service.shown.tables import continuations_table
    from pho_service.spec.configuration import write_configuration

    write_configuration(result.configuration, path)
    for warning in result.warnings:
        say(f"Note: {warning}")
    if as_json and target is not None:
        print_json(within_target.target_document(target, path, study))
        return
    if as_json:
        print_json(
            {
                "configuration": result.configuration.model_dump(mode="json"),
                "out": str(path),
                "study": {"url": study, "name": result.study_name},
                "rated_before": result.rated_before,
                "validation": result.validation
                and {name: asdict(quality) for name, quality in result.validation.items()},
                "warnings": result.warnings,
            }
        )
        return
    if target is not None:
        within_target.show_target(target)
    configuration = result.configuration
    if configuration.continuations:
        show_table(continuations_table(configuration.continuations))
        click.echo()
    click.echo(describe(result, path, study))


def describe(result: "SearchResult", path: Path, study: str) -> str:
    """What was found, in a few lines."""
    from pho_service.shown.tables import configuration_rows

    configuration = result.configuration
    good = configuration.headline
    lines = [
        *([] if good is None else [f"result       {good.sentence}"]),
        *(f"{name:<12} {value}" for name, value in configuration_rows(configuration)),
    ]
    if result.validation is not None:
        quality = result.validation[configuration.objective["name"]]
        low, high = quality.spearman_interval
        lines.append(
            f"proxy        rank correlation with perplexity {quality.spearman:+.2f} "
            f"({low:+.2f} to {high:+.2f})"
        )
    if result.rated_before:
        lines.append(
            f"ratings      {result.rated_before} were taken from a study that rated the same "
            "candidates"
        )
    if configuration.warm_start:
        lines.append(f"warm start   {configuration.warm_start}; the result is trial {result.trial}")
    lines += [
        f"written      {path}",
        f"study        {result.study_name!r}; browse it with: optuna-dashboard {study}",
    ]
    return "\n".join(lines)
