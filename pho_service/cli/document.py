"""
Options made from the fields of a job's document, and the document made from the options.

Types, choices, defaults and descriptions are those of the document's JSON schema, which is also
what the API shows; pydantic checks what the options say.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pho_service.cli.sizes import parse_bytes
from pho_service.errors import InvalidInput

if TYPE_CHECKING:
    from pho_service.spec.fields import CalibrationSpec
    from pho_service.spec.job import JobSpec

T = TypeVar("T")

# What an option is called, if not as its field; more names are hidden, of older versions.
_NAMES = {
    "steps/allocation/method": ("--allocation",),
    "steps/allocation/unit": ("--allocation-unit",),
    "steps/allocation/spread": ("--allocation-spread",),
    "steps/allocation/outlier_ratio": ("--allocation-outlier-ratio",),
    "search_space": ("--space",),
    "calibration/seed": ("--calibration-seed",),
    "calibration/memory_bytes": ("--calibration-memory",),
    "confirm": ("--no-confirm",),
    "confirm/text": ("--confirm-text",),
    "confirm/windows": ("--confirm-windows",),
    "confirm/candidates": ("--finalists", "--candidates"),
    "validation/candidates": ("--validate",),
    "validation/seed": ("--validation-seed",),
    "objective/name": ("--objective",),
    "warm_start/found": ("--warm-start",),
    "warm_start/count": ("--warm-start-count",),
    "timeout_s": ("--timeout",),
}

# Fields without an option, and why.
WITHOUT = {"model": "the argument MODEL", "more_models": "further arguments MODEL"}

# Fields that only a service has a use for, and why `pho search` has not.
OF_A_SERVICE = {
    "name": "a study of `pho search` is named after what it searches",
    "islands": "one process is one island",
    "priority": "of a service's queue",
    "max_attempts": "of a service's queue",
    "max_failed_trials": "the caller sees what fails",
    "timeout_s": "an interrupted search goes on with the same command",
    "validation": "`pho validate` does it",
}

# The sections of --help; what is not named here is of the last.
GROUPS = {
    "Method": ("pattern", "scope", "preset", "steps", "search_space"),
    "Text": ("calibration", "confirm", "validation"),
    "Search": (
        "objective", "warm_start", "sampler", "trials", "islands", "seed", "timeout_s",
        "max_failed_trials",
    ),
    "Machine": (),
}  # fmt: skip


# What options say of themselves that are not written as their fields.
_ABOUT = {
    "search_space": "Bounds of the search, name=low:high, or name=value, which fixes it; may be "
    "given several times. Names: neighbourhood_share, row_share, activation_exponent, "
    "gradient_exponent, kernel_sizes=3,5, allocations=uniform,fisher, allocation_spread.",
    "confirm": "Measure no perplexity: the best by the objective alone.",
    "warm_start/found": "A configuration that was found elsewhere, in the same pattern and scope; "
    "or a library, that is, a folder of them or the URL of a service, for the most promising; "
    "without a value, that of the service. They are rated first, and the sampler begins around the "
    "best; may be given several times.",
}

# Rules of pydantic in the words of the other messages.
_RULES = {
    "greater_than_equal": "is below {ge:g}",
    "greater_than": "is not above {gt:g}",
    "less_than_equal": "is above {le:g}",
    "less_than": "is not below {lt:g}",
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """
    A field of the document that has an option.

    Attributes:
        path: Where it stands: ``calibration/samples``.
        schema: Its JSON schema, without null.
        default: Its value if nothing is said; None, too, if the part that it is in is null then.
    """

    path: str
    schema: Mapping[str, Any]
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Of its option, the one that is shown first."""
        own = f"--{self.path.rpartition('/')[2].replace('_', '-')}"
        return _NAMES.get(self.path, (own,))

    @property
    def group(self) -> str:
        """The section of --help that it stands in."""
        top = self.path.partition("/")[0]
        return next((title for title, fields in GROUPS.items() if top in fields), "Machine")

    @property
    def kind(self) -> str:
        """How its option is written."""
        special = {
            "search_space": "bounds", "warm_start/found": "points", "confirm": "off",
            "calibration/memory_bytes": "size",
        }  # fmt: skip
        listed = f"{self.schema.get('items', {}).get('type')}s"
        kind = str(self.schema.get("type", "object"))
        return special.get(self.path, listed if kind == "array" else kind)

    def option(self, names: Sequence[str], *, required: bool, hidden: bool) -> click.Option:
        """Its option, by this name."""
        flag = self.kind in ("boolean", "off")
        many = self.kind in ("bounds", "points", "strings")
        types = {"integer": click.INT, "number": click.FLOAT}
        choices = self.schema.get("enum")
        shown = self.default not in (None, [], {}) and not flag and self.kind != "bounds"
        about = _ABOUT.get(self.path, self.schema.get("description", ""))
        if shown:
            listed = isinstance(self.default, list)
            about += f"  [default: {_joined(self.default) if listed else self.default}]"
        optional = {"is_flag": False, "flag_value": ""} if self.kind == "points" else {}
        return click.Option(
            [_parameter(self.path, *names), *names],
            type=None if flag else click.Choice(choices) if choices else types.get(self.kind),
            multiple=many,
            help=about.strip(),
            required=required,
            hidden=hidden,
            **({"is_flag": True} if flag else optional),
        )

    def value(self, said: Any, name: str) -> Any:
        """What an option says, as JSON."""
        from pho_service.spec.space import parse_bounds

        if self.kind == "size":
            return parse_bytes(said, name)
        if self.kind == "off":
            return None
        if self.kind == "bounds":
            return {bound: list(values) for bound, values in parse_bounds(said).items()}
        if self.kind == "integers":
            try:
                return [int(number) for number in said.split(",")]
            except ValueError:
                raise InvalidInput(
                    f"{name} {said!r} are not numbers with commas between: 3,5,9."
                ) from None
        return list(said) if isinstance(said, tuple) else said

    def words(self, value: Any) -> list[str]:
        """The option that says a value."""
        name = self.names[0]
        if self.kind in ("boolean", "off"):
            return [name]
        if self.kind == "bounds":
            found = {bound: _bound(bound, values) for bound, values in value.items() if values}
            return [word for bound, said in found.items() for word in (name, f"{bound}={said}")]
        if self.kind == "strings":
            return [word for each in value for word in (name, str(each))]
        return [name, _joined(value) if isinstance(value, list) else str(value)]


