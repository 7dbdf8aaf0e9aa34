"""
The base of all documents, and the types of the values in them: sizes, seeds, names.
"""

import inspect
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Self, TypeVar, cast, get_args, get_origin, get_type_hints
from uuid import UUID

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

from pho_service.errors import InvalidInput, shown

D = TypeVar("D")
P = TypeVar("P", bound="Partial")

# Of a dataclass. An instance is checked again, so that a whole number where a real one belongs is
# written as one.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always")


# Sections of `--help` and of the form.
MODEL, TEXT, JOB = "Model", "Text and calibration", "The job itself"
PRUNED, SEARCH = "What to prune", "Search"
REPORT, AFTER, MACHINE = "Confirmation and report", "After it", "Machine"


@dataclass(frozen=True, kw_only=True)
class FieldShown:
    """The look of a field as an option of the command line and in the form, beside its type."""

    # Section of `--help` and of the form; that of the part it is in if there is one
    section: str = ""
    fold: str = ""  # What it is folded under in the form, with all that is in it
    rank: int = 0  # Place among the fields that the form always shows; 0: it is under More
    # Name of its option, if it does not follow from the field's; "" if it has none
    option: str | None = None
    argument: str | None = None  # In Python, if not the last part of its path; "" if none
    prefix: str = ""  # What the options of the fields in it begin with, after the dashes
    label: str = ""  # Name in the form, if it does not follow from the path
    help: str = ""  # Help of its option, if that is not written as the field is
    # What `--help` calls its default, if that is not the value; "" says nothing
    default: str | None = None
    kind: str = ""  # How its option is written, if that does not follow from the type
    # What the form or a shell offers for it: ``models``, ``texts``, ``patterns`` or ``methods``
    picks: str = ""
    # Whether only a service has a use for it, so that `pho search` has no option
    service: bool = False


def sentences_of(kind: type) -> dict[str, str]:
    """
    What each field of a dataclass is: as the ``Attributes`` of its docstring or of its bases' say,
    or else as its description does.
    """
    sentences: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, listed = (inspect.getdoc(base) or "").partition("\nAttributes:\n")
        said = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
        sentences |= {name: re.sub(r"\n {8}", " ", sentence) for name, sentence in said}
        for part in fields(base) if is_dataclass(base) else ():
            infos = [info for info in get_args(part.type) if isinstance(info, FieldInfo)]
            about = [info.description for info in infos if info.description]
            if about and part.name not in sentences:
                sentences[part.name] = about[0]
    return sentences


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
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class JsonDocument:
    """A dataclass that is written as JSON, and read again, as its fields say."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, but those that their ``exclude_if`` leaves out."""
        kind: Any = type(self)
        values: dict[str, Any] = _adapter(kind).dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the values of :meth:`to_dict`."""
        kind: Any = cls
        try:
            document: Self = _adapter(kind).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            ours = isinstance(first.get("ctx", {}).get("error"), InvalidInput)
            rule = broken_rule(first)
            raise InvalidInput(rule if ours else f"{place}: {rule}.") from error
        return document


def broken_rule(error: Mapping[str, Any]) -> str:
    """What pydantic says of a value, with the value."""
    ours, message = "Value error, ", str(error["msg"])
    if message.startswith(ours):
        return message.removeprefix(ours)
    message = re.sub(r" or instance of \w+", "", message)
    return re.sub(r"^\w+ should", lambda _: f"{reprlib.repr(error['input'])} should", message)


def part_of(source: object, kind: type[D]) -> D:
    """The dataclass that a document or a larger dataclass has all fields of."""
    names = [field.name for field in fields(cast("Any", kind))]
    return kind(**{name: getattr(source, name) for name in names})


Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(printable)]
Title = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(printable)]


def whole_id(value: str) -> str:
    """An id, in the one way to write it."""
    try:
        return str(UUID(value))
    except ValueError:
        raise ValueError(f"{value!r} is not the whole id of a job, as `pho show` has it") from None


JobId = Annotated[str, Field(max_length=36), AfterValidator(whole_id)]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"  # as of Kubernetes
MOST_LABELS = 16


def are_labels(labels: dict[str, str]) -> dict[str, str]:
    """Names and values are short words."""
    for word in (word for pair in labels.items() for word in pair):
        if not re.fullmatch(_LABEL, word):
            raise ValueError(
                f"{shown(word)!r} is not a label's name or value: 1 to 63 letters and digits, with "
                "any of . _ - / between"
            )
    return labels


_Word = Annotated[str, Field(max_length=63, json_schema_extra={"pattern": f"^{_LABEL}$"})]
Labels = Annotated[
    dict[str, _Word],
    Field(
        max_length=MOST_LABELS,
        exclude_if=lambda labels: not labels,
        description='Names and values of your own, to find jobs by: {"team": "a"}.',
        json_schema_extra={"propertyNames": {"pattern": f"^{_LABEL}$"}},
    ),
    AfterValidator(are_labels),
    FieldShown(section=JOB, option="--label", service=True),
]


class Document(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Partial(Document):
    """A document of fields that may all be left out; made of a dataclass by :func:`optional`."""

    def given(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in self if value is not None}


def optional(dataclass: type) -> Callable[[type[P]], type[P]]:
    """Give a document the fields of a dataclass, each of which may be null, and is by default."""

    def decorate(document: type[P]) -> type[P]:
        fields: dict[str, Any] = {}
        for name, annotation in get_type_hints(dataclass, include_extras=True).items():
            field = FieldInfo.from_annotation(annotation)
            value_type: Any = field.annotation
            checked = any(isinstance(entry, AfterValidator) for entry in field.metadata)
            if get_origin(value_type) is tuple and not checked:  # as JSON has it
                value_type = list.__class_getitem__(get_args(value_type)[0])
            if field.metadata:
                value_type = Annotated[(value_type, *field.metadata)]
            fields[name] = (value_type | None, Field(None, description=field.description))
        return create_model(
            document.__name__,
            __base__=document,
            __module__=document.__module__,
            __doc__=document.__doc__,
            **fields,
        )

    return decorate


# Sizes of memory as people write them.
def parse_bytes(text: str, option: str) -> int:
    """The bytes that ``8GiB``, ``800 MB`` or ``8e9`` say."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    try:
        number, unit = match.groups()  # type: ignore[union-attr]
        # ByteSize reads neither 8e9 nor 8Gi.
        size = TypeAdapter(ByteSize).validate_python(
            f"1{unit}b" if unit[-1:] == "i" else f"1{unit}"
        )
        return int(float(number) * size)
    except (AttributeError, ValidationError, ValueError, OverflowError):
        raise InvalidInput(
            f"{option} {text!r} is not a size. Give a number with a unit: 8GiB, 800MB."
        ) from None


