"""`pho validate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.options import (
    at_least,
    calibration_options,
    calibration_seed_option,
    calibration_settings,
    confirm_text,
    json_option,
    model_options,
    open_bundle,
    open_model,
    pattern_options,
    read_calibration_text,
    space_option,
    text_source,
)
from pho_service.cli.plots import plot_file, plot_validation
from pho_service.cli.terminal import print_json, print_table, progress, say, verb
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern

if TYPE_CHECKING:
    from pho_service.pipeline.validate import Validation


@click.command()
@click.argument("model")
@pattern_options
@click.option("--candidates", "count", type=int, default=40, show_default=True, help="At least 8.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the candidates.")
@space_option
@click.option(
    "--confirm-text",
    "confirm_path",
    type=click.Path(),
    help="Text for the perplexities.  [default: windows of --text that calibration left]",
)
@click.option(
    "--confirm-windows", type=int, default=16, show_default=True, help="Windows of that text."
)
@click.option("--plot", type=click.Path(), help="Write scatter plots to this HTML page.")
@calibration_options
@calibration_seed_option
@model_options
@json_option
@verb
def validate(
    model: str,
    pattern: str,
    scope: str | None,
    count: int,
    seed: int,
    bounds: tuple[str, ...],
    confirm_path: str | None,
    confirm_windows: int,
    plot: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Measure how well the proxies rank candidates on MODEL.

    Random candidates of the search space are rated by every proxy and by
    perplexity. Spearman and Kendall are rank correlations; the regret is how
    much worse than the best of all the best perplexity among the proxy's top
    candidates is. Intervals are 95 %, by bootstrap.

    \b
    Example:
      pho validate HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt \\
          --candidates 40 --plot proxy.html
    """
    from pho_service.errors import InvalidInput, TextError
    from pho_service.pipeline.validate import validate_job
    from pho_service.spec.space import parse_bounds

    if count < 8:
        raise InvalidInput(f"--candidates {count} is too few to rank. Give at least 8.")
    at_least(1, confirm_windows=confirm_windows)
    at_least(0, seed=seed)
    plot_path = plot_file(plot) if plot else None
    parsed = Pattern.parse(pattern, scope)
    box = parse_bounds(bounds)
    settings = calibration_settings(options)
    source = text_source(options)
    loaded = open_model(model, options)
    text = read_calibration_text(loaded, source, settings)
    rating_text = confirm_text(loaded, text, confirm_path, settings, confirm_windows)
    if rating_text is None:
        raise TextError("there is no text to measure perplexity on. Give --confirm-text.")
    bundle = open_bundle(loaded, text, settings)
    result = validate_job(
        loaded,
        bundle,
        rating_text,
        parsed,
        bounds=box,
        count=count,
        seed=seed,
        calibration=text.calibration,
        device=str(loaded.device),
        progress=progress,
    )
    if plot_path:
        plot_validation(result, plot_path, f"{Path(model).name} at {parsed}")
        say(f"Plot: {plot_path}")
    if as_json:
        print_json(
            {
                "pattern": str(parsed),
                "scope": parsed.scope.value,
                "proxies": {name: asdict(q) for name, q in result.qualities.items()},
                "candidates": [
                    {
                        "coefficients": candidate.coefficients.to_dict(),
                        "perplexity": result.perplexity[i],
                        "proxies": {name: values[i] for name, values in result.proxies.items()},
                    }
                    for i, candidate in enumerate(result.candidates)
                ],
                "text": rating_text.to_dict(),
                "model": loaded.to_dict(),
                "seed": seed,
                "calibration": bundle.provenance,
                "warning": _warning(result),
            }
        )
    else:
        _show(result, f"{Path(loaded.name).name} at {parsed}, scope {parsed.scope.value}")
    warning = _warning(result)
    if warning:
        say(warning)


def _warning(result: "Validation") -> str | None:
    from pho_service.search.validation import verdict

    name = Objective().label
    return verdict(name, result.qualities[name])


def _show(result: "Validation", title: str) -> None:
    def with_interval(value: float, interval: tuple[float, float]) -> str:
        return f"{value:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"

    top_k = next(iter(result.qualities.values())).top_k
    print_table(
        title,
        ("proxy", "Spearman (95 %)", "better half", "Kendall (95 %)", f"top-{top_k} regret (95 %)"),
        [
            (
                name,
                with_interval(q.spearman, q.spearman_interval),
                f"{q.spearman_better_half:+.2f}",
                with_interval(q.kendall, q.kendall_interval),
                f"{q.regret:.1%} ({q.regret_interval[0]:.1%} to {q.regret_interval[1]:.1%})",
            )
            for name, q in result.qualities.items()
        ],
        caption=f"{len(result.candidates)} random candidates, perplexity "
        f"{min(result.perplexity):.2f} to {max(result.perplexity):.2f}",
    )
