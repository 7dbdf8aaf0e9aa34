"""
Find a checkpoint on the hub or on a disk, and read it with transformers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pho_service.errors import ModelError, PhoError
from pho_service.host.faults import device_is_lost, ran_out_of_memory
from pho_service.host.model_folder import NAMING_FILES, check_model_folder, check_names
from pho_service.models.names import AWAY, check_local_name, is_on_hub
from pho_service.models.packed import SUFFIX, Unpacked, is_packed, unpacked
from pho_service.planning.gguf_header import gguf_read_once


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """
    Location of a model.

    Attributes:
        name: As the user gave it.
        source: The same as transformers' arguments.
        is_gguf: Whether it is a GGUF file; a folder or hub model with safetensors otherwise.
        unpacked: Holds the folder that ``source`` names, where the model is a packed one.
    """

    name: str
    source: dict[str, str]
    is_gguf: bool = False
    unpacked: Unpacked | None = None

    @property
    def revision(self) -> str | None:
        """Commit hash on the hub, or None for local files."""
        return self.source.get("revision")

    def config(self) -> PreTrainedConfig:
        """
        Read the model's configuration.

        Raises:
            ModelError: It cannot be read.
        """
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
        """
        The names of the tensors, from the only file of weights or its index; none if it has none.

        Raises:
            ModelError: They cannot be read.
        """
        source = dict(self.source)
        name = source.pop("pretrained_model_name_or_path")
        with loading_errors(self.name):
            for filename in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
                found = cached_file(
                    name, filename, **source, _raise_exceptions_for_missing_entries=False
                )
                if found is not None and filename == SAFE_WEIGHTS_INDEX_NAME:
                    return list(json.loads(Path(found).read_bytes())["weight_map"])
                if found is not None:
                    with safe_open(found, framework="pt") as file:
                        return list(file.keys())
        return []  # whoever reads it says so

    def read(
        self, dtype: str, *, reader: Any = AutoModelForCausalLM, **extra: Any
    ) -> tuple[PreTrainedModel, Any]:
        """
        Read model and tokenizer with transformers; its errors become ours, with the way out.

        Args:
            dtype: ``auto`` for the stored one, or its name.
            reader: Whose ``from_pretrained`` is asked.
            extra: More arguments for that.

        Raises:
            ModelError: It cannot be read, or lacks weights.
        """
        if self.is_gguf:
            extra["quantization_config"] = GgufConfig(dequantize=True)
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded: Any
        with loading_errors(self.name), gguf_read_once() if self.is_gguf else nullcontext():
            loaded = reader.from_pretrained(
                **self.source,
                **extra,
                use_safetensors=None if self.is_gguf else True,
                trust_remote_code=False,
                dtype=wanted,
                output_loading_info=True,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(**self.source, trust_remote_code=False)
            tokenizer.unpacked = self.unpacked  # some save what they find in its folder
        model, info = loaded  # as output_loading_info asks for
        missing = sorted(info["missing_keys"])
        if missing:  # transformers has filled them with random numbers
            raise ModelError(
                f"{self.name} lacks {len(missing)} weights that its config asks for: "
                f"{', '.join(missing[:4])}. The download is not complete, or the config is of "
                "another model: get it again."
            )
        return model, tokenizer


def find_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """
    Find a model by hub id, local folder, .gguf or packed file, and check what its files name.

    Raises:
        InvalidInput: A revision of what is local, or a file that names another outside the folder.
        ModelError: Not there, or without a config or safetensors.
    """
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
    held = unpacked(path) if is_packed(path) else None
    folder = path if held is None else held.folder
    if not folder.is_dir():
        raise ModelError(f"{name} is neither a folder nor a .gguf or {SUFFIX} file.")
    _check_folder(folder)
    check_model_folder(folder)
    source = {"pretrained_model_name_or_path": str(folder)}
    return Checkpoint(name=name, source=source, unpacked=held)


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

    Raises:
        ModelError: Its configuration cannot be had, without which nothing else is of use.
    """
    given = {"revision": revision} if revision else {}
    with loading_errors(name):
        config = cached_file(name, "config.json", **given)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(str(config)).as_posix())
    return given if commit is None else {"revision": commit[1]}


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
    if "trust_remote_code" in text:
        return "it needs code of its own, and code from a model repository is never run."
    return f"{type(error).__name__}: {text[:500]}"
