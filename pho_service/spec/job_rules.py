"""
Rules of the fields of a job's document, each told of the fields before its own.

Each takes a value and what pydantic knows of the other fields, gives the value back, and refuses by
a ValueError.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo

from pho_service.spec.curve import curve_patterns
from pho_service.spec.fields import ConfirmSpec, ValidationSpec
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.points import asked_patterns, first_of_kinds, one_of
from pho_service.spec.presets import Preset
from pho_service.spec.space import SearchSpaceSpec
from pho_service.spec.tasks import task_names
from pho_service.tuning.request import SearchRequest

_PATTERN = {"patterns", "target", "pattern", "scope"}  # what says which patterns are searched


def each_model_once(value: list[str], info: ValidationInfo) -> list[str]:
    """No model is given twice."""
    names = [info.data.get("model"), *value]
    twice = [name for name in value if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return value


def of_one_model(value: str | None, info: ValidationInfo) -> str | None:
    """A revision is of one model."""
    if value is not None and info.data.get("more_models"):
        raise ValueError("a revision is of one model: leave it out where there are several")
    return value


def of_one_text(value: ConfirmSpec | None, info: ValidationInfo) -> ConfirmSpec | None:
    """Several models have no text that all of them are measured on."""
    if value is not None and info.data.get("more_models"):
        raise ValueError(
            "several models are searched by the proxy alone: leave it out, and measure the "
            "result on each of them afterwards, with `pho transfer` or :transfer"
        )
    return value


def are_patterns(value: list[str] | None) -> list[str] | None:
    """Each is a pattern, and none is given twice."""
    if value is not None:
        curve_patterns(value, None)
    return value


def is_pattern(value: str | None, info: ValidationInfo) -> str | None:
    """It is a pattern, or something else says how sparse the model is to be."""
    if value is not None:
        Pattern.parse(value)
    if {"patterns", "target"} <= info.data.keys():
        one_of(value, info.data["patterns"], info.data["target"])
    return value


def fits_pattern(value: str | None, info: ValidationInfo) -> str | None:
    """The scope is one of the pattern."""
    if value is not None and info.data.get("pattern") is not None:
        Pattern.parse(info.data["pattern"], value)
    return value


def can_be_measured(value: Any, info: ValidationInfo) -> Any:
    """Perplexities need a text."""
    needed = isinstance(value, ValidationSpec) or (
        isinstance(value, Objective) and value.name == "perplexity"
    )
    if needed and info.data.get("confirm", 0) is None:
        raise ValueError("perplexities need a text: confirm must not be null")
    if isinstance(value, Objective):
        more = info.data.get("more_models") or []
        if value.over is not None and not more:
            raise ValueError(f"over={value.over} is for several models: give more_models")
        value.over_models(1 + len(more))  # raises with the rule
    return value


def was_calibrated(value: SearchSpaceSpec, info: ValidationInfo) -> SearchSpaceSpec:
    """Only kernel sizes that are calibrated can be searched."""
    calibration = info.data.get("calibration")
    sizes = value.given().get("kernel_sizes", ())
    missing = set(sizes) - set(calibration.kernel_sizes if calibration else ())
    if calibration is not None and missing:
        raise ValueError(
            f"kernel_sizes has {min(missing)}, which is not in calibration.kernel_sizes: "
            f"{', '.join(map(str, calibration.kernel_sizes))}. Add it there"
        )
    return value


def more_than_baselines(value: int, info: ValidationInfo) -> int:
    """The plan of the search is one."""
    needed = {"preset", "steps", "calibration", "search_space"}
    if _PATTERN | needed <= info.data.keys():
        given = info.data
        for pattern in first_of_kinds(asked_patterns(given)):
            preset = preset_of(given, pattern)
            request = SearchRequest(
                pattern=pattern, trials=value, steps=preset.steps, bounds=preset.bounds
            )
            request.plan(tuple(given["calibration"].kernel_sizes))
    return value


def has_one_model(value: Any, info: ValidationInfo) -> Any:
    """One model is pruned, and measured on tasks."""
    if value and info.data.get("more_models"):
        what = "pruned" if info.field_name == "prune" else "measured on tasks"
        raise ValueError(
            f"one model is {what}, and this job searches for several: prune each of them with "
            "the result, `pho prune MODEL --config`"
            + (", and measure it, `pho evaluate FOLDER --tasks`" * (info.field_name == "tasks"))
        )
    return value


def each_task_once(value: list[str] | None) -> list[str] | None:
    """No task is named twice."""
    return None if value is None else [*task_names(value)]


def of_tasks(value: Any, info: ValidationInfo) -> Any:
    """What says how tasks are measured needs some."""
    if value is not None and info.data.get("tasks", ()) is None:
        raise ValueError("it is of tasks, but none is named: give tasks, or leave it out")
    return value


def differ(value: int, info: ValidationInfo) -> int:
    """Islands are not all the same."""
    if value > 1 and info.data.get("sampler") == "hill-climb":
        raise ValueError(
            "a hill climb draws nothing at random, so all islands would be the same: give 1"
        )
    return value


def in_memory(value: int, info: ValidationInfo) -> int:
    """A streamed model is not corrected."""
    if value and info.data.get("stream"):
        raise ValueError(
            "a streamed model is read again for each correction, which takes as long as a "
            "calibration: give 0, or do not stream"
        )
    return value


def preset_of(given: Mapping[str, Any], pattern: Pattern) -> Preset:
    """The preset of a job with these fields, with its steps and bounds."""
    preset = Preset.of(given["preset"], pattern)
    return preset.changed(given["steps"].given(), given["search_space"].given())
