"""
Zero-shot tasks: found by their names, and how likely a model finds their answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError, TextError, field_name, shown
from pho_service.host.machine import missing_extra
from pho_service.host.tasks import harness_folder, harness_tasks, unknown_task
from pho_service.models.blockwise import BlockNetwork
from pho_service.models.loading import LanguageModel, hub_or_cache
from pho_service.progress import Advance
from pho_service.pruning.perplexity import window_logits

_FILES = ("json", "csv", "parquet", "text", "arrow")  # data sets that are files of their own
_RATED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """Tasks with their examples, to be measured as often as one likes."""

    names: tuple[str, ...]  # As they were asked for
    tasks: dict[str, Any]  # As the harness calls what it has loaded: tasks, groups

    def questions_sha256(self) -> str:
        """Hash of all examples: what was measured on others cannot be compared."""
        digest = hashlib.sha256()
        for name, task in self.tasks["tasks"].items():
            digest.update(f"{name} {task.VERSION}\n".encode())
            for example in task.eval_docs:
                digest.update(json.dumps(example, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def load_tasks(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    check_dataset: Callable[[str], object] = lambda _: None,
) -> LoadedTasks:
    """Find tasks and read their examples, from a folder first and then from the harness."""
    # Functions that a task file names (``!function``) are code beside it, and run: a folder must be
    # one that is trusted.
    if folder is not None and not folder.is_dir():
        raise InvalidInput(
            f"the folder for tasks {folder} does not exist. Check {field_name('tasks_dir')}."
        )
    manager = _manager(names, folder)
    _check_kinds(manager, names)
    for dataset in _hub_datasets(manager, names):
        check_dataset(dataset)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with hub_or_cache(wanted=bool(_hub_datasets(manager, names))):
        for name in names:
            with _told(name):
                for part, members in manager.load([name]).items():
                    loaded[part].update(members)
    for name, task in loaded["tasks"].items():
        _check_rated(name, task.get_config("output_type"))
    return LoadedTasks(names=tuple(names), tasks=loaded)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's list of tasks, of a folder and of as little of its own as these names need."""
    # To list all that it has takes half a minute.
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        needs = missing_extra(error)
        if needs is None:
            raise
        raise ModuleNotFoundError(f"measuring tasks {needs}", name=error.name) from error
    root = harness_folder()
    assert root is not None  # it is imported already
    index: Mapping[str, set[Path]] = {}
    places: set[Path] = set()
    while True:
        paths = [*sorted(places), *([folder] if folder else [])]
        manager = TaskManager(include_path=paths, include_defaults=False)
        missing = [n for n in _members(manager, names) if n not in manager.task_index]
        if not missing:
            break
        index = harness_tasks(root)
        more = {root / f.relative_to(root).parts[0] for n in missing for f in index.get(n, ())}
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
        return {split: _placed(file, folder) for split, file in files.items()}
    if isinstance(files, list):
        return [_placed(file, folder) for file in files]
    if isinstance(files, str) and "://" not in files and (folder / files).is_file():
        return str(folder / files)
    return files


def _members(manager: Any, names: Iterable[str]) -> Iterator[str]:
    """The names, and in the place of groups and tags those that they are made of."""
    for name in names:
        entry = manager.task_index.get(name)
        inner = (entry.cfg or {}).get("task") if entry else None
        if isinstance(inner, list):
            members = [m if isinstance(m, str) else m.get("task") for m in inner]
            yield from _members(manager, [m for m in members if isinstance(m, str)])
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
    places = [leaf.get("dataset_path") or leaf.get("task") for leaf in leaves]  # code may name one
    return [str(place) for place in places if place not in _FILES and not Path(str(place)).exists()]


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
            f"local with {field_name('tasks_dir')} (dataset_path: json, dataset_kwargs: "
            "data_files)."
        ) from error
    except Exception as error:  # the harness raises whatever a task file makes it stumble over
        reason = shown(" ".join(str(error).split()), 300)
        raise InvalidInput(
            f"the task {name} cannot be loaded: {type(error).__name__}: {reason}. Check its task "
            "file and its data."
        ) from error


AT_ONCE = 128  # sequences that are padded to the same length, on a GPU
STREAMED = 2**16  # tokens for which a streamed model is read once


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Tokens whose end is rated."""

    # The context and after it the continuation: no more than the model can read, and one.
    tokens: tuple[int, ...]
    length: int  # Length of the continuation, at least 1 and less than all


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    log: float  # Log-probability of a continuation, in nats: the sum over its tokens
    greedy: bool  # Whether each of its tokens is the likeliest where it stands


def rate_continuations(
    model: LanguageModel,
    continuations: Sequence[Ending],
    *,
    advance: Advance = lambda _: None,
) -> list[Likelihood]:
    """Rate continuations, in any number and of any lengths."""
    # What differs in its last token alone is read once. Long sequences come first, so a GPU whose
    # memory is not enough says so at once.
    readers: dict[tuple[int, ...], list[int]] = {}  # what is read, and who asks for it
    for number, continuation in enumerate(continuations):
        readers.setdefault(continuation.tokens[:-1], []).append(number)
    inputs = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
    likelihoods: dict[int, Likelihood] = {}
    for batch in _batches(model, inputs):
        for tokens, logits in zip(batch, _logits(model, batch), strict=True):
            for number in readers[tokens]:
                likelihoods[number] = _rated(logits[: len(tokens)], continuations[number])
            advance(len(readers[tokens]))
    return [likelihoods[number] for number in range(len(continuations))]


def _batches(
    model: LanguageModel, inputs: Sequence[tuple[int, ...]]
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cut what is sorted by length; a CPU is given one by one, without padding."""
    begin = 0
    while begin < len(inputs):
        size = AT_ONCE if model.device.type == "cuda" else 1
        if model.stream:
            size = max(1, STREAMED // len(inputs[begin]))
        yield inputs[begin : begin + size]
        begin += size


def _logits(model: LanguageModel, batch: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yield for each sequence (longest of the batch, vocabulary)."""
    # Shorter ones are padded at their end, which no token before sees.
    longest = len(batch[0])
    windows = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens in batch])
    if not model.stream:
        yield from window_logits(model.model, windows)
        return
    network = BlockNetwork(model, windows)
    for index, (_, module) in enumerate(network.blocks):
        with network.on_device(module):
            network.step(index, lambda _: None)
    with network.ending(network.hidden):
        yield from window_logits(model.model, windows, most=1)


def _rated(logits: Tensor, continuation: Ending) -> Likelihood:
    targets = torch.tensor(continuation.tokens[-continuation.length :], device=logits.device)
    ending = logits[-continuation.length :].log_softmax(dim=-1, dtype=torch.float32)
    chosen = ending.gather(1, targets[:, None])  # (length, 1)
    log = float(chosen.double().sum())
    if log != log:
        raise NumericalError(
            "the log-likelihood of an answer is NaN: the model's weights overflow in this dtype. "
            f"Use {field_name('dtype', 'float32')}."
        )
    return Likelihood(log=log, greedy=bool((ending.argmax(dim=-1) == targets).all()))
