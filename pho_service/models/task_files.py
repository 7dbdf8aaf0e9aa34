"""
Tasks of lm-evaluation-harness, found by their names: its own, and those of a folder.

The harness comes with the extra ``eval`` and is imported when it is needed, which takes seconds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, TextError
from pho_service.host.extras import missing_extra
from pho_service.host.plain import shown
from pho_service.host.task_names import harness_folder, harness_tasks, unknown_task
from pho_service.models.hub_or_cache import hub_or_cache

_FILES = ("json", "csv", "parquet", "text", "arrow")  # data sets that are files of their own
_RATED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """
    Tasks with their examples, to be measured as often as one likes.

    Attributes:
        names: As they were asked for.
        tasks: As the harness calls what it has loaded: tasks, groups.
    """

    names: tuple[str, ...]
    tasks: dict[str, Any]

    def questions_sha256(self) -> str:
        """Hash of all examples: what was measured on others cannot be compared."""
        found = hashlib.sha256()
        for name, task in self.tasks["tasks"].items():
            found.update(f"{name} {task.VERSION}\n".encode())
            for example in task.eval_docs:
                found.update(json.dumps(example, sort_keys=True, default=str).encode() + b"\n")
        return found.hexdigest()


def load_tasks(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    check_dataset: Callable[[str], object] = lambda _: None,
) -> LoadedTasks:
    """
    Find tasks and read their examples, from a folder first and then from the harness.

    Functions that a task file names (``!function``) are code beside it, and run: a folder must be
    one that is trusted.

    Args:
        names: Names of tasks, groups or tags.
        folder: With task files of one's own, at all depths. What they name as ``data_files`` may
            lie beside them.
        check_dataset: Called with the name of each data set of the hub before it is asked for;
            refuses by raising.

    Raises:
        ModuleNotFoundError: The extra ``eval`` is not installed.
        InvalidInput: There is no such task or folder, or it needs more than likelihoods.
        TextError: Its examples cannot be read: the hub is away, or a file is missing.
    """
    if folder is not None and not folder.is_dir():
        raise InvalidInput(f"the folder for tasks {folder} does not exist. Check --tasks-dir.")
    manager = _manager(names, folder)
    _check_kinds(manager, names)
    for dataset in _hub_datasets(manager, names):
        check_dataset(dataset)
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with hub_or_cache(wanted=bool(_hub_datasets(manager, names))):
        for name in names:
            with _told(name):
                for part, members in manager.load([name]).items():
                    found[part].update(members)
    for name, task in found["tasks"].items():
        _check_rated(name, task.get_config("output_type"))
    return LoadedTasks(names=tuple(names), tasks=found)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """
    The harness's list of tasks, of a folder and of as little of its own as these names need.

    To list all that it has takes half a minute.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        needs = missing_extra(error)
        if needs is None:
            raise
        raise ModuleNotFoundError(f"measuring tasks {needs}", name=error.name) from error
    own = harness_folder()
    assert own is not None  # it is imported already
    index: Mapping[str, set[Path]] = {}
    places: set[Path] = set()
    while True:
        paths = [*sorted(places), *([folder] if folder else [])]
        manager = TaskManager(include_path=paths, include_defaults=False)
        missing = [n for n in _members(manager, names) if n not in manager.task_index]
        if not missing:
            break
        index = harness_tasks(own)
        more = {own / file.relative_to(own).parts[0] for n in missing for file in index.get(n, ())}
        if more <= places:
            break
        places |= more
    for name in names:
        if name not in manager.task_index:
            raise unknown_task(name, [*index, *manager.all_tasks], folder)
    if folder:
        _beside(manager.task_index.values(), folder.resolve())
    return manager


def _beside(entries: Iterable[Any], folder: Path) -> None:
    """Let ``data_files`` of task files in a folder be files beside them, wherever we run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in entries:
        path = entry.yaml_path
        if path is None or not path.resolve().is_relative_to(folder):
            continue
        files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
        placed = _placed(files, path.parent)
        if placed != files:
            entry.cfg = load_yaml(path, resolve_func=True)
            entry.cfg["dataset_kwargs"]["data_files"] = placed
            entry.yaml_path = None  # the harness would read it again


def _placed(files: Any, folder: Path) -> Any:
    """``data_files`` with paths that exist below a folder made absolute."""
    if isinstance(files, dict):
        return {split: _placed(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_placed(each, folder) for each in files]
    if isinstance(files, str) and "://" not in files and (folder / files).is_file():
        return str(folder / files)
    return files


def _members(manager: Any, names: Iterable[str]) -> Iterator[str]:
    """The names, and in the place of groups and tags those that they are made of."""
    for name in names:
        entry = manager.task_index.get(name)
        inner = (entry.cfg or {}).get("task") if entry else None
        if isinstance(inner, list):
            said = [each if isinstance(each, str) else each.get("task") for each in inner]
            yield from _members(manager, [each for each in said if isinstance(each, str)])
        elif entry and entry.yaml_path is None and entry.tags:
            yield from _members(manager, sorted(entry.tags))
        else:
            yield name


def _leaves(manager: Any, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read what the task files say of those."""
    for name in _members(manager, names):
        entry = manager.task_index.get(name)
        if entry and entry.cfg:
            yield entry.cfg


def _check_kinds(manager: Any, names: Sequence[str]) -> None:
    """Refuse what cannot be measured, before anything is read."""
    for leaf in _leaves(manager, names):
        if "class" not in leaf:  # of those that are code it is known when they are loaded
            _check_rated(str(leaf.get("task")), leaf.get("output_type", "generate_until"))


def _check_rated(name: str, kind: str) -> None:
    if kind not in _RATED:
        raise InvalidInput(
            f"the task {name} is of the kind {kind}, which needs generated text. Only tasks that "
            f"compare likelihoods are measured: {', '.join(_RATED)}."
        )


def _hub_datasets(manager: Any, names: Sequence[str]) -> list[str]:
    """The data sets that tasks have on the hub: neither files nor folders of this machine."""
    leaves = _leaves(manager, names)
    named = [leaf.get("dataset_path") or leaf.get("task") for leaf in leaves]  # code may name one
    return [str(each) for each in named if each not in _FILES and not Path(str(each)).exists()]


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn whatever reading a task raises into a sentence."""
    try:
        yield
    except (MemoryError, ModuleNotFoundError):
        raise
    except (OSError, ConnectionError) as error:  # missing files, data sets that are not there
        reason = shown(" ".join(str(error).split()), 300)
        raise TextError(
            f"the examples of the task {name} cannot be read: {reason}. Run it once with a network "
            "and then with HF_DATASETS_OFFLINE=1, or give a task file of that name whose data are "
            "local with --tasks-dir (dataset_path: json, dataset_kwargs: data_files)."
        ) from error
    except Exception as error:  # the harness raises whatever a task file makes it stumble over
        reason = shown(" ".join(str(error).split()), 300)
        raise InvalidInput(
            f"the task {name} cannot be loaded: {type(error).__name__}: {reason}. Check its task "
            "file and its data."
        ) from error
