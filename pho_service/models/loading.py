"""
Open a model by hub id, local folder or .gguf file. Never runs remote code, never unpickles weights.
"""

import gc
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pho_service.access import is_path
from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.faults import device_is_lost, ran_out_of_memory
from pho_service.model_folder import NAMING_FILES, check_model_folder, check_names
from pho_service.models.architecture import prunable_linears
from pho_service.models.device_map import DEVICE_MAPS, devices_of, spread
from pho_service.models.devices import pick_device
from pho_service.models.expert_files import expert_files
from pho_service.models.gguf_header import gguf_read_once
from pho_service.models.weights_hash import SCHEME, weights_sha256
from pho_service.pruning.statistics import PrunableLinear

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
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
        stored_dtype: Of the weights on disk, to save them as they came.
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
    def weights_sha256(self) -> str:
        """Hash of every parameter's name, shape, dtype and bytes, as loaded: scheme 2."""
        return weights_sha256(self.model)

    def is_recorded(self, record: Mapping[str, Any]) -> bool:
        """
        Whether a stored record, as :meth:`to_dict` gives it, is of a model with these weights.

        A record of an older version has no ``weights_scheme`` and is compared by the first one.
        """
        scheme = record.get("weights_scheme", 1)
        known = scheme in (1, SCHEME)
        return known and self.sha256_by(scheme) == record.get("weights_sha256")

    def sha256_by(self, scheme: int) -> str:
        """``weights_sha256`` by an older scheme of :func:`~weights_hash.weights_sha256`, too."""
        return self.weights_sha256 if scheme == SCHEME else self._first_sha256

    @cached_property
    def _first_sha256(self) -> str:
        return weights_sha256(self.model, scheme=1)

    def weights_sha256_as(self, dtype: torch.dtype, scheme: int = SCHEME) -> str:
        """
        Return the hash of the weights as if they had been loaded in another dtype.

        The same file is float32 on a CPU and bfloat16 on a GPU. Where one of the two is the
        stored dtype, the cast is exact, so that both give the same hash.
        """
        return weights_sha256(self.model, scheme=scheme, dtype=dtype)

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
            "weights_scheme": SCHEME,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tokenize(self, text: str) -> Tensor:
        """
        (tokens,), int64: the whole text at once, without special tokens.

        Raises:
            ModelError: A token that the model has no embedding for.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        tokens = torch.tensor(ids, dtype=torch.int64)
        embedding: Any = self.model.get_input_embeddings()
        known = embedding.weight.shape[0]
        if len(tokens) and int(tokens.max()) >= known:
            raise ModelError(
                f"{self.name}: the tokenizer gave token {int(tokens.max())}, but the model's "
                f"vocabulary has {known}: the tokenizer is of another model."
            )
        return tokens

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
        token = self.tokenizer.bos_token_id
        if bos == "never":
            return []
        if bos == "always":
            if token is None:
                raise InvalidInput(f"{self.name} has no BOS token. Use --bos auto or never.")
            return [token]
        adds_it = token is not None and self.tokenizer("a").input_ids[:1] == [token]
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
        name: Hub id, folder with a config and safetensors, or .gguf file.
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
    if dtype not in DTYPES:
        raise InvalidInput(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    source, is_gguf = _source(name, revision)
    if target.type == "cuda":
        gc.collect()  # a model that lay on several GPUs has circles in it, and may still be there
    reader: dict[str, Any] = {}
    if stream:
        wanted = "auto"
        reader = _mapped_reader(name, source, is_gguf)
    elif device_map is not None:
        reader = {"device_map": _device_map(name, source, is_gguf, wanted)}
    elif target.type == "cuda":  # each tensor on its own, not the model by way of main memory
        reader = {"device_map": {"": target}}
    model, tokenizer = _read(name, source, is_gguf, wanted, **reader)
    stored = torch.float32 if is_gguf else _stored_dtype(source)
    if is_gguf:
        # Dequantised now: a saved copy must not claim to be GGUF.
        for leftover in ("quantization_config", "_pre_quantization_dtype"):
            model.config.__dict__.pop(leftover, None)
    if stream:
        _check_mapped(name, model, dtype)
    model.eval()
    linears = prunable_linears(model)
    _check_weights(linears)
    logger.info("model loaded", extra={"model": name, "device": str(target)})
    return LanguageModel(
        name=name,
        revision=source.get("revision"),
        model=model,
        tokenizer=tokenizer,
        stored_dtype=stored or model.dtype,
        linears=linears,
        streamed_to=target if stream else None,
    )


def _source(name: str, revision: str | None) -> tuple[dict[str, Any], bool]:
    """Where transformers finds the model, as its arguments, and whether it is a GGUF file."""
    path = Path(name).expanduser()
    if not (path.exists() or _looks_local(name, revision)):
        revision_argument = _pinned(name, revision)
        _check_hub_files(name, revision_argument)
        return {"pretrained_model_name_or_path": name, **revision_argument}, False
    if revision:
        raise InvalidInput(f"--revision {revision} is for hub ids, but {name} is a local path.")
    if not path.exists():
        though = f", though the folder {path.parent} does" if path.parent.is_dir() else ""
        hint = f" For the hub's {name} give --revision main." if _HUB_ID.fullmatch(name) else ""
        raise ModelError(
            f"{name} does not exist{though}. Give a hub id, a model folder or a .gguf file.{hint}"
        )
    if path.suffix == ".gguf":
        beside = path.with_name("tokenizer_config.json")
        if beside.is_file():
            check_names(beside)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}, True
    if not path.is_dir():
        raise ModelError(f"{name} is neither a folder nor a .gguf file.")
    _check_folder(path)
    check_model_folder(path)
    return {"pretrained_model_name_or_path": str(path)}, False


def _looks_local(name: str, revision: str | None) -> bool:
    """
    Whether a missing model is a missing file or folder, and not one of the hub.

    So is what lies in a folder that is there: somebody else may have its name on the hub.
    """
    folder = name.rpartition("/")[0]
    return is_path(name) or (folder != "" and revision is None and Path(folder).is_dir())


def _check_hub_files(name: str, revision: Mapping[str, str]) -> None:
    """Check what a hub model's files name; what cannot be had is told when the model is read."""
    for filename in (SAFE_WEIGHTS_INDEX_NAME, *NAMING_FILES):
        with suppress(OSError):
            file = cached_file(
                name,
                filename,
                **revision,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if file is not None:
                check_names(Path(file))


def _pinned(name: str, revision: str | None) -> dict[str, str]:
    """
    Return the argument that names one commit of a hub model, so that all its files are of that.

    What cannot be had is told when the model is read.
    """
    given = {"revision": revision} if revision else {}
    with suppress(OSError, ValueError):
        config = cached_file(name, "config.json", **given)
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(str(config)).as_posix())
        if commit is not None:
            return {"revision": commit[1]}
    return given


