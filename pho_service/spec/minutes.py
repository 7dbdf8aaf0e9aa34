"""
How long a job may take, and the sizes that it chooses within that.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationInfo

from pho_service.errors import InvalidInput
from pho_service.spec.structure import is_structured

MINUTES = 20.0  # that a job may take if nobody says how long, nor on how much text
MOST_MINUTES = 100_000.0
MOST_PASSES = 4  # of a winner's training; with eight it is no better on a text of another domain
REST = 0.25  # share of the minutes that is left for a recovery without a time of its own
REST_TOKENS = 8192  # it trains on at least: fewer bring less than they cost the search before it

SizeName = Literal[
    "calibration/samples",
    "calibration/context_length",
    "confirm/windows",
    "confirm/finalists",
    "in_full",
]
SIZES: tuple[SizeName, ...] = get_args(SizeName)
OF_THE_TEXT = SIZES[:2]  # who gives one of these has thought of the time
AFTER_CALIBRATION = SIZES[3:]  # can be chosen again when the calibration lies behind


def with_minutes(document: Mapping[str, Any]) -> dict[str, Any]:
    """
    A job's document that says how long it may take, if nothing else does, and which of its sizes
    are free to be chosen for that: those that are not given.
    """
    values = dict(document)
    if not any(_is_given(values, path) for path in OF_THE_TEXT):
        values.setdefault("minutes", MINUTES)
    if values.get("minutes") is not None and "free_sizes" not in values:
        values["free_sizes"] = [path for path in SIZES if not _is_given(values, path)]
        if values["free_sizes"] and _changes_weights(values):
            values.setdefault("recovery", {})
    return values


def _changes_weights(document: Mapping[str, Any]) -> bool:
    """Whether a job writes a model whose weights are not those of the dense one anyway."""
    from pho_service.spec.space import DEFAULT_PRESET  # slow to import

    alone = document.get("pattern") is not None
    changes = document.get("preset", DEFAULT_PRESET) == DEFAULT_PRESET
    changes = changes or is_structured(document.get("pattern"))
    return bool(document.get("prune") and alone and changes and not document.get("stream"))


def parse_minutes(text: str, name: str) -> float:
    """Read ``20`` or ``0.5``."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = float("nan")
    if not 0 < minutes <= MOST_MINUTES:
        raise InvalidInput(
            f"{name} {text!r} is not a number of minutes above 0 and up to {MOST_MINUTES:,.0f}, "
            f"nor none. Write {name} {MINUTES:g}, or {name} none for 128 windows of 2,048 tokens, "
            "as papers take."
        )
    return minutes


def of_minutes(value: list[SizeName], info: ValidationInfo) -> list[SizeName]:
    """Sizes are free for the sake of the minutes."""
    if value and info.data.get("minutes", 0) is None:
        raise ValueError("the minutes choose these sizes, and none are given: give minutes, too")
    return value


def _is_given(document: Mapping[str, Any], path: str) -> bool:
    """Whether a document says a size, or has no use for it."""
    *above, name = path.split("/")
    part = document.get(above[0], {}) if above else document
    if isinstance(part, BaseModel):
        return name in part.model_fields_set
    return name in part if isinstance(part, Mapping) else True


def sizes_of(document: Mapping[str, Any]) -> dict[SizeName, int | None]:
    """The sizes of a job's complete document; those of a confirmation only if there is one."""
    sizes: dict[SizeName, int | None] = {}
    for path in SIZES:
        *above, name = path.split("/")
        part = document[above[0]] if above else document
        if part is not None:
            sizes[path] = part[name]
    return sizes


def with_sizes(document: Mapping[str, Any], sizes: Mapping[SizeName, int | None]) -> dict[str, Any]:
    """A job's complete document with sizes that were chosen, so that they are free no more."""
    free = [path for path in document.get("free_sizes", ()) if path not in sizes]
    return {**put_sizes(document, sizes), "free_sizes": free}


def put_sizes(document: Mapping[str, Any], sizes: Mapping[SizeName, int | None]) -> dict[str, Any]:
    """A job's document that says these sizes, too; those of a confirmation if there is one."""
    values = dict(document)
    for path, size in sizes.items():
        *above, name = path.split("/")
        if not above:
            values[name] = size
        elif values.get(above[0], {}) is not None:
            values[above[0]] = {**values.get(above[0], {}), name: size}
    return values
