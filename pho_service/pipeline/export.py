"""
A model folder as a GGUF file for llama.cpp, compared with the folder before it is handed out.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch

from pho_service.errors import InvalidInput, ModelError, PhoError
from pho_service.host.files import check_file, new_file
from pho_service.host.model_files import check_not_quantised, is_packed
from pho_service.models.calibration import CalibrationText, calibrate
from pho_service.models.gguf_file import converted, converter_for, write_gguf
from pho_service.models.gguf_types import Quantiser, check_types
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.packed import as_folder
from pho_service.models.scratch import Memo
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.perplexity import DenseReference, dense_reference, rate_divergence
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.export import BITS_WINDOWS, BY_CONVERTER, Exported, GgufType

SUFFIX = ".gguf"
TOP_K = 512  # likeliest tokens that predictions are compared by
_WINDOWS, _LENGTH = 4, 128
# A conversion that went wrong, with the heads in another order, say, is off by several nats.
_MOST_NATS = {"f32": 0.001, "f16": 0.01, "bf16": 0.02, "q8_0": 0.1}
_MOST_OTHERWISE = 1.5


def export(
    folder: str | Path,
    out: str | Path,
    gguf_type: GgufType = "bf16",
    *,
    most: int | None = None,
    types: Sequence[str] = (),
    bundle: ProxyBundle | None = None,
    windows: torch.Tensor | None = None,
    memo: Memo | None = None,
    converter: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Exported:
    """
    Write a folder, packed or not, as a GGUF file; ``out`` is there when it was read back.

    In at most so many bytes, if ``most`` is given: then each linear has one of ``types``, of all by
    default, by what its rounding costs on the text of ``bundle``. Its ``windows``, (windows,
    tokens), say the same of the embedding and the head, which have eight bits without them.
    ``memo`` keeps these costs, which are the same for any number of bytes.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    check_types(types)
    check_export(folder, out)
    command = converter_for([gguf_type], converter)
    chosen = None
    with as_folder(folder) as small, new_file(out) as partial:
        check_not_quantised(small, "Export the model before it is quantised.")
        if most is None or bundle is None:
            write_gguf(small, partial, gguf_type, command, progress)
        else:
            model = load_model(str(small), device="cpu")
            bundle.check_model(model.linears)
            with converted(small, partial, command, progress) as whole:
                quantiser = Quantiser(whole, model, bundle.statistics(), windows, memo, types)
                chosen = quantiser.write(partial, most, progress)
            del model, quantiser
        folder_bytes = sum(file.stat().st_size for file in small.glob("*.safetensors"))
        with progress("Reading it back", 2) as advance:
            reference, tokens = _predictions(small, device)
            advance(1)
            divergence, note = _divergence(partial, reference, tokens, folder.name, device)
            advance(1)
        nats = _MOST_OTHERWISE if chosen else _MOST_NATS.get(gguf_type, _MOST_OTHERWISE)
        if not divergence <= nats:
            raise ModelError(
                f"{folder.name} as {gguf_type} predicts other tokens than the folder: they differ "
                f"by {divergence:.3g} nats, and {nats:g} are the most that rounding explains. "
                + (
                    f"{Path(command[-1]).name} does not know this model well enough: take a newer "
                    "llama.cpp."
                    if gguf_type in BY_CONVERTER
                    else "Take a type with more bits, such as q8_0."
                )
            )
        size = partial.stat().st_size
    return Exported(
        file=str(out),
        type=max(chosen.types, key=lambda each: chosen.types[each]) if chosen else gguf_type,
        bytes=size,
        folder_bytes=folder_bytes,
        divergence=divergence,
        tokens=reference.windows.shape[0] * (reference.windows.shape[1] - 1),
        converter=Path(command[-1]).name,
        chosen=chosen,
        note=note,
    )


def bundle_for(
    folder: Path, text: CalibrationText, settings: CalibrationSettings, *, device: str,
    progress: Progress,
) -> ProxyBundle:  # fmt: skip
    """Calibrate a folder on the first windows of a text, for a file of so many bytes."""
    few = replace(text, calibration=text.calibration[:BITS_WINDOWS], bundle_key="")
    settings = replace(settings, samples=len(few.calibration), fisher_samples=None)
    return calibrate(load_model(str(folder), device=device), few, settings, progress)


def check_export(folder: Path, out: Path) -> None:
    """See before any long work that a folder can be exported to a place."""
    if out.suffix != SUFFIX:
        raise InvalidInput(f"{out} does not end in {SUFFIX}. Give a name that does.")
    if folder.suffix == SUFFIX:
        raise InvalidInput(
            f"{folder} is a GGUF file already. Give the safetensors folder that it was made of; "
            "llama.cpp's llama-quantize writes a file in another type."
        )
    if not (folder.is_dir() or is_packed(folder)):
        raise InvalidInput(
            f"{folder} is not a folder here. Give a model folder, as `pho prune` writes; a model "
            "of the hub is fetched with `hf download`."
        )
    check_file(out)


def _predictions(folder: Path, device: str) -> tuple[DenseReference, list[int]]:
    """What the folder's model predicts on English prose, and the tokens of the prose."""
    model = load_model(str(folder), device=device)
    tokens = _prose(model)
    prefix = model.window_prefix("auto")
    body = _LENGTH - len(prefix)
    count = min(_WINDOWS, max(1, len(tokens) // body))
    windows = torch.tensor(
        [[*prefix, *tokens[body * i : body * (i + 1)]] for i in range(count)], dtype=torch.int64
    )
    reference = dense_reference(model.model, windows, top_k=TOP_K)
    return reference, tokens


def _prose(model: LanguageModel) -> list[int]:
    text = "\n\n".join(topics[name] for name in sorted(topics)[:8])[:6000]
    return [int(token) for token in model.tokenize(text)]


def _divergence(
    file: Path, reference: DenseReference, tokens: list[int], name: str, device: str
) -> tuple[float, str]:
    gc.collect()
    try:
        model = load_model(str(file), device=device)
    except PhoError as error:
        raise ModelError(
            f"{name} was converted, but its GGUF file cannot be read back, so it was not kept: "
            f"{error} llama.cpp's converter writes it without this check."
        ) from error
    note = ""
    if model.tokenizer is not None and _prose(model) != tokens:
        note = (
            "Take care: read back by transformers, its tokenizer cuts English into other tokens "
            "than the folder's. See what llama.cpp makes of your text."
        )
    return rate_divergence(model.model, reference), note
