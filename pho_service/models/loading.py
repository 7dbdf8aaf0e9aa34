"""
Open a model by hub id, folder, .gguf or packed file. Never runs remote code, unpickles nothing.
"""

import gc
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pho_service.errors import (
    ChangedInput,
    InvalidInput,
    ModelError,
    NumericalError,
    PhoError,
    field_name,
)
from pho_service.host.access import did_you_mean, is_path
from pho_service.host.machine import device_is_lost, hub_answers, ran_out_of_memory
from pho_service.host.model_files import (
    NAMING_FILES,
    TOKENIZER,
    check_config,
    check_counts,
    check_model_folder,
    check_names,
    is_packed,
)
from pho_service.models.architecture import expert_files, prunable_linears, separate_weights
from pho_service.models.packed import Unpacked, unpacked
from pho_service.planning.shapes import gguf_read_once
from pho_service.pruning.hardware import free_memory, gpus, pick_device
from pho_service.pruning.permutation import foldable
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.document import check_choice, format_bytes

logger = logging.getLogger(__name__)


DEVICE_MAPS = ("auto",)
USED = 0.9  # of what is free on a card; the rest is lost between blocks of torch's allocator


def spread(
    name: str, config: PreTrainedConfig, dtype: torch.dtype | None
) -> dict[str, torch.device]:
    """Say for each module of a model which GPU it lies on, before any weight is read."""
    # Each card gets about as much, so that all have room left to work in, and no decoder block is
    # cut.
    cards = gpus()
    if not cards:
        device_map = field_name("device_map")
        raise InvalidInput(f"{device_map} needs a GPU, and torch sees none. Leave it out.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
    room = {card.index: int(USED * free_memory(card)) for card in cards}
    blocks = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, dict(room), no_split_module_classes=blocks)
    device_of = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    elsewhere = [module for module, place in device_of.items() if not isinstance(place, int)]
    if elsewhere:
        size = sum(parameter.nbytes for parameter in model.parameters())
        places = ", ".join(f"cuda:{card} {format_bytes(free)}" for card, free in room.items())
        raise ModelError(
            f"{name} takes {format_bytes(size)} in {str(model.dtype).removeprefix('torch.')}, but "
            f"the GPUs have room for: {places}. {len(elsewhere)} modules, {elsewhere[0]} first, "
            "would lie in main memory or on disk, where nothing is computed. Use more or "
            f"freer GPUs, {field_name('dtype', 'bfloat16')}, or {field_name('stream', True)}."
        )
    return {module: torch.device("cuda", place) for module, place in device_of.items()}


def hub_is_away() -> bool:
    """Return whether nothing may be asked of the hub, or it cannot be reached; asks once."""
    offline = any(place.HF_HUB_OFFLINE for place in _places())  # or HF_DATASETS_OFFLINE
    return offline or not hub_answers()


@contextmanager
def hub_or_cache(*, wanted: bool = True) -> Iterator[None]:
    """Let the hub's libraries read the cache alone, inside, if the hub is away."""
    if not wanted or not hub_is_away():
        yield
        return
    logger.info("the hub is away: models and data sets are looked for in the cache alone")
    places = _places()
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _places() -> list[Any]:
    """Where the libraries look whether they may ask the hub; `datasets` is not loaded for it."""
    datasets = sys.modules.get("datasets")
    return [huggingface_hub.constants, *([datasets.config] if datasets else [])]


# Why a model of the hub cannot be had, in the sentence that begins with its name.
AWAY = (
    "no folder or file here has this name, and as a name on the hub it cannot be looked up: the "
    "hub cannot be reached, and no copy is in the local cache. Check the spelling, the network "
    "and HF_ENDPOINT, or give a local folder or a .gguf file."
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_on_hub(name: str, revision: str | None) -> bool:
    """Return whether a name is the hub's: nothing here has it, and it does not look like a path."""
    # What would lie in a folder that is there is missing: somebody else may have its name on the
    # hub, which a revision asks for.
    if Path(name).expanduser().exists() or is_path(name):
        return False
    folder = name.rpartition("/")[0]
    return folder == "" or revision is not None or not Path(folder).is_dir()


def check_name(name: str, revision: str | None) -> None:
    """See that a model can be there, before long work: the hub is asked once if it answers."""
    if not is_on_hub(name, revision):
        check_local_name(name, revision)
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder or file here nor a name on the hub, which looks like "
            "org/name. Check the spelling."
        ) from error
    if not isinstance(cached, str) and hub_is_away():
        raise ModelError(f"{name} cannot be loaded: {AWAY}")


