"""
The base of all documents, and the types of the values in them.

A part of a document is a frozen dataclass of its own, which pydantic reads and writes as it is:
the same value is asked for in Python, sent to the service, stored and run. ``STRICT`` makes such a
part as strict as a document, with :data:`Number`, :data:`Whole` and :data:`Flag` for its values.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from pho_service.errors import InvalidInput

# Of a dataclass. An instance is checked again, so that a whole number where a real one belongs is
# written as one.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """
    How a field is shown as an option of the command line and in the form, beside its type.

    Attributes:
        section: Section of `--help` and of the form; that of the part it is in if there is one.
        fold: What it is folded under in the form, with all that is in it.
        rank: Place among the fields of its section that the form always shows; 0: it is folded.
        option: Name of its option, if it does not follow from the field's; "" if it has none.
        label: Name in the form, if it does not follow from the path.
        help: Help of its option, if that is not written as the field is.
        default: What `--help` calls its default, if that is not the value; "" says nothing.
        kind: How its option is written, if that does not follow from the type.
        picks: What the form offers for it: ``models``, ``texts`` or ``patterns``.
        service: Whether only a service has a use for it, so that `pho search` has no option.
    """

    section: str = ""
    fold: str = ""
    rank: int = 0
    option: str | None = None
    label: str = ""
    help: str = ""
    default: str | None = None
    kind: str = ""
    picks: str = ""
    service: bool = False


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


@cache
def _adapter(of: type) -> TypeAdapter[Any]:
    return TypeAdapter(of)


class Stored:
    """A dataclass that is written as JSON, and read again, as its fields say."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, but those that their ``exclude_if`` leaves out."""
        own: Any = type(self)
        values: dict[str, Any] = _adapter(own).dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        What :meth:`to_dict` gave.

        Raises:
            InvalidInput: A value breaks a rule.
        """
        own: Any = cls
        try:
            found: Self = _adapter(own).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            ours = isinstance(first.get("ctx", {}).get("error"), InvalidInput)
            message = str(first["msg"]).removeprefix("Value error, ")
            raise InvalidInput(message if ours else f"{place}: {message}.") from error
        return found


Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(printable)]
Title = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(printable)]


class Document(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Partial(Document):
    """A document of fields that may all be left out; made of a dataclass by :func:`optional`."""

    def given(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in self if value is not None}


P = TypeVar("P", bound=Partial)


def optional(of: type) -> Callable[[type[P]], type[P]]:
    """Give a document the fields of a dataclass, each of which may be null, and is by default."""

    def decorate(document: type[P]) -> type[P]:
        made: dict[str, Any] = {}
        for name, annotation in get_type_hints(of, include_extras=True).items():
            field = FieldInfo.from_annotation(annotation)
            own: Any = field.annotation
            checked = any(isinstance(each, AfterValidator) for each in field.metadata)
            if get_origin(own) is tuple and not checked:  # as JSON has it
                own = list.__class_getitem__(get_args(own)[0])
            if field.metadata:
                own = Annotated[(own, *field.metadata)]
            made[name] = (own | None, Field(None, description=field.description))
        return create_model(
            document.__name__,
            __base__=document,
            __module__=document.__module__,
            __doc__=document.__doc__,
            **made,
        )

    return decorate
