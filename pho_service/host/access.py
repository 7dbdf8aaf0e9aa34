"""
What jobs may name: models and texts below certain folders, and certain names on the hub.

The front end asks at the door, and each worker asks again before it opens
anything: only the worker sees its own disk.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, PhoError
from pho_service.host.dataset_card import check_cards
from pho_service.host.model_folder import NAMING_FILES, check_model_folder
from pho_service.host.settings import Settings
from pho_service.host.usual_texts import USUAL_TEXTS

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_DATA_FILE = re.compile(r"[A-Za-z0-9_*?\[\]][A-Za-z0-9._*?\[\]/-]*")
_IN_A_MODEL = 1000  # files and folders; large models have some hundred shards
_IN_A_DATASET = 5000  # at all depths; C4's English has 1,032
_NAMES_BYTES = 4 * 2**20  # of the files of a model that name others
_MOST_PLACED = 500  # characters; a name of a job may have 512
_TEMPLATES = "additional_chat_templates"  # the only folder in a model's that is read


@dataclass(frozen=True, kw_only=True)
class Access:
    """
    The rules of one machine.

    Attributes:
        model_roots: Absolute folders.
        text_roots: Absolute folders.
        hub_models: Shell patterns.
        hub_datasets: Shell patterns.
        task_roots: Absolute folders.
    """

    model_roots: tuple[Path, ...]
    text_roots: tuple[Path, ...]
    hub_models: tuple[str, ...]
    hub_datasets: tuple[str, ...]
    task_roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> "Access":
        """The rules that the settings ask for, on this machine."""
        return cls(
            model_roots=tuple(r.expanduser().resolve() for r in settings.model_roots),
            text_roots=tuple(r.expanduser().resolve() for r in settings.text_roots),
            hub_models=settings.hub_models,
            hub_datasets=settings.hub_datasets,
            task_roots=tuple(r.expanduser().resolve() for r in settings.task_roots),
        )

    def model(self, name: str) -> str:
        """
        The absolute path of a local model, or the id of one on the hub.

        Raises:
            InvalidInput: Neither is allowed.
        """
        if not is_path(name):
            found = _below(name, self.model_roots, _model_files)
            if found is not None:
                return str(found)
            return _on_hub(name, self.hub_models, "model", "PHO_HUB_MODELS")
        return str(_local(name, self.model_roots, "model", "PHO_MODEL_ROOTS", _model_files))

    def placed_model(self, name: str) -> str:
        """
        Return the name as a job keeps it: ``./name`` of a model that is local now.

        Only a path is never asked of the hub, where somebody else may have the same name when
        the folder is missing.

        Raises:
            InvalidInput: As :meth:`model`.
        """
        return _placed(name, self.model(name))

    def placed_dataset(self, name: str) -> str:
        """
        Return the same of a data set.

        Raises:
            InvalidInput: As :meth:`dataset`.
        """
        return _placed(name, self.dataset(name))

    def text(self, path: str) -> str:
        """
        The absolute path of a text.

        Raises:
            InvalidInput: It does not lie below the folders for texts.
        """
        return str(_local(path, self.text_roots, "text", "PHO_TEXT_ROOTS", _no_files))

    def task_folder(self, path: str) -> str:
        """
        The absolute path of a folder with task files.

        Raises:
            InvalidInput: There are no folders for those, or it does not lie below them.
        """
        if not self.task_roots:
            raise InvalidInput(
                f"folder of tasks {path!r} is not allowed here: what task files name as !function "
                "is run, so that the operator must name the folders for them in PHO_TASK_ROOTS."
            )
        thing = "folder of tasks"
        return str(_local(path, self.task_roots, thing, "PHO_TASK_ROOTS", _no_files))

    def dataset(self, name: str) -> str:
        """
        The absolute path of a local data set, or the id of one on the hub.

        Raises:
            InvalidInput: Neither is allowed.
        """
        usual = USUAL_TEXTS.get(name)
        if usual is not None:  # a folder of that name is ./c4
            _on_hub(usual.dataset, self.hub_datasets, "data set", "PHO_HUB_DATASETS")
            return name
        if not is_path(name):
            found = _below(name, self.text_roots, _dataset_files)
            if found is not None:
                return str(found)
            return _on_hub(name, self.hub_datasets, "data set", "PHO_HUB_DATASETS")
        return str(_local(name, self.text_roots, "data set", "PHO_TEXT_ROOTS", _dataset_files))

    def without_places(self, document: Any) -> Any:
        """
        Return a document without where its models and texts lie on this machine.

        Args:
            document: JSON values. A path below the folders for models or texts is named from
                there, as a job may name it; one that would then mean another file stays.
        """
        if isinstance(document, dict):
            return {key: self.without_places(value) for key, value in document.items()}
        if isinstance(document, list):
            return [self.without_places(value) for value in document]
        if not isinstance(document, str) or not document.startswith("/"):
            return document
        return _named_below(document, self.model_roots, self.text_roots)


def check_data_file(data_file: str) -> None:
    """
    Raises:
        InvalidInput: It leads out of its data set.
    """
    if not _DATA_FILE.fullmatch(data_file) or ".." in data_file.split("/"):
        raise InvalidInput(
            f"data_file {data_file!r} is not a path inside of the data set: letters, digits "
            "and -._/*?[] only, not absolute, no '..', no URL."
        )


def _placed(name: str, source: str) -> str:
    local = Path(source).is_absolute() and not is_path(name)
    return f"./{name}" if local and len(name) <= _MOST_PLACED else name


def _named_below(path: str, *kinds: tuple[Path, ...]) -> str:
    for roots in kinds:
        for root in roots:
            if Path(path) != root and Path(path).is_relative_to(root):
                name = str(Path(path).relative_to(root))
                first = next((r for r in roots if _resolved(r, name) and (r / name).exists()), root)
                return name if first == root else path
    return path


def is_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id has no more than one slash, and no suffix."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(("/", ".gguf", ".safetensors", ".pho"))
    )


def _resolved(root: Path, name: str) -> Path | None:
    """Where a name leads from a root, links followed; None if that is not below the root."""
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL in it, links in a circle
        return None
    return path if path.is_relative_to(root) else None


Files = Callable[[Path, str], Iterator[os.DirEntry[str]]]


def _below(name: str, roots: tuple[Path, ...], files: Files) -> Path | None:
    """
    The existing file or folder of this name below a root.

    Args:
        name: As a job has it.
        roots: Absolute folders.
        files: What of a folder is looked at.

    Raises:
        InvalidInput: A file in the folder is a link to somewhere else, or there are too many.
    """
    for root in roots:
        path = _resolved(root, name)
        if path is None or not path.exists():
            continue
        for file in files(path, name) if path.is_dir() else ():
            # What is no link lies where its folder lies.
            if file.is_symlink() and _resolved(root, file.path) is None:
                raise InvalidInput(
                    f"{name!r} has a link to something outside of {root}: {file.name}. Put a copy "
                    "there, or let the operator add the other folder."
                )
        return path
    return None


def _model_files(folder: Path, name: str) -> Iterator[os.DirEntry[str]]:
    """
    What a loader of models opens: the folder's own files, and none below it but templates.

    Raises:
        InvalidInput: Its files name others elsewhere, or those that may cannot be read.
    """
    yield from _entries(folder, _IN_A_MODEL, f"model {name!r}", "the model's folder alone")
    if (folder / _TEMPLATES).is_dir():
        yield from _entries(folder / _TEMPLATES, _IN_A_MODEL, f"model {name!r}", "fewer templates")
    naming = [*folder.glob("*.index.json"), *(folder / file for file in NAMING_FILES)]
    # Larger ones are left to the worker, whose loader looks at them in any case.
    if sum(file.stat().st_size for file in naming if file.is_file()) <= _NAMES_BYTES:
        try:
            check_model_folder(folder)
        except PhoError as error:
            raise InvalidInput(f"model {name!r}: {error}") from error


def _dataset_files(folder: Path, name: str) -> Iterator[os.DirEntry[str]]:
    """
    All files of a data set, at all depths, after its card was checked.

    Raises:
        InvalidInput: The card names files elsewhere.
    """
    check_cards(folder, f"data set {name!r}")
    folders, left = [folder], _IN_A_DATASET
    linked = {folder}
    while folders:
        way_out = "one of its folders, or a file as calibration.text"
        for entry in _entries(folders.pop(), left, f"data set {name!r}", way_out):
            left -= 1
            yield entry  # and whoever looks at it refuses a link that leads out
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_symlink() and (target := Path(entry.path).resolve()) not in linked:
                linked.add(target)
                folders += [target] if target.is_dir() else []


def _no_files(_folder: Path, _name: str) -> Iterator[os.DirEntry[str]]:
    """Return no files: a folder that is named as a text is refused when it is read."""
    return iter(())


def _entries(folder: Path, most: int, thing: str, way_out: str) -> Iterator[os.DirEntry[str]]:
    """
    What a folder has, unless that is more than ``most``.

    Raises:
        InvalidInput: It is, or the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            for number, entry in enumerate(found):
                if number >= most:
                    raise InvalidInput(
                        f"{thing} has too many files to be looked through: a model may have "
                        f"{_IN_A_MODEL}, a data set {_IN_A_DATASET}. Give {way_out}."
                    )
                yield entry
    except OSError as error:
        raise InvalidInput(
            f"{thing} cannot be looked through: {error.strerror or error}. Let the service and its "
            "workers read it."
        ) from error


def _local(name: str, roots: tuple[Path, ...], thing: str, variable: str, files: Files) -> Path:
    places = ", ".join(map(str, roots))
    allowed = [] if name.startswith("~") else [_resolved(root, name) for root in roots]
    if not any(allowed):
        raise InvalidInput(
            f"{thing} {name!r} does not lie below {places}. Move it there, or let the operator "
            f"add its folder to {variable}."
        )
    found = _below(name, roots, files)
    if found is not None:
        return found
    if any(root.is_dir() for root in roots):
        raise InvalidInput(f"{thing} {name!r} does not exist below {places}.")
    return next(path for path in allowed if path)  # the disk of the workers is another one


def _on_hub(name: str, patterns: tuple[str, ...], thing: str, variable: str) -> str:
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise InvalidInput(
            f"{thing} {name!r} is neither a hub id (org/name) nor a path of something that exists."
        )
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        raise InvalidInput(
            f"{thing} {name!r} is not allowed here: {variable} allows "
            f"{', '.join(patterns) or 'none'}."
        )
    return name