def check_local_name(name: str, revision: str | None) -> None:
    path = Path(name).expanduser()
    if revision:
        version = field_name("revision", revision)
        raise InvalidInput(f"{version} is for hub ids, but {name} is a local path.")
    if path.exists():
        return
    beside = path.parent != Path() and path.parent.is_dir()
    though = f", though the folder {path.parent} does" if beside else ""
    version = field_name("revision", "main")
    hint = f" For the hub's {name} give {version}." if _HUB_ID.fullmatch(name) else ""
    hint += did_you_mean(name)
    raise ModelError(
        f"{name} does not exist{though}. Give a hub id, a model folder or a .gguf file.{hint}"
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Location of a model."""

    name: str  # As the user gave it
    source: dict[str, str]  # The same as transformers' arguments
    # Whether it is a GGUF file; a folder or hub model with safetensors otherwise.
    is_gguf: bool = False
    # Holds the folder that ``source`` names, where the model is a packed one.
    unpacked: Unpacked | None = None

    @property
    def revision(self) -> str | None:
        """Commit hash on the hub, or None for local files."""
        return self.source.get("revision")

    def config(self) -> PreTrainedConfig:
        """Read the model's configuration."""
        with loading_errors(self.name):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                **self.source, trust_remote_code=False
            )
            return config

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype that the configuration declares; GGUF is dequantised to float32."""
        if self.is_gguf:
            return torch.float32
        dtype = getattr(self.config(), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    def stored_names(self) -> list[str]:
        """The tensors' names, from the only file of weights or its index; none if it has none."""
        source = dict(self.source)
        name = source.pop("pretrained_model_name_or_path")
        with loading_errors(self.name):
            for filename in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
                path = cached_file(
                    name, filename, **source, _raise_exceptions_for_missing_entries=False
                )
                if path is not None and filename == SAFE_WEIGHTS_INDEX_NAME:
                    return list(json.loads(Path(path).read_bytes())["weight_map"])
                if path is not None:
                    with safe_open(path, framework="pt") as file:
                        return list(file.keys())
        return []  # whoever reads it says so

    def read(
        self, dtype: str, *, reader: Any = AutoModelForCausalLM, **extra: Any
    ) -> tuple[PreTrainedModel, Any]:
        """Read model and tokenizer with transformers; its errors become ours, with the way out."""
        if self.is_gguf:
            extra["quantization_config"] = GgufConfig(dequantize=True)
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded: Any
        with loading_errors(self.name), gguf_read_once() if self.is_gguf else nullcontext():
            if self.is_gguf:  # those of other models are checked in their files
                check_counts(self.config().to_dict(), self.name)
            loaded = reader.from_pretrained(
                **self.source,
                **extra,
                use_safetensors=None if self.is_gguf else True,
                trust_remote_code=False,
                dtype=torch_dtype,
                output_loading_info=True,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(**self.source, trust_remote_code=False)
            tokenizer.unpacked = self.unpacked  # some save what they find in its folder
        model, info = loaded  # as output_loading_info asks for
        if missing := sorted(info["missing_keys"]):  # filled with random numbers by transformers
            raise ModelError(
                f"{self.name} lacks weights that its config asks for, {len(missing)} in all: "
                f"{', '.join(missing[:4])}. The download is not complete, or the config is of "
                "another model: get it again."
            )
        return model, tokenizer


def find_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """Find a model by hub id, local folder, .gguf or packed file, and check what its files name."""
    path = Path(name).expanduser()
    if is_on_hub(name, revision):
        revision_argument = _pinned(name, revision)
        _check_hub_files(name, revision_argument)
        return Checkpoint(
            name=name, source={"pretrained_model_name_or_path": name, **revision_argument}
        )
    check_local_name(name, revision)
    if path.suffix == ".gguf":
        beside = path.with_name("tokenizer_config.json")
        if beside.is_file():
            check_names(beside)
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return Checkpoint(name=name, source=source, is_gguf=True)
    unpacked_model = unpacked(path) if is_packed(path) else None
    folder = path if unpacked_model is None else unpacked_model.folder
    if not folder.is_dir():
        raise ModelError(f"{name} is neither a folder nor a .gguf or .pho file.")
    _check_folder(folder)
    check_model_folder(folder)
    source = {"pretrained_model_name_or_path": str(folder)}
    return Checkpoint(name=name, source=source, unpacked=unpacked_model)


def _check_hub_files(name: str, revision: Mapping[str, str]) -> None:
    """Check what a hub model's files name; what cannot be had is told when the model is read."""
    for filename in (SAFE_WEIGHTS_INDEX_NAME, *NAMING_FILES, TOKENIZER):
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
    """Return the argument that names one commit of a hub model, for all its files alike."""
    argument = {"revision": revision} if revision else {}
    with loading_errors(name):
        config = cached_file(name, "config.json", **argument)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(str(config)).as_posix())
    return argument if commit is None else {"revision": commit[1]}


