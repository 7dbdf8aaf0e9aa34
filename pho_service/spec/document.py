"""
The base of all documents, and the types of the values in them.

A part of a document is a frozen dataclass of its own, which pydantic reads and writes as it is:
the same value is asked for in Python, sent to the service, stored and run. ``STRICT`` makes such a
part as strict as a document, with :data:`Number`, :data:`Whole` and :data:`Flag` for its values.
"""

from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from pho_service.errors import InvalidInput

# Of a dataclass. An instance is checked again, so that a whole number where a real one belongs is
# written as one.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always")


def check_choice(what: str, value: object, allowed: Collection[str]) -> None:
    """Raise InvalidInput, which names ``what``, if the value is none of those allowed."""
    if value not in allowed:
        raise InvalidInput(f"{what} {value!r} is not one of {', '.join(allowed)}.")


def check_number(what: str, value: float, low: float, high: float) -> None:
    """Raise InvalidInput, which names ``what``, if the value is no number from low to high."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise InvalidInput(f"{what}={value!r} is not in {low:g}..{high:g}.")


def printable(value: str) -> str:
    """Return the text if it has nothing in it that cannot be printed; for names of all kinds."""
    if not value.isprintable():  # nor NUL or half characters, which no database takes
        raise ValueError("control characters and unpaired surrogates are not allowed")
    return value


Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(printable)]
Title = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(printable)]


class Document(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
