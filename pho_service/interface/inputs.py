"""
What the functions of the API take: models and texts, by name or in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pho_service.errors import BundleError, InvalidInput, ModelError, TextError
from pho_service.host.data_sets import USUAL_TEXTS
from pho_service.host.settings import Settings
from pho_service.models.bundle_file import read_bundle
from pho_service.models.calibration import CalibrationText, drawn_windows
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel, given_model, load_model
from pho_service.models.texts import (
    GivenText,
    GivenWindows,
    MixedText,
    ReportText,
    Text,
    mixed_text,
)
from pho_service.pipeline.inputs import Inputs
from pho_service.pipeline.work import Work
from pho_service.progress import Run, bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration, parse_configuration, read_configuration
from pho_service.spec.pattern import Pattern
from pho_service.tuning.result import SearchResult

# What the functions of the API take for a model and for what was found on one.
Model = PreTrainedModel | LanguageModel | str | Path
# What a pruning is done with: what was found, in any of its forms.
Choice = SearchResult | Configuration | dict[str, Any] | str | Path

_PRUNED = 0.01  # share of the sampled weights that are zero in the model and not in its bundle


def article(value: object) -> str:
    """What a value is, with its article: ``an int``."""
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def opened(model: Model, tokenizer: Any = None) -> LanguageModel:
    """Take a model in memory as it is, or load one by its name, with its own tokenizer."""
    if isinstance(model, PreTrainedModel):
        return given_model(model, tokenizer)
    if isinstance(model, LanguageModel):
        its_tokenizer = model.tokenizer if tokenizer is None else tokenizer
        # What it was may have changed since; a streamed one's weights are in its files.
        current_model = model if model.stream else given_model(model.model, its_tokenizer)
        return replace(model, tokenizer=its_tokenizer, linears=current_model.linears)
    if not isinstance(model, (str, Path)):
        raise InvalidInput(
            f"model is {article(model)}, not a model of transformers. Give a "
            "PreTrainedModel (of a compiled or wrapped one the model inside), or its name."
        )
    loaded = load_model(str(model))
    return loaded if tokenizer is None else opened(loaded, tokenizer)


def run_on(model: LanguageModel | None, progress: bool | None) -> Run:
    """Rate candidates for a model on its GPU if it has one, and show bars if they are wanted."""
    device = torch.device("cpu") if model is None else model.device
    return Run(device=str(device) if device.type == "cuda" else "cpu", progress=bars(progress))


def opened_bundle(bundle: ProxyBundle | str | Path) -> ProxyBundle:
    """Take a bundle as it is, or read one from a file of `pho calibrate`."""
    if isinstance(bundle, (str, Path)):
        return read_bundle(Path(bundle).expanduser())
    if not isinstance(bundle, ProxyBundle):
        raise InvalidInput(
            f"bundle is {article(bundle)}, not a bundle. Give what pho.calibrate returns, "
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
    configuration = choice.configuration if isinstance(choice, SearchResult) else choice
    if isinstance(configuration, Configuration):
        return configuration
    if isinstance(configuration, (str, Path)):
        return read_configuration(Path(configuration).expanduser())
    if isinstance(configuration, dict):
        return parse_configuration(configuration, "the configuration")
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


# Texts as the functions of the API take them.
if TYPE_CHECKING:
    import datasets

    from pho_service.pipeline.inputs import Cut

    Texts: TypeAlias = (
        str | Path | Sequence[str] | Tensor | datasets.Dataset | datasets.IterableDataset
    )
    # What a calibration takes: one, or several with their shares.
    MixedTexts: TypeAlias = Texts | list[tuple[Texts, float]]

FIELD = "text"  # column of a data set in memory


def calibration_text_of(texts: "MixedTexts") -> Text | MixedText:
    """Take a text, or pairs of texts and their shares."""
    parts: Any = texts
    if not isinstance(parts, list) or not parts or not isinstance(parts[0], tuple):
        return text_of(parts)
    if wrong := [part for part in parts if not isinstance(part, tuple) or len(part) != 2]:
        raise InvalidInput(f"{wrong[0]!r} is not a pair of a text and its share.")
    return mixed_text([text_of(text) for text, _ in parts], [share for _, share in parts])


def text_of(texts: "Texts") -> Text:
    """Take a text in any of its forms: a path or a usual name, documents, a data set, windows."""
    if isinstance(texts, str) and texts in USUAL_TEXTS:
        return TextSource(dataset=texts)
    if isinstance(texts, (str, Path)):
        return TextSource(path=str(texts))
    if isinstance(texts, Tensor):
        return GivenWindows(tokens=texts)
    if hasattr(texts, "select_columns") and hasattr(texts, "info"):  # datasets is not loaded here
        return _data_set(texts)
    if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
        return GivenText(documents=texts)
    raise InvalidInput(
        f"texts is {article(texts)}, which is not a text. Give the path of a .txt, .jsonl "
        "or .parquet file, a list of strings, a data set of `datasets` (one split of it), or a "
        "tensor of token windows."
    )


def _data_set(data_set: Any) -> GivenText:
    columns = data_set.column_names
    if columns is not None and FIELD not in columns:
        raise TextError(
            f"the data set has no column {FIELD!r}, only {', '.join(map(str, columns))}. Rename "
            f"the one with the text: dataset.rename_column(..., {FIELD!r})."
        )
    name = " ".join(
        str(part)
        for part in (data_set.info.dataset_name, data_set.info.config_name, data_set.split)
        if part is not None
    )
    return GivenText(documents=_Column(data_set), name=name or "a data set in memory")


@dataclass(frozen=True)
class _Column:
    """The documents of a data set, read again each time."""

    rows: Any

    def __iter__(self) -> Iterator[str]:
        for row in self.rows.select_columns([FIELD]):
            document = row[FIELD]
            if not isinstance(document, str):
                raise TextError(
                    f"the column {FIELD!r} of the data set holds a {type(document).__name__} "
                    "where a document is expected."
                )
            yield document


def length_of(model: LanguageModel, texts: "MixedTexts", context_length: int | None) -> int:
    """The tokens of a window: as asked for, as given windows have, or 2048 or what fits."""
    if context_length is not None:
        return context_length
    if isinstance(texts, Tensor):
        return texts.shape[-1]
    usual = CalibrationSettings.context_length
    return usual if model.longest is None else min(usual, model.longest)


def measured_text(
    model: LanguageModel, texts: "Texts", how: "Cut", most: int | None, unlike: Tensor | None = None
) -> ReportText:
    """A text cut into windows to measure on, as `pho evaluate` does."""
    if most is not None and most < 1:
        raise InvalidInput(f"{most} windows are asked for, but at least 1 is needed.")
    return Inputs().report(model, text_of(texts), how, most, unlike)


def settings_of(bundle: ProxyBundle) -> CalibrationSettings:
    """The settings that a bundle was made with; one that was put together by hand has none."""
    stored = bundle.provenance.get("settings")
    if not stored:
        raise InvalidInput(
            "the bundle does not say how it was calibrated, so no text can be cut as its text "
            "was. Make it with pho.calibrate."
        )
    return CalibrationSettings(**{**stored, "kernel_sizes": tuple(stored["kernel_sizes"])})


def opened_for(bundle: ProxyBundle, model: Model, tokenizer: Any) -> LanguageModel:
    """Take a bundle's model, dense, with the tokenizer that it was calibrated with."""
    loaded = opened(model, tokenizer or getattr(bundle, "tokenizer", None))
    check_dense(loaded, bundle)
    check_prefix(loaded, bundle)
    return loaded