def _check_folder(path: Path) -> None:
    """Raise ModelError unless the folder has a config and safetensors."""
    check_config(path, str(path))
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


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises into a ModelError with the way out."""
    try:
        yield
    except Exception as error:  # transformers raises a dozen unrelated types here
        if isinstance(error, PhoError) or ran_out_of_memory(error) or device_is_lost(error):
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
            "no folder or file here has this name, and the hub has no such model, or it is private "
            "or gated. Check the spelling, accept its licence on the hub and set HF_TOKEN, or give "
            "a local folder or a .gguf file."
        )
    if any(sign in text for sign in ("couldn't connect", "offline", "Max retries", "resolve")):
        return AWAY
    if "safetensors" in text and "does not appear to have" in text:
        return (
            "it has no safetensors weights. Only safetensors and GGUF are accepted, since pickled "
            "weights can run any code when they are read."
        )
    if isinstance(error, KeyError) and text == "'metadata'":
        return (
            'its *.index.json has no "metadata", which transformers asks for: add "metadata": {}.'
        )
    if "trust_remote_code" in text:
        return "it needs code of its own, and code from a model repository is never run."
    return f"{type(error).__name__}: {text[:500]}"


# Hashes of weights, made by all cores: hashlib lets other threads run while it reads.
PIECE = 2**25  # bytes that are copied from a GPU at a time, by each thread
MOST_THREADS = 32  # a GPU's link is full long before


def weights_sha256(
    model: nn.Module,
    *,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Hash a model's weights: every parameter's name, shape, dtype and bytes."""
    # It is the SHA-256 of a line for each tensor, in the order of their names: name, shape, dtype
    # and the SHA-256 of its bytes. In fused experts each matrix is a tensor, so it does not matter
    # how they lie in memory.
    tensors = dict(sorted(separate_weights(model).items()))
    hashes = sha256_each(tensors.values(), threads=threads, dtype=dtype)
    digest = hashlib.sha256()
    for (name, tensor), sha256 in zip(tensors.items(), hashes, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {dtype or tensor.dtype} {sha256}\n".encode())
    return digest.hexdigest()


def sha256_each(
    tensors: Iterable[Tensor], *, threads: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[str]:
    """The SHA-256 of each tensor's bytes in its dtype, the last dimension's neighbours first."""
    with ThreadPoolExecutor(min(threads or torch.get_num_threads(), MOST_THREADS)) as pool:
        yield from pool.map(partial(_sha256, dtype=dtype), tensors)


def _sha256(tensor: Tensor, dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    tensor = tensor if dtype is None else tensor.to(dtype)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.device.type == "cpu":
        digest.update(data.numpy().data)
        return digest.hexdigest()
    with torch.cuda.device(data.device):
        buffer = torch.empty(min(PIECE, len(data)), dtype=torch.uint8, pin_memory=True)
        for piece in data.split(PIECE):
            copied = buffer[: len(piece)].copy_(piece, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            digest.update(copied.numpy().data)
    return digest.hexdigest()


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A loaded model with its tokenizer and where both came from."""

    # A streamed model's weights are mapped from its files and never written to: run and change it
    # with :mod:`pho_service.models.blockwise` only.

    name: str  # As the user gave it
    revision: str | None  # Commit hash on the hub, or None for local files
    model: PreTrainedModel = field(repr=False)
    tokenizer: Any = field(repr=False)  # Its own; None where only tokens are given, never text
    stored_dtype: torch.dtype  # Dtype of the weights on disk, to save them as they came
    linears: dict[str, PrunableLinear] = field(repr=False)  # What can be pruned, in its order
    # Where a streamed model computes, block by block; None for a model that lies on its device as a
    # whole.
    streamed_to: torch.device | None = None

    @property
    def stream(self) -> bool:
        """Return whether the weights stay on disk, and one block at a time is on the device."""
        return self.streamed_to is not None

    @property
    def device(self) -> torch.device:
        """Where the model computes; of several GPUs, the one that tokens come to."""
        return self.streamed_to or self.model.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that the model computes on, that of :attr:`device` first."""
        places = (parameter.device for parameter in self.model.parameters())
        return (self.streamed_to,) if self.streamed_to else tuple(dict.fromkeys(places))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def foldable(self) -> frozenset[str]:
        """Names of the linears whose inputs may be permuted without a loader having to know."""
        # None of a streamed model's: its weights are written as they stand.
        return frozenset() if self.stream else foldable(self.model, self.linears)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of every parameter's name, shape, dtype and bytes, as loaded."""
        return weights_sha256(self.model)

    def weights_sha256_as(self, dtype: torch.dtype) -> str:
        """Return the hash of the weights as if they had been loaded in another dtype."""
        # The same file is float32 on a CPU and bfloat16 on a GPU. Where one of the two is the
        # stored dtype, the cast is exact, so that both give the same hash.
        return weights_sha256(self.model, dtype=dtype)

    def check_unchanged(self) -> None:
        """See that the weights are still those that were hashed, before a result is kept."""
        # Weights that were read to a GPU cannot change. Those in main memory are pages of their
        # file, and change with it where it is written into in place.
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
        """Number of weights, pruned or not; shared ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def to_dict(self) -> dict[str, Any]:
        """The facts of this model that are stored with every result."""
        return {
            "name": self.name,
            "family": self.family,
            "parameters": self.parameters,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tokenize(self, text: str) -> Tensor:
        """(tokens,), int64: the whole text at once, without special tokens."""
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
        """Number of tokens that the model has an embedding for."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def longest(self) -> int | None:
        """The tokens that it reads at once; None where its configuration does not say so."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) else None

    def check_context(self, context_length: int) -> None:
        """Raise InvalidInput if windows are longer than the model can read."""
        if self.longest is not None and context_length > self.longest:
            raise InvalidInput(
                f"context_length={context_length} is more than {self.name} can read: "
                f"{self.longest}. Use {field_name('calibration/context_length', self.longest)} or "
                "less."
            )

    def window_prefix(self, bos: str) -> list[int]:
        """Which tokens every window starts with: BOS or nothing."""
        if bos == "never":
            return []
        tokenizer = self._required_tokenizer()
        token = tokenizer.bos_token_id
        if bos == "always":
            if token is None:
                way_out = f"Use {field_name('calibration/bos', 'auto')} or never."
                raise InvalidInput(f"{self.name} has no BOS token. {way_out}")
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
        other = field_name("stream") if stream else field_name("device")
        raise InvalidInput(
            f"a device map puts a model on several GPUs, which {'streaming' if stream else device} "
            f"does not. Leave {field_name('device_map')} out, or {other}."
        )
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    check_choice("dtype", dtype, DTYPES)
    dtype_name = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    with hub_or_cache(wanted=is_on_hub(name, revision)):
        checkpoint = find_checkpoint(name, revision)
        if target.type == "cuda":
            gc.collect()  # a model that lay on several GPUs has circles in it, and may be there
        reader: dict[str, Any] = {}
        if stream:
            dtype_name, reader = "auto", _mapped_reader(checkpoint)
        elif device_map is not None:
            reader = {"device_map": _device_map(checkpoint, dtype_name)}
        elif target.type == "cuda":  # each tensor on its own, not the model by way of main memory
            reader = {"device_map": {"": target}}
        model, tokenizer = checkpoint.read(dtype_name, **reader)
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
    """Load a packed model; its ``model`` and ``tokenizer`` are those of transformers."""
    # It is unpacked into the user's cache for as long as the model is there: the disk needs room
    # for its weights.
    path = Path(packed).expanduser()
    if not is_packed(path):
        raise ModelError(
            f"{packed} is not a packed model, a file whose name ends in .pho. Give what "
            "`pho pack` or pho.pack wrote; pho.load_model loads others."
        )
    return load_model(str(path), device=device, dtype=dtype, device_map=device_map)


def _mapped_reader(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of :meth:`Checkpoint.read` with which all weights stay in their files."""
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
            f"it is read. Leave {field_name('device_map')} out, or give the safetensors "
            "folder that it came from."
        )
    config = checkpoint.config()
    return spread(checkpoint.name, config, None if dtype == "auto" else getattr(torch, dtype))


def _check_mapped(name: str, model: PreTrainedModel, dtype: str) -> None:
    """Raise InvalidInput if the weights have another dtype, or do not lie in their files."""
    if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise InvalidInput(
            f"{name} cannot be streamed as {dtype}: its weights stay in their files, in "
            f"{str(model.dtype).removeprefix('torch.')}. Use {field_name('dtype', 'auto')}, or "
            "load it without streaming."
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


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def given_model(model: PreTrainedModel, tokenizer: Any = None) -> LanguageModel:
    """Take a model in memory, on whatever device it lies."""
    # Fused experts are given modules of their own, see :func:`~experts.unfuse_experts`; what the
    # model computes stays the same.
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidInput(
            f"tokenizer is a {type(tokenizer).__name__}, not a tokenizer of transformers. Give "
            f"what AutoTokenizer.from_pretrained({name!r}) loads."
        )
    for fault in _faults(model):
        raise InvalidInput(f"the model {name} {fault}")
    linears = prunable_linears(model)
    for linear, prunable in linears.items():
        weight = prunable.weight
        if weight.is_meta or weight.dtype not in _DTYPES:
            raise InvalidInput(
                f"the model {name} has a weight, {linear}, "
                + (
                    "on the device meta, which holds no values. Load the model without offloading."
                    if weight.is_meta
                    else f"of {weight.dtype}. Only float32, bfloat16 and float16 can be pruned: "
                    "load the model in one of them, without quantisation."
                )
            )
    check_weights(linears)
    return LanguageModel(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        model=model,
        tokenizer=tokenizer,
        stored_dtype=model.dtype,
        linears=linears,
    )


def _faults(model: PreTrainedModel) -> Iterator[str]:
    """The faults that keep a model from being measured as it is, each with the way out."""
    modules = dict(model.named_modules())
    training = [path or "the whole model" for path, module in modules.items() if module.training]
    if training:
        yield (
            f"is in training mode ({training[0]}), in which dropout would change what is "
            "measured. Call model.eval() first."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        yield (
            "has adapters beside its weights, which would be pruned as weights of their own. "
            "Merge them first: merge_and_unload() of peft."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        yield (
            "is quantised already, and its weights can no longer be pruned one by one. Prune "
            "the model that it was made from, then quantise."
        )
    parametrised = [path for path, module in modules.items() if hasattr(module, "parametrizations")]
    if parametrised:
        yield (
            f"has parametrised weights ({parametrised[0]}), which cannot be changed in place. "
            "Make them plain first: torch.nn.utils.parametrize.remove_parametrizations."
        )
    hooked = [path or "the whole model" for path, module in modules.items() if _hooked(module)]
    if hooked:
        yield (
            f"has hooks ({hooked[0]}), which may change what it computes, or see passes that "
            "they are not meant for. Remove them first: handle.remove(), or load it again."
        )


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)
