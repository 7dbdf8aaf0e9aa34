"""
What optuna-dashboard shows of a job: a note on its study.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import optuna

from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.shown.layers import layer_cells
from pho_service.shown.parts import pairs_table
from pho_service.shown.report import Report
from pho_service.shown.tables import configuration_rows, results_table, verdict_table
from pho_service.spec.candidate import Candidate
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.tuning.result import CHOSEN


def show_search(study: optuna.Study, spec: JobSpec) -> None:
    """Write on a study what is searched for."""
    _save_note(study, "\n".join([*_asked(spec), "", "*Searching.*"]))


def show_curve(study: optuna.Study, spec: JobSpec) -> None:
    """Write on the study of all patterns of a job what it has."""
    patterns = ", ".join(map(str, spec.points))
    asked = f"**patterns** {patterns}" if spec.target is None else f"**target** {spec.target}"
    lines = [
        f"**Model** `{spec.model}`, {asked}",
        "",
        f"Sparsity and {spec.request(0).objective.label} of the trials of all patterns; those of a "
        "pattern are added when its search is confirmed. Each has its pattern, its study and its "
        "number there as attributes.",
    ]
    _save_note(study, "\n".join(lines))


def show_result(study: optuna.Study, spec: JobSpec, configuration: Configuration) -> None:
    """Write on a study, which has the mark of its result, what was found, and which trial it is."""
    mark = study.user_attrs[CHOSEN]
    where = "" if mark["study"] == study.study_name else f" of study `{mark['study']}`"
    good = configuration.perplexities
    tables = [
        None if good is None else verdict_table(good),
        pairs_table("The configuration", "part", configuration_rows(configuration)),
        results_table(Report.of(configuration)),
    ]
    lines = [*_asked(spec), "", f"**Best** trial {mark['trial']}{where}"]
    lines += [f"\n{table.markdown()}" for table in tables if table is not None]
    _save_note(study, "\n".join(lines))


def _asked(spec: JobSpec) -> list[str]:
    models = ", ".join(f"`{name}`" for name in spec.models)
    return [
        f"**Model** {models}, **pattern** {spec.pattern}, **scope** {spec.pruning().scope}",
        "",
        f"Objective {spec.request(0).objective.label}, sampler {spec.sampler}, {spec.trials} trials"
        f"{f' in each of {spec.islands} islands' if spec.islands > 1 else ''}, seed {spec.seed}, "
        f"preset {spec.preset}",
    ]


def of_layers(
    bundles: Mapping[str, ProxyBundle], candidate: Candidate, device: str
) -> dict[str, list[list[Any]]]:
    """What a candidate does to each linear by the proxy: the cells of each model."""
    layers = {}
    for name, bundle in bundles.items():
        evaluator = ProxyEvaluator(bundle, device)
        errors = evaluator.layer_errors(candidate)
        cells = layer_cells(errors, evaluator.layer_sparsities(candidate))
        layers[name] = [cell.to_list() for cell in cells]
    return layers


def _save_note(study: optuna.Study, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import save_note

        save_note(study, text)
