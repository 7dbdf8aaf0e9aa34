"""
`pho search --within`: the highest sparsity that is still good enough.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.curve import open_curve, opened_points, show_points
from pho_service.cli.document import Given
from pho_service.cli.options import Terminal, all_options
from pho_service.cli.terminal import tell
from pho_service.errors import InvalidInput
from pho_service.spec.curve import HIGHEST, LOWEST, STEP, Target, parse_rise

if TYPE_CHECKING:
    from pho_service.pipeline.target import TargetFound
    from pho_service.spec.job import JobSpec
    from pho_service.tuning.request import SearchRequest

target_options = all_options(
    click.option(
        "--within",
        help="Instead of --pattern: find the highest sparsity whose perplexity is at most so much "
        "above the dense model's, such as 5%. Several sparsities are searched.",
    ),
    click.option(
        "--step",
        type=float,
        help=f"With --within: distance between possible answers, as a sparsity.  [default: {STEP}]",
    ),
    click.option(
        "--lowest",
        type=float,
        help=f"With --within: the lowest sparsity that may be the answer.  [default: {LOWEST}]",
    ),
    click.option(
        "--highest",
        type=float,
        help=f"With --within: the highest sparsity that may be the answer.  [default: {HIGHEST}]",
    ),
)


def given_target(within: str | None, given: Given, bounds: Mapping[str, Any]) -> Target | None:
    """
    The target of a search; None if it has a pattern instead.

    Args:
        within: The rise of the perplexity, as it was written.
        given: The options of the document.
        bounds: What --step, --lowest and --highest say.

    Raises:
        InvalidInput: Neither or both are given, or a value breaks a rule.
    """
    said = {name: value for name, value in bounds.items() if value is not None}
    if within is None:
        if said:
            raise InvalidInput(
                f"--{', --'.join(said)} is for --within alone. Leave it out, or give --within."
            )
        if "pattern" not in given.said:
            raise InvalidInput(
                "there is neither a pattern nor a target. Give --pattern, such as 0.5 or 2:4, or "
                "--within, such as 5%, for the highest sparsity that is still good enough."
            )
        return None
    if "pattern" in given.said:
        raise InvalidInput(
            f"--pattern {given('pattern')} says how sparse the model is to be, and --within "
            f"{within} asks for it. Give one of them."
        )
    return Target.of(perplexity_rise=parse_rise(within, "--within"), **said)


def search_within(
    models: tuple[str, ...],
    given: Given,
    target: Target,
    study: str,
    inputs: Terminal,
) -> "TargetFound":
    """
    Find the highest sparsity that is within a target.

    Raises:
        InvalidInput: There are several models, or nothing can be confirmed.
        TargetMissed: There is none.
    """
    from pho_service.pipeline.target import target_job

    if len(models) > 1:
        raise InvalidInput(
            "--within is of one model's perplexity, and several models are given. Search for each "
            "of them alone."
        )
    refused = [
        given.names[path]
        for path in given.said
        if path == "confirm" or path.startswith("warm_start/")
    ]
    if refused:
        raise InvalidInput(
            f"{', '.join(refused)} cannot be used with --within: each sparsity is confirmed by "
            "perplexity, in a search of its own. Leave it out."
        )
    specs = {each: _spec(models[0], given, each) for each in target.sparsities}
    requests: dict[float, SearchRequest] = {s: spec.request(0) for s, spec in specs.items()}
    of_all = [*requests.values()]
    opened = open_curve(specs[target.sparsities[0]], given, of_all, inputs)
    with opened_points(opened, study, [*specs.values()], inputs) as (points, _):
        return target_job(points, target, requests.__getitem__)


def _spec(model: str, given: Given, sparsity: float) -> "JobSpec":
    return given.job(given.document({"model": model, "pattern": str(sparsity)}))


def show_target(found: "TargetFound") -> None:
    """The answer and all points."""
    answer, limit = found.answer, found.target.limit(found.answer.dense)
    show_points(found.points)
    told = "" if found.outside is None else (
        f"; {found.outside.pattern} is outside, with {found.outside.perplexity:.4f}"
    )  # fmt: skip
    tell(
        f"target       at most {limit:.4f}, {found.target}\n"
        f"answer       {answer.pattern}, with {answer.perplexity:.4f} ({answer.rise:+.1%}){told}; "
        f"steps of {found.target.step:g} were looked at"
    )


def target_document(found: "TargetFound", path: Path, study: str) -> dict[str, Any]:
    """The same as JSON values."""
    result = found.result
    return {
        "configuration": result.configuration.model_dump(mode="json"),
        "out": str(path),
        "study": {"url": study, "name": result.study_name},
        "target": found.target.model_dump(),
        "dense": found.answer.dense,
        "limit": found.target.limit(found.answer.dense),
        "points": [each.to_dict() for each in found.points],
        "warnings": result.warnings,
    }
