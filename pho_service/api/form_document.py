"""
From what was typed into the form to the document of a job, and back; errors by field.
"""

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pho_service.api.form import MORE, form_fields, sections, without_field
from pho_service.api.problems import field_problem
from pho_service.spec.job import JobSpec
from pho_service.spec.job_fields import minimal_document, remove_at, value_at, within

Errors = dict[str, list[str]]

# What the rules of this machine look at: checked also where other fields are wrong.
_PLACES = (
    "model", "more_models", "calibration/text", "calibration/dataset", "calibration/data_file",
    "calibration/context_length", "confirm/text", "notify",
)  # fmt: skip


def typed_as(document: Mapping[str, Any]) -> dict[str, str]:
    """
    What to type for the job that has this document; what is as it is by default is left out.

    Args:
        document: Document of a search, as it is stored.
    """
    left = minimal_document(JobSpec.model_validate(document))
    typed = {}
    for path, each in form_fields().items():
        value = value_at(left, path, left)
        if value is left:
            continue
        text = each.write(value)
        if text and each.read(text) == value:
            typed[path] = text
            remove_at(left, path)
    return {**typed, **({MORE: json.dumps(left, indent=2, ensure_ascii=False)} if left else {})}


@dataclass(kw_only=True)
class Typed:
    """
    A form that was filled in.

    Attributes:
        fields: What was typed, by field.
        document: What that is in a job's document; what cannot be read is not in it.
        errors: What is wrong, by field; "" is of none.
    """

    fields: Mapping[str, str]
    document: dict[str, Any] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)
    _as_json: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Typed":
        """Read a form."""
        made = cls(fields=fields)
        switches = {}
        for path, each in form_fields().items():
            text = fields.get(path, "").strip()
            try:
                value = each.read(text) if text else None
            except ValueError as error:
                made.add(path, str(error))
                continue
            if each.kind == "switch":
                switches[path] = (text, value)
            elif text:
                _put(made.document, path, value)
        for path, (text, value) in switches.items():
            made._switch(path, text, value)
        made._read_json(fields.get(MORE, ""))
        return made

    def add(self, name: str, detail: str) -> None:
        """Note an error; the same one is said once."""
        said = self.errors.setdefault(name, [])
        if detail not in said:
            said.append(detail)

    def add_at(self, pointer: str, detail: str) -> None:
        """Note an error at a place in the document, at the field that stands for it."""
        path = "/".join(
            part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]
        )
        nothing = object()
        if not path:
            self.add("", detail)
        elif value_at(self._as_json, path, nothing) is not nothing:
            self.add(MORE, f"{pointer}: {detail}")
        elif above := [each for each in form_fields() if within(path, each)]:
            self.add(above[-1], detail)
        elif below := [each for each in form_fields() if within(each, path)]:
            typed = [each for each in below if self.fields.get(each, "").strip()]
            self.add((typed or below)[0], detail)
        else:
            self.add(MORE, f"{pointer}: {detail}")

    def spec(self) -> JobSpec | None:
        """The job, if the document is one; its rules that are broken are noted."""
        try:
            return JobSpec.model_validate(self.document)
        except ValidationError as error:
            for each in error.errors():
                found = field_problem({**each, "loc": ("body", *each["loc"])}, JobSpec)
                self.add_at(found["pointer"], _in_words(found["detail"]))
            return None

    def places(self) -> JobSpec | None:
        """A job with the models and texts of this one, as far as these can be read."""
        found: dict[str, Any] = {"model": "org/model", "pattern": "0.5"}
        for path in _PLACES:
            value = value_at(self.document, path)
            if value is not None and path not in self.errors:
                _put(found, path, value)
        for tried in (found, {"model": found["model"], "pattern": "0.5"}):
            try:
                return JobSpec.model_validate(tried)
            except ValidationError:
                continue
        return None

    @property
    def in_order(self) -> Errors:
        """The errors in the order of the page."""
        order = ["", *(field.path for section in sections() for field in section.fields), MORE]
        return {name: self.errors[name] for name in order if name in self.errors}

    def _switch(self, path: str, text: str, value: Any) -> None:
        """Put in a part that is there or null."""
        if text == "no" and path in self.document:
            typed = next(
                each for each in form_fields() if self.fields.get(each) and within(each, path)
                and each != path
            )  # fmt: skip
            off = form_fields()[path].label
            self.add(typed, f"{off!r} says no. Say yes there, or leave this empty.")
        elif text == "no" and form_fields()[path].default is not None:
            self.document[path] = None
        elif text and text != "no":
            self.document.setdefault(path, value)

    def _read_json(self, text: str) -> None:
        """Put in what was given as JSON, unless it was typed above, too."""
        if not text.strip():
            return
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            self.add(MORE, f"This is not JSON: {error.msg} in {where}.")
            return
        except (ValueError, RecursionError):
            self.add(MORE, "This cannot be read as JSON.")
            return
        if not isinstance(found, dict):
            self.add(MORE, 'This is not a JSON object. Write, for example, {"trials": 100}.')
            return
        twice = [*_merge(self.document, found, "")]
        for pointer in twice:
            self.add(MORE, f"{pointer}: is given above, too. Give it in one of the two places.")
        self._as_json = found


def _in_words(rule: str) -> str:
    """A rule as a sentence of the page, which shows the value beside it."""
    words = {"Field required": "This is needed", "Input should": "This should"}
    for theirs, ours in words.items():
        rule = rule.replace(theirs, ours)
    return f"{rule.rstrip('.')}."


def is_place(pointer: str) -> bool:
    """Whether a rule of this machine is broken by what :meth:`Typed.places` has been told."""
    return any(within(pointer[1:], place) for place in _PLACES)


def hint_of_json() -> str:
    """Return the hint beside the field for JSON."""
    return (
        "A JSON object, or nothing. All of a job can be given here instead of above; only here: "
        f"{', '.join(without_field())}."
    )


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split("/")
    for part in parts:
        document = document.setdefault(part, {})
    document[last] = value


def _merge(document: dict[str, Any], more: Mapping[str, Any], above: str) -> Iterable[str]:
    """Put in what is not there; gives pointers to what is."""
    for name, value in more.items():
        pointer = f"{above}/{name.replace('~', '~0').replace('/', '~1')}"
        own = document.get(name)
        if name not in document:
            document[name] = deepcopy(value)
        elif isinstance(own, dict) and isinstance(value, dict):
            yield from _merge(own, value, pointer)
        else:
            yield pointer
