"""
What lies below the folders that jobs may name models and texts of, to choose from.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEEPEST = 5  # folders below a root
MOST = 200  # names of a kind
MOST_ENTRIES = 3000  # files and folders that are looked at for a kind, over all its roots
MOST_S = 0.3  # for a kind
_LONGEST = 500  # characters of a name; a job's may have 512
_TEXTS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """
    Names as a job would have them, those near the roots first.

    Attributes:
        models: Folders with a config.json, and .gguf files.
        texts: Text files that are not a model's.
        is_whole: Whether all of them are here.
    """

    models: tuple[str, ...]
    texts: tuple[str, ...]
    is_whole: bool


def list_roots(model_roots: Sequence[Path], text_roots: Sequence[Path]) -> Listing:
    """
    List models and texts, as far as little time and depth allow.

    Hidden folders are left out, and so are links that lead out of the root that they lie below.

    Args:
        model_roots: Absolute folders, links in their paths resolved.
        text_roots: The same.
    """
    models, texts = _Budget(), _Budget()
    return Listing(
        models=_names(model_roots, models)[0],
        texts=_names(text_roots, texts)[1],
        is_whole=models.is_kept and texts.is_kept,
    )


class _Budget:
    """How much may be looked at."""

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
            found = models if is_model else texts
            if name is None or len(found) >= MOST:
                budget.cut()
            else:
                found.append(name)
    return tuple(models), tuple(texts)


def _name(path: Path, root: Path, before: Sequence[Path]) -> str | None:
    """What a job calls a path: relative to its root, unless an earlier root has that, too."""
    name = str(path.relative_to(root))
    if name.startswith("~"):
        name = f"./{name}"
    if any((other / name).exists() for other in before):
        name = str(path)
    return name if name.isprintable() and len(name) <= _LONGEST else None


def _walk(root: Path, budget: _Budget) -> list[tuple[Path, bool]]:
    """Paths of models (True) and texts (False) below a root, level by level and by name."""
    found: list[tuple[Path, bool]] = []
    folders = deque([(root, 0)])
    seen = {root}
    while folders:
        folder, depth = folders.popleft()
        entries = _entries(folder, root, budget)
        if any(entry.name == "config.json" for entry in entries) and folder != root:
            found.append((folder, True))
            continue
        for entry in entries:
            path = folder / entry.name
            if _is_folder(entry):
                real = path.resolve()
                if depth == DEEPEST:
                    budget.cut()
                elif real not in seen:
                    seen.add(real)
                    folders.append((path, depth + 1))
            elif entry.name.endswith(".gguf"):
                found.append((path, True))
            elif entry.name.endswith(_TEXTS):
                found.append((path, False))
    return found


def _entries(folder: Path, root: Path, budget: _Budget) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without what is hidden and links that lead out of the root."""
    kept = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not budget.spend():
                    break
                if not entry.name.startswith(".") and _stays(entry, root):
                    kept.append(entry)
    except OSError:  # that cannot be read, or is gone
        return []
    return sorted(kept, key=lambda entry: entry.name)


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
