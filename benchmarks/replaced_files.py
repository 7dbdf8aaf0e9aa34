"""
A model and a text that are replaced by others while jobs read them, and whether a job mixed them.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from local_service import write_text, write_tiny_model

from storage.records import JobRecord, StageKind

MODEL, TEXT = "changing", "changing.txt"


class ReplacedFiles:
    """
    A model ``changing`` and a text ``changing.txt``, each with two contents of the same size.

    A replacement is whole: a new file takes the old one's name. Whoever has the old one open
    goes on reading it.

    Args:
        folder: Where jobs look for models and texts. The contents lie in ``contents`` below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = folder / "contents"
        self._kept.mkdir()
        for version in (0, 1):
            write_tiny_model(self._kept, name=f"model {version}", seed=2 + version)
            write_text(self._kept / f"text {version}", seed=2 + version)
        shutil.copytree(self._kept / "model 0", folder / MODEL)
        self._version = {"text": 0, "model": 0}
        self.put(0)

    def put(self, version: int) -> None:
        """Let both have their first contents (0), or their second ones (1)."""
        self._put_text(version)
        self._put_model(version)

    def replace_text(self, _chance: random.Random) -> None:
        """The text gets its other contents."""
        self._put_text(1 - self._version["text"])

    def replace_model(self, _chance: random.Random) -> None:
        """The model gets its other weights."""
        self._put_model(1 - self._version["model"])

    def _put_text(self, version: int) -> None:
        self._version["text"] = version
        self._put(f"text {version}", TEXT)

    def _put_model(self, version: int) -> None:
        self._version["model"] = version
        self._put(f"model {version}/model.safetensors", f"{MODEL}/model.safetensors")

    def _put(self, kept: str, name: str) -> None:
        new = self._kept / "new"
        shutil.copyfile(self._kept / kept, new)
        new.replace(self._folder / name)


def mixtures(job: JobRecord) -> Iterator[str]:
    """
    What of a succeeded search was measured on several things: nothing, if all is well.

    Compared are the hashes that its stages stored and those in its configuration.
    """
    results = {
        kind: [s.result for s in job.of_kind(kind) if s.result and s.result.get("provenance", 1)]
        for kind in (StageKind.CALIBRATE, StageKind.PERPLEXITY)
    }
    measured = results[StageKind.PERPLEXITY]
    inputs = [result["inputs"] for result in results[StageKind.CALIBRATE]]
    best = job.best or {}
    confirmed = [best["confirmation"]] if best["confirmation"] else []
    several = best["model"].get("models")
    models = several or [best["model"]]
    bundles = best["calibration"]["bundles"] if several else [best["calibration"]]
    first = inputs[0]  # the model that perplexities are measured on
    found = {
        "weights under perplexities": [first["weights_sha256"]]
        + [result["weights_sha256"] for result in measured],
        "windows of perplexities": [first["confirmation"]]
        + [result["text_sha256"] for result in measured],
        "texts of perplexities": [
            each["text"]["sha256"] for each in [*confirmed, *(r["measured_on"] for r in measured)]
        ],
    }
    for number, (model, bundle, each) in enumerate(zip(models, bundles, inputs, strict=True)):
        found[f"weights of model {number}"] = [model["weights_sha256"], each["weights_sha256"]]
        made = results[StageKind.CALIBRATE][number]["provenance"]
        found[f"calibration text {number}"] = [text["text"]["sha256"] for text in (bundle, made)]
    for what, hashes in found.items():
        if len({*hashes}) > 1:
            yield f"{what}: {hashes}"
