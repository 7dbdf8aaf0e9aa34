"""
What a recipe says to others: of files of this machine their names, not where they lie.
"""

import re
from pathlib import Path, PureWindowsPath
from typing import Any

_ROOTED = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
_WEIGHTS = ("layers", "folded", "dense", "blocks")  # parts that are of linears, by their names


def shareable(value: Any) -> Any:
    """
    The same JSON values with the last part of each path of this machine in place of it.

    Paths are absolute ones, those that begin with ``~``, ``.`` or ``..``, and others with a folder
    in them that are there. Names of the hub and files of its data sets stay.
    """
    if isinstance(value, dict):
        return {k: each if k in _WEIGHTS else shareable(each) for k, each in value.items()}
    if isinstance(value, list):
        return [shareable(each) for each in value]
    return _name(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if _ROOTED.match(text):
        return True
    try:
        return "/" in text and Path(text).exists()
    except (OSError, ValueError):  # too long, or no name that a file could have
        return False


def _name(path: str) -> str:
    """The last part, by the rules of any system."""
    return PureWindowsPath(path).name or "a local folder"
