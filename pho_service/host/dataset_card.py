"""
Data set cards: what they say of the files of a data set, before anything follows it.

The `datasets` library reads from a card which files a data set has, and would open whatever is
named there: files beside the data set, and URLs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from pho_service.errors import InvalidInput
from pho_service.host.plain import shown

CARDS = ("README.md", ".huggingface.yaml")  # that `datasets` reads
MOST_BYTES = 256 * 1024  # of a card's YAML; Wikipedia's 300 languages have 60 KB

_YAML = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")  # as huggingface_hub
_DEPTH = 50
_PLACES = ("data_files", "data_dir")
_LEADS_OUT = re.compile(r"^[/~\\]|^[A-Za-z]:|://|::|(^|[/\\])\.\.([/\\]|$)")


def check_cards(folder: Path, name: str) -> None:
    """
    Check the cards of a data set on this machine.

    Args:
        folder: Folder of the data set.
        name: For messages.

    Raises:
        InvalidInput: As :func:`check_card`, or a card cannot be read.
    """
    for file in CARDS:
        try:
            with (folder / file).open("rb") as card:
                content = card.read(MOST_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidInput(
                f"{name}: {file} cannot be read: {error.strerror or error}."
            ) from error
        check_card(file, content, name)


def check_card(file: str, content: bytes, name: str) -> None:
    """
    Check that a card names nothing but what lies in its data set.

    Args:
        file: One of :data:`CARDS`.
        content: What it holds; of a long one, the first bytes beyond :data:`MOST_BYTES`.
        name: Name of the data set, for messages.

    Raises:
        InvalidInput: It is not YAML, is too long or deep, or it names an absolute path, a folder
            above the data set, or a URL.
    """
    text = content.decode(errors="replace")
    if file.endswith(".md"):
        found = _YAML.search(text)
        if found is None and not (text.lstrip().startswith("---") and len(content) > MOST_BYTES):
            return  # without YAML, it says nothing of files
        text = "" if found is None else found[2]
    if len(content) > MOST_BYTES and (not text or not file.endswith(".md")):
        raise InvalidInput(
            f"{name}: the YAML of {file} is longer than {MOST_BYTES} bytes. Take out of it what is "
            "not about `configs`."
        )
    try:
        for value in _files(text):
            if _LEADS_OUT.search(value):
                raise InvalidInput(
                    f"{name}: its {file} names the files {shown(value)!r}, but a data set's files "
                    "lie in its folder: no absolute path, no '..', no URL. Copy them there, or "
                    "give a file as --text."
                )
    except (yaml.YAMLError, _OddYaml) as error:
        reason = shown(" ".join(str(error).split()))
        raise InvalidInput(
            f"{name}: the YAML of {file} cannot be read: {reason}. Mend it, or take it out."
        ) from error


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is many times as fast


class _OddYaml(ValueError):
    """YAML that is small, and large when it is read."""


@dataclass(kw_only=True)
class _Level:
    """A mapping or a list that is being read; the keys of a mapping are not of its values."""

    is_mapping: bool
    inside: bool
    at_key: bool = True
    at_place: bool = False


def _files(text: str) -> Iterator[str]:
    """
    All texts below the keys that name files, without making anything of the document.

    Raises:
        yaml.YAMLError: It is not YAML.
        _OddYaml: It is deep, or refers to parts of itself.
    """
    levels = [_Level(is_mapping=False, inside=False)]
    for event in yaml.parse(text, Loader=_Loader):
        level = levels[-1]
        if isinstance(event, yaml.AliasEvent):
            raise _OddYaml("it has an alias, which data set cards do not need")
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
            level = levels[-1]
            level.at_key = not level.at_key
            continue
        inside = level.inside or (level.is_mapping and not level.at_key and level.at_place)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(levels) > _DEPTH:
                raise _OddYaml(f"it is more than {_DEPTH} lists and mappings deep")
            mapping = isinstance(event, yaml.MappingStartEvent)
            levels.append(_Level(is_mapping=mapping, inside=inside))
        elif isinstance(event, yaml.ScalarEvent):
            if level.is_mapping and level.at_key:
                level.at_place = event.value in _PLACES
            elif inside:
                yield str(event.value)
            level.at_key = not level.at_key
