"""
What jobs may name: models and texts below certain folders, and certain names on the hub.

The front end asks at the door, and each worker asks again before it opens
anything: only the worker sees its own disk.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pho_service.errors import InvalidInput
from pho_service.settings import Settings

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_DATA_FILE = re.compile(r"[A-Za-z0-9_*?\[\]][A-Za-z0-9._*?\[\]/-]*")


@dataclass(frozen=True, kw_only=True)
class Access:
    """
    The rules of one machine.

    Attributes:
        model_roots: Absolute folders.
        text_roots: Absolute folders.
        hub_models: Shell patterns.
        hub_datasets: Shell patterns.
    """

    model_roots: tuple[Path, ...]
    text_roots: tuple[Path, ...]
    hub_models: tuple[str, ...]
    hub_datasets: tuple[str, ...]

    @classmethod
    def of(cls, settings: Settings) -> "Access":
        """The rules that the settings ask for, on this machine."""
        return cls(
            model_roots=tuple(r.expanduser().resolve() for r in settings.model_roots),
            text_roots=tuple(r.expanduser().resolve() for r in settings.text_roots),
            hub_models=settings.hub_models,
            hub_datasets=settings.hub_datasets,
        )

    def model(self, name: str) -> str:
        """
        The absolute path of a local model, or the id of one on the hub.

        Raises:
            InvalidInput: Neither is allowed.
        """
        if not _is_path(name):
            found = _below(name, self.model_roots)
            if found is not None:
                return str(found)
            return _on_hub(name, self.hub_models, "model", "PHO_HUB_MODELS")
        return str(_local(name, self.model_roots, "model", "PHO_MODEL_ROOTS"))

    def text(self, path: str) -> str:
        """
        The absolute path of a text.

        Raises:
            InvalidInput: It does not lie below the folders for texts.
        """
        return str(_local(path, self.text_roots, "text", "PHO_TEXT_ROOTS"))

    def dataset(self, name: str) -> str:
        """
        The absolute path of a local data set, or the id of one on the hub.

        Raises:
            InvalidInput: Neither is allowed.
        """
        if not _is_path(name):
            found = _below(name, self.text_roots)
            if found is not None:
                return str(found)
            return _on_hub(name, self.hub_datasets, "data set", "PHO_HUB_DATASETS")
        return str(_local(name, self.text_roots, "data set", "PHO_TEXT_ROOTS"))


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


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id has no more than one slash, and no .gguf."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith((".gguf", ".safetensors"))
    )


def _resolved(root: Path, name: str) -> Path | None:
    """Where a name leads from a root, links followed; None if that is not below the root."""
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL in it, links in a circle
        return None
    return path if path.is_relative_to(root) else None


def _below(name: str, roots: tuple[Path, ...]) -> Path | None:
    """
    The existing file or folder of this name below a root.

    Raises:
        InvalidInput: A file in the folder is a link to somewhere else.
    """
    for root in roots:
        path = _resolved(root, name)
        if path is None or not path.exists():
            continue
        for file in path.rglob("*") if path.is_dir() else ():
            if _resolved(root, str(file)) is None:
                raise InvalidInput(
                    f"{name!r} has a link to something outside of {root}: {file.name}. Put a copy "
                    "there, or let the operator add the other folder."
                )
        return path
    return None


def _local(name: str, roots: tuple[Path, ...], thing: str, variable: str) -> Path:
    places = ", ".join(map(str, roots))
    allowed = [] if name.startswith("~") else [_resolved(root, name) for root in roots]
    if not any(allowed):
        raise InvalidInput(
            f"{thing} {name!r} does not lie below {places}. Move it there, or let the operator "
            f"add its folder to {variable}."
        )
    found = _below(name, roots)
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
