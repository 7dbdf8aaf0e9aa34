"""
Zero-shot tasks by name: those of lm-evaluation-harness and of a folder, read without loading any.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pho_service.errors import InvalidInput, field_name
from pho_service.host.machine import versions

_NAME = re.compile(rb"^(?:task|group)[ \t]*:[ \t]*['\"]?([^'\"\s#\[]+)", re.MULTILINE)
_TAG = re.compile(rb"^tag[ \t]*:[ \t]*((?:\n[ \t]*-[^\n]*)+|[^\n]*)", re.MULTILINE)


def harness_folder() -> Path | None:
    """Where the harness has its tasks; None if it is not installed: it comes with ``eval``."""
    spec = find_spec("lm_eval")
    return None if spec is None or not spec.origin else Path(spec.origin).parent / "tasks"


@cache
def harness_tasks(folder: Path) -> Mapping[str, set[Path]]:
    """The harness's tasks, as of :func:`tasks_in`; its 14,000 files are read once."""
    return tasks_in(folder)


def tasks_in(folder: Path) -> dict[str, set[Path]]:
    """The files that define each task, group and tag, without reading more of them than names."""
    files: dict[str, set[Path]] = {}
    for file in folder.rglob("*.yaml"):
        text = file.read_bytes()
        tags = [word for block in _TAG.findall(text) for word in re.findall(rb"[\w.-]+", block)]
        for name in (*_NAME.findall(text), *tags):
            files.setdefault(name.decode(errors="replace"), set()).add(file)
    return files


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """See that there are tasks with these names, as far as this machine knows."""
    harness = harness_folder()
    if harness is None or (folder is not None and not folder.is_dir()):
        return
    folder_tasks = {} if folder is None else tasks_in(folder)
    for name in names:
        if name not in folder_tasks and name not in harness_tasks(harness):
            raise unknown_task(name, [*harness_tasks(harness), *folder_tasks], folder)


def unknown_task(name: str, names: Iterable[str], folder: Path | None) -> InvalidInput:
    """The error for a task that is not there, with the names that are near."""
    near = difflib.get_close_matches(name, {*names}, n=3)
    return InvalidInput(
        f"the task {name!r} is not one of lm-eval {versions('lm-eval')['lm-eval']}"
        + (f", and not in {folder}." if folder else ".")
        + (f" Did you mean {' or '.join(near)}?" if near else "")
        + f" Name the folder of task files of your own with {field_name('tasks_dir')}."
    )
