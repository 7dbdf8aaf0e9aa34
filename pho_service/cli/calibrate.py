"""
`pho calibrate` and `pho validate`: a proxy bundle, and how well it ranks.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    json_verb,
    out_file,
    plot_file,
    plot_validation,
)
from pho_service.cli.terminal import print_json, print_table, progress, say
from pho_service.spec.document import number
from pho_service.spec.objective import Objective

if TYPE_CHECKING:
    from pho_service.pipeline.confirmation import Validation


@click.command(
    cls=DocumentCommand,
    fields=("calibration", "revision", "dtype", "stream"),
    names={"calibration/seed": "--seed"},
)
@click.argument("model")
@click.option("--out", required=True, type=click.Path(), help="The bundle: a .safetensors file.")
@device_options
@json_verb
def calibrate(model: str, given: Given, out: str, inputs: Terminal, as_json: bool) -> None:
    """
    Run MODEL once over a text and write its proxy bundle.

    A search from the bundle needs neither the model nor the text. Without --text
    or --dataset, C4 is used.

    \b
    Example:
      pho calibrate HuggingFaceTB/SmolLM2-135M --text book.txt --out smollm2.safetensors
    """
    from pho_service.errors import InvalidInput
    from pho_service.models.bundle_file import write_bundle
    from pho_service.models.calibration import calibrate as make_bundle

    path = out_file(out)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"--out {out} must end in .safetensors: a bundle is such a file.")
    check_models([model], given("revision"))
    calibration = given.calibration()
    settings, source = calibration.settings(), calibration_source(calibration)
    loaded = inputs.model(model)
    text = inputs.windows(loaded, source, settings)
    bundle = make_bundle(loaded, text, settings, progress)
    write_bundle(bundle, path)
    size = path.expanduser().stat().st_size
    if as_json:
        print_json({"bundle": str(path), "bytes": size, **bundle.provenance})
        return
    click.echo(
        f"{path}: {size / 2**20:.1f} MB, {len(bundle.layers)} linears, "
        f"{len(text.calibration)} windows of {settings.context_length} tokens"
    )


@click.command(
    cls=DocumentCommand,
    fields=(
        "pattern", "scope", "preset", "steps/linears", "search_space", "validation", "confirm/text",
        "confirm/windows", "calibration", "revision", "dtype", "stream",
    ),
    names={"validation/candidates": "--candidates", "validation/seed": "--seed"},
    required=("pattern",),
)  # fmt: skip
@click.argument("model")
@click.option("--plot", type=click.Path(), help="Write scatter plots to this HTML page.")
@device_options
@json_verb
def validate(
    model: str,
    given: Given,
    plot: str | None,
    inputs: Terminal,
    as_json: bool,
) -> None:
    """
    Measure how well the proxies rank candidates on MODEL.

    Random candidates of the search space, that of --preset, are rated by every
    proxy and by perplexity. Intervals are 95 %, by bootstrap.

    \b
    Example:
      pho validate HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt \\
          --candidates 40 --plot proxy.html
    """
    from pho_service.pipeline.confirmation import validate_job

    plot_path = plot_file(plot) if plot else None
    spec = given.job(given.document({"model": model, "validation": {}}))
    confirm, validation, parsed = spec.confirm, spec.validation, spec.pruning()
    assert confirm is not None  # the document says so
    assert validation is not None
    check_models([model], given("revision"), confirm.text)
    settings, source = spec.calibration.settings(), calibration_source(spec.calibration)
    request = spec.request(0)
    work = inputs.calibrated(model, source, settings, confirm, requests=[request])
    result = validate_job(
        work,
        spec.plan(0),  # of the preset, with its allocation
        validation,
        run=inputs.run(work.model),
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
                        "allocation": candidate.steps.allocation.to_dict(),
                        "perplexity": result.perplexity[i],
                        "proxies": {name: values[i] for name, values in result.proxies.items()},
                    }
                    for i, candidate in enumerate(result.candidates)
                ],
                "text": work.text.to_dict(),
                "model": work.model.to_dict(),
                "seed": validation.seed,
                "calibration": work.bundle.provenance,
                "warning": _warning(result),
            }
        )
    else:
        _show(result, f"{Path(work.model.name).name} at {parsed}, scope {parsed.scope.value}")
    warning = _warning(result)
    if warning:
        say(warning)


def _warning(result: "Validation") -> str | None:
    from pho_service.tuning.validation import verdict

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
        f"{number(min(result.perplexity))} to {number(max(result.perplexity))}",
        spare=("better half", "Kendall (95 %)"),
    )
