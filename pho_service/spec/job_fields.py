"""
The fields of a job's document, one by one: options of the command line and fields of the form are
made from them.

Types, choices, bounds, defaults and descriptions are those of the document's JSON schema, which is
also what the API shows. A new field of the document is here by being there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec  # which takes long to import


@dataclass(frozen=True, kw_only=True)
class JobField:
    """
    A field of the document.

    Attributes:
        path: Where it stands: ``calibration/samples``.
        schema: Its JSON schema, without null.
        default: Its value if nothing is said; None, too, if the part that it is in is null then.
        nullable: Whether null may be said.
    """

    path: str
    schema: Mapping[str, Any]
    default: Any
    nullable: bool

    @property
    def is_part(self) -> bool:
        """Whether it is an object with fields of its own, which come after it."""
        return "properties" in self.schema


@cache
def job_fields() -> dict[str, JobField]:
    """All fields by their paths, each part before what is in it."""
    from pydantic import TypeAdapter

    from pho_service.spec.job import JobSpec

    schema = TypeAdapter(JobSpec).json_schema()
    return {field.path: field for field in _fields(schema, schema["$defs"], "", {})}


def _fields(
    schema: Mapping[str, Any],
    parts: Mapping[str, Any],
    above: str,
    defaults: Mapping[str, Any] | None,
) -> Iterator[JobField]:
    for name, field in schema["properties"].items():
        path = f"{above}{name}"
        choices = field.get("anyOf", [field])
        own = next(each for each in choices if each.get("type") != "null")
        part = parts[own["$ref"].rpartition("/")[2]] if "$ref" in own else own
        default = None if defaults is None else defaults.get(name, field.get("default"))
        about = {key: field[key] for key in ("description",) if key in field}
        yield JobField(
            path=path,
            schema={**part, **about},
            default=default,
            nullable={"type": "null"} in choices,
        )
        if "properties" in part:
            yield from _fields(part, parts, f"{path}/", default)


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