# The seeds that every generator in use takes.
SEEDS = 2**32  # what every generator in use takes
Seed = Annotated[Whole, Field(ge=0, lt=SEEDS)]


def check_seed(seed: int) -> None:
    """Raise InvalidInput unless 0 <= seed < 2**32."""
    if seed < 0:
        raise InvalidInput(f"seed={seed} is below 0.")
    if seed >= SEEDS:
        raise InvalidInput(f"seed={seed} is too large: it must be below {SEEDS}.")


# The one format of measured numbers: a terminal, a page and a card show the same digits.
def number(value: float | None) -> str:
    """Four significant digits, or all before the point; empty where there is none."""
    if value is None:
        return ""
    if 999.95 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if value else "0"


def with_error(value: float | None, error: float | None) -> str:
    """A number and its standard error, to the same digit: ``27.70 ± 0.85``."""
    text = number(value)
    if not text or error is None:
        return text
    return f"{text} ± {error:,.{len(text.partition('.')[2])}f}"


def percent(share: float | None, *, signed: bool = False, error: float | None = None) -> str:
    """
    A share in percent, with one digit after the point, and its standard error: ``+22.6 ± 0.4%``;
    a change that rounds to none is ``±0%``.
    """
    text = "" if share is None else f"{share:{'+' if signed else ''}z,.1%}"
    if text and error:
        text = f"{text[:-1]} ± {error:.1%}"
    return "±0%" if text in ("+0.0%", "+0.0 ± 0.0%") else text


def format_bytes(count: int) -> str:
    """With one digit after the point, in the largest unit: ``9.3 GiB``, ``116.2 KiB``."""
    if not count:
        return "0"
    power = min(max(0, count.bit_length() - 1) // 10, 4)
    return f"{count / 2 ** (10 * power):.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def sizes_told(sizes: Mapping[str, int]) -> str:
    """Bytes by what takes them, and those that are free, in words."""
    parts = [f"{name} {format_bytes(size)}" for name, size in sizes.items() if name != "free"]
    free = f"; {format_bytes(sizes['free'])} free" if "free" in sizes else ""
    return ", ".join(parts) + free


def format_count(count: int) -> str:
    """With three digits: ``135 million``, ``29.7 thousand``."""
    for name, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return str(count)


def seconds(value: float | None) -> str:
    """A duration, with one digit after the point."""
    return "" if value is None else f"{value:,.1f}"


def listed(values: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Names and their values in a line: ``row 0.2500, kernel 5``."""
    pairs = values.items() if isinstance(values, Mapping) else values
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}" for name, value in pairs
    )
