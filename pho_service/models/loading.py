"""
Open a model by hub id, folder, .gguf or packed file. Never runs remote code or unpickles weights.
"""

import gc
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pho_service.errors import ChangedInput, InvalidInput, ModelError, NumericalError
from pho_service.models.architecture import prunable_linears
from pho_service.models.checkpoint import Checkpoint, find_checkpoint, loading_errors
from pho_service.models.device_map import DEVICE_MAPS, devices_of, spread
from pho_service.models.devices import pick_device
from pho_service.models.expert_files import expert_files
from pho_service.models.hub_or_cache import hub_or_cache
from pho_service.models.names import is_on_hub
from pho_service.models.packed import SUFFIX, is_packed
from pho_service.models.weights_hash import weights_sha256
from pho_service.pruning.folding import foldable
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.document import check_choice

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """
    A loaded model with its tokenizer and where both came from.

    A streamed model's weights are mapped from its files and never written to:
    run and change it with :mod:`pho_service.models.blockwise` only.

    Attributes:
        name: As the user gave it.
        revision: Commit hash on the hub, or None for local files.
        tokenizer: Its own; None where only tokens are given, never text.
        stored_dtype: Dtype of the weights on disk, to save them as they came.
        linears: What can be pruned, by name, in the model's order.
        streamed_to: Where a streamed model computes, block by block; None for
            a model that lies on its device as a whole.
    """

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: Any
    stored_dtype: torch.dtype
    linears: dict[str, PrunableLinear]
    streamed_to: torch.device | None = None

    @property
    def stream(self) -> bool:
        """Whether the weights stay on disk, and one block at a time is on the device."""
        return self.streamed_to is not None

    @property
    def device(self) -> torch.device:
        """Where the model computes; of several GPUs, the one that tokens come to."""
        return self.streamed_to or self.model.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that the model computes on, that of :attr:`device` first."""
        return (self.streamed_to,) if self.streamed_to else devices_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self.model.dtype

    @cached_property
    def foldable(self) -> frozenset[str]:
        """
        Names of the linears whose inputs may be permuted without a loader having to know.

        None of a streamed model's: its weights are written as they stand.
        """
        return frozenset() if self.stream else foldable(self.model, self.linears)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of every parameter's name, shape, dtype and bytes, as loaded."""
        return weights_sha256(self.model)

    def weights_sha256_as(self, dtype: torch.dtype) -> str:
        """
        Return the hash of the weights as if they had been loaded in another dtype.

        The same file is float32 on a CPU and bfloat16 on a GPU. Where one of the two is the
        stored dtype, the cast is exact, so that both give the same hash.
        """
        return weights_sha256(self.model, dtype=dtype)

    def check_unchanged(self) -> None:
        """
        See that the weights are still those that were hashed, before something is kept under
        the hash.

        Weights that were read to a GPU cannot change. Those in main memory are pages of their
        file, and change with it where it is written into in place.

        Raises:
            ChangedInput: They are others.
        """
        if self.device.type == "cuda" and not self.stream:
            return
        if weights_sha256(self.model) != self.weights_sha256:
            raise ChangedInput(
                f"the model {self.name} changed while it was being calibrated: its file was "
                "written into. Nothing of it was kept. Replace model files as a whole, by moving "
                "a new file into place, and begin again."
            )

    @property
    def family(self) -> str:
        """The architecture, as its configuration calls it: ``llama``, ``gemma3_text``."""
        return str(self.model.config.model_type)

    @property
    def parameters(self) -> int:
        """How many there are, pruned or not; shared ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def to_dict(self) -> dict[str, Any]:
        """What is stored with every result of this model."""
        return {
            "name": self.name,
            "family": self.family,
            "parameters": self.parameters,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tokenize(self, text: str) -> Tensor:
        """
        (tokens,), int64: the whole text at once, without special tokens.

        Raises:
            ModelError: A token that the model has no embedding for.
        """
        ids = self._required_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids
        tokens = torch.tensor(ids, dtype=torch.int64)
        if len(tokens) and int(tokens.max()) >= self.vocabulary:
            raise ModelError(
                f"{self.name}: the tokenizer gave token {int(tokens.max())}, but the model's "
                f"vocabulary has {self.vocabulary}: the tokenizer is of another model."
            )
        return tokens

    def _required_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInput(
                f"a text is given to {self.name}, but no tokenizer. Give its tokenizer, or token "
                "windows as a tensor."
            )
        return self.tokenizer

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has an embedding for."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    def check_context(self, context_length: int) -> None:
        """Raise InvalidInput if windows are longer than the model can read."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and context_length > longest:
            raise InvalidInput(
                f"context_length={context_length} is more than {self.name} can read: {longest}. "
                f"Use --context-length {longest} or less."
            )

    def window_prefix(self, bos: str) -> list[int]:
        """
        Which tokens every window starts with: BOS or nothing.

        Args:
            bos: ``always``, ``never``, or ``auto``: as the tokenizer does.
                Gemma's perplexity is twice as high without it.

        Raises:
            InvalidInput: ``always``, and the tokenizer has no BOS.
        """
        if bos == "never":
            return []
        tokenizer = self._required_tokenizer()
        token = tokenizer.bos_token_id
        if bos == "always":
            if token is None:
                raise InvalidInput(f"{self.name} has no BOS token. Use --bos auto or never.")
            return [token]
        adds_it = token is not None and tokenizer("a").input_ids[:1] == [token]
        return [token] if adds_it else []


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool = False,
    device_map: str | None = None,
) -> LanguageModel:
    """
    Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        name: Hub id, folder with a config and safetensors, .gguf file, or what `pho pack` wrote.
        revision: Branch, tag or commit; hub ids only.
        device: ``auto`` takes a GPU if torch sees one.
        dtype: ``auto`` is the stored one on a GPU and float32 on the CPU. A
            streamed model has its stored one everywhere.
        stream: Leave the weights in their files, mapped, for a model that is
            larger than the memory. ``device`` is where single blocks are run.
        device_map: ``auto`` puts the model on all GPUs together, block by block.

    Raises:
        ModelError: Not found, not reachable, no weights, only pickled
            weights, or an architecture that cannot be pruned as a whole.
        NumericalError: A weight is NaN or infinite.
        InvalidInput: An unknown device, dtype or device map, or a model that cannot be
            streamed: GGUF, weights that transformers converts when it reads
            them (those of experts in the usual layout are kept apart instead), or
            another dtype than the stored one.
    """
    target = pick_device(device)
    if device_map not in (None, *DEVICE_MAPS):
        raise InvalidInput(f"device map {device_map!r} is not known. Use auto, or leave it out.")
    if device_map is not None and (stream or device not in ("auto", "cuda")):
        raise InvalidInput(
            f"a device map puts a model on several GPUs, which {'streaming' if stream else device} "
            "does not. Leave --device-map out, or " + ("--stream." if stream else "--device.")
        )
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    check_choice("dtype", dtype, DTYPES)
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    with hub_or_cache(wanted=is_on_hub(name, revision)):
        checkpoint = find_checkpoint(name, revision)
        if target.type == "cuda":
            gc.collect()  # a model that lay on several GPUs has circles in it, and may be there
        reader: dict[str, Any] = {}
        if stream:
            wanted = "auto"
            reader = _mapped_reader(checkpoint)
        elif device_map is not None:
            reader = {"device_map": _device_map(checkpoint, wanted)}
        elif target.type == "cuda":  # each tensor on its own, not the model by way of main memory
            reader = {"device_map": {"": target}}
        model, tokenizer = checkpoint.read(wanted, **reader)
        if checkpoint.is_gguf:
            # Dequantised now: a saved copy must not claim to be GGUF.
            for leftover in ("quantization_config", "_pre_quantization_dtype"):
                model.config.__dict__.pop(leftover, None)
        if stream:
            _check_mapped(name, model, dtype)
        converted = checkpoint.is_gguf and dtype != "auto"  # what is stored cannot be written again
        model.eval()
        linears = prunable_linears(model)
        check_weights(linears)
        logger.info("model loaded", extra={"model": name, "device": str(target)})
        return LanguageModel(
            name=name,
            revision=checkpoint.revision,
            model=model,
            tokenizer=tokenizer,
            stored_dtype=(None if converted else checkpoint.stored_dtype()) or model.dtype,
            linears=linears,
            streamed_to=target if stream else None,
        )


