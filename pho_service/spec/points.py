"""
Jobs with several patterns: which they are, and what such a job cannot ask for.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pho_service.spec.curve import CURVE_FINALISTS, Target, curve_patterns
from pho_service.spec.pattern import Pattern

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec


def one_of(pattern: str | None, patterns: Sequence[str] | None, target: Target | None) -> None:
    """
    Raises:
        ValueError: Not exactly one of them is given.
    """
    given = {"pattern": pattern, "patterns": patterns, "target": target}
    said = [name for name, value in given.items() if value is not None]
    if not said:
        raise ValueError(
            "there is none: give pattern, such as 0.5 or 2:4; patterns, for several; or target, "
            "for the highest sparsity that is still good enough"
        )
    if len(said) > 1:
        raise ValueError(
            f"{' and '.join(said)} are given, and each says how sparse the model is to be: give "
            "one of them"
        )


def asked_patterns(given: Mapping[str, Any]) -> list[Pattern]:
    """
    What may be pruned, by sparsity.

    Args:
        given: Fields of a job, checked: ``pattern``, ``patterns``, ``target`` and ``scope``, which
            is that of shares.
    """
    target: Target | None = given["target"]
    if target is not None:
        return [Pattern.parse(str(each), given["scope"]) for each in target.sparsities]
    if given["patterns"] is not None:
        return curve_patterns(given["patterns"], given["scope"])
    return [Pattern.parse(given["pattern"], given["scope"])]


def first_of_kinds(patterns: Sequence[Pattern]) -> list[Pattern]:
    """The first share and the first N:M: what a preset means differs between these two alone."""
    kinds: dict[bool, Pattern] = {}
    for each in patterns:
        kinds.setdefault(bool(each.group), each)
    return [*kinds.values()]


def curve_confirmation(confirm: Any) -> Any:
    """How each of several patterns is confirmed, with its own default."""
    return {"candidates": CURVE_FINALISTS, **confirm} if isinstance(confirm, dict) else confirm


def check_several(spec: "JobSpec") -> None:
    """
    See that a job with several patterns asks for nothing that is of one.

    Raises:
        ValueError: It does; names the field and the way out.
    """
    what = "a target" if spec.patterns is None else "several patterns"
    refused = {
        "more_models": (bool(spec.more_models), "each pattern is confirmed on one model's text"),
        "confirm: null": (spec.confirm is None, "they are compared by perplexity"),
        "islands": (spec.islands > 1, "each pattern has one study"),
        "warm_start": (spec.warm_start is not None, "what was found elsewhere is of one pattern"),
        "timeout_s": (spec.timeout_s is not None, "each pattern is searched to its end"),
        "prune": (
            spec.prune and spec.patterns is not None,
            "it must be said which is pruned, when they are measured: :prune with its pattern",
        ),
        "tasks": (
            spec.tasks is not None and spec.patterns is not None,
            "one pruned model is measured on them: submit the chosen pattern alone, or measure "
            "its folder with `pho evaluate --tasks`",
        ),
    }
    for field, (wrong, why) in refused.items():
        if wrong:
            raise ValueError(f"{field} cannot be asked for with {what}: {why}. Leave it out")