@cache
def document_fields() -> dict[str, Field]:
    """The fields of a job's document that have an option, by their paths."""
    from pydantic import TypeAdapter

    from pho_service.spec.job import JobSpec

    schema = TypeAdapter(JobSpec).json_schema()
    return {field.path: field for field in _fields(schema, schema["$defs"], "", {})}


def _fields(
    schema: Mapping[str, Any],
    parts: Mapping[str, Any],
    above: str,
    defaults: Mapping[str, Any] | None,
) -> Iterator[Field]:
    for name, field in schema["properties"].items():
        path = f"{above}{name}"
        if path in WITHOUT:
            continue
        (own,) = (each for each in field.get("anyOf", [field]) if each.get("type") != "null")
        part = parts[own["$ref"].rpartition("/")[2]] if "$ref" in own else own
        default = None if defaults is None else defaults.get(name, field.get("default"))
        about = {key: field[key] for key in ("description",) if key in field}
        whole = "properties" not in part or path in _NAMES
        if whole:
            yield Field(path=path, schema={**part, **about}, default=default)
        if "properties" in part and path != "search_space":
            yield from _fields(part, parts, f"{path}/", default)


@dataclass(frozen=True, kw_only=True)
class Given:
    """
    The options of a document that were given.

    Attributes:
        said: What they say, by the paths of their fields.
        names: What they are called, by the same.
    """

    said: Mapping[str, Any]
    names: Mapping[str, str]

    def document(self, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """
        The document that has what was given, put into another one.

        Raises:
            InvalidInput: An option cannot be read, or has no place in that other one.
        """
        made: dict[str, Any] = _copied(document or {})
        for path, said in self.said.items():
            name = self.names[path]
            *folders, last = path.split("/")
            place = made
            value: Any = document_fields()[path].value(said, name)
            if path == "warm_start/found":  # files, which are read when the pattern is known
                value, folders, last = {}, [], "warm_start"
            for folder in [*folders, *([last] if isinstance(value, dict) else [])]:
                place = place.setdefault(folder, {})
                if not isinstance(place, dict):
                    raise InvalidInput(
                        f"{name} has no place in the job document: its {folder!r} is no object. "
                        "Leave one of them out."
                    )
            place.update(value if isinstance(value, dict) else {last: value})
        return made

    def __call__(self, path: str) -> Any:
        """What was given for a field, or its default."""
        return self.said.get(path, document_fields()[path].default)

    def job(self, document: Mapping[str, Any]) -> "JobSpec":
        """
        Check a document.

        Raises:
            InvalidInput: It breaks a rule; names the option and the value.
        """
        from pydantic import ValidationError

        from pho_service.spec.job import JobSpec

        try:
            return JobSpec.model_validate(document)
        except ValidationError as error:
            raise self._refused(error, "") from error

    def calibration(self) -> "CalibrationSpec":
        """
        How a model is calibrated.

        Raises:
            InvalidInput: It breaks a rule; names the option and the value.
        """
        from pydantic import ValidationError

        from pho_service.spec.fields import CalibrationSpec

        try:
            return CalibrationSpec.model_validate(self.document().get("calibration", {}))
        except ValidationError as error:
            raise self._refused(error, "calibration/") from error

    def _refused(self, error: Any, above: str) -> InvalidInput:
        """What pydantic says, with the options' names instead of the fields'."""
        sentences = []
        for each in error.errors():
            path = above + "/".join(map(str, each["loc"]))
            message = str(each["msg"]).removeprefix("Value error, ").removesuffix(".")
            ours = isinstance(each.get("ctx", {}).get("error"), InvalidInput)
            thing = self._thing(path, each["input"], named=ours)
            # The plan of the whole search is checked with the number of trials.
            if path == "trials" and ours and not message.startswith("trials"):
                thing = ""
            if thing and each["type"] in _RULES:
                rule = _RULES[each["type"]].format(**each["ctx"])
                sentences.append(f"{thing.removesuffix(': ')} {rule}")
            else:
                sentences.append(thing + message.replace("Input should", "it should"))
        return InvalidInput("; ".join(dict.fromkeys(sentences)) + ".")

    def _thing(self, path: str, value: object, *, named: bool) -> str:
        """
        What a message is about: an option with its value, or else a field.

        Args:
            path: Of the field.
            value: It.
            named: Whether the message names what it is about in any case.
        """
        given = [p for p in self.said if _within(path, p) or _within(p, path)] if path else []
        if given:
            said = self.said[given[0]]
            words = said if isinstance(said, tuple) else () if said is True else (said,)
            return " ".join((self.names[given[0]], *map(str, words))) + ": "
        if path.partition("/")[0] in WITHOUT:
            return "MODEL: "
        return "" if named or not path else f"/{path} {_short(value)}: "


class DocumentCommand(click.Command):
    """
    A verb with options for fields of the job's document, which are made when they are needed.

    Args:
        fields: Their paths, or those of parts; those that begin with ``-`` are left out.
        names: What some are called in this verb.
        required: Fields that must be given.
    """

    def __init__(
        self,
        *args: Any,
        fields: Sequence[str],
        names: Mapping[str, str] | None = None,
        required: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self._asked, self._renamed, self._required = fields, names or {}, required

    @cached_property
    def fields(self) -> list[Field]:
        """The fields that have an option."""
        left = tuple(path[1:] for path in self._asked if path.startswith("-"))
        return [
            field
            for path, field in document_fields().items()
            if any(_within(path, part) for part in self._asked)
            and not any(_within(path, part) for part in left)
        ]

    @cached_property
    def _options(self) -> dict[str, tuple[Field, click.Option]]:
        """By the names of their parameters."""
        found = {}
        for field in self.fields:
            shown, *hidden = self._names(field)
            for name in (shown, *hidden):
                option = field.option(
                    [name],
                    required=field.path in self._required,
                    hidden=name != shown,
                )
                found[str(option.name)] = (field, option)
        return found

    def _names(self, field: Field) -> tuple[str, ...]:
        return (self._renamed[field.path],) if field.path in self._renamed else field.names

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All of them, those of the document first."""
        own = super().get_params(ctx)
        arguments = [each for each in own if isinstance(each, click.Argument)]
        made = [option for _, option in self._options.values()]
        return [*arguments, *made, *(each for each in own if each not in arguments)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; what is of the document becomes the argument ``given``."""
        rest = super().parse_args(ctx, args)
        said, names = {}, {}
        for parameter, (field, option) in self._options.items():
            value = ctx.params.pop(parameter, None)
            if value is not None and value != () and value is not False:
                said[field.path], names[field.path] = value, option.opts[0]
        ctx.params["given"] = Given(said=said, names=names)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in sections."""
        groups = {parameter: field.group for parameter, (field, _) in self._options.items()}
        for title in GROUPS:
            records = [
                parameter.get_help_record(ctx)
                for parameter in self.get_params(ctx)
                if isinstance(parameter, click.Option)
                if groups.get(str(parameter.name), "Machine") == title
            ]
            rows = [record for record in records if record is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def search_command(document: Mapping[str, Any], *more: str) -> str:
    """
    The `pho search` that asks for what a document does: each option that differs from its default.

    Args:
        document: Of a job; what is left out has its default.
        more: Words at the end.
    """
    words = ["pho", "search", str(document["model"]), *map(str, document.get("more_models") or ())]
    for path, field in document_fields().items():
        if any(_within(path, each) for each in (*OF_A_SERVICE, "warm_start")):
            continue
        value = _at(document, path, field.default)
        if field.kind == "off":
            words += field.words(None) if value is None and not document.get("more_models") else []
        elif value != field.default:
            words += field.words(value)
    return shlex.join([*words, *more])


def _at(document: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of a field."""
    found: Any = document
    for part in path.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found


def _parameter(path: str, name: str) -> str:
    """The name of a parameter, which click wants to be one of Python's."""
    return f"{path}_{name}".replace("/", "_").replace("-", "_")


def _within(path: str, part: str) -> bool:
    return part in ("", path) or path.startswith(f"{part}/")


def _bound(name: str, values: Sequence[Any]) -> str:
    if name in ("kernel_sizes", "allocations"):
        return _joined(values)
    return ":".join(map(str, dict.fromkeys(values)))


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _copied(value: Any) -> Any:
    """Of dictionaries within dictionaries."""
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _short(value: object) -> str:
    """A value, in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
