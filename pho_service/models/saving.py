"""
A pruned model as a folder: weights, recipe (``pruning.json``), card, and its way to the hub.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePath, PureWindowsPath
from typing import Annotated, Any, Literal, Self

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pho_service.errors import ConfigurationError, InvalidInput, ModelError, ServiceError
from pho_service.host.files import new_folder, write_text
from pho_service.models.bundle_file import os_errors
from pho_service.models.loading import LanguageModel
from pho_service.models.mask_file import MASKS, PackedMask, write_masks
from pho_service.models.packed import as_folder
from pho_service.planning.shapes import read_gguf
from pho_service.pruning.reconstruction import Reconstructed, summary
from pho_service.shown.report import Report
from pho_service.shown.tables import (
    configuration_rows,
    continuations_table,
    recovered_table,
    results_table,
    tasks_table,
    text_of,
    verdict_table,
)
from pho_service.spec.configuration import Configuration, check_format, read_document, reasons
from pho_service.spec.recovery import Recovered, Student

_ROOTED = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
_WEIGHTS = ("layers", "folded", "dense", "blocks")  # parts that are of linears, by their names


def shareable(value: Any) -> Any:
    """Return a recipe for others: with the names of this machine's files, not where they lie."""
    if isinstance(value, dict):
        return {k: item if k in _WEIGHTS else shareable(item) for k, item in value.items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
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


CARD = "README.md"  # of a pruned model, with the head that the hub reads
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE_KEYS = ("license", "license_name", "license_link")
_LICENCE_FIELDS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
_PLAIN = re.compile(r"[\w.+:/#?=&%~-]{1,300}")  # what is taken over from another card
_TOLD = ("method", "cut", "coefficients", "exponents", "normalised", "steps")


def licence_of(name: str, revision: str | None) -> dict[str, str]:
    """The licence of a model by its own words, in the keys of the hub; empty if it says nothing."""
    path = Path(name).expanduser()
    try:
        if path.is_file() and path.suffix == ".gguf":
            fields, _ = read_gguf(path)
            head = {
                ours: fields[field]
                for field, ours in _LICENCE_FIELDS.items()
                if isinstance(fields.get(field), str)
            }
        elif path.exists():
            with as_folder(path) as folder:
                head = _head(folder / CARD)
        elif is_hub_id(name):
            head = _head(Path(hf_hub_download(name, CARD, revision=revision)))
        else:
            head = {}
    except (
        OSError,
        ValueError,
        ModelError,
        EntryNotFoundError,
        yaml.YAMLError,
    ):  # no network, no card, or not one to be read
        return {}
    licence = {key: head.get(key) for key in _LICENCE_KEYS}
    return {k: v for k, v in licence.items() if isinstance(v, str) and _PLAIN.fullmatch(v)}


def _head(card: Path) -> dict[str, Any]:
    return (metadata_load(card) or {}) if card.is_file() else {}


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be that of a model on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(recipe: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    name = str(recipe["model"]["name"])
    document = recipe["configuration"]
    config = None if document is None else Configuration.model_validate(document)  # None: elsewhere
    recovery = recipe.get("recovery")
    recovered = None if recovery is None else Recovered.from_dict(recovery)
    student = None if recovered is None or config is not None else recovered.student
    cut = None if config is None else config.cut
    on_hub = is_hub_id(name) and not Path(name).exists()
    base = name if on_hub else PurePath(name).name or "a model in memory"
    head_fields: dict[str, Any] = {"license": "unknown", **licence}
    head = ModelCardData(
        **head_fields,
        base_model=name if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pho", *_tags(recipe, config, student)],
    ).to_yaml()
    base_link = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"
    zeros = f"{recipe['sparsity']:.2%} of the weights of {len(recipe['layers'])} linears"
    smaller = bool(student or cut)
    if cut:
        share = f"{cut.removed:.1%} of the weights of its blocks"
        intro = f"{base_link}\nwithout {share}: PHO has cut them out, and it is an ordinary, "
        intro += "smaller model.\n"
    elif student:
        intro = f"A smaller model that PHO has trained towards {base_link}: it has {student}.\n"
    else:
        intro = f"{base_link}\nwith {zeros} set to zero{' by PHO' if config else ''}.\n"
    parts = [
        f"---\n{head}\n---\n\n# {base}, {'as a smaller model' if smaller else 'pruned'}\n",
        intro,
        f"## How it was {'made' if smaller else 'pruned'}\n",
        *(f"* {line}" for line in _how(recipe, config, recovered)),
        "\n`pruning.json` has the whole recipe, `pruning/masks.safetensors` the masks; "
        "`pho prune --check FOLDER` compares the weights with both.\n"
        if recipe["layers"]
        else "\n`pruning.json` has the whole recipe; `pho prune --check FOLDER` compares the "
        "weights with it.\n",
        "## How good it is\n",
        *_how_good(config, recovered),
        "\n## How to load it\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or its name on the hub\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n',
        "The zeros alone make it neither smaller nor faster: that needs a format or a runtime that "
        "leaves them out.\n"
        if recipe["layers"]
        else "It is smaller by its shapes, so any runtime that takes its architecture runs it.\n",
        "## Licence\n",
        _licence(base, licence),
    ]
    return "\n".join(parts) + "\n"


def _tags(
    recipe: Mapping[str, Any], config: Configuration | None, student: Student | None
) -> Iterator[str]:
    if student is not None:
        yield "distillation"
    if recipe.get("structure"):
        yield from ("pruned", "structured-pruning")
    if recipe["layers"]:
        yield from ("pruned", "sparse")
    if config is not None and config.cut is None:
        yield f"sparsity-{config.pattern}"


def _how(
    recipe: Mapping[str, Any], config: Configuration | None, recovered: Recovered | None
) -> Iterator[str]:
    """The method, its numbers, and the text."""
    student = None if recovered is None else recovered.student
    if config is None and student is not None:
        yield f"Trained from `{shareable(student.model['name'])}`, which was made smaller before"
        if recipe["layers"]:
            zeros = f"{recipe['sparsity']:.2%} of the weights of {len(recipe['layers'])} linears"
            yield f"Zeros stayed zeros: {zeros}"
    elif config is None:
        yield "By another tool than PHO, which has its masks from the zeros"
    else:
        for name, value in configuration_rows(config):
            if name in _TOLD:
                yield f"{name.capitalize()}: `{value}`"
        yield f"Calibration: {_text(recipe.get('calibration') or {})}"
    if blocks := recipe.get("blocks"):
        trained = {name: Reconstructed(**block) for name, block in blocks.items()}
        yield f"Training: {summary(trained)}"
    if few := recipe.get("few_tokens"):
        yield f"Take care: {few}"
    if config is not None and recovered is not None and student is not None:
        yield f"Teacher: `{shareable(recovered.teacher['name'])}`; the model has {student}"
    if recovered is not None:
        yield f"Recovery on {_text({'text': recovered.text})}: {recovered}"
    yield f"PHO {recipe['versions'].get('pho-service', '')}"


def _how_good(config: Configuration | None, recovered: Recovered | None) -> Iterator[str]:
    if recovered is not None and recovered.perplexities:
        yield f"{recovered_table(recovered).markdown()}\n"
        writing = continuations_table(recovered.continuations, before=recovered.models_before)
        yield f"{writing.markdown()}\n" if writing.rows else ""
    elif recovered is not None:
        yield "The perplexity after the recovery was not measured.\n"
    before = "" if recovered is None else ", before the recovery"
    if config is None or config.confirmation is None:
        if recovered is None:
            yield "Its perplexity was not measured."
    else:
        good = config.headline
        how = config.report or config.confirmation
        yield f"Measured when it was found, on {text_of(how)}{before}.\n"
        table = results_table(Report.of(config)) if good is None else verdict_table(good)
        yield "" if table is None else table.markdown()
        if not (recovered and recovered.continuations):
            writing = continuations_table(config.continuations)
            yield f"\n{writing.markdown() if writing.rows else writing.notes[0]}"
    if config is not None and config.tasks is not None:
        limit = config.tasks.limit
        limit_note = "" if limit is None else f", the first {limit} examples of each"
        yield f"\nBy lm-evaluation-harness{limit_note}:\n\n{tasks_table(config.tasks).markdown()}"


def _text(about: Mapping[str, Any]) -> str:
    """A text and its windows, without the folders that it lay in."""
    name = str((about.get("text") or {}).get("source") or "")
    settings = about.get("settings") or {}
    sizes = [f"{settings[k]} {k.replace('_', ' ')}" for k in ("samples", "context_length")
             if k in settings]  # fmt: skip
    title = f"`{PurePath(name).name if name[0] in '/.~' else name}`" if name else "a text"
    return ", ".join([title, *sizes])


def _licence(base: str, licence: Mapping[str, str]) -> str:
    if not licence:
        return f"Unknown here: that of {base} applies; see the base model."
    name = licence.get("license_name") or licence.get("license")
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"That of the base model: `{name}`{link}."


RECIPE = "pruning.json"
SHARD = "2GB"  # a file is put together in memory


def save_pruned(
    model: LanguageModel,
    folder: Path,
    masks: Iterable[tuple[str, PackedMask]],
    recipe: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model whose masks are applied: weights, tokenizer, recipe, a card, and the masks."""
    # The folder is made beside its place and moved there when it is complete.
    with new_folder(folder, replacing=RECIPE if overwrite else None) as partial, os_errors():
        model.model.save_pretrained(partial, max_shard_size=SHARD)
        model.tokenizer.save_pretrained(partial)
        hashes = {}
        if recipe["layers"]:  # of a smaller model without zeros there are none
            metadata = {"model": shareable(recipe["model"])}
            (partial / MASKS).parent.mkdir()
            hashes = write_masks(masks, partial / MASKS, metadata=metadata)
        layers = {
            name: {**entry, "mask_sha256": hashes[name]} for name, entry in recipe["layers"].items()
        }
        text = json.dumps({**recipe, "layers": layers}, indent=2) + "\n"
        (partial / RECIPE).write_text(text, encoding="utf-8")
        card = model_card(recipe, licence_of(model.name, model.revision))
        (partial / CARD).write_text(card, encoding="utf-8")


def with_configuration(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Write a folder's recipe and card again, with what its configuration says by now."""
    recipe = {**recipe_document(folder), "configuration": dict(configuration)}
    model = recipe["model"]
    card = model_card(recipe, licence_of(model["name"], model["revision"]))
    write_text(folder / CARD, card)
    write_text(folder / RECIPE, json.dumps(recipe, indent=2) + "\n")


FORMAT = "pho-pruning"  # of the recipe of a pruned folder, ``pruning.json``
VERSION = 2
MAX_BYTES = 2**28  # a mixture of experts names each expert, and each folded channel
MAX_GROUP = 64  # M of N:M, as in pho_service.spec.pattern.Pattern
_FAULTS = 100  # wrong records of a recipe that are counted
_WAY_OUT = "Prune the model again with `pho prune`."


class _Document(BaseModel):
    """No infinities, no coercion; keys that are not looked at may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class LayerRecord(_Document):
    """Entry of the recipe for one linear."""

    sparsity: float = Field(ge=0, le=1)  # Share removed
    mask_sha256: str  # As :func:`pho_service.models.mask_file.write_masks` gives it
    # As :func:`pho_service.models.mask_file.weight_sha256` gives it, of the weight in its saved
    # dtype.
    weights_sha256: str
    keep: int | None  # N of N:M
    group: int | None = Field(ge=1)  # M of N:M; None where the linear has no groups

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
    """Channels that were renumbered in the saved model: position p holds what was order[p]."""

    reader: str  # The linear whose input channels they are
    writers: Annotated[list[str], FailFast()]  # The linears whose outputs they are
    order: Annotated[list[int], FailFast()]  # A permutation of the channels


class ModelRecord(_Document):
    """Which model was pruned: :meth:`pho_service.models.loading.LanguageModel.to_dict`."""

    name: str
    revision: str | None
    weights_sha256: str
    dtype: str


class BlockRecord(_Document):
    """Entry of the recipe for the reconstruction of a block."""

    before: float | None  # Squared error over energy, a token, on windows that were not trained on
    after: float | None  # The same of the weights that were saved
    passes: int = Field(ge=0)  # That were made over the calibration windows
    kept: bool  # Whether the trained weights were taken


class RecoveryRecord(_Document):
    """The fields of a :class:`~pho_service.spec.recovery.Recovered` that are looked at."""

    train: Literal["kept", "norms", "lora"]
    kept: bool  # Whether the trained weights were taken
    student: dict[str, Any] | None = None  # Sizes of it and of its teacher, if that is larger


class StructureRecord(_Document):
    """What was cut out of the blocks of a smaller model, and what stayed of each."""

    layers: Annotated[list[int], FailFast()]  # Indices of the dense model's blocks that stayed
    # Of each of these blocks, by its name in the dense model; none where nothing was cut.
    neurons: dict[str, Annotated[list[int], FailFast()]]
    query_heads: dict[str, Annotated[list[int], FailFast()]]
    sha256: str  # Of these three, as JSON with sorted keys


def indices_sha256(
    layers: Sequence[int], neurons: Mapping[str, list[int]], query_heads: Mapping[str, list[int]]
) -> str:
    """Hash of what stayed of a model's blocks."""
    kept = {"layers": [*layers], "neurons": neurons, "query_heads": query_heads}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class PatternRecord(_Document):
    """The fields of the configuration that are looked at."""

    pattern: str


class Recipe(_Document):
    """``pruning.json``, version 2."""

    format: Literal["pho-pruning"]
    version: Literal[2]
    configuration: PatternRecord | None  # None of a model that another tool has made
    model: ModelRecord  # The dense model; the teacher of a smaller one
    updated: bool  # Weights that stayed were changed
    folded: Annotated[list[Folded], FailFast()]
    sparsity: float = Field(ge=0, le=1)
    layers: dict[str, LayerRecord]  # None of a smaller model without zeros
    # Linears that were left out, with the hash of each one's weight. They have no masks.
    dense: dict[str, str] = Field(default_factory=dict)
    # What the reconstruction of each block came to, if there was one.
    blocks: dict[str, BlockRecord] = Field(default_factory=dict)
    recovery: RecoveryRecord | None = None  # What the whole model was trained for, if it was
    structure: StructureRecord | None = None  # What was cut out of it, if anything was
    calibration: dict[str, Any]
    versions: dict[str, str]

    @property
    def is_student(self) -> bool:
        """Whether it is smaller than the dense model: cut, or made so by another tool."""
        trained = self.recovery is not None and self.recovery.student is not None
        return self.structure is not None or (trained and self.configuration is None)

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if not self.layers and not self.is_student:
            raise ValueError("layers is empty; only a model smaller than its teacher has none")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _first_faults(cls, value: Any) -> Any:
        """Keep the first of very many wrong records: each fault takes a thousand bytes."""
        if not isinstance(value, dict):
            return value
        fits = LayerRecord.__pydantic_validator__.isinstance_python
        wrong = (name for name, record in value.items() if not fits(record))
        names = list(islice(wrong, _FAULTS))
        return {name: value[name] for name in names} if len(names) == _FAULTS else value


def read_recipe(folder: Path) -> Recipe:
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
        raise ModelError(f"{folder} is no folder. Give what `pho prune --out` wrote.")
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} has no {RECIPE}, so `pho prune` did not write it. Give a folder that it did."
        )
    document: dict[str, Any] = read_document(path, "recipe", MAX_BYTES, f" {_WAY_OUT}")
    kind, again = (FORMAT, VERSION), "prune the model"
    check_format(document, str(path), "recipe", kind, f" {_WAY_OUT}", again)
    return document


# Of the HTTP library that huggingface_hub takes: httpx, or in newer versions httpx2.
_HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without those of tools, which are hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [p for p in files if not any(x.startswith(".") for x in p.relative_to(folder).parts)]


def _added(folder: Path, path: Path) -> CommitOperationAdd:
    name = path.relative_to(folder).as_posix()
    if name != RECIPE:
        return CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
    recipe = shareable(json.loads(path.read_bytes()))
    text = json.dumps(recipe, indent=2) + "\n"
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())


