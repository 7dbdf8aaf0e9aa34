"""
Names for the texts that papers on pruning calibrate and measure on: ``c4`` and ``wikitext2``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pho_service.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Part:
    """
    A part of a data set, and how its rows become one text.

    Attributes:
        config: Configuration of the data set.
        data_file: One file of it.
        split: Its split.
        rows: How many are joined, the first; None takes all.
        separator: What the rows are joined by; None leaves each a document of its own.
        windows: How many windows are measured on, the first, if nothing is said; None takes all.
    """

    config: str | None = None
    data_file: str | None = None
    split: str
    rows: int | None = None
    separator: str | None = None
    windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class UsualText:
    """
    Data set that a name stands for.

    Attributes:
        dataset: Its id on the hub.
        calibration: What a model is calibrated on.
        evaluation: What perplexities are measured on.
    """

    dataset: str
    calibration: Part
    evaluation: Part


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


def separator_of(config: str | None) -> str | None:
    """Return what joins the rows of a data set that are lines of one text, as WikiText's are."""
    return "\n\n" if config is not None and config.startswith("wikitext-") else None


def check_usual(dataset: str | None, **others: object) -> None:
    """
    See that nothing is said of a usual text but its name.

    Args:
        dataset: Name of a data set.
        others: Its other fields, by name, where they differ from their defaults.

    Raises:
        InvalidInput: The name says it already.
    """
    usual = USUAL_TEXTS.get(dataset or "")
    said = [name for name, value in others.items() if value is not None]
    if usual is not None and said:
        raise InvalidInput(
            f"dataset {dataset!r} is a name for a usual text, its files and splits: leave "
            f"{', '.join(said)} out, or give the data set by its own name, {usual.dataset!r}."
        )
