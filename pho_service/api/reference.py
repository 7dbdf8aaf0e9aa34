"""
/docs: the OpenAPI document as a page, whose words the site of the documentation has, too.
"""

import re
from typing import Any

from fastapi import APIRouter, Request, Response
from markupsafe import Markup

from pho_service.api.pages import draw
from pho_service.api.service import CallerParam
from pho_service.shown.parts import as_code

router = APIRouter(include_in_schema=False)


@router.api_route("/docs", methods=["GET", "HEAD"])
def show(request: Request, caller: CallerParam) -> Response:
    """Show every operation and every schema."""
    document = request.app.openapi()
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    tags = dict.fromkeys(operation["tags"][0] for *_, operation in operations)
    return draw(
        "reference.html",
        caller=caller,
        document=document,
        groups={tag: [each for each in operations if each[2]["tags"] == [tag]] for tag in tags},
        words=lambda schema: linked(words(schema)),
        body=lambda content: linked(body(content)),
    )


def linked(text: str) -> Markup:
    """What :func:`words` says, with its code and its links as HTML."""
    html = re.sub(r"\[(\w+)\]\((#\w+)\)", r'<a href="\2">\1</a>', str(as_code(text)))
    return Markup(html)  # noqa: S704 - escaped


def words(schema: dict[str, Any]) -> str:
    """What a value may be, in words, with links to other schemas."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(words(part) for part in schema[several])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {words(schema.get('items', {}))}" + _limits(schema, "Items")
    return str(schema.get("format", kind)) + _limits(schema, "Length") + _limits(schema, "imum")


def _limits(schema: dict[str, Any], what: str) -> str:
    """The bounds of a number, of a text's length, or of how many items there are."""
    unit = {"Items": " items", "Length": " characters", "imum": ""}[what]
    bounds = [
        f"{sign} {schema[key]:,}"
        for key, sign in (
            (f"min{what}", "≥"), (f"exclusiveMin{what}", ">"),
            (f"max{what}", "≤"), (f"exclusiveMax{what}", "<"),
        )
        if key in schema
    ]  # fmt: skip
    return f", {' and '.join(bounds)}{unit}" if bounds else ""


def body(content: dict[str, Any]) -> str:
    """Say what the body of a request or of an answer is."""
    return " or ".join(
        words(each.get("schema", {})) if "json" in kind else f"`{kind}`"
        for kind, each in content.get("content", {}).items()
    )
