"""
`pho.pack`, `pho.unpack` and `pho.load_packed`: a model folder made smaller, and read as it is.
"""

from pathlib import Path

from pho_service.errors import ModelError
from pho_service.models import packed_file, packing
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.packing import Size
from pho_service.progress import bars


def pack(folder: str | Path, out: str | Path, *, progress: bool = False) -> Size:
    """
    Make a model folder smaller without losing a bit, as `pho pack`.

    Args:
        folder: With safetensors: what ``pho.save`` wrote, or any other model.
        out: One file if its name ends in ``.pho``; otherwise a new or empty folder.
        progress: Show a bar on stderr.

    Returns:
        Its bytes ``before`` and ``after``, and their ``ratio``.

    Raises:
        InvalidInput: ``folder`` is not a model folder, or packed already.
        ModelError: A file of it is damaged.
        OutputError: ``out`` cannot be written, or is in use.
    """
    return packing.pack(Path(folder), Path(out), progress=bars(progress))


def unpack(packed: str | Path, out: str | Path, *, progress: bool = False) -> None:
    """
    Make a packed model's folder again, bit for bit, as `pho unpack`.

    Args:
        packed: What ``pho.pack`` wrote.
        out: A new or empty folder.
        progress: Show a bar on stderr.

    Raises:
        ModelError: It is cut short or damaged; then nothing is written.
        OutputError: The folder is in use, or cannot be written.
    """
    packed_file.unpack(Path(packed), Path(out), progress=bars(progress))


def load_packed(
    packed: str | Path, *, device: str = "auto", dtype: str = "auto", device_map: str | None = None
) -> LanguageModel:
    """
    Load a packed model; its ``model`` and ``tokenizer`` are those of transformers.

    Nothing is unpacked on the disk: each tensor is compared with its hash and taken into the model
    before the next one is read, so it takes the memory of the model and of one tensor.

    Args:
        packed: What ``pho.pack`` wrote.
        device: ``auto`` takes a GPU if torch sees one.
        dtype: ``auto`` is the stored one on a GPU and float32 on the CPU.
        device_map: ``auto`` puts the model on all GPUs together.

    Raises:
        ModelError: It is not a packed model, is cut short or damaged, or cannot be loaded.
        InvalidInput: An unknown device, dtype or device map.
    """
    path = Path(packed).expanduser()
    if not packed_file.is_packed(path):
        raise ModelError(
            f"{packed} is not a packed model: neither a file whose name ends in "
            f"{packed_file.SUFFIX}, nor a folder with {packed_file.IN_A_FOLDER}. Give what "
            "`pho pack` or pho.pack wrote; pho.load_model loads others."
        )
    return load_model(str(path), device=device, dtype=dtype, device_map=device_map)
