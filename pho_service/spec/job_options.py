"""
The fields of a document, one by one, as options of the command line and fields of the form.

Most are of a job's document; a verb has more, of a dataclass that says what it alone is asked.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import click
from pydantic import TypeAdapter

from pho_service.errors import InvalidInput
from pho_service.spec.document import (
    AFTER,
    JOB,
    MODEL,
    PRUNED,
    REPORT,
    SEARCH,
    TEXT,
    FieldShown,
    parse_bytes,
    sentences_of,
)
from pho_service.spec.minutes import OF_THE_TEXT, SIZES, put_sizes

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec


# Sections of --help and of the form, with what the form calls them under More.
SECTIONS = {
    MODEL: "Several models, revision, data type",
    TEXT: "Data set and calibration",
    PRUNED: "Scope, and steps besides the score",
    SEARCH: "Trials, seed, sampler, islands",
    REPORT: "Confirmation by perplexity",
    AFTER: "Pruned model, webhook, zero-shot tasks",
    JOB: "Name, queue and others",
}

NO_LIMIT = "none"  # what is typed for minutes that are null

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True)
class JobField:
    """A field of the document."""

    path: str  # Where it stands: ``calibration/samples``
    schema: Mapping[str, Any]  # Its JSON schema, without null
    default: Any  # Its value if nothing is said; None, too, if the part that it is in is null then
    nullable: bool  # Whether null may be said
    required: bool  # Whether something must be said, if it is not in a part
    shown: FieldShown

    @property
    def argument(self) -> str:
        """What Python calls it; "" if no function has it."""
        own = self.path.rpartition("/")[2]
        return own if self.shown.argument is None else self.shown.argument

    @property
    def is_part(self) -> bool:
        """Return whether it is an object with fields of its own, which come after it."""
        return "properties" in self.schema

    @property
    def kind(self) -> str:
        """
        How it is written: ``line``, ``integer``, ``number``, ``choice``, ``flag``, ``words`` and
        ``numbers`` (in one line), ``lines``, ``pairs``, ``part``, or "" if only JSON says it.
        """
        kind, items = self.schema.get("type"), self.schema.get("items", {})
        if self.is_part:
            return "part"
        if "enum" in self.schema:
            return "choice"
        if kind == "array" and items.get("type") in ("integer", "number"):
            return "numbers"
        if kind == "array" and ("enum" in items or self.shown.kind == "words"):
            return "words"
        if kind == "array" and items.get("type") == "string":
            return "lines"
        if kind == "object":
            values = self.schema.get("additionalProperties")
            return "pairs" if isinstance(values, dict) else ""
        kinds = {"string": "line", "integer": "integer", "number": "number", "boolean": "flag"}
        return kinds.get(str(kind), "")

    def numbers(self, texts: Iterable[str]) -> list[int | float | str]:
        """The numbers that are typed for a list of them; texts that are none stay texts."""
        whole = self.schema["items"]["type"] == "integer"
        return [number(text, whole=whole) for text in texts]

    def pair_value(self, typed: str) -> int | float | str:
        """The value that is typed for a name: a number, unless its values are texts."""
        texts = self.schema["additionalProperties"].get("type") == "string"
        return typed if texts else number(typed)


def number(typed: str, *, whole: bool = False) -> int | float | str:
    """The number that is typed, or the text if it is none."""
    if _INTEGER.fullmatch(typed):
        return int(typed) if whole else float(typed)
    return float(typed) if not whole and _NUMBER.fullmatch(typed) else typed


def job_fields() -> dict[str, JobField]:
    """The fields of a job's document."""
    from pho_service.spec.job import JobSpec

    return fields_of(JobSpec, SEARCH)


@cache
def fields_of(document: type, section: str = "Output") -> dict[str, JobField]:
    """All fields by their paths, each part before what is in it; most are in a section of help."""
    schema = TypeAdapter(document).json_schema()
    shown = FieldShown(section=section)
    return {f.path: f for f in _fields(document, schema, schema.get("$defs", {}), "", {}, shown)}


