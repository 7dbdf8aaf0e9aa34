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
class FormField:
    """
    A field of the form.

    Attributes:
        job: The field of the document.
        label: What it is called.
        kind: As of the field, but for ``switch``, of a part that may be null.
    """

    job: JobField
    label: str
    kind: str

    @property
    def path(self) -> str:
        """Where it stands in the document; its name and its id on the page, too."""
        return self.job.path

    @property
    def default(self) -> Any:
        """What an empty field stands for, or would once its part is there."""
        return self.job.schema.get("default", self.job.default)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Values and what they are called; an empty one stands for the default."""
        default = self.job.default
        if self.kind == "switch":
            on = default is not None
            return [("", "yes" if on else "no"), ("no", "no") if on else ("yes", "yes")]
        unsaid = ("", "the preset's" if within(self.path, "steps") else "default")
        if self.job.schema.get("type") == "boolean":
            return [unsaid, ("yes", "yes"), ("no", "no")]
        known = self.job.schema["enum"]
        named = [(value, value) for value in known if value != default]
        return [unsaid if default is None else ("", f"{default} (default)"), *named]

    @property
    def picks(self) -> str:
        """What is offered to be picked for it: ``models``, ``texts``, ``patterns`` or nothing."""
        return self.job.shown.picks

    @property
    def hint(self) -> str:
        """Hint that stands beside the field."""
        how = {
            "lines": "One a line.",
            "pairs": "NAME = VALUE, one a line.",
            "numbers": "With commas between.",
            "words": "With commas between.",
        }
        said = [str(self.job.schema.get("description", "")), _bounds(self.job.schema)]
        is_range = self.job.schema.get("minItems") == 2
        said.append("Two numbers, or one that fixes it." if is_range else how.get(self.kind, ""))
        if self.kind not in ("choice", "switch", "flag") and (default := self.write(self.default)):
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
        if self.kind == "flag" or self.job.schema.get("type") == "boolean":
            return {"on": True, "yes": True, "no": False}.get(typed, typed)
        if self.kind in ("integer", "number"):
            return number(typed, whole=self.kind == "integer")
        if self.kind == "words":
            return [word for word in re.split(r"[,\s]+", typed) if word]
        if self.kind == "numbers":
            values = self.job.numbers(each for each in re.split(r"[,;:\s]+", typed) if each)
            fixed = len(values) == 1 and self.job.schema.get("minItems") == 2
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
    found = {}
    for path, field in job_fields().items():
        kind = _kind(field)
        if kind is not None:
            found[path] = FormField(job=field, label=_label(field), kind=kind)
    return found


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
        mine = [each for each in form_fields().values() if each.job.shown.section == title]
        shown = [each for each in mine if each.job.shown.rank]
        folds = dict.fromkeys(each.job.shown.fold for each in mine if each not in shown)
        folded = {
            fold or more: tuple(
                each for each in mine if each not in shown and each.job.shown.fold == fold
            )
            for fold in sorted(folds, key=lambda fold: not fold)  # the others come last
        }
        in_order = tuple(sorted(shown, key=lambda each: each.job.shown.rank))
        found.append(Section(title=title, shown=in_order, folded=folded))
    return tuple(found)


def field_label(path: str) -> str:
    """What a field is called in messages."""
    if path == MORE:
        return "As JSON"
    return form_fields()[path].label.removesuffix(" (needed)")


def _kind(field: JobField) -> str | None:
    """How a field is typed; None if it is not."""
    if field.is_part:
        of_the_job = field.nullable and "/" not in field.path
        return "switch" if of_the_job and not field.schema.get("required") else None
    if field.kind == "flag" and field.default is not False:
        return "choice"
    return field.kind or None


def _label(field: JobField) -> str:
    if field.shown.label:
        return field.shown.label
    *above, last = field.path.split("/")
    short = len(above) == 1 and above[0] in _SHORT
    return " ".join([*above[-1:], last][short:]).replace("_", " ").capitalize()


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
