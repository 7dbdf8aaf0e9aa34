"""
The recipe of a pruned folder, ``pruning.json``: what was done to each linear, read with care.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pho_service.errors import ConfigurationError, ModelError
from pho_service.models.saving import RECIPE
from pho_service.spec.configuration import shown

FORMAT = "pho-pruning"
VERSION = 2
MAX_BYTES = 2**28  # a mixture of experts names each expert, and each folded channel
MAX_CONTAINERS = 2**20  # lists and objects; each takes many times its two bytes in memory
MAX_GROUP = 64  # M of N:M, as in pho_service.spec.pattern.Pattern
_SHOWN = 3  # problems of one check that are told in full
_FAULTS = 100  # wrong records of a recipe that are counted
_WAY_OUT = "Prune the model again with `pho prune`."


class _Document(BaseModel):
    """No infinities, no coercion; keys that are not looked at may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class LayerRecord(_Document):
    """
    Entry of the recipe for one linear.

    Attributes:
        sparsity: Share removed.
        mask_sha256: As :func:`pho_service.models.mask_file.write_masks` gives it.
        weights_sha256: As :func:`pho_service.models.mask_file.weight_sha256` gives it, of the
            weight in its saved dtype.
        keep: N of N:M.
        group: M of N:M; None where the linear has no groups.
    """

    sparsity: float = Field(ge=0, le=1)
    mask_sha256: str
    weights_sha256: str
    keep: int | None
    group: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_pattern(self) -> Self:
        if (self.keep is None) != (self.group is None):
            raise ValueError("keep and group must both be given, or neither")
        if self.group is not None and not 0 <= (self.keep or 0) <= self.group <= MAX_GROUP:
            raise ValueError(
                f"keep={self.keep} of group={self.group} is not a pattern up to {MAX_GROUP}"
            )
        return self


class Folded(_Document):
    """
    Channels that were renumbered in the saved model: position p holds what was order[p].

    Attributes:
        reader: The linear whose input channels they are.
        writers: The linears whose outputs they are.
        order: A permutation of the channels.
    """

    reader: str
    writers: Annotated[list[str], FailFast()]
    order: Annotated[list[int], FailFast()]


class ModelRecord(_Document):
    """Which model was pruned: :meth:`pho_service.models.loading.LanguageModel.to_dict`."""

    name: str
    revision: str | None
    weights_sha256: str
    dtype: str


class BlockRecord(_Document):
    """
    Entry of the recipe for the reconstruction of a block.

    Attributes:
        before: Squared error over energy, a token, on windows that were not trained on.
        after: The same of the weights that were saved.
        passes: That were made over the calibration windows.
        kept: Whether the trained weights were taken.
    """

    before: float | None
    after: float | None
    passes: int = Field(ge=0)
    kept: bool


class PatternRecord(_Document):
    """What of the configuration is looked at."""

    pattern: str


class Recipe(_Document):
    """
    ``pruning.json``, version 2.

    Attributes:
        updated: Weights that stayed were changed.
        dense: Linears that were left out, with the hash of each one's weight. They have no masks.
        blocks: What the reconstruction of each block came to, if there was one.
    """

    format: Literal["pho-pruning"]
    version: Literal[2]
    configuration: PatternRecord
    model: ModelRecord
    updated: bool
    folded: Annotated[list[Folded], FailFast()]
    sparsity: float = Field(ge=0, le=1)
    layers: dict[str, LayerRecord] = Field(min_length=1)
    dense: dict[str, str] = Field(default_factory=dict)
    blocks: dict[str, BlockRecord] = Field(default_factory=dict)
    calibration: dict[str, Any]
    versions: dict[str, str]

    @field_validator("layers", mode="before")
    @classmethod
    def _first_faults(cls, value: Any) -> Any:
        """Keep the first of very many wrong records: each fault takes a thousand bytes."""
        if not isinstance(value, dict):
            return value
        fits = LayerRecord.__pydantic_validator__.isinstance_python
        wrong = (name for name, record in value.items() if not fits(record))
        some = list(islice(wrong, _FAULTS))
        return {name: value[name] for name in some} if len(some) == _FAULTS else value


def read_recipe(folder: Path) -> Recipe:
    """
    Read what a pruned folder says of itself.

    Raises:
        ModelError: No such folder.
        ConfigurationError: No recipe, another format or version, or a key that is missing or
            breaks a rule.
    """
    document = recipe_document(folder.expanduser())
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(
            f"{folder / RECIPE} breaks the format: {reasons(error)}. {_WAY_OUT}"
        ) from error


def recipe_document(folder: Path) -> dict[str, Any]:
    """The recipe as JSON, of the version that this PHO reads."""
    path = folder / RECIPE
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder. Give what `pho prune` wrote with --out.")
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} has no {RECIPE}, so `pho prune` did not write it. Give a folder that it did."
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_BYTES} bytes: no recipe.")
        if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
            raise ConfigurationError(
                f"{path} has more than {MAX_CONTAINERS} lists and objects: no recipe."
            )
        document = json.loads(content.decode())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}. {_WAY_OUT}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigurationError(
            f"{path} is not a recipe: its format is not {FORMAT!r}. {_WAY_OUT}"
        )
    version = document.get("version")
    if version != VERSION:
        raise ConfigurationError(
            f"{path} has format version {shown(version)}, but this PHO reads version {VERSION}. "
            "Install the PHO that wrote it, or prune the model again."
        )
    return document


def reasons(error: ValidationError) -> str:
    """What is wrong with a document, each fault after its place."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    problems = (f"{shown('.'.join(map(str, e['loc'])))}: {e['msg']}" for e in faults)
    return listed(list(problems))


def listed(problems: list[str]) -> str:
    """The first problems in full, and how many more there are."""
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
