"""
How a job is submitted without the form: the same document from a shell, by HTTP and in Python.
"""

import json
import shlex
from typing import Any

from pho_service.spec.job import JobSpec
from pho_service.spec.job_fields import minimal_document
from pho_service.spec.job_options import submit_command

_END = "END"  # of the document; no line of JSON is this word


def equivalents(spec: JobSpec, url: str, *, with_key: bool) -> list[tuple[str, str]]:
    """
    What submits a job, by its title; no key is in it.

    Args:
        spec: The job.
        url: URL of the service.
        with_key: Whether the service needs a key, which PHO_API_KEY has then.
    """
    document = minimal_document(spec)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    at = ["--url", url]
    command = submit_command(document, *at)
    if command is None:  # no options say it
        command = f"{shlex.join(['pho', 'submit', *at])} --job - <<'{_END}'\n{text}\n{_END}"
    key = ['  -H "Authorization: Bearer $PHO_API_KEY" \\'] if with_key else []
    curl = [
        f"curl -sS {shlex.quote(f'{url}/v1/jobs')} \\",
        *key,
        "  -H 'Content-Type: application/json' \\",
        f"  -d {shlex.quote(text)}",
    ]
    python = [
        "from pho_service import Client",
        "",
        f"document = {_literal(document)}",
        f"with Client({url!r}) as client:",
        "    job = client.submit(document)",
        "    print(job.id)",
    ]
    return [("curl", "\n".join(curl)), ("pho submit", command), ("Python", "\n".join(python))]


def _literal(value: Any, above: str = "") -> str:
    """A value as Python, each field of an object in a line of its own."""
    if not isinstance(value, dict) or not value:
        return repr(value)
    inner = f"{above}    "
    lines = [f"{inner}{name!r}: {_literal(each, inner)},\n" for name, each in value.items()]
    return f"{{\n{''.join(lines)}{above}}}"
