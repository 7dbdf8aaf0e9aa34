"""
The fields of the form that submits a job: made from the fields of the document, in sections.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pho_service.spec.job_fields import SECTIONS, JobField, job_fields, number, within

MORE = "more"  # takes as JSON what has no field

# Parts whose fields go by their own names where no other field has them.
_SHORT = ("calibration", "steps")


@dataclass(frozen=True, kw_only=True)
class FormField(JobField):
    """A field of the form."""

    @property
    def kind(self) -> str:
        """As of any field, but ``switch`` for a part that may be null."""
        if self.is_part:
            of_the_job = self.nullable and "/" not in self.path
            return "switch" if of_the_job and not self.schema.get("required") else ""
        kind = super().kind
        return "choice" if kind == "flag" and self.default is not False else kind

    @property
    def label(self) -> str:
        """What it is called."""
        *above, last = self.path.split("/")
        short = len(above) == 1 and above[0] in _SHORT
        own = " ".join([*above[-1:], last][short:]).replace("_", " ").capitalize()
        return self.shown.label or own

    @property
    def unsaid(self) -> Any:
        """What an empty field stands for, or would once its part is there."""
        return self.schema.get("default", self.default)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Values and what they are called; an empty one stands for the default."""
        default = self.default
        if self.kind == "switch":
            on = default is not None
            return [("", "yes" if on else "no"), ("no", "no") if on else ("yes", "yes")]
        unsaid = ("", "the preset's" if within(self.path, "steps") else "default")
        if self.schema.get("type") == "boolean":
            return [unsaid, ("yes", "yes"), ("no", "no")]
        known = self.schema["enum"]
        named = [(value, value) for value in known if value != default]
        return [unsaid if default is None else ("", f"{default} (default)"), *named]

    @property
    def hint(self) -> str:
        """Hint that stands beside the field."""
        how = {
            "lines": "One a line.",
            "pairs": "NAME = VALUE, one a line.",
            "numbers": "With commas between.",
            "words": "With commas between.",
        }
        said = [str(self.schema.get("description", "")), _bounds(self.schema)]
        is_range = self.schema.get("minItems") == 2
        said.append("Two numbers, or one that fixes it." if is_range else how.get(self.kind, ""))
        if self.kind not in ("choice", "switch", "flag") and (default := self.write(self.unsaid)):
            said.append(f"By default {default}.")
        return " ".join(filter(None, said))

    def read(self, typed: str) -> Any:
        """
        The value that a text stands for; what is not of its kind is left to the document's rules.

        Args:
            typed: Not empty.

        Raises:
            ValueError: It cannot be read.
        """
        if self.kind == "switch":
            return {"yes": {}, "no": None}.get(typed, typed)
        if self.kind == "flag" or self.schema.get("type") == "boolean":
            return {"on": True, "yes": True, "no": False}.get(typed, typed)
        if self.kind in ("integer", "number"):
            return number(typed, whole=self.kind == "integer")
        if self.kind == "words":
            return [word for word in re.split(r"[,\s]+", typed) if word]
        if self.kind == "numbers":
            values = self.numbers(each for each in re.split(r"[,;:\s]+", typed) if each)
            fixed = len(values) == 1 and self.schema.get("minItems") == 2
            return values * 2 if fixed else values
        lines = [line.strip() for line in typed.split("\n") if line.strip()]
        if self.kind == "pairs":
            return dict(_pair(line) for line in lines)
        return lines if self.kind == "lines" else typed

    def write(self, value: Any) -> str:
        """What to type for a value; empty for what is said by an empty field."""
        if self.kind == "switch":
            return "no" if value is None else "" if value else "yes"
        if value is None:
            return ""
        if isinstance(value, bool):
            said = "on" if self.kind == "flag" else "yes"
            return said if value else "" if self.kind == "flag" else "no"
        if self.kind in ("words", "numbers"):
            return ", ".join(map(str, value))
        if self.kind == "lines":
            return "\n".join(value)
        if self.kind == "pairs":
            return "\n".join(f"{name} = {each}" for name, each in value.items())
        return str(value)


@cache
def form_fields() -> dict[str, FormField]:
    """The fields of the form by their paths, in the order of the document."""
    fields = (FormField(**vars(field)) for field in job_fields().values())
    return {field.path: field for field in fields if field.kind}


def without_field() -> list[str]:
    """What a job has and the form has not, by path."""
    return [
        path for path, field in job_fields().items() if not (path in form_fields() or field.is_part)
    ]


@dataclass(frozen=True, kw_only=True)
class Section:
    """
    A group with its fields.

    Attributes:
        title: Title of the group.
        shown: Fields that are always seen.
        folded: Others, by their heading.
    """

    title: str
    shown: tuple[FormField, ...]
    folded: Mapping[str, tuple[FormField, ...]]

    @property
    def fields(self) -> list[FormField]:
        """All of them, in their order."""
        return [*self.shown, *(field for fields in self.folded.values() for field in fields)]


@cache
def sections() -> tuple[Section, ...]:
    """All fields, each in one place."""
    found = []
    for title, more in SECTIONS.items():
        mine = [each for each in form_fields().values() if each.shown.section == title]
        shown = [each for each in mine if each.shown.rank]
        folds = dict.fromkeys(each.shown.fold for each in mine if each not in shown)
        folded = {
            fold or more: tuple(
                each for each in mine if each not in shown and each.shown.fold == fold
            )
            for fold in sorted(folds, key=lambda fold: not fold)  # the others come last
        }
        in_order = tuple(sorted(shown, key=lambda each: each.shown.rank))
        found.append(Section(title=title, shown=in_order, folded=folded))
    return tuple(found)


def field_label(path: str) -> str:
    """What a field is called in messages."""
    if path == MORE:
        return "As JSON"
    return form_fields()[path].label.removesuffix(" (needed)")


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    least = _bound("from", low) or _bound("above", above)
    most = _bound("up to", high) or _bound("below", below)
    words = ", ".join(filter(None, (least, most)))
    words = re.sub(r"^from (\S+), up to", r"\1 to", words)
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _bound(word: str, value: float | None) -> str:
    return "" if value is None else f"{word} {value:,.10g}"


def _pair(line: str) -> tuple[str, float | str]:
    name, sign, value = (part.strip() for part in line.rpartition("="))
    if not sign or not name or not value:
        raise ValueError(f"{line!r} is not NAME = VALUE. Write one pair a line.")
    return name, number(value)