def _fields(
    document: type,
    schema: Mapping[str, Any],
    parts: Mapping[str, Any],
    above: str,
    defaults: Mapping[str, Any] | None,
    within: FieldShown,
) -> Iterator[JobField]:
    types, sentences = get_type_hints(document, include_extras=True), sentences_of(document)
    for name, field in schema["properties"].items():
        path = f"{above}{name}"
        choices = field.get("anyOf", [field])
        variant = next(choice for choice in choices if choice.get("type") != "null")
        part = parts[variant["$ref"].rpartition("/")[2]] if "$ref" in variant else variant
        default = None if defaults is None else defaults.get(name, field.get("default"))
        sentence = field.get("description") or sentences.get(name, "")
        about = {"description": sentence} if sentence else {}
        metadata = [*_said_of_field(types[name])]
        shown = next((entry for entry in metadata if isinstance(entry, FieldShown)), FieldShown())
        shown = replace(
            shown,
            section=shown.section or within.section,
            fold=shown.fold or within.fold,
            prefix=shown.prefix or within.prefix,
        )
        yield JobField(
            path=path,
            schema={**part, **about},
            default=default,
            nullable={"type": "null"} in choices,
            required=not above and name in schema.get("required", ()),
            shown=shown,
        )
        if "properties" in part:
            inner = next(e for e in metadata if is_dataclass(e) or hasattr(e, "model_fields"))
            yield from _fields(inner, part, parts, f"{path}/", default, shown)


