"""
Data sets by name: what their cards may name, and those that papers use.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pho_service.errors import InvalidInput, field_name, shown

CARDS = ("README.md", ".huggingface.yaml")  # that `datasets` reads; checked before it follows one
MOST_BYTES = 256 * 1024  # of a card's YAML; Wikipedia's 300 languages have 60 KB

_YAML = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")  # as huggingface_hub
_DEPTH = 50
_PLACES = ("data_files", "data_dir")
_LEADS_OUT = re.compile(r"^[/~\\]|^[A-Za-z]:|://|::|(^|[/\\])\.\.([/\\]|$)")


def check_cards(folder: Path, name: str) -> None:
    """Check the cards of a data set on this machine."""
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
    """Check that a card names nothing but what lies in its data set."""
    text = content.decode(errors="replace")
    if file.endswith(".md"):
        match = _YAML.search(text)
        if match is None and not (text.lstrip().startswith("---") and len(content) > MOST_BYTES):
            return  # without YAML, it says nothing of files
        text = "" if match is None else match[2]
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
                    f"give a file as {field_name('calibration/text')}."
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
    """All texts below the keys that name files, without making anything of the document."""
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a data set, and how its rows become one text."""

    config: str | None = None  # Configuration of the data set
    data_file: str | None = None  # One file of it
    split: str  # Its split
    rows: int | None = None  # How many are joined, the first; None takes all
    # What the rows are joined by; None leaves each a document of its own.
    separator: str | None = None
    # How many windows are measured on, the first, if nothing is said; None takes all.
    windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class UsualText:
    """Data set that a name stands for, as papers on pruning calibrate and measure on it."""

    dataset: str  # Its id on the hub
    calibration: Part  # What a model is calibrated on
    evaluation: Part  # What perplexities are measured on


_WIKITEXT = "wikitext-2-raw-v1"

# Source: the code of SparseGPT and Wanda, datautils.py and data.py. Of C4 they measure on the
# first 1,100 documents of the first validation file, joined by spaces, and there on 256 windows.
USUAL_TEXTS: Mapping[str, UsualText] = {
    "c4": UsualText(
        dataset="allenai/c4",
        calibration=Part(data_file="en/c4-train.00000-of-01024.json.gz", split="train"),
        evaluation=Part(
            data_file="en/c4-validation.00000-of-00008.json.gz",
            split="train",  # the only one that a single file has
            rows=1100,
            separator=" ",
            windows=256,
        ),
    ),
    "wikitext2": UsualText(
        dataset="Salesforce/wikitext",
        calibration=Part(config=_WIKITEXT, split="train", separator="\n\n"),
        evaluation=Part(config=_WIKITEXT, split="test", separator="\n\n"),
    ),
}


def near_usual(name: str | None) -> str:
    """Ask for the usual text whose name a data set's nearly is: `` Did you mean wikitext2?``."""
    near = difflib.get_close_matches(name or "", USUAL_TEXTS, n=1, cutoff=0.75)
    return f" Did you mean {near[0]}?" if near and name not in USUAL_TEXTS else ""


def separator_of(config: str | None) -> str | None:
    """Return what joins the rows of a data set that are lines of one text, as WikiText's are."""
    return "\n\n" if config is not None and config.startswith("wikitext-") else None


def check_usual(dataset: str | None, **others: object) -> None:
    """See that nothing is said of a usual text but its name."""
    usual = USUAL_TEXTS.get(dataset or "")
    said = [name for name, value in others.items() if value is not None]
    if usual is not None and said:
        raise InvalidInput(
            f"dataset {dataset!r} is a name for a usual text, its files and splits: leave "
            f"{', '.join(said)} out, or give the data set by its own name, {usual.dataset!r}."
        )
