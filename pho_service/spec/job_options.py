"""
The fields of a job's document as options: their names, sections, types and values.

Types, choices, defaults and descriptions are those of the document's JSON schema, which is also
what the API shows. A new field has an option by being there.
"""

import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import click

from pho_service.errors import InvalidInput
from pho_service.spec.job_fields import (
    JobField,
    job_fields,
    number,
    remove_at,
    value_at,
    within,
)
from pho_service.spec.sizes import parse_bytes


@dataclass(frozen=True, kw_only=True)
class Field(JobField):
    """
    A field of the document that has an option.
    """

    @property
    def name(self) -> str:
        """Name of its option."""
        own = self.path.rpartition("/")[2].replace("_", "-")
        return f"--{own}" if self.shown.option is None else self.shown.option

    @property
    def written(self) -> str:
        """How its option is written."""
        return self.shown.kind or self.kind

    @property
    def is_flag(self) -> bool:
        """Whether its option has no value."""
        return self.written in ("flag", "off")

    def parameter(self, name: str) -> str:
        """What click calls its option with this name: a name that Python could have."""
        return f"{self.path}_{name}".replace("/", "_").replace("-", "_")

    def option(self, name: str, *, required: bool) -> click.Option:
        """Its option, by this name."""
        kind, named = self.written, self.written in ("bounds", "pairs")
        types = {"integer": click.INT, "number": click.FLOAT}
        choices = self.schema.get("enum")
        about = self.shown.help or self.schema.get("description", "")
        if kind in ("lines", "pairs"):
            about = f"{about.rstrip('.')}; may be given several times."
        if default := self._default():
            about += f"  [default: {default}]"
        optional = {"is_flag": False, "flag_value": ""} if kind == "points" else {}
        return click.Option(
            [self.parameter(name), name],
            type=None if self.is_flag else click.Choice(choices) if choices else types.get(kind),
            multiple=named or kind in ("points", "lines"),
            metavar="NAME=VALUE" if named else None,
            help=about.strip(),
            required=required,
            **({"is_flag": True} if self.is_flag else optional),
        )

    def _default(self) -> str:
        """What `--help` calls its default; "" says nothing."""
        if self.shown.default is not None or self.written in ("bounds", "off"):
            return self.shown.default or ""
        default = self.schema.get("default", self.default)
        chosen = self.written in ("choice", "number")
        if default is None and chosen and within(self.path, "steps"):
            return "the preset's"
        if default is False or default in (None, [], {}):
            return ""
        return _joined(default) if isinstance(default, list) else str(default)

    def value(self, said: Any, name: str) -> Any:
        """What an option says, as JSON."""
        from pho_service.spec.curve import parse_rise
        from pho_service.spec.space import parse_bounds

        match self.written:
            case "size":
                return parse_bytes(said, name)
            case "words":
                return [each.strip() for each in said.split(",")]
            case "rise":
                return parse_rise(said, name)
            case "off":
                return None
            case "bounds":
                return {bound: list(values) for bound, values in parse_bounds(said).items()}
            case "numbers":
                values = self.numbers(each.strip() for each in said.split(","))
                if any(isinstance(each, str) for each in values):
                    whole = self.schema["items"]["type"] == "integer"
                    raise InvalidInput(
                        f"{name} {said!r} are not numbers with commas between: "
                        f"{'3,5,9' if whole else '0.2,-0.1'}."
                    )
                return values
            case "pairs":
                pairs = [each.rpartition("=") for each in said]
                if not all(key for key, _, _ in pairs):
                    raise InvalidInput(f"{name} {' '.join(said)}: write NAME=VALUE.")
                return {key: number(value) for key, _, value in pairs}
        return list(said) if isinstance(said, tuple) else said

    def words(self, value: Any) -> list[str]:
        """The option that says a value."""
        if self.is_flag:
            return [] if value is False else [self.name]
        match self.written:
            case "bounds":
                pairs = {bound: _bound(bound, values) for bound, values in value.items() if values}
                said = [f"{bound}={text}" for bound, text in pairs.items()]
            case "pairs":
                said = [f"{key}={each}" for key, each in value.items()]
            case "lines":
                said = [str(each) for each in value]
            case _:
                said = [_joined(value) if isinstance(value, list) else str(value)]
        return [word for each in said for word in (self.name, each)]


