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
from pho_service.models.gguf_header import text_fields
from pho_service.models.packed_file import small_files
from pho_service.pruning.reconstruction import Reconstructed, summary
from pho_service.spec.perplexities import Perplexities
from pho_service.spec.tasks import TaskScores

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE_KEYS = ("license", "license_name", "license_link")
_LICENCE_FIELDS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
_PLAIN = re.compile(r"[\w.+:/#?=&%~-]{1,300}")  # what is taken over from another card
_STEPS = ("statistics", "permutation", "repruning", "update", "shrinkage")


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
            fields = text_fields(path, _LICENCE_FIELDS)
            said = {_LICENCE_FIELDS[field]: value for field, value in fields.items()}
        elif path.exists():
            with small_files(path) as folder:
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
    name, configuration = str(recipe["model"]["name"]), recipe["configuration"]
    on_hub = is_hub_id(name) and not Path(name).exists()
    base = name if on_hub else PurePath(name).name or "a model in memory"
    known: dict[str, Any] = {"license": "unknown", **licence}
    head = ModelCardData(
        **known,
        base_model=name if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pho", "pruned", "sparse", f"sparsity-{configuration['pattern']}"],
    ).to_yaml()
    parts = [
        f"---\n{head}\n---\n\n# {base}, pruned\n",
        f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        f"with {recipe['sparsity']:.2%} of the weights of {len(recipe['layers'])} linears set to "
        "zero by PHO.\n",
        "## How it was pruned\n",
        *(f"* {line}" for line in _how(recipe)),
        "\n`pruning.json` has the whole recipe, `pruning/masks.safetensors` the masks; "
        "`pho prune --check FOLDER` compares the weights with both.\n",
        "## How good it is\n",
        *_how_good(configuration),
        *_tasks(configuration),
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


def _how(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The method, its numbers, and the text."""
    configuration = recipe["configuration"]
    yield f"Method: `{configuration['method']}`"
    yield f"Pattern: `{configuration['pattern']}`, weights compared by `{configuration['scope']}`"
    numbers = configuration.get("coefficients") or {}
    if numbers:
        said = ", ".join(f"{key} {_short(value)}" for key, value in numbers.items())
        yield f"Coefficients: {said}"
    steps = configuration.get("steps") or {}
    done = [f"{key} `{steps[key]}`" for key in _STEPS if steps.get(key) not in (None, "none")]
    for step in ("allocation", "reconstruction"):
        method = (steps.get(step) or {}).get("method")
        done += [f"{step} `{method}`"] if method not in (None, "none") else []
    yield f"Steps: {', '.join(done) or 'none beside the score'}"
    yield f"Calibration: {_text(recipe.get('calibration') or {})}"
    if blocks := recipe.get("blocks"):
        trained = {name: Reconstructed(**block) for name, block in blocks.items()}
        yield f"Training: {summary(trained)}"
    if few := recipe.get("few_tokens"):
        yield f"Take care: {few}"
    yield f"PHO {recipe['versions'].get('pho-service', '')}"


def _how_good(configuration: Mapping[str, Any]) -> Iterator[str]:
    """The perplexities that were measured when the configuration was found."""
    measured, beside = configuration.get("confirmation"), configuration.get("perplexities")
    if not measured or not beside:
        yield "Its perplexity was not measured."
        return
    where = f"{measured['tokens']:,} tokens in windows of {measured['context_length']}"
    yield f"Perplexity when it was found, on {_text(measured)} ({where}); lower is better:\n"
    yield "| model | perplexity |\n| --- | --- |"
    told = Perplexities.model_validate(beside)
    yield f"| dense | {told.dense:.2f} |"
    yield f"| this one | {told.pruned:.2f} ({told.rise:+.0%}) |"
    for name, value in (("Wanda", told.wanda), ("RIA", told.ria)):
        yield from [] if value is None else [f"| {name}, same pattern | {value:.2f} |"]


def _tasks(configuration: Mapping[str, Any]) -> Iterator[str]:
    """What it scored in zero-shot tasks when it was found."""
    if not configuration.get("tasks"):
        return
    scores = TaskScores.model_validate(configuration["tasks"])
    asked = "" if scores.limit is None else f", the first {scores.limit} examples of each"
    yield f"\nZero-shot tasks by lm-evaluation-harness{asked}. {scores.note}\n"
    yield f"| {' | '.join(scores.columns)} |\n|{' --- |' * len(scores.columns)}"
    yield from (f"| {' | '.join(row)} |" for row in scores.rows())


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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
