"""
The card of a pruned model: ``README.md`` in its folder, with the head that the hub reads.

All of it follows from the recipe, and from what the base model says of its licence.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import metadata_load

from pho_service.errors import ModelError
from pho_service.models.packed import as_folder
from pho_service.planning.gguf_header import read_gguf
from pho_service.pruning.reconstruction import Reconstructed, summary
from pho_service.shown.report import Report
from pho_service.shown.tables import (
    configuration_rows,
    results_table,
    tasks_table,
    text_of,
    verdict_table,
)
from pho_service.spec.configuration import Configuration

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE_KEYS = ("license", "license_name", "license_link")
_LICENCE_FIELDS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
_PLAIN = re.compile(r"[\w.+:/#?=&%~-]{1,300}")  # what is taken over from another card
_TOLD = ("method", "coefficients", "exponents", "normalised", "steps")


def licence_of(name: str, revision: str | None) -> dict[str, str]:
    """
    What a model says of its licence, in the keys of the hub; empty if nothing is known.

    Args:
        name: A hub id, a folder, packed or not, whose card is read; or a .gguf file, which says
            it in its header. Other models say nothing.
        revision: Revision of a hub id.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file() and path.suffix == ".gguf":
            fields, _ = read_gguf(path)
            said = {
                ours: fields[field]
                for field, ours in _LICENCE_FIELDS.items()
                if isinstance(fields.get(field), str)
            }
        elif path.exists():
            with as_folder(path) as folder:
                said = _head(folder / CARD)
        elif is_hub_id(name):
            said = _head(Path(hf_hub_download(name, CARD, revision=revision)))
        else:
            said = {}
    except (
        OSError,
        ValueError,
        ModelError,
        EntryNotFoundError,
        yaml.YAMLError,
    ):  # no network, no card, or not one to be read
        return {}
    found = {key: said.get(key) for key in _LICENCE_KEYS}
    return {k: v for k, v in found.items() if isinstance(v, str) and _PLAIN.fullmatch(v)}


def _head(card: Path) -> dict[str, Any]:
    """Metadata of a card for the hub."""
    return (metadata_load(card) or {}) if card.is_file() else {}


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be that of a model on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(recipe: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """
    Return the card of a pruned model.

    Args:
        recipe: What ``pruning.json`` says.
        licence: That of the base model; see :func:`licence_of`.
    """
    name = str(recipe["model"]["name"])
    found = Configuration.model_validate(recipe["configuration"])
    on_hub = is_hub_id(name) and not Path(name).exists()
    base = name if on_hub else PurePath(name).name or "a model in memory"
    known: dict[str, Any] = {"license": "unknown", **licence}
    head = ModelCardData(
        **known,
        base_model=name if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pho", "pruned", "sparse", f"sparsity-{found.pattern}"],
    ).to_yaml()
    parts = [
        f"---\n{head}\n---\n\n# {base}, pruned\n",
        f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        f"with {recipe['sparsity']:.2%} of the weights of {len(recipe['layers'])} linears set to "
        "zero by PHO.\n",
        "## How it was pruned\n",
        *(f"* {line}" for line in _how(recipe, found)),
        "\n`pruning.json` has the whole recipe, `pruning/masks.safetensors` the masks; "
        "`pho prune --check FOLDER` compares the weights with both.\n",
        "## How good it is\n",
        *_how_good(found),
        "\n## How to load it\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or its name on the hub\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n',
        "The zeros alone make it neither smaller nor faster: that needs a format or a runtime that "
        "leaves them out.\n",
        "## Licence\n",
        _licence(base, licence),
    ]
    return "\n".join(parts) + "\n"


def _how(recipe: Mapping[str, Any], found: Configuration) -> Iterator[str]:
    """The method, its numbers, and the text."""
    for name, value in configuration_rows(found):
        if name in _TOLD:
            yield f"{name.capitalize()}: `{value}`"
    yield f"Calibration: {_text(recipe.get('calibration') or {})}"
    if blocks := recipe.get("blocks"):
        trained = {name: Reconstructed(**block) for name, block in blocks.items()}
        yield f"Training: {summary(trained)}"
    if few := recipe.get("few_tokens"):
        yield f"Take care: {few}"
    yield f"PHO {recipe['versions'].get('pho-service', '')}"


def _how_good(found: Configuration) -> Iterator[str]:
    """What was measured when the configuration was found."""
    if found.confirmation is None:
        yield "Its perplexity was not measured."
    else:
        yield f"Measured when it was found, on {text_of(found.confirmation)}.\n"
        good = found.perplexities
        table = results_table(Report.of(found)) if good is None else verdict_table(good)
        yield "" if table is None else table.markdown()
    if found.tasks is not None:
        limit = found.tasks.limit
        asked = "" if limit is None else f", the first {limit} examples of each"
        yield f"\nBy lm-evaluation-harness{asked}:\n\n{tasks_table(found.tasks).markdown()}"


def _text(about: Mapping[str, Any]) -> str:
    """What is known of a text, without the folders that it lay in."""
    name = str((about.get("text") or {}).get("source") or "")
    settings = about.get("settings") or {}
    sizes = [f"{settings[k]} {k.replace('_', ' ')}" for k in ("samples", "context_length")
             if k in settings]  # fmt: skip
    said = f"`{PurePath(name).name if name[0] in '/.~' else name}`" if name else "a text"
    return ", ".join([said, *sizes])


def _licence(base: str, licence: Mapping[str, str]) -> str:
    if not licence:
        return f"Unknown here: that of {base} applies; see the base model."
    name = licence.get("license_name") or licence.get("license")
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"That of the base model: `{name}`{link}."
