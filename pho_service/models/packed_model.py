"""
A model read from a packed file, one tensor at a time, without its folder on the disk.
"""

import shutil
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from pho_service.errors import ModelError
from pho_service.host.model_folder import check_model_folder
from pho_service.host.plain import shown
from pho_service.models.packed_file import PackedFile, StoredTensor, archive_of

_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class PackedModel:
    """
    A packed model's small files in a folder, and its weights where they are.

    Attributes:
        folder: With config and tokenizer; of a packed file it is temporary, and is removed when
            this object is.
    """

    def __init__(self, path: Path) -> None:
        self._archive = archive_of(path)
        self.folder = path
        if not path.is_dir():
            self.folder = Path(mkdtemp(prefix="pho-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            with PackedFile(self._archive) as packed:
                packed.write_others(self.folder)
        if not (self.folder / "config.json").is_file():
            raise ModelError(f"{path} has no config.json. Pack a model folder with `pho pack`.")
        check_model_folder(self.folder)

    def read(
        self, config: PreTrainedConfig, dtype: torch.dtype | str, **extra: Any
    ) -> tuple[Any, dict[str, Any]]:
        """
        Read the model with transformers, as a folder would be.

        At any time one tensor is unpacked beside those that the model has already.

        Args:
            config: That of ``folder``.
            dtype: ``auto`` for the stored one.
            extra: More arguments of ``from_pretrained``: a device map.

        Returns:
            The model, and what transformers says of its loading.

        Raises:
            ModelError: A tensor is damaged, or the architecture is not a language model's.
        """
        kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in kinds:
            raise ModelError(f"{shown(config.model_type)} is not a causal language model's config.")
        with PackedFile(self._archive) as packed:
            tensors = {
                tensor.span.name: _Unread(packed, tensor)
                for name in _weight_files(self.folder, packed)
                for tensor in packed.weights[name]
            }
            if dtype == "auto":
                stored = [_DTYPES[t.dtype] for t in tensors.values() if t.dtype in _DTYPES]
                floats = [each for each in stored if each.is_floating_point]
                dtype = config.dtype or next(iter(floats), torch.float32)
            model, info = kinds[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                **extra,
            )
        if (self.folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model, info


def _weight_files(folder: Path, packed: PackedFile) -> list[str]:
    """The files that transformers would read of a folder: the only one, or those of its index."""
    if SAFE_WEIGHTS_NAME in packed.weights:
        return [SAFE_WEIGHTS_NAME]
    found = [name for name in packed.weights if "/" not in name]
    if not found or not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        raise ModelError(
            f"{packed.path} has no {SAFE_WEIGHTS_NAME}, and no index of several files. Unpack it "
            "with `pho unpack`, and give the folder."
        )
    return found


class _Unread:
    """What transformers takes for a slice of a file: unpacked when it is asked for."""

    def __init__(self, packed: PackedFile, stored: StoredTensor) -> None:
        self._packed = packed
        self._stored = stored
        self.dtype = stored.span.dtype

    def __getitem__(self, place: Any) -> Tensor:
        span = self._stored.span
        if span.dtype not in _DTYPES:
            raise ModelError(
                f"{shown(span.name)} is {shown(span.dtype)}, which cannot be read from a packed "
                "model. Unpack it with `pho unpack`, and give the folder."
            )
        data = torch.from_numpy(self._packed.bytes_of(self._stored))
        return data.view(_DTYPES[span.dtype]).view(span.shape)[place]