@cache
def document_fields() -> dict[str, Field]:
    """The fields of a job's document that have an option, by their paths."""
    return {
        path: Field(**vars(field))
        for path, field in job_fields().items()
        if not path.startswith("search_space/")
        and field.shown.option != ""
        and (not field.is_part or field.shown.option)
    }


def search_command(document: Mapping[str, Any], *more: str) -> str:
    """
    The `pho search` that asks for what a document does: each option that differs from its default.

    Args:
        document: Document of a job; what is left out has its default.
        more: Words at the end.
    """
    models = [str(document["model"]), *map(str, document.get("more_models") or ())]
    return shlex.join(["pho", "search", *models, *_said(document, ""), *more])


def prune_command(model: str, config: str, document: Mapping[str, Any]) -> str:
    """The `pho prune` that prunes a model with a search's result, on the search's calibration."""
    words = ["pho", "prune", model, "--config", config, *_said(document, "calibration")]
    return shlex.join([*words, "--out", "pruned"])


def _said(document: Mapping[str, Any], part: str) -> list[str]:
    """The options for a part of a document that differ from their defaults."""
    words: list[str] = []
    for path, field in document_fields().items():
        if field.shown.service or path == "warm_start/found":
            continue
        if not within(path, part):
            continue
        value = value_at(document, path, field.default)
        if field.written == "off":
            words += field.words(None) if value is None and not document.get("more_models") else []
        elif value is not None and value != field.default:
            words += field.words(value)
    return words


def submit_command(document: Mapping[str, Any], *more: str) -> str | None:
    """
    The `pho submit` that sends a document; None if no options say what is in it.

    Args:
        document: Document of a job.
        more: More options.
    """
    models = [str(document["model"]), *map(str, document.get("more_models") or ())]
    left = deepcopy(dict(document))
    left = {name: value for name, value in left.items() if name not in ("model", "more_models")}
    left |= {name: _first_field(name) for name, value in left.items() if value == {}}
    if "warm_start" in left:
        left["warm_start"] = {**_first_field("warm_start"), **left["warm_start"]}
    words: list[str] = []
    nothing = object()
    for path, field in document_fields().items():
        value = value_at(left, path, nothing)
        if value is nothing or (field.written == "off" and value is not None):
            continue
        said = field.words(value)
        if not said or not _says(field, said, value):
            return None
        # Without a value, which another option must follow: from what the service has found.
        words += ["--warm-start", *said] if path == "warm_start/count" else said
        remove_at(left, path)
    if left:
        return None
    words += more
    is_option = any(model.startswith("-") for model in models)
    said = [*words, "--", *models] if is_option else [*models, *words]
    return shlex.join(["pho", "submit", *said])


def _first_field(part: str) -> dict[str, Any]:
    """A part of the document that says its first default, as no option says nothing."""
    fields = [f for path, f in job_fields().items() if path.startswith(f"{part}/")]
    named = (f for f in fields if f.schema.get("default") is not None)
    return {f.path.rpartition("/")[2]: f.schema["default"] for f in [next(named, None)] if f}


def _says(field: Field, words: Sequence[str], value: Any) -> bool:
    """Whether an option with its value is read as the value that was meant."""
    if field.is_flag:
        return True
    many = field.written in ("bounds", "lines", "pairs")
    said = tuple(words[1::2]) if many else words[1]
    types = {"integer": int, "number": float}
    try:
        return bool(
            field.value(types.get(field.written, lambda same: same)(said), words[0]) == value
        )
    except (InvalidInput, ValueError):
        return False


def _bound(name: str, values: Sequence[Any]) -> str:
    if name in ("kernel_sizes", "allocations"):
        return _joined(values)
    return ":".join(map(str, dict.fromkeys(values)))


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