def _said_of_field(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, and what is said of it and of them."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _said_of_field(part)
    else:
        yield annotation


def within(path: str, part: str) -> bool:
    """Return whether a field is a part of the document, or in it; "" is all of it."""
    return part in ("", path) or path.startswith(f"{part}/")


def value_at(document: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value of a field."""
    value: Any = document
    for part in path.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def remove_at(document: dict[str, Any], path: str) -> None:
    """Take a value out, and the parts that are empty then."""
    name, _, rest = path.partition("/")
    if rest:
        remove_at(document[name], rest)
    if not rest or not document[name]:
        del document[name]


def changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A document with changes: of parts field by field, of all else whole."""
    return {
        **document,
        **{
            name: changed(old, value)
            if isinstance(old := document.get(name), Mapping) and isinstance(value, Mapping)
            else value
            for name, value in changes.items()
        },
    }


def minimal_document(spec: "JobSpec") -> dict[str, Any]:
    """The document that asks for the same job and says no default."""
    whole = spec.model_dump(mode="json")
    sparse = {
        name: _changed(name, whole[name])
        for name in ("pattern", "patterns", "target")
        if whole.get(name)
    }
    least = {"model": spec.model, **({"more_models": m} if (m := spec.more_models) else {})}
    default = type(spec).model_validate({**least, **sparse}).model_dump(mode="json")
    small = {**least, **sparse}
    for name, value in whole.items():
        if name not in (*small, "free_sizes") and value != default.get(name):
            small[name] = _changed(name, value)
    if _as_published(whole):
        small["minutes"] = None
    elif "minutes" in whole:  # sizes that are chosen are said, also those that are usual
        said = {path: size for path, size in spec.sizes.items() if path not in spec.free_sizes}
        kept = {"minutes": spec.minutes} if said.keys() & {*OF_THE_TEXT} else {}
        small = put_sizes({**small, **kept}, said)
    return small if _same(small, whole) else _filled(small, whole)


def _changed(path: str, value: Any) -> Any:
    """The parts of a value that are not as they are by default."""
    if not isinstance(value, dict) or not job_fields()[path].is_part:
        return value
    changes = {}
    for name, part in value.items():
        field = job_fields()[f"{path}/{name}"]
        default = field.schema.get("default", field.default)
        if part is not None and part != default:
            changes[name] = _changed(field.path, part)
    return changes


def _filled(small: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    full = {name: whole[name] for name in small}
    for name in small:
        tried = {**full, name: small[name]}
        if _same(tried, whole):
            full = tried
            continue
        for inner in whole[name] if isinstance(whole[name], dict) else ():
            without = {key: value for key, value in full[name].items() if key != inner}
            less = [without]
            if inner in small[name]:
                less.append({**without, inner: small[name][inner]})
            tries = [{**full, name: part} for part in less]
            full = next((tried for tried in tries if _same(tried, whole)), full)
    return full if _same(full, whole) else dict(whole)


def _same(document: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Return whether a document asks for the job that this one, complete, asks for."""
    from pho_service.spec.job import JobSpec

    try:
        job = JobSpec.model_validate(document)
    except ValueError:
        return False
    return job.model_dump(mode="json") == whole


@dataclass(frozen=True, kw_only=True)
class Field(JobField):
    """A field of the document that has an option."""

    @property
    def name(self) -> str:
        word = self.path.rpartition("/")[2].replace("_", "-")
        return f"--{self.shown.prefix}{word}" if self.shown.option is None else self.shown.option

    @property
    def written(self) -> str:
        """The way its option is written."""
        return self.shown.kind or self.kind

    @property
    def is_flag(self) -> bool:
        """Return whether its option has no value."""
        return self.written in ("flag", "off", "part")

    def parameter(self, name: str) -> str:
        """The name that click has for its option: one that Python could have."""
        return f"{self.path}_{name}".replace("/", "_").replace("-", "_")

    def option(self, name: str, *, required: bool) -> click.Option:
        """Its option, by this name."""
        kind, has_names = self.written, self.written in ("bounds", "pairs")
        types = {"integer": click.INT, "number": click.FLOAT, "path": click.Path()}
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
            multiple=has_names or kind in ("points", "lines"),
            metavar="NAME=VALUE" if has_names else {"models": "MODEL"}.get(self.shown.picks),
            help=about.strip(),
            required=required or self.required,
            shell_complete=_methods_beginning if self.shown.picks == "methods" else None,
            **({"is_flag": True} if self.is_flag else optional),
        )

    def _default(self) -> str:
        """The words of `--help` for its default; "" says nothing."""
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
        """Read the text of an option as JSON."""
        from pho_service.spec.curve import parse_rise
        from pho_service.spec.minutes import parse_minutes
        from pho_service.spec.space import parse_bounds

        match self.written:
            case "size":
                return parse_bytes(said, name)
            case "words":
                return [word.strip() for word in said.split(",")]
            case "minutes":
                return None if said == NO_LIMIT else parse_minutes(said, name)
            case "rise":
                return parse_rise(said, name)
            case "off":
                return None
            case "part":
                return {}
            case "bounds":
                return {bound: list(values) for bound, values in parse_bounds(said).items()}
            case "numbers":
                values = self.numbers(word.strip() for word in said.split(","))
                if any(isinstance(word, str) for word in values):
                    whole = self.schema["items"]["type"] == "integer"
                    raise InvalidInput(
                        f"{name} {said!r} are not numbers with commas between: "
                        f"{'3,5,9' if whole else '0.2,-0.1'}."
                    )
                return values
            case "pairs":
                pairs = [word.rpartition("=") for word in said]
                if not all(key for key, _, _ in pairs):
                    raise InvalidInput(f"{name} {' '.join(said)}: write NAME=VALUE.")
                return {key: self.pair_value(value) for key, _, value in pairs}
        return list(said) if isinstance(said, tuple) else said

    def words(self, value: Any) -> list[str]:
        """The option that says a value."""
        if self.is_flag:
            return [] if value is False else [self.name]
        match self.written:
            case "bounds":
                pairs = {bound: _bound(bound, values) for bound, values in value.items() if values}
                texts = [f"{bound}={text}" for bound, text in pairs.items()]
            case "minutes":
                texts = [NO_LIMIT if value is None else f"{value:g}"]
            case "pairs":
                texts = [f"{key}={part}" for key, part in value.items()]
            case "lines":
                texts = [str(line) for line in value]
            case _:
                texts = [_joined(value) if isinstance(value, list) else str(value)]
        return [word for option_text in texts for word in (self.name, option_text)]


def _methods_beginning(_: click.Context, __: click.Parameter, beginning: str) -> list[str]:
    """The names of published methods that begin so, for the completion of a shell."""
    from pho_service.spec.baselines import named_baselines
    from pho_service.spec.pattern import Pattern

    names = {*named_baselines(Pattern.parse("0.5")), *named_baselines(Pattern.parse("2:4"))}
    return sorted(name for name in names if name.startswith(beginning))


def document_fields() -> dict[str, Field]:
    """The fields of a job's document that have an option, by their paths."""
    from pho_service.spec.job import JobSpec

    return option_fields(JobSpec, SEARCH)


@cache
def option_fields(document: type, section: str = "Output") -> dict[str, Field]:
    """The fields of a document that have an option, by their paths."""
    return {
        path: Field(**vars(field))
        for path, field in fields_of(document, section).items()
        if not path.startswith("search_space/")
        and field.shown.option != ""
        and (not field.is_part or field.shown.option)
    }


# What messages call a field, by its path: in Python, and in a job.
def argument(path: str, value: object = None) -> str:
    """The argument of a function, or the key of one that is a dictionary."""
    field = job_fields().get(path)
    name = path if field is None else field.argument
    return name if value is None else f"{name}={value!r}"


def entry(path: str, value: object = None) -> str:
    """The place in a job's document; "" for what no job asks for."""
    if path not in job_fields():
        return ""
    name = path.replace("/", ".")
    return name if value is None else f"{name}={json.dumps(value)}"


def search_command(document: Mapping[str, Any], *more: str) -> str:
    """The `pho search` that asks for what a document does: the options that are not defaults."""
    models = [str(document["model"]), *map(str, document.get("more_models") or ())]
    return shlex.join(["pho", "search", *models, *_said(document, ""), *more])


def prune_command(model: str, config: str, document: Mapping[str, Any]) -> str:
    """The `pho prune` that prunes a model with a search's result, on the search's calibration."""
    words = ["pho", "prune", model, "--config", config, *_said(document, "calibration")]
    return shlex.join([*words, "--out", "pruned"])


def _said(document: Mapping[str, Any], part: str) -> list[str]:
    """The options for a part of a document that differ from their defaults."""
    words: list[str] = []
    minutes, free = document.get("minutes"), document.get("free_sizes", ())
    for path, field in document_fields().items():
        if field.shown.service or path == "warm_start/found":
            continue
        if not within(path, part):
            continue
        value = value_at(document, path, field.default)
        if path == "minutes":
            words += field.words(value) if free or _as_published(document) else []
        elif minutes is not None and path in SIZES:
            size = value_at(document, path)  # None of a confirmation that there is not
            words += [] if path in free or size is None else field.words(size)
        elif field.written == "off":
            words += field.words(None) if value is None and not document.get("more_models") else []
        elif value is not None and value != field.default:
            words += field.words(value)
    return words


def _as_published(document: Mapping[str, Any]) -> bool:
    """Whether a job is on as much text as papers take, and nobody has said how much."""
    calibration = document.get("calibration", {})
    return document.get("minutes") is None and not any(
        calibration.get(path.rpartition("/")[2], field.default) != field.default
        for path, field in document_fields().items()
        if path in OF_THE_TEXT
    )


def submit_command(document: Mapping[str, Any], *more: str) -> str | None:
    """The `pho submit` that sends a document; None if no options say what is in it."""
    models = [str(document["model"]), *map(str, document.get("more_models") or ())]
    rest = deepcopy(dict(document))
    rest = {name: value for name, value in rest.items() if name not in ("model", "more_models")}
    rest |= {name: _first_field(name) for name, value in rest.items() if value == {}}
    if "warm_start" in rest:
        rest["warm_start"] = {**_first_field("warm_start"), **rest["warm_start"]}
    words: list[str] = []
    nothing = object()
    for path, field in document_fields().items():
        value = value_at(rest, path, nothing)
        if value is nothing or (field.written == "off" and value is not None):
            continue
        option_words = field.words(value)
        if not option_words or not _says(field, option_words, value):
            return None
        # Without a value, which another option must follow: from what the service has found.
        words += ["--warm-start", *option_words] if path == "warm_start/count" else option_words
        remove_at(rest, path)
    if rest:
        return None
    words += more
    is_option = any(model.startswith("-") for model in models)
    arguments = [*words, "--", *models] if is_option else [*models, *words]
    return shlex.join(["pho", "submit", *arguments])


def _first_field(part: str) -> dict[str, Any]:
    """A part of the document that says its first default, as no option says nothing."""
    fields = [f for path, f in job_fields().items() if path.startswith(f"{part}/")]
    with_default = (f for f in fields if f.schema.get("default") is not None)
    return {f.path.rpartition("/")[2]: f.schema["default"] for f in [next(with_default, None)] if f}


def _says(field: Field, words: Sequence[str], value: Any) -> bool:
    """Return whether an option with its value is read as the value that was meant."""
    if field.is_flag:
        return True
    many = field.written in ("bounds", "lines", "pairs")
    text = tuple(words[1::2]) if many else words[1]
    types = {"integer": int, "number": float}
    try:
        return bool(
            field.value(types.get(field.written, lambda same: same)(text), words[0]) == value
        )
    except (InvalidInput, ValueError):
        return False


def _bound(name: str, values: Sequence[Any]) -> str:
    if name in ("kernel_sizes", "allocations"):
        return _joined(values)
    return ":".join(map(str, dict.fromkeys(values)))


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
