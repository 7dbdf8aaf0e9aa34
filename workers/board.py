"""
What optuna-dashboard shows of a job: a note, and two plots.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna

from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.report.layers import layer_cells
from pho_service.spec.candidate import Candidate
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.result import CHOSEN

if TYPE_CHECKING:
    import plotly.graph_objects as go


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


def show_result(
    study: optuna.Study,
    spec: JobSpec,
    configuration: Configuration,
    plots: Mapping[str, "go.Figure | None"],
) -> None:
    """
    Write on a study what was found, and which trial it is.

    Args:
        study: Study of one island, with the mark of :func:`~pho_service.tuning.result.mark_chosen`.
        spec: Document of the job.
        configuration: Configuration of the job.
        plots: By their ids.
    """
    _save_note(study, "\n".join([*_asked(spec), "", *_found(configuration, study)]))
    for name, figure in plots.items():
        if figure is not None:
            _save_plot(study, name, figure)


def _asked(spec: JobSpec) -> list[str]:
    models = ", ".join(f"`{name}`" for name in spec.models)
    return [
        f"**Model** {models}, **pattern** {spec.pattern}, **scope** {spec.pruning().scope}",
        "",
        f"Objective {spec.request(0).objective.label}, sampler {spec.sampler}, {spec.trials} trials"
        f"{f' in each of {spec.islands} islands' if spec.islands > 1 else ''}, seed {spec.seed}, "
        f"preset {spec.preset}",
    ]


def _found(configuration: Configuration, study: optuna.Study) -> list[str]:
    c = configuration.coefficients
    mark = study.user_attrs[CHOSEN]
    where = "" if mark["study"] == study.study_name else f" of study `{mark['study']}`"
    good = configuration.perplexities
    lines = [
        *([] if good is None else [f"**Perplexity** {good}", ""]),
        f"**Best** trial {mark['trial']}{where}, method {configuration.method}: row {c.row:.4f}, "
        f"column {c.column:.4f}, neighbourhood {c.neighbourhood:.4f}, kernel {c.kernel_size}, "
        f"exponents {c.activation_exponent:.4f} (activation) and {c.gradient_exponent:.4f} "
        "(gradient)",
        "",
        f"Steps: {configuration.steps}",
        "",
        f"{configuration.objective['name']}: {configuration.objective['value']:.6g}",
    ]
    if configuration.confirmation is None:
        return [
            *lines,
            "",
            "Not confirmed by perplexity.",
            "",
            "| baseline | objective |",
            "| --- | --- |",
            *(f"| {r.method} | {r.proxy:.6g} |" for r in configuration.baselines if r.proxy),
        ]
    return [
        *lines,
        "",
        f"Perplexity {configuration.confirmation.perplexity:.4f} on "
        f"{configuration.confirmation.tokens} tokens",
        "",
        "| candidate | trial | objective | divergence | perplexity |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {r.method} | {r.trial} | {r.proxy:.6g} | {_cell(r.divergence)} "
            f"| {_cell(r.perplexity)} |"
            for r in configuration.candidates
            if r.proxy is not None
        ),
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def confirmed_plot(
    configuration: Configuration, measured: Sequence[tuple[float, RatedCandidate]]
) -> "go.Figure | None":
    """The objective of the confirmed candidates against their perplexity; None without any."""
    if not measured:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    for title, symbol, chosen in (
        ("found", "circle", [m for m in measured if m[1].candidate.method == "crepe"]),
        ("baseline", "diamond", [m for m in measured if m[1].candidate.method != "crepe"]),
    ):
        figure.add_scatter(
            x=[rated.value for _, rated in chosen],
            y=[perplexity for perplexity, _ in chosen],
            text=[f"{rated.candidate.method}, trial {rated.number}" for _, rated in chosen],
            mode="markers",
            marker={"symbol": symbol, "size": 10},
            name=title,
        )
    figure.update_layout(
        title="Proxy against perplexity of the confirmed candidates",
        xaxis={"title": configuration.objective["name"], "type": "log"},
        yaxis={"title": "perplexity", "type": "log"},
    )
    return figure


def of_layers(
    bundles: Mapping[str, ProxyBundle], candidate: Candidate, device: str
) -> tuple[dict[str, "go.Figure | None"], dict[str, list[list[Any]]]]:
    """
    What a candidate does to each linear, by the proxy.

    Args:
        bundles: Bundles of each model, by its name.
        candidate: What is pruned with.
        device: For the proxy.

    Returns:
        A plot of the errors of each model, by its id; and the cells of each model's linears.
    """
    plots: dict[str, go.Figure | None] = {}
    layers = {}
    for number, (name, bundle) in enumerate(bundles.items()):
        evaluator = ProxyEvaluator(bundle, device)
        errors = evaluator.layer_errors(candidate)
        of_model = name if len(bundles) > 1 else ""
        plots[f"errors-{number}" if number else "errors"] = error_plot(errors, of_model)
        cells = layer_cells(errors, evaluator.layer_sparsities(candidate))
        layers[name] = [cell.to_list() for cell in cells]
    return plots, layers


def error_plot(errors: Mapping[str, float], model: str = "") -> "go.Figure":
    """The relative error of each linear, by kind and block; of ``model``, if there are several."""
    import plotly.graph_objects as go

    figure = go.Figure()
    kinds: dict[str, list[tuple[str, float]]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append((name, error))
    for kind, layers in kinds.items():
        figure.add_scatter(
            x=list(range(len(layers))),
            y=[error for _, error in layers],
            text=[name for name, _ in layers],
            mode="lines+markers",
            name=kind,
        )
    figure.update_layout(
        title="Error of each layer with the best configuration" + (f", {model}" if model else ""),
        xaxis={"title": "block"},
        yaxis={"title": "error / energy of the output", "type": "log"},
    )
    return figure


def _save_note(study: optuna.Study, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import save_note

        save_note(study, text)


def _save_plot(study: optuna.Study, name: str, figure: "go.Figure") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import save_plotly_graph_object

        save_plotly_graph_object(study, figure, graph_object_id=name)