def load_packed(
    packed: str | Path, *, device: str = "auto", dtype: str = "auto", device_map: str | None = None
) -> LanguageModel:
    """
    Load a packed model; its ``model`` and ``tokenizer`` are those of transformers.

    It is unpacked into the user's cache for as long as the model is there: the disk needs room for
    its weights.

    Args:
        packed: What ``pho.pack`` wrote.
        device: ``auto`` takes a GPU if torch sees one.
        dtype: ``auto`` is the stored one on a GPU and float32 on the CPU.
        device_map: ``auto`` puts the model on all GPUs together.

    Raises:
        ModelError: It is not a packed model, is cut short or damaged, or cannot be loaded.
        InvalidInput: An unknown device, dtype or device map.
        OutputError: There is no room for its weights.
    """
    path = Path(packed).expanduser()
    if not is_packed(path):
        raise ModelError(
            f"{packed} is not a packed model, a file whose name ends in {SUFFIX}. Give what "
            "`pho pack` or pho.pack wrote; pho.load_model loads others."
        )
    return load_model(str(path), device=device, dtype=dtype, device_map=device_map)


def _mapped_reader(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    The arguments of :meth:`Checkpoint.read` with which all weights stay in their files.

    Raises:
        InvalidInput: Some would be held in memory as a whole, which is told before any is read.
    """
    if checkpoint.is_gguf:
        raise InvalidInput(
            f"{checkpoint.name} cannot be streamed: GGUF is dequantised into memory when it is "
            "read. Load it without streaming, or give the safetensors folder that it was made from."
        )
    config, stored = checkpoint.config(), checkpoint.stored_names()
    with loading_errors(checkpoint.name):
        files = expert_files(config, stored)
    if files.converted:
        raise _not_mapped(checkpoint.name, ", ".join(files.converted[:2]))
    if files.separate is None:
        return {}
    return {"reader": files.separate, "config": config, "key_mapping": files.key_mapping or None}


def _device_map(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.device]:
    """A card for each module, known before any weight is read."""
    if checkpoint.is_gguf:
        raise InvalidInput(
            f"{checkpoint.name} cannot be put on several GPUs: GGUF is dequantised as a whole when "
            "it is read. Leave --device-map out, or give the safetensors folder that it came from."
        )
    config = checkpoint.config()
    return spread(checkpoint.name, config, None if dtype == "auto" else getattr(torch, dtype))


def _check_mapped(name: str, model: PreTrainedModel, dtype: str) -> None:
    """Raise InvalidInput if the weights have another dtype, or do not lie in their files."""
    if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise InvalidInput(
            f"{name} cannot be streamed as {dtype}: its weights stay in their files, in "
            f"{str(model.dtype).removeprefix('torch.')}. Use --dtype auto, or load it without "
            "streaming."
        )
    for parameter_name, parameter in model.named_parameters():
        # The storage of a mapped tensor has a fixed size, that of a copy has not.
        if parameter.dim() > 1 and parameter.untyped_storage().resizable():
            raise _not_mapped(name, parameter_name)


def _not_mapped(name: str, weights: str) -> InvalidInput:
    return InvalidInput(
        f"{name} cannot be streamed: transformers converts weights when it reads them ({weights}), "
        "so the whole model would be held in memory. Load it without streaming."
    )


def check_weights(linears: dict[str, PrunableLinear]) -> None:
    """Raise NumericalError if a weight is NaN or infinite; names its linear."""
    for name, linear in linears.items():
        weight = linear.weight
        # A sum is 13 times faster to check, and it overflows only near the end of float32.
        if not bool(weight.sum(dtype=torch.float32).isfinite() or weight.isfinite().all()):
            raise NumericalError(
                f"{name}: a weight is NaN or infinite. The model file is damaged, or overflowed "
                "when it was converted: get it again.",
                layer=name,
            )