def _check_folder(path: Path) -> None:
    """Raise ModelError unless the folder has a config and safetensors."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model folder.")
    if any(path.glob("*.safetensors")):
        return
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
    if pickled:
        raise ModelError(
            f"{path} has only pickled weights ({pickled[0]}), which can run any code when they are "
            "read. Only safetensors and GGUF are accepted: convert them where you trust the file, "
            "with save_pretrained of transformers."
        )
    raise ModelError(f"{path} has no weights: no *.safetensors file is in it.")


def _read(
    name: str,
    source: dict[str, Any],
    is_gguf: bool,
    dtype: str,
    *,
    reader: Any = AutoModelForCausalLM,
    **extra: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load with transformers; its errors become ours, with the way out."""
    if is_gguf:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    with _loading_errors(name), gguf_read_once() if is_gguf else nullcontext():
        loaded: Any = reader.from_pretrained(
            **source,
            **extra,
            use_safetensors=None if is_gguf else True,
            trust_remote_code=False,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    model, info = loaded  # as output_loading_info asks for
    missing = sorted(info["missing_keys"])
    if missing:  # transformers has filled them with random numbers
        raise ModelError(
            f"{name} lacks {len(missing)} weights that its config asks for: "
            f"{', '.join(missing[:4])}. The download is not complete, or the config is of another "
            "model: get it again."
        )
    return model, tokenizer


def _mapped_reader(name: str, source: dict[str, Any], is_gguf: bool) -> dict[str, Any]:
    """
    The arguments of :func:`_read` with which all weights stay in their files.

    Raises:
        InvalidInput: Some would be held in memory as a whole, which is told before any is read.
    """
    if is_gguf:
        raise InvalidInput(
            f"{name} cannot be streamed: GGUF is dequantised into memory when it is read. Load it "
            "without streaming, or give the safetensors folder that it was made from."
        )
    with _loading_errors(name):
        config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
        files = expert_files(config, _stored_names(source))
    if files.converted:
        raise _not_mapped(name, ", ".join(files.converted[:2]))
    if files.separate is None:
        return {}
    return {"reader": files.separate, "config": config, "key_mapping": files.key_mapping or None}


def _device_map(
    name: str, source: dict[str, Any], is_gguf: bool, dtype: str
) -> dict[str, torch.device]:
    """A card for each module, known before any weight is read."""
    if is_gguf:
        raise InvalidInput(
            f"{name} cannot be put on several GPUs: GGUF is dequantised as a whole when it is "
            "read. Leave --device-map out, or give the safetensors folder that it was made from."
        )
    with _loading_errors(name):
        config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    return spread(name, config, None if dtype == "auto" else getattr(torch, dtype))


def _stored_names(source: dict[str, Any]) -> list[str]:
    """The names of a checkpoint's tensors, from its only file or its index; none if it has none."""
    source = dict(source)
    name = source.pop("pretrained_model_name_or_path")
    for filename in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found = cached_file(name, filename, **source, _raise_exceptions_for_missing_entries=False)
        if found is not None and filename == SAFE_WEIGHTS_INDEX_NAME:
            return list(json.loads(Path(found).read_bytes())["weight_map"])
        if found is not None:
            with safe_open(found, framework="pt") as file:
                return list(file.keys())
    return []  # whoever reads it says so


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


@contextmanager
def _loading_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises into a ModelError with the way out."""
    try:
        yield
    except Exception as error:  # transformers raises a dozen unrelated types here
        if ran_out_of_memory(error) or device_is_lost(error):
            raise
        raise ModelError(f"{name} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One paragraph for a user, from whatever the loaders raised."""
    text = " ".join(str(error).split())
    if any(
        sign in text
        for sign in ("not a valid model identifier", "Repository Not Found", "gated repo")
    ):
        return (
            "the hub has no such model, or it is private or gated. Check the spelling, accept its "
            "licence on the hub and set HF_TOKEN, or give a local folder or a .gguf file."
        )
    if any(sign in text for sign in ("couldn't connect", "offline", "Max retries", "resolve")):
        return (
            "the Hugging Face hub cannot be reached and no copy is in the local cache. Check the "
            "network and HF_ENDPOINT, or give a local folder or a .gguf file."
        )
    if "safetensors" in text and "does not appear to have" in text:
        return (
            "it has no safetensors weights. Only safetensors and GGUF are accepted, since pickled "
            "weights can run any code when they are read."
        )
    if "trust_remote_code" in text:
        return "it needs code of its own, and code from a model repository is never run."
    return f"{type(error).__name__}: {text[:500]}"


def _stored_dtype(source: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the checkpoint's config declares."""
    config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _check_weights(linears: dict[str, PrunableLinear]) -> None:
    for name, linear in linears.items():
        weight = linear.weight
        # A sum is 13 times faster to check, and it overflows only near the end of float32.
        if not bool(weight.sum(dtype=torch.float32).isfinite() or weight.isfinite().all()):
            raise NumericalError(
                f"{name}: a weight is NaN or infinite. The model file is damaged, or overflowed "
                "when it was converted: get it again.",
                layer=name,
            )
