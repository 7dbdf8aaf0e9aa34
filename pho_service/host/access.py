"""
Access of jobs to models and texts: those below certain folders, and certain names on the hub.
"""

import difflib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, OutputError, PhoError
from pho_service.host.artifacts import ID_BEGINS, TEXT_ID, TEXTS, TextFiles
from pho_service.host.data_sets import USUAL_TEXTS, check_cards
from pho_service.host.model_files import (
    MOST_FILES,
    NAMING_FILES,
    PACKED_SUFFIX,
    check_config,
    check_model_folder,
)
from pho_service.host.settings import Settings

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_DATA_FILE = re.compile(r"[A-Za-z0-9_*?\[\]][A-Za-z0-9._*?\[\]/-]*")
_IN_A_DATASET = 5000  # at all depths; C4's English has 1,032
_NAMES_BYTES = 4 * 2**20  # of the files of a model that name others
_MOST_PLACED = 500  # characters; a name of a job may have 512
_TEMPLATES = "additional_chat_templates"  # the only folder in a model's that is read


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of one machine."""

    model_roots: tuple[Path, ...]  # Absolute folders
    text_roots: tuple[Path, ...]  # Absolute folders
    hub_models: tuple[str, ...]  # Shell patterns
    hub_datasets: tuple[str, ...]  # Shell patterns
    task_roots: tuple[Path, ...] = ()  # Absolute folders
    texts: TextFiles | None = None  # That were uploaded; None: this machine takes none

    @classmethod
    def of(cls, settings: Settings) -> "Access":
        """The rules that the settings ask for, on this machine."""
        return cls(
            model_roots=tuple(r.expanduser().resolve() for r in settings.model_roots),
            text_roots=tuple(r.expanduser().resolve() for r in settings.text_roots),
            hub_models=settings.hub_models,
            hub_datasets=settings.hub_datasets,
            task_roots=tuple(r.expanduser().resolve() for r in settings.task_roots),
            texts=TextFiles.of(settings),
        )

    def model(self, name: str) -> str:
        """The absolute path of a local model, or the id of one on the hub."""
        if not is_path(name):
            path = _below(name, self.model_roots, _model_files)
            if path is not None:
                return str(path)
            return _on_hub(name, self.hub_models, "model", "PHO_HUB_MODELS")
        return str(_local(name, self.model_roots, "model", "PHO_MODEL_ROOTS", _model_files))

    def near_model(self, name: str) -> str | None:
        """The name of a local model that one of the hub is nearly spelt like."""
        if is_path(name) or _below(name, self.model_roots, _no_files) is not None:
            return None
        places = filter(None, (_resolved(root, name) for root in self.model_roots))
        near = next(filter(None, map(near_name, places)), None)
        return near and str(Path(name).with_name(near))

    def placed_model(self, name: str) -> str:
        """Return the name as a job keeps it: ``./name`` of a model that is local now."""
        # Only a path is never asked of the hub, where somebody else may have the same name when the
        # folder is missing.
        return _placed(name, self.model(name))

    def placed_dataset(self, name: str) -> str:
        return _placed(name, self.dataset(name))

    def text(self, path: str) -> str:
        if path.startswith(ID_BEGINS):
            return str(self._uploads(path).place(path))
        place = _local(path, self.text_roots, "text", "PHO_TEXT_ROOTS", _no_files)
        if place.is_dir():
            raise InvalidInput(
                f"text {path!r} is a folder. Give a file, or the folder as a data set."
            )
        return str(place)

    def fetched_text(self, path: str) -> str:
        """The path of a text; one that was uploaded is copied to this machine if it is not here."""
        if path.startswith(ID_BEGINS):
            return str(self._uploads(path).fetch(path))
        return self.text(path)

    def _uploads(self, text_id: str) -> TextFiles:
        if not TEXT_ID.fullmatch(text_id) or self.texts is None:
            raise InvalidInput(
                f"text {text_id!r} is not the id of an uploaded text, which is {ID_BEGINS}, its "
                "SHA-256 of 64 digits, and .txt, .jsonl or .parquet. POST /v1/texts gives it."
            )
        return self.texts

    def task_folder(self, path: str) -> str:
        if not self.task_roots:
            raise InvalidInput(
                f"folder of tasks {path!r} is not allowed here: what task files name as !function "
                "is run, so that the operator must name the folders for them in PHO_TASK_ROOTS."
            )
        thing = "folder of tasks"
        return str(_local(path, self.task_roots, thing, "PHO_TASK_ROOTS", _no_files))

    def dataset(self, name: str) -> str:
        """The absolute path of a local data set, or the id of one on the hub."""
        usual = USUAL_TEXTS.get(name)
        if usual is not None:  # a folder of that name is ./c4
            _on_hub(usual.dataset, self.hub_datasets, "data set", "PHO_HUB_DATASETS")
            return name
        if not is_path(name):
            path = _below(name, self.text_roots, _dataset_files)
            if path is not None:
                return str(path)
            return _on_hub(name, self.hub_datasets, "data set", "PHO_HUB_DATASETS")
        return str(_local(name, self.text_roots, "data set", "PHO_TEXT_ROOTS", _dataset_files))

    def without_places(self, document: Any) -> Any:
        """Return a document without where its models and texts lie on this machine."""
        if isinstance(document, dict):
            return {key: self.without_places(value) for key, value in document.items()}
        if isinstance(document, list):
            return [self.without_places(value) for value in document]
        if not isinstance(document, str) or not document.startswith("/"):
            return document
        text_id, folder = f"{ID_BEGINS}{Path(document).name}", Path(document).parent.name
        if folder == TEXTS and TEXT_ID.fullmatch(text_id):
            return text_id
        return _named_below(document, self.model_roots, self.text_roots)

    def hide_places(self, message: str, kept: Mapping[str, str]) -> str:
        """
        Return a message for people elsewhere: what lies in a root as it is named from there, and
        ``[cache]/...`` for what lies in a folder that ``kept`` calls "cache". A root itself is
        ``[folder]``.
        """
        if self.texts is not None:
            with suppress(OutputError):  # no store, and so no text in it
                message = message.replace(f"{self.texts.folder}/", ID_BEGINS)
        roots = (*self.model_roots, *self.text_roots, *self.task_roots)
        places = {**kept, **{str(root): "" for root in roots if root != root.parent}}
        for place in sorted(places, key=len, reverse=True):
            word = f"[{places[place]}]/" if places[place] else ""
            message = re.sub(rf"(?<![\w./~-]){re.escape(place)}/", word, message)
            alone = f"[{places[place] or 'folder'}]"
            message = re.sub(rf"(?<![\w./~-]){re.escape(place)}(?![\w-]|\.\w)", alone, message)
        return message


def check_data_file(data_file: str) -> None:
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
    """Return whether a name can only be a path: a hub id has at most one slash, and no suffix."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(("/", ".gguf", ".safetensors", PACKED_SUFFIX))
    )


