"""
The fields of a job's document as options: their names, sections, types and values.

Types, choices, defaults and descriptions are those of the document's JSON schema, which is also
what the API shows. A new field has an option by being there.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import click

from pho_service.errors import InvalidInput
from pho_service.spec.job_fields import JobField, job_fields, value_at, within
from pho_service.spec.sizes import parse_bytes
from pho_service.spec.tasks import USUAL_TASKS

# What an option is called, if not as its field.
_NAMES = {
    "steps/allocation/method": ("--allocation",),
    "steps/allocation/unit": ("--allocation-unit",),
    "steps/allocation/spread": ("--allocation-spread",),
    "steps/allocation/outlier_ratio": ("--allocation-outlier-ratio",),
    "steps/allocation/offsets": ("--allocation-offset",),
    "steps/allocation/depth": ("--allocation-depth",),
    "steps/reconstruction/method": ("--reconstruction",),
    "steps/reconstruction/passes": ("--reconstruction-passes",),
    "steps/reconstruction/learning_rate": ("--reconstruction-rate",),
    "steps/reconstruction/seed": ("--reconstruction-seed",),
    "steps/linears/sparsities": ("--sparsity",),
    "search_space": ("--space",),
    "calibration/seed": ("--calibration-seed",),
    "calibration/memory_bytes": ("--calibration-memory",),
    "confirm": ("--no-confirm",),
    "confirm/text": ("--confirm-text",),
    "confirm/windows": ("--confirm-windows",),
    "confirm/candidates": ("--finalists",),
    "validation/candidates": ("--validate",),
    "validation/seed": ("--validation-seed",),
    "objective/name": ("--objective",),
    "warm_start/found": ("--warm-start",),
    "warm_start/count": ("--warm-start-count",),
    "timeout_s": ("--timeout",),
    "target/perplexity_rise": ("--within",),
    "tasks_limit": ("--limit",),
}

# Defaults that are not values of the field.
_DEFAULTS = {
    "steps/statistics": "the preset's",
    "steps/allocation/method": "the preset's",
    "steps/permutation": "the preset's",
    "steps/repruning": "the preset's",
    "steps/update": "the preset's",
    "steps/shrinkage": "the preset's",
    "steps/reconstruction/method": "the preset's",
    "confirm": None,
    "search_space": None,
    "validation/candidates": None,
}

# Fields without an option, and why.
WITHOUT = {
    "model": "the argument MODEL",
    "more_models": "further arguments MODEL",
}

# Fields that only a service has a use for, and why `pho search` has not.
OF_A_SERVICE = {
    "name": "a study of `pho search` is named after what it searches",
    "islands": "one process is one island",
    "priority": "of a service's queue",
    "notify": "a command is over when it returns",
    "patterns": "`pho curve` searches at several",
    "target": "--within of `pho search` is an option of its own",
    "prune": "`pho prune` does it, with what was found",
    "tasks": "`pho evaluate --tasks` measures what was pruned",
    "tasks_dir": "of --tasks",
    "tasks_limit": "of --tasks",
    "max_attempts": "of a service's queue",
    "max_failed_trials": "`pho search` goes on past failed trials",
    "timeout_s": "an interrupted search goes on with the same command",
}

# What options say of themselves that are not written as their fields.
_ABOUT = {
    "search_space": "Bounds of the search, name=low:high, or name=value, which fixes it; may be "
    "given several times. Names: neighbourhood_share, row_share, activation_exponent, "
    "gradient_exponent, kernel_sizes=3,5, allocations=uniform,fisher, allocation_spread.",
    "patterns": "Instead of --pattern: several, with commas between, each searched and confirmed.",
    "target/perplexity_rise": "Instead of --pattern: find the highest sparsity whose perplexity is "
    "at most so much above the dense model's, such as 5%.",
    "tasks": "Zero-shot tasks of lm-evaluation-harness, with commas between; papers report "
    f"{','.join(USUAL_TASKS)}. Needs the extra eval.",
    "confirm": "Measure no perplexity: the best by the objective alone.",
    "warm_start/found": "A configuration that was found elsewhere, in the same pattern and scope; "
    "or a library, that is, a folder of them or the URL of a service, for the most promising; "
    "without a value, that of the service. They are rated first, and the sampler begins around the "
    "best; may be given several times.",
}


@dataclass(frozen=True, kw_only=True)
class Field(JobField):
    """
    A field of the document that has an option.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its option; the first one is shown."""
        own = f"--{self.path.rpartition('/')[2].replace('_', '-')}"
        return _NAMES.get(self.path, (own,))

    @property
    def kind(self) -> str:
        """How its option is written."""
        special = {
            "search_space": "bounds", "warm_start/found": "points", "confirm": "off",
            "calibration/memory_bytes": "size", "patterns": "list", "tasks": "list",
            "target/perplexity_rise": "rise",
        }  # fmt: skip
        listed = f"{self.schema.get('items', {}).get('type')}s"
        kind = str(self.schema.get("type", "object"))
        return special.get(self.path, listed if kind == "array" else kind)

    def parameter(self, name: str) -> str:
        """What click calls its option with this name: a name that Python could have."""
        return f"{self.path}_{name}".replace("/", "_").replace("-", "_")

    def option(self, names: Sequence[str], *, required: bool, hidden: bool) -> click.Option:
        """Its option, by this name."""
        flag = self.kind in ("boolean", "off")
        many = self.kind in ("bounds", "points", "strings", "object")
        types = {"integer": click.INT, "number": click.FLOAT}
        choices = self.schema.get("enum")
        default = _DEFAULTS.get(self.path, self.schema.get("default", self.default))
        about = _ABOUT.get(self.path, self.schema.get("description", ""))
        if self.kind in ("strings", "object"):
            about = f"{about.rstrip('.')}; may be given several times."
        if default is not False and default not in (None, [], {}):
            about += f"  [default: {_joined(default) if isinstance(default, list) else default}]"
        optional = {"is_flag": False, "flag_value": ""} if self.kind == "points" else {}
        return click.Option(
            [self.parameter(names[0]), *names],
            type=None if flag else click.Choice(choices) if choices else types.get(self.kind),
            multiple=many,
            metavar="NAME=VALUE" if self.kind in ("bounds", "object") else None,
            help=about.strip(),
            required=required,
            hidden=hidden,
            **({"is_flag": True} if flag else optional),
        )

    def value(self, said: Any, name: str) -> Any:
        """What an option says, as JSON."""
        from pho_service.spec.curve import parse_rise
        from pho_service.spec.space import parse_bounds

        if self.kind == "size":
            return parse_bytes(said, name)
        if self.kind == "list":
            return [each.strip() for each in said.split(",")]
        if self.kind == "rise":
            return parse_rise(said, name)
        if self.kind == "off":
            return None
        if self.kind == "bounds":
            return {bound: list(values) for bound, values in parse_bounds(said).items()}
        if self.kind in ("integers", "numbers"):
            read, example = (int, "3,5,9") if self.kind == "integers" else (float, "0.2,-0.1")
            try:
                return [read(number) for number in said.split(",")]
            except ValueError:
                raise InvalidInput(
                    f"{name} {said!r} are not numbers with commas between: {example}."
                ) from None
        if self.kind == "object":
            pairs = [each.rpartition("=") for each in said]
            if not all(key for key, _, _ in pairs):
                raise InvalidInput(f"{name} {' '.join(said)}: write NAME=VALUE.")
            return {key: _number(value) for key, _, value in pairs}
        return list(said) if isinstance(said, tuple) else said

    def words(self, value: Any) -> list[str]:
        """The option that says a value."""
        name = self.names[0]
        if self.kind in ("boolean", "off"):
            return [] if value is False else [name]
        if self.kind == "bounds":
            found = {bound: _bound(bound, values) for bound, values in value.items() if values}
            return [word for bound, said in found.items() for word in (name, f"{bound}={said}")]
        if self.kind == "strings":
            return [word for each in value for word in (name, str(each))]
        if self.kind == "object":
            return [word for key, said in value.items() for word in (name, f"{key}={said}")]
        return [name, _joined(value) if isinstance(value, list) else str(value)]


@cache
def document_fields() -> dict[str, Field]:
    """The fields of a job's document that have an option, by their paths."""
    return {
        path: Field(**vars(field))
        for path, field in job_fields().items()
        if not any(within(path, each) for each in WITHOUT)
        and (not field.is_part or path in _NAMES)
        and not path.startswith("search_space/")
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
        if any(within(path, each) for each in (*OF_A_SERVICE, "warm_start/found")):
            continue
        if not within(path, part):
            continue
        value = value_at(document, path, field.default)
        if field.kind == "off":
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
    left = {name: value for name, value in document.items() if name not in ("model", "more_models")}
    left |= {name: _first_field(name) for name, value in left.items() if value == {}}
    if "warm_start" in left:
        left["warm_start"] = {**_first_field("warm_start"), **left["warm_start"]}
    words: list[str] = []
    nothing = object()
    for path, field in document_fields().items():
        value = value_at(left, path, nothing)
        if value is nothing or (field.kind == "off" and value is not None):
            continue
        said = field.words(value)
        if not said or not _says(field, said, value):
            return None
        # Without a value, which another option must follow: from what the service has found.
        words += ["--warm-start", *said] if path == "warm_start/count" else said
        _remove(left, path)
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
    if field.kind in ("boolean", "off"):
        return True
    said = tuple(words[1::2]) if field.kind in ("bounds", "strings", "object") else words[1]
    types = {"integer": int, "number": float}
    try:
        return bool(field.value(types.get(field.kind, lambda same: same)(said), words[0]) == value)
    except (InvalidInput, ValueError):
        return False


def _remove(document: dict[str, Any], path: str) -> None:
    """Take a value out, and the parts that are empty then, of this copy alone."""
    name, _, rest = path.partition("/")
    if rest:
        document[name] = {**document[name]}
        _remove(document[name], rest)
    if not rest or not document[name]:
        del document[name]


def _bound(name: str, values: Sequence[Any]) -> str:
    if name in ("kernel_sizes", "allocations"):
        return _joined(values)
    return ":".join(map(str, dict.fromkeys(values)))


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