def push(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """
    Upload a pruned folder, as one commit.

    ``pruning.json`` then only has the names of models, texts and libraries on this machine, not
    their folders; the file in the folder stays as it is.

    The token is that of ``HF_TOKEN``, or of `hf auth login`.

    Args:
        folder: What `pho prune` wrote.
        repository: ``org/name``; made if it is not there. One that is there stays private or
            public, as it is.
        public: Whether a new one can be seen by everybody.

    Returns:
        The commit's address.

    Raises:
        ModelError, ConfigurationError: The folder is not one that `pho prune` wrote.
        InvalidInput: ``repository`` is not a name of the hub.
        ServiceError: The hub says no, or cannot be reached.
    """
    folder = Path(folder).expanduser()
    recipe = read_recipe(folder)
    if repository.count("/") != 1:
        raise InvalidInput(
            f"{repository!r} is not a repository of the hub. Write org/name, or user/name."
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.create_commit(
            repo_id=repository,
            operations=[_added(folder, path) for path in _files(folder)],
            commit_message=f"Pruned to {recipe.configuration.pattern} with PHO"
            if recipe.configuration
            else "Recovered with PHO",
        )
    except HFValidationError as error:
        raise InvalidInput(f"{repository!r} is not a name of the hub: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        way_out = (
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
            if status in (401, 403)
            else "Nothing of the folder was lost; push it again."
        )
        raise ServiceError(
            f"the hub refuses {repository}: {error.server_message or error}. {way_out}",
            status=status,
        ) from error
    except (OSError, _HTTPError) as error:
        raise ServiceError(
            f"the hub at {api.endpoint} cannot be reached: {error}. Push again: "
            f"`pho push {folder} {repository}`."
        ) from error
    return str(commit.commit_url)