def near_name(path: Path) -> str | None:
    """The name nearly spelt like a path, where it leads, if nothing is there."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_FILES)]
    except OSError:
        return None
    return next(iter(difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)), None)


def did_you_mean(name: str, *places: Path) -> str:
    """Ask for what a name nearly is, at the places where it may be: `` Did you mean a/b?``."""
    near = next(filter(None, map(near_name, places or [Path(name).expanduser()])), None)
    return f" Did you mean {Path(name).with_name(near)}?" if near else ""


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
    for root in roots:
        path = _resolved(root, name)
        if path is None or not path.exists():
            continue
        for file in files(path, name) if path.is_dir() else ():
            # What is no link lies where its folder lies.
            if file.is_symlink() and _resolved(root, file.path) is None:
                raise InvalidInput(
                    f"{name!r} has a link to something outside of the folders that jobs may name: "
                    f"{file.name}. Put a copy there, or let the operator add the other folder."
                )
        return path
    return None


def _model_files(folder: Path, name: str) -> Iterator[os.DirEntry[str]]:
    """The files that a loader of models opens: the folder's own, and none below but templates."""
    yield from _entries(folder, MOST_FILES, f"model {name!r}", "the model's folder alone")
    if (folder / _TEMPLATES).is_dir():
        yield from _entries(folder / _TEMPLATES, MOST_FILES, f"model {name!r}", "fewer templates")
    naming = [*folder.glob("*.index.json"), *(folder / file for file in NAMING_FILES)]
    try:
        check_config(folder, "it")
        # Larger ones are left to the worker, whose loader looks at them in any case.
        if sum(file.stat().st_size for file in naming if file.is_file()) <= _NAMES_BYTES:
            check_model_folder(folder, _NAMES_BYTES)
    except PhoError as error:
        raise InvalidInput(f"model {name!r}: {error}") from error


def _dataset_files(folder: Path, name: str) -> Iterator[os.DirEntry[str]]:
    """All files of a data set, at all depths, after its card was checked."""
    check_cards(folder, f"data set {name!r}")
    folders, entries_left = [folder], _IN_A_DATASET
    linked = {folder}
    while folders:
        way_out = "one of its folders, or a file as calibration.text"
        for entry in _entries(folders.pop(), entries_left, f"data set {name!r}", way_out):
            entries_left -= 1
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
    """The entries of a folder, unless they are more than ``most``."""
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= most:
                    raise InvalidInput(
                        f"{thing} has too many files to be looked through: a model may have "
                        f"{MOST_FILES}, a data set {_IN_A_DATASET}. Give {way_out}."
                    )
                yield entry
    except OSError as error:
        raise InvalidInput(
            f"{thing} cannot be looked through: {error.strerror or error}. Let the service and its "
            "workers read it."
        ) from error


