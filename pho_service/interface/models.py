"""
What the functions of the API take for a model and for what was found on one.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pho_service.errors import BundleError, InvalidInput, ModelError
from pho_service.models.bundle_file import read_bundle
from pho_service.models.given_model import given_model
from pho_service.models.loading import LanguageModel, load_model
from pho_service.progress import Run, bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.configuration import Configuration, parse_configuration, read_configuration
from pho_service.spec.pattern import Pattern
from pho_service.tuning.result import SearchResult

Model = PreTrainedModel | LanguageModel | str | Path
# What a pruning is done with: what was found, in any of its forms.
Choice = SearchResult | Configuration | dict[str, Any] | str | Path

_PRUNED = 0.01  # share of the sampled weights that are zero in the model and not in its bundle


def opened(model: Model, tokenizer: Any = None) -> LanguageModel:
    """Take a model in memory as it is, or load one by its name, with its own tokenizer."""
    if isinstance(model, PreTrainedModel):
        return given_model(model, tokenizer)
    if isinstance(model, LanguageModel):
        kept = model.tokenizer if tokenizer is None else tokenizer
        # What it was may have changed since; a streamed one's weights are in its files.
        known = model if model.stream else given_model(model.model, kept)
        return LanguageModel(
            name=model.name,
            revision=model.revision,
            model=model.model,
            tokenizer=kept,
            stored_dtype=model.stored_dtype,
            linears=known.linears,
            streamed_to=model.streamed_to,
        )
    if not isinstance(model, (str, Path)):
        raise InvalidInput(
            f"model is a {type(model).__name__}, not a model of transformers. Give a "
            "PreTrainedModel (of a compiled or wrapped one the model inside), or its name."
        )
    loaded = load_model(str(model))
    return loaded if tokenizer is None else opened(loaded, tokenizer)


def run_on(model: LanguageModel | None, progress: bool) -> Run:
    """Rate candidates for a model on its GPU if it has one, and show bars if they are wanted."""
    device = torch.device("cpu") if model is None else model.device
    return Run(device=str(device) if device.type == "cuda" else "cpu", progress=bars(progress))


def opened_bundle(bundle: ProxyBundle | str | Path) -> ProxyBundle:
    """Take a bundle as it is, or read one from a file of `pho calibrate`."""
    if isinstance(bundle, (str, Path)):
        return read_bundle(Path(bundle).expanduser())
    if not isinstance(bundle, ProxyBundle):
        raise InvalidInput(
            f"bundle is a {type(bundle).__name__}, not a bundle. Give what pho.calibrate returns, "
            "or the path of a file of `pho calibrate`."
        )
    return bundle


def check_dense(model: LanguageModel, bundle: ProxyBundle) -> None:
    """See that a bundle was made of a model as it is, which was not pruned since."""
    try:
        bundle.check_model(model.linears)
    except BundleError as error:
        if _zeros(model, bundle) > _PRUNED:
            raise ModelError(
                f"the model {model.name} has been pruned already: {_zeros(model, bundle):.1%} of "
                "the weights that are in its bundle are zero now. Load it again, dense; or "
                "calibrate the pruned one to prune it further."
            ) from error
        raise


def _zeros(model: LanguageModel, bundle: ProxyBundle) -> float:
    """Share of a bundle's sampled weights that are zero in the model alone."""
    gone = total = 0
    for layer in bundle.layers:
        linear = model.linears.get(layer.name)
        if linear is None or linear.weight.shape != (layer.out_features, layer.in_features):
            return 0.0
        now = linear.weight[layer.row_index.to(linear.weight.device)].cpu()
        gone += int(((now == 0) & (layer.rows != 0)).sum())
        total += layer.rows.numel()
    return gone / total


def check_prefix(model: LanguageModel, bundle: ProxyBundle) -> None:
    """See that a tokenizer begins windows as that of the calibration did."""
    prefix = bundle.provenance.get("prefix")
    if model.tokenizer is None or prefix is None:
        return
    begins = model.window_prefix(bundle.provenance.get("settings", {}).get("bos", "auto"))
    if begins != prefix:
        raise ModelError(
            f"the tokenizer begins windows with the tokens {begins}, but that of the calibration "
            f"with {prefix}: it is of another model, or was changed. Give the one that the bundle "
            "was made with."
        )


def chosen(choice: Choice) -> Configuration:
    """Take a configuration in any of its forms: found, parsed, its JSON values, or a path."""
    found = choice.configuration if isinstance(choice, SearchResult) else choice
    if isinstance(found, Configuration):
        return found
    if isinstance(found, (str, Path)):
        return read_configuration(Path(found).expanduser())
    if isinstance(found, dict):
        return parse_configuration(found, "the configuration")
    raise InvalidInput(
        f"a {type(choice).__name__} is given for a configuration. Give what pho.search or "
        "pho.configuration returns, or the path of a config.json."
    )


def parsed(pattern: str | float | Pattern, scope: str | None) -> Pattern:
    """Take a pattern in any of its forms: ``"2:4"``, ``"0.5"``, 0.5, or parsed already."""
    if not isinstance(pattern, Pattern):
        return Pattern.parse(str(pattern), scope)
    if scope is not None:
        raise InvalidInput(
            f"scope {scope!r} is given beside a pattern that has one, {pattern.scope.value!r}. "
            "Leave it out."
        )
    return pattern
