"""
`pho search --within`: the highest sparsity that is still good enough.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.cli.curve import open_curve, opened_points, show_points
from pho_service.cli.document import Given
from pho_service.cli.options import Terminal
from pho_service.cli.terminal import tell
from pho_service.errors import InvalidInput
from pho_service.spec.curve import Target
from pho_service.spec.job_fields import within
from pho_service.spec.numbers import number, percent

if TYPE_CHECKING:
    from pho_service.pipeline.target import TargetFound
    from pho_service.spec.job import JobSpec
    from pho_service.tuning.request import SearchRequest


def given_target(given: Given) -> Target | None:
    """
    The target of a search; None if it has a pattern instead.

    Raises:
        InvalidInput: Neither or both are given, or a value breaks a rule.
    """
    said = [path for path in given.said if within(path, "target")]
    if "target/perplexity_rise" not in said:
        if said:
            raise InvalidInput(
                f"{', '.join(given.names[path] for path in said)} is for --within alone. Leave it "
                "out, or give --within."
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
            f"{given('target/perplexity_rise')} asks for it. Give one of them."
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
    return Target.of(**given.document()["target"])


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
    specs = {each: _spec(models[0], given, each) for each in target.sparsities}
    requests: dict[float, SearchRequest] = {s: spec.request(0) for s, spec in specs.items()}
    of_all = [*requests.values()]
    opened = open_curve(specs[target.sparsities[0]], given, of_all, inputs)
    with opened_points(opened, study, [*specs.values()], inputs) as (points, _):
        return target_job(points, target, requests.__getitem__)


def _spec(model: str, given: Given, sparsity: float) -> "JobSpec":
    document = given.document({"model": model, "pattern": str(sparsity)})
    del document["target"]
    return given.job(document)


def show_target(found: "TargetFound") -> None:
    """The answer and all points."""
    answer, limit = found.answer, found.target.limit(found.answer.dense)
    show_points(found.points)
    told = "" if found.outside is None else (
        f"; {found.outside.pattern} is outside, with {number(found.outside.perplexity)}"
    )  # fmt: skip
    tell(
        f"target       at most {number(limit)}, {found.target}\n"
        f"answer       {answer.pattern}, with {number(answer.perplexity)} "
        f"({percent(answer.rise, signed=True)}){told}; "
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