def _local(name: str, roots: tuple[Path, ...], thing: str, variable: str, files: Files) -> Path:
    allowed = [] if name.startswith("~") else [_resolved(root, name) for root in roots]
    if not any(allowed):
        raise InvalidInput(
            f"{thing} {name!r} does not lie below the folders of {variable}. Move it there, or let "
            "the operator add its folder."
        )
    existing = _below(name, roots, files)
    if existing is not None:
        return existing
    if any(root.is_dir() for root in roots):
        meant = did_you_mean(name, *filter(None, allowed))
        raise InvalidInput(
            f"{thing} {name!r} does not exist below the folders of {variable}.{meant}"
        )
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


# Bounds of a look below the roots for names to choose from.
DEEPEST = 5  # folders below a root
MOST = 200  # names of a kind
MOST_ENTRIES = 3000  # files and folders that are looked at for a kind, over all its roots
MOST_S = 0.3  # for a kind
_LONGEST = 500  # characters of a name; a job's may have 512
_TEXTS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Names as a job would have them, those near the roots first."""

    models: tuple[str, ...]  # Folders with a config.json, and .gguf files
    texts: tuple[str, ...]  # Text files that are not a model's
    is_whole: bool  # Whether all of them are here


def list_roots(model_roots: Sequence[Path], text_roots: Sequence[Path]) -> Listing:
    """List models and texts, as far as little time and depth allow."""
    # Hidden folders are left out, and so are links that lead out of the root that they lie below.
    models, texts = _Budget(), _Budget()
    return Listing(
        models=_names(model_roots, models)[0],
        texts=_names(text_roots, texts)[1],
        is_whole=models.is_kept and texts.is_kept,
    )


class _Budget:
    """The files and the time that a look below the roots may still take."""

    def __init__(self) -> None:
        self._entries, self._end = MOST_ENTRIES, time.monotonic() + MOST_S
        self.is_kept = True

    def spend(self) -> bool:
        """Count one more; False if that is one too many."""
        self._entries -= 1
        within = self._entries >= 0 and time.monotonic() < self._end
        self.is_kept = self.is_kept and within
        return within

    def cut(self) -> None:
        """Note that something is left out."""
        self.is_kept = False


def _names(roots: Sequence[Path], budget: _Budget) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of models and of texts below the roots."""
    models: list[str] = []
    texts: list[str] = []
    for number, root in enumerate(roots):
        for path, is_model in _walk(root, budget):
            name = _name(path, root, roots[:number])
            names = models if is_model else texts
            if name is None or len(names) >= MOST:
                budget.cut()
            else:
                names.append(name)
    return tuple(models), tuple(texts)


def _name(path: Path, root: Path, before: Sequence[Path]) -> str | None:
    """The name of a path in jobs: relative to its root, unless an earlier root has that, too."""
    name = str(path.relative_to(root))
    if name.startswith("~"):
        name = f"./{name}"
    if any((earlier / name).exists() for earlier in before):
        name = str(path)
    return name if name.isprintable() and len(name) <= _LONGEST else None


def _walk(root: Path, budget: _Budget) -> list[tuple[Path, bool]]:
    """Paths of models (True) and texts (False) below a root, level by level and by name."""
    paths: list[tuple[Path, bool]] = []
    folders = deque([(root, 0)])
    visited = {root}
    while folders:
        folder, depth = folders.popleft()
        entries = _listed_entries(folder, root, budget)
        if any(entry.name == "config.json" for entry in entries) and folder != root:
            paths.append((folder, True))
            continue
        for entry in entries:
            path = folder / entry.name
            if _is_folder(entry):
                real = path.resolve()
                if depth == DEEPEST:
                    budget.cut()
                elif real not in visited:
                    visited.add(real)
                    folders.append((path, depth + 1))
            elif entry.name.endswith(".gguf"):
                paths.append((path, True))
            elif entry.name.endswith(_TEXTS):
                paths.append((path, False))
    return paths


def _listed_entries(folder: Path, root: Path, budget: _Budget) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, but hidden ones and links that lead out of the root."""
    visible = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not budget.spend():
                    break
                if not entry.name.startswith(".") and _stays(entry, root):
                    visible.append(entry)
    except OSError:  # that cannot be read, or is gone
        return []
    return sorted(visible, key=lambda entry: entry.name)


def _stays(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        return not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