def calibrated(
    model: LanguageModel,
    bundle: ProxyBundle,
    texts: "MixedTexts | None",
    confirm: "Texts | None" = None,
    windows: int | None = None,
    report: "tuple[Texts, int] | None" = None,
) -> Work:
    """
    A model with its bundle and texts.

    What ``pho.calibrate`` gave includes the windows of its text, and some that were held out; a
    bundle from a file does not. None of the first ``windows`` to confirm on overlaps with those of
    the calibration; without ``windows`` there are none. ``report`` is a text and how many of its
    windows to report on, which overlap with neither.
    """
    drawn: CalibrationText | None = getattr(bundle, "text", None)
    calibration = None if drawn is None else drawn.calibration
    if texts is not None:
        settings = settings_of(bundle)
        source = calibration_text_of(texts)
        calibration = drawn_windows(model, source, settings)[0][: settings.samples]
    text = None
    if windows is not None and confirm is not None:
        text = measured_text(model, confirm, settings_of(bundle), windows, calibration)
    elif windows is not None:
        text = Inputs().held_out(drawn, windows)
    reported = None
    if report is not None:
        source, most = text_of(report[0]), report[1]
        how = settings_of(bundle)
        reported = Inputs().reported(model, source, how, most, calibration, text)
    return Work(
        bundles={model.name: bundle},
        dense=model,
        calibration=calibration,
        confirm=text,
        report=reported,
        unused_windows=None if drawn is None else len(drawn.held_out),
        cache_dir=Settings().cache_dir,
    )
