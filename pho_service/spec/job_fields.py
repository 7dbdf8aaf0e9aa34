"""
The fields of a job's document, one by one: options of the command line and fields of the form are
made from them.

Types, choices, bounds, defaults and descriptions are those of the document's JSON schema, which is
also what the API shows; how a field is shown is in its :class:`Shown`. A new field of the document
is here by being there.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

from pho_service.spec.document import Shown

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec  # which takes long to import

# Sections of --help and of the form, with what the form folds up in each.
SECTIONS = {
    "Model": "Several models, revision, data type",
    "Text and calibration": "More about the calibration",
    "What to prune": "Steps besides the score",
    "Search": "More about the search",
    "Confirmation and report": "More about the confirmation",
    "After it": "Zero-shot tasks",
    "The job itself": "Name, queue and others",
}

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True)
class JobField:
    """
    A field of the document.

    Attributes:
        path: Where it stands: ``calibration/samples``.
        schema: Its JSON schema, without null.
        default: Its value if nothing is said; None, too, if the part that it is in is null then.
        nullable: Whether null may be said.
        shown: How it is shown.
    """

    path: str
    schema: Mapping[str, Any]
    default: Any
    nullable: bool
    shown: Shown

    @property
    def is_part(self) -> bool:
        """Whether it is an object with fields of its own, which come after it."""
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
        if kind == "array" and items.get("type") == "string":
            return "words" if "enum" in items or self.shown.kind == "words" else "lines"
        if kind == "object":
            values = self.schema.get("additionalProperties")
            return "pairs" if isinstance(values, dict) else ""
        kinds = {"string": "line", "integer": "integer", "number": "number", "boolean": "flag"}
        return kinds.get(str(kind), "")

    def numbers(self, texts: Iterable[str]) -> list[int | float | str]:
        """The numbers that are typed for a list of them; texts that are none stay texts."""
        whole = self.schema["items"]["type"] == "integer"
        return [number(each, whole=whole) for each in texts]


def number(typed: str, *, whole: bool = False) -> int | float | str:
    """The number that is typed, or the text if it is none."""
    if _INTEGER.fullmatch(typed):
        return int(typed) if whole else float(typed)
    return float(typed) if not whole and _NUMBER.fullmatch(typed) else typed


@cache
def job_fields() -> dict[str, JobField]:
    """All fields by their paths, each part before what is in it."""
    from pho_service.spec.job import JobSpec

    return fields_of(JobSpec)


def fields_of(document: type["JobSpec"]) -> dict[str, JobField]:
    """The fields of a document of jobs."""
    schema = document.model_json_schema()
    search = Shown(section="Search")
    return {f.path: f for f in _fields(document, schema, schema["$defs"], "", {}, search)}


def _fields(
    document: type,
    schema: Mapping[str, Any],
    parts: Mapping[str, Any],
    above: str,
    defaults: Mapping[str, Any] | None,
    within: Shown,
) -> Iterator[JobField]:
    types = get_type_hints(document, include_extras=True)
    for name, field in schema["properties"].items():
        path = f"{above}{name}"
        choices = field.get("anyOf", [field])
        own = next(each for each in choices if each.get("type") != "null")
        part = parts[own["$ref"].rpartition("/")[2]] if "$ref" in own else own
        default = None if defaults is None else defaults.get(name, field.get("default"))
        about = {key: field[key] for key in ("description",) if key in field}
        said = [*_said(types[name])]
        shown = next((each for each in said if isinstance(each, Shown)), Shown())
        shown = replace(
            shown, section=shown.section or within.section, fold=shown.fold or within.fold
        )
        yield JobField(
            path=path,
            schema={**part, **about},
            default=default,
            nullable={"type": "null"} in choices,
            shown=shown,
        )
        if "properties" in part:
            inner = next(e for e in said if is_dataclass(e) or hasattr(e, "model_fields"))
            yield from _fields(inner, part, parts, f"{path}/", default, shown)


def _said(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, and what is said of it and of them."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for each in get_args(annotation):
            yield from _said(each)
    else:
        yield annotation


def within(path: str, part: str) -> bool:
    """Whether a field is a part of the document, or in it; "" is all of it."""
    return part in ("", path) or path.startswith(f"{part}/")


def value_at(document: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value of a field."""
    found: Any = document
    for part in path.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found


def remove_at(document: dict[str, Any], path: str) -> None:
    """Take a value out, and the parts that are empty then."""
    name, _, rest = path.partition("/")
    if rest:
        remove_at(document[name], rest)
    if not rest or not document[name]:
        del document[name]


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
        if name not in small and value != default.get(name):
            small[name] = _changed(name, value)
    return small if _same(small, whole) else _filled(small, whole)


def _changed(path: str, value: Any) -> Any:
    """What is not as it is by default, of a value that is not."""
    if not isinstance(value, dict) or not job_fields()[path].is_part:
        return value
    found = {}
    for name, each in value.items():
        field = job_fields()[f"{path}/{name}"]
        own = field.schema.get("default", field.default)
        if each is not None and each != own:
            found[name] = _changed(field.path, each)
    return found


def _filled(small: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The same with those defaults that a rule would fill in otherwise."""
    full = {name: whole[name] for name in small}
    for name in small:
        tried = {**full, name: small[name]}
        if _same(tried, whole):
            full = tried
            continue
        for each in whole[name] if isinstance(whole[name], dict) else ():
            without = {key: value for key, value in full[name].items() if key != each}
            less = [without]
            if each in small[name]:
                less.append({**without, each: small[name][each]})
            tries = [{**full, name: kept} for kept in less]
            full = next((tried for tried in tries if _same(tried, whole)), full)
    return full if _same(full, whole) else dict(whole)


def _same(document: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a document asks for the job that this one, complete, asks for."""
    from pho_service.spec.job import JobSpec

    try:
        made = JobSpec.model_validate(document)
    except ValueError:
        return False
    return made.model_dump(mode="json") == whole
