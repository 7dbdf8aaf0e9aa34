"""
The fields of the form that submits a job: made from the fields of the document, in groups.

A new field of the document is in the form by being there: in the group of the part that it is in,
or in the last one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pho_service.spec.job_fields import JobField, job_fields, within

MORE = "more"  # takes as JSON what has no field

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
# What is called otherwise than its field, or its field and the part that it is in.
_LABELS = {
    "model": "Model (needed)",
    "target/perplexity_rise": "Or the most that the perplexity may rise",
    "patterns": "Or several patterns",
    "calibration/text": "Text file",
    "calibration/dataset": "Data set",
    "calibration/seed": "Seed of the calibration",
    "objective/name": "Objective",
    "confirm": "Confirm by perplexity",
    "timeout_s": "Time limit in seconds",
    "prune": "Write the pruned model",
    "calibration/memory_bytes": "Memory in bytes",
    "calibration/bos": "BOS",
    "dtype": "Data type",
    "steps/linears/targets": "Linears to prune",
    "steps/linears/ignore": "Linears that stay dense",
    "steps/linears/sparsities": "Linears with a sparsity of their own",
}
# Parts whose fields go by their own names where no other field has them.
_SHORT = ("calibration", "steps")
_PICKS = {
    "model": "models", "calibration/text": "texts", "confirm/text": "texts", "pattern": "patterns",
}  # fmt: skip
_COMMAS = ("patterns",)  # texts that are short enough for one line


@dataclass(frozen=True, kw_only=True)
class Group:
    """
    A part of the form.

    Attributes:
        title: Its heading.
        parts: What of the document is in it; "" is all that no group before has.
        shown: The fields that are always seen.
        folded: What can be unfolded, by its heading, as parts of the document; what is in none of
            them is under "More".
    """

    title: str
    parts: tuple[str, ...]
    shown: tuple[str, ...]
    folded: Mapping[str, tuple[str, ...]]


GROUPS = (
    Group(
        title="Model",
        parts=("model", "more_models", "revision", "dtype", "stream"),
        shown=("model",),
        folded={"Several models, revision, data type": ("",)},
    ),
    Group(
        title="Text and calibration",
        parts=("calibration",),
        shown=(
            "calibration/text", "calibration/dataset", "calibration/samples",
            "calibration/context_length",
        ),
        folded={"More about the calibration": ("",)},
    ),
    Group(
        title="What to prune",
        parts=("pattern", "patterns", "target", "scope", "preset", "steps"),
        shown=("pattern", "scope", "patterns", "target/perplexity_rise", "preset"),
        folded={
            "Which linears": ("steps/linears",),
            "Steps besides the score": ("steps",),
            "Sparsities that are tried for a rise": ("target",),
        },
    ),
    Group(
        title="Search",
        parts=(
            "trials", "seed", "sampler", "islands", "corrections", "objective", "search_space",
            "warm_start", "timeout_s", "max_failed_trials",
        ),
        shown=("trials", "seed", "sampler", "islands"),
        folded={"Search space": ("search_space",), "More about the search": ("",)},
    ),
    Group(
        title="Confirmation and report",
        parts=("confirm", "validation"),
        shown=("confirm/text", "confirm/candidates", "confirm/windows"),
        folded={"More about the confirmation": ("",)},
    ),
    Group(
        title="After it",
        parts=("prune", "notify", "tasks", "tasks_dir", "tasks_limit"),
        shown=("prune", "notify"),
        folded={"Zero-shot tasks": ("",)},
    ),
    Group(title="The job itself", parts=("",), shown=(), folded={"Name, queue and others": ("",)}),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FormField:
    """
    A field of the form.

    Attributes:
        job: The field of the document.
        label: What it is called.
        kind: ``line``, ``integer``, ``number``, ``choice``, ``flag``, ``switch`` (of a part that
            may be null), ``words`` and ``numbers`` (in one line), ``lines``, or ``pairs``.
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
        return _PICKS.get(self.path, "")

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
            return _number(typed, whole=self.kind == "integer")
        if self.kind == "words":
            return [word for word in re.split(r"[,\s]+", typed) if word]
        if self.kind == "numbers":
            whole = self.job.schema["items"]["type"] == "integer"
            values = [_number(each, whole=whole) for each in re.split(r"[,;:\s]+", typed) if each]
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
            found[path] = FormField(job=field, label=_label(path), kind=kind)
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
    left = dict(form_fields())
    found = []
    for group in GROUPS:
        mine = {
            path: left.pop(path)
            for path in [*left]
            if any(within(path, part) for part in group.parts)
        }
        shown = tuple(mine.pop(path) for path in group.shown if path in mine)
        folded = {
            title: tuple(mine.pop(path) for path in [*mine] if _in_any(path, parts))
            for title, parts in {**group.folded, "More": ("",)}.items()
        }
        kept = {title: fields for title, fields in folded.items() if fields}
        found.append(Section(title=group.title, shown=shown, folded=kept))
    return tuple(found)


def field_label(path: str) -> str:
    """What a field is called in messages."""
    if path == MORE:
        return "As JSON"
    return form_fields()[path].label.removesuffix(" (needed)")


def _in_any(path: str, parts: tuple[str, ...]) -> bool:
    return any(within(path, part) for part in parts)


def _kind(field: JobField) -> str | None:
    """How a field is typed; None if it is not."""
    schema = field.schema
    if field.is_part:
        of_the_job = field.nullable and "/" not in field.path
        return "switch" if of_the_job and not schema.get("required") else None
    kind, items = schema.get("type"), schema.get("items", {})
    if "enum" in schema:
        return "choice"
    if kind == "boolean":
        return "flag" if field.default is False else "choice"
    if kind == "array" and items.get("type") in ("integer", "number"):
        return "numbers"
    if kind == "array" and items.get("type") == "string":
        return "words" if "enum" in items or field.path in _COMMAS else "lines"
    if kind == "object":
        return "pairs" if isinstance(schema.get("additionalProperties"), dict) else None
    return {"string": "line", "integer": "integer", "number": "number"}.get(str(kind))


def _label(path: str) -> str:
    if path in _LABELS:
        return _LABELS[path]
    *above, last = path.split("/")
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


def _number(typed: str, *, whole: bool) -> int | float | str:
    """The number that is typed, or the text if it is none."""
    if _INTEGER.fullmatch(typed):
        return int(typed) if whole else float(typed)
    return float(typed) if not whole and _NUMBER.fullmatch(typed) else typed


def _pair(line: str) -> tuple[str, float | str]:
    name, sign, value = (part.strip() for part in line.rpartition("="))
    if not sign or not name or not value:
        raise ValueError(f"{line!r} is not NAME = VALUE. Write one pair a line.")
    return name, _number(value, whole=False)
