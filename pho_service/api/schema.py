"""
What the OpenAPI document says of values whose rules no type of Python has.

A document that is valid by these is not refused for its form.
"""

from collections.abc import Mapping
from typing import Any

from pho_service.library import TRANSFER_VERSION, TransferFile
from pho_service.spec.configuration import FORMAT, TRANSFER_FORMAT, VERSION, Configuration
from pho_service.spec.pattern import LONGEST, MOST
from pho_service.spec.steps import CHOOSING, UPDATES

_GROUPS = 64
# A share with at most 15 decimals, which no rounding makes 0 or 1; N of M with 1 <= N < M <= 64.
SHARE = r"0?\.[0-9]{0,14}[1-9]"
KEPT = "|".join(
    f"{keep}:({'|'.join(map(str, range(keep + 1, _GROUPS + 1)))})" for keep in range(1, _GROUPS)
)
PATTERN = f"^({SHARE}|{KEPT})$"
# A name of a linear or a glob; or a regular expression, of the parts that most are made of.
_PART = r"([A-Za-z0-9_. -]|\\[.dw]|\[[A-Za-z0-9_]+\]|\([A-Za-z0-9_|]*\))"
LINEAR = rf"^([ -9;-~]+|re:({_PART}[*+?]?)+)$"
KIND = r"^[!-)+-\-0-~]+$"  # the last part of a linear's name
PAGE_TOKEN = r"^[0-9]{1,18}$"  # noqa: S105 - of a page

_LARGEST = 1e30
EVENT = {
    "title": "Event",
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "For Last-Event-ID."},
        "event": {"enum": ["state", "stage", "progress", "retry", "put_down"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["id", "event", "data"],
}


def without_null(parameter: dict[str, Any]) -> None:
    """Let a parameter of an OpenAPI document not be null: no query and no header can say that."""
    schema = parameter["schema"]
    options = [option for option in schema.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1:
        del schema["anyOf"]
        schema.update(options[0])


def library_document() -> dict[str, Any]:
    """A configuration, or a transfer with one."""
    configuration = _configuration()
    transfer = _inlined(TransferFile.model_json_schema())
    transfer["properties"] |= {
        "format": {"const": TRANSFER_FORMAT},
        "version": {"enum": [TRANSFER_VERSION]},
        "configuration": configuration,
    }
    transfer["required"] += ["format", "version"]
    return {"title": "LibraryDocument", "oneOf": [configuration, transfer]}


def _configuration() -> dict[str, Any]:
    schema = _inlined(Configuration.model_json_schema())
    fields = schema["properties"]
    fields |= {"format": {"const": FORMAT}, "version": {"enum": [VERSION]}}
    schema["required"] += ["format", "version", "coefficients"]
    del fields["cut"]  # which no library has
    coefficients, _ = fields["coefficients"]["anyOf"]
    fields["coefficients"] = coefficients
    for name in ("row", "column", "neighbourhood", "activation_exponent", "gradient_exponent"):
        coefficients["properties"][name] |= {"minimum": 0, "maximum": _LARGEST}
    coefficients["properties"]["kernel_size"] = {"enum": [*range(3, 1000, 2)]}
    parts = ("row", "column", "neighbourhood")
    coefficients |= _either(*(_with(**{name: {"exclusiveMinimum": 0}}) for name in parts))
    given: list[str] = [update for update in UPDATES if update not in CHOOSING]
    # N:M is kept within rows, and alone has channels to permute; some updates choose masks.
    ratio = _with(pattern={"pattern": f"^({SHARE})$"}, steps=_steps(permutation=["none"]))
    by_hand = _with(linears=_with(sparsities={"maxProperties": 0}))
    kept = _with(pattern={"pattern": f"^({KEPT})$"}, scope={"const": "row"}, steps=by_hand)
    steps = fields["steps"]["properties"]
    _describe_linears(steps["linears"]["properties"])
    kinds = {"pattern": KIND, "maxLength": LONGEST}
    steps["allocation"]["properties"]["offsets"]["propertyNames"] = kinds
    no_offsets = _with(offsets={"maxProperties": 0})
    even = _with(method={"const": "uniform"}, offsets={"maxProperties": 0}, depth={"maxItems": 0})
    by_linear = _with(unit={"const": "linear"})
    schema["allOf"] = [
        _either(ratio, kept),
        _either(_with(scope={"enum": ["row", "layer"]}), _with(steps=_with(allocation=even))),
        _with(steps=_with(allocation=_either(by_linear, no_offsets))),
        _with(steps=_with(reconstruction=_trained_or_empty())),
        _with(steps=_either(_steps(repruning=["none"]), _steps(update=given))),
        _with(
            steps=_either(
                _steps(repruning=["none", "dsnot", "swaps"]),
                _steps(update=["obs", "least-squares"]),
            )
        ),
        _with(steps=_shrunk_or_not()),
    ]
    return schema


def _describe_linears(fields: dict[str, Any]) -> None:
    """Say which patterns are taken, and which sparsities by hand."""
    # For N:M those are N of the same M, which JSON Schema cannot say: here, there are none.
    for name in ("targets", "ignore"):
        fields[name]["items"] |= {"pattern": LINEAR, "maxLength": LONGEST}
        fields[name]["maxItems"] = MOST
    fields["sparsities"] |= {
        "propertyNames": {"pattern": LINEAR, "maxLength": LONGEST},
        "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "maxProperties": MOST,
    }


def _trained_or_empty() -> dict[str, Any]:
    named: dict[str, Any] = {"required": ["method"]}
    return _either(
        {**_with(method={"const": "block"}), **named},
        {**_with(method={"const": "none"}), **named, "maxProperties": 1},
        {"maxProperties": 0},
    )


def _shrunk_or_not() -> dict[str, Any]:
    """A shrinkage is of second moments that a step looks at."""
    looking: dict[str, list[str]] = {
        "repruning": ["swaps", "admm"],
        "update": [update for update in UPDATES if update != "none"],
    }
    return _either(
        _with(shrinkage={"const": 0}),
        *({**_steps(**{name: values}), "required": [name]} for name, values in looking.items()),
    )


def _steps(**allowed: list[str]) -> dict[str, Any]:
    return _with(**{name: {"enum": values} for name, values in allowed.items()})


def _with(**fields: dict[str, Any]) -> dict[str, Any]:
    """An object whose fields, where it has them, keep to these schemas."""
    return {"properties": fields}


def _either(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [*schemas]}


def _inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    definitions = schema.get("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(part) for part in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline(definitions[value["$ref"].rpartition("/")[2]])
        return {key: inline(part) for key, part in value.items() if key != "$defs"}

    inlined = inline(dict(schema))
    assert isinstance(inlined, dict)
    return inlined
