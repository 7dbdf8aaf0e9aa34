"""
Write files and folders whole or not at all.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pho_service.errors import OutputError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes its place if all went well."""
    check_file(path)
    path = path.expanduser()
    with _reported(path), tempfile.TemporaryDirectory(prefix=".pho-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)


def write_json(path: Path, document: object) -> None:
    """Write JSON values as they are read best."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path, *, replacing: str | None = None) -> Iterator[Path]:
    """Give a temporary folder; it takes the place of ``path``, or of what has ``replacing``."""
    check_free(path, replacing=replacing)
    path = path.expanduser().resolve()  # "." can be replaced by its own name alone
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".pho-", dir=path.parent))
        try:
            yield partial
            partial.chmod(0o755)
            with tempfile.TemporaryDirectory(prefix=".pho-", dir=path.parent) as old:
                if path.is_dir():
                    path.replace(Path(old) / path.name)
                partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_free(path: Path, *, replacing: str | None = None) -> None:
    """Raise OutputError if :func:`new_folder` could not make ``path``: see before long work."""
    path = path.expanduser()
    if path.is_dir() and any(path.iterdir()) and not (replacing and (path / replacing).is_file()):
        without = f", but no {replacing}" if replacing else ""
        raise OutputError(
            f"{path} is in use: it holds files{without}. Give a new or an empty folder."
        )
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file. Give the name of a new folder.")
    above = path.resolve()
    while not above.parent.exists():  # they are made with it
        above = above.parent
    _check_parent(above)


def check_file(path: Path) -> None:
    """Raise OutputError if :func:`new_file` could not make ``path``: see before long work."""
    path = path.expanduser()
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file.")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    parent = path.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"{path} was not written: the folder {parent} does not exist.")
    with _reported(path), tempfile.TemporaryFile(dir=parent):
        pass  # what cannot be written to is known now


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn what the operating system says of ``path`` into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path} was not written: the disk is full. Free some space and run it again."
            ) from error
        reason = error.strerror or error
        raise OutputError(f"{path} was not written: {reason}.") from error
