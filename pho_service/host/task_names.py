"""
Which tasks lm-evaluation-harness and a folder have, read from the names in their files alone.

To import the harness takes seconds, and brings torch; this needs neither.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pho_service.errors import InvalidInput
from pho_service.host.versions import versions

_NAME = re.compile(rb"^(?:task|group)[ \t]*:[ \t]*['\"]?([^'\"\s#\[]+)", re.MULTILINE)
_TAG = re.compile(rb"^tag[ \t]*:[ \t]*((?:\n[ \t]*-[^\n]*)+|[^\n]*)", re.MULTILINE)


def harness_folder() -> Path | None:
    """Where the harness has its tasks; None if it is not installed: it comes with ``eval``."""
    found = find_spec("lm_eval")
    return None if found is None or not found.origin else Path(found.origin).parent / "tasks"


@cache
def harness_tasks(folder: Path) -> Mapping[str, set[Path]]:
    """The harness's tasks, as of :func:`tasks_in`; its 14,000 files are read once."""
    return tasks_in(folder)


def tasks_in(folder: Path) -> dict[str, set[Path]]:
    """The files that define each task, group and tag, without reading more of them than names."""
    found: dict[str, set[Path]] = {}
    for file in folder.rglob("*.yaml"):
        text = file.read_bytes()
        tags = [word for block in _TAG.findall(text) for word in re.findall(rb"[\w.-]+", block)]
        for name in (*_NAME.findall(text), *tags):
            found.setdefault(name.decode(errors="replace"), set()).add(file)
    return found


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """
    See that there are tasks with these names, as far as this machine knows.

    Args:
        names: Names of tasks, groups or tags.
        folder: With task files of one's own; it may lie on the disk of workers alone.

    Raises:
        InvalidInput: The harness is installed, and neither it nor the folder has one of them.
    """
    harness = harness_folder()
    if harness is None or (folder is not None and not folder.is_dir()):
        return
    mine = {} if folder is None else tasks_in(folder)
    for name in names:
        if name not in mine and name not in harness_tasks(harness):
            raise unknown_task(name, [*harness_tasks(harness), *mine], folder)


def unknown_task(name: str, known: Iterable[str], folder: Path | None) -> InvalidInput:
    """The error for a task that is not there, with the names that are near."""
    near = difflib.get_close_matches(name, {*known}, n=3)
    return InvalidInput(
        f"the task {name!r} is not one of lm-eval {versions('lm-eval')['lm-eval']}"
        + (f", and not in {folder}." if folder else ".")
        + (f" Did you mean {' or '.join(near)}?" if near else "")
        + " Name the folder of task files of your own with --tasks-dir (a job's tasks_dir)."
    )
