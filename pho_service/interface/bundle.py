"""
`pho.calibrate`: a proxy bundle of a model, with the windows that it was made of.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.errors import InvalidInput
from pho_service.interface.models import Model, opened
from pho_service.interface.texts import length_of, text_of
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import CalibrationText, calibration_text
from pho_service.models.calibration import calibrate as make_bundle
from pho_service.models.given_texts import GivenWindows
from pho_service.progress import bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.shown.parts import Shown, Table
from pho_service.spec.calibration import Bos, CalibrationSettings, Stop
from pho_service.spec.numbers import number

if TYPE_CHECKING:
    from pho_service.interface.texts import Texts

_DEFAULT = CalibrationSettings()


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Bundle(Shown, ProxyBundle):
    """
    A proxy bundle that was made in this process.

    Attributes:
        text: The windows that it was made of, and some that were held out; not in its file.
        tokenizer: That cut them; None where windows were given as tokens.
    """

    text: CalibrationText = field(kw_only=True)
    tokenizer: Any = None

    def write(self, path: str | Path) -> None:
        """
        Write the file that `pho calibrate` writes; the windows are not in it.

        Raises:
            OutputError: The file cannot be written.
        """
        write_bundle(self, Path(path))

    def _shown(self) -> Table:
        model, settings = self.provenance["model"], self.provenance["settings"]
        windows, length = self.text.calibration.shape
        dense = self.provenance["dense"]
        return Table(
            ("bundle", ""),
            [
                ("model", f"{model['name']} ({model['family']}, {model['parameters']:,})"),
                ("linears", f"{len(self.layers)}, {self.weights:,} weights"),
                ("text", f"{windows} windows of {length} tokens of {self.text.record.source}"),
                ("rows", settings["rows_per_layer"] or "all"),
                ("kernel sizes", ", ".join(map(str, self.kernel_sizes))),
                ("dense", f"perplexity {number(dense['perplexity'])} on {dense['tokens']} tokens"),
                ("key", self.key[:12]),
            ],
            numbers=False,
        )


def calibrate(
    model: Model,
    tokenizer: Any,
    texts: "Texts",
    *,
    samples: int = _DEFAULT.samples,
    context_length: int | None = None,
    fisher_samples: int | None = _DEFAULT.fisher_samples,
    rows_per_layer: int = _DEFAULT.rows_per_layer,
    projection_rows: int = _DEFAULT.projection_rows,
    kernel_sizes: tuple[int, ...] = _DEFAULT.kernel_sizes,
    bos: Bos = _DEFAULT.bos,
    seed: int = _DEFAULT.seed,
    mixed_precision: bool = _DEFAULT.mixed_precision,
    stop: Stop = _DEFAULT.stop,
    memory_bytes: int | None = _DEFAULT.memory_bytes,
    progress: bool = False,
) -> Bundle:
    """
    Run a dense model once over a text, and keep what a search needs of it.

    The model stays as it is. The same model, text and settings give the bundle of
    `pho calibrate`.

    Args:
        model: A model of transformers in memory, on any device; or a folder, a hub id or a .gguf
            file, which is loaded for this call.
        tokenizer: The model's own. None where texts are token windows, or where the model is
            loaded by its name.
        texts: The path of a .txt, .jsonl or .parquet file; a list of documents; a data set of the
            library ``datasets`` with a column ``text``; or token windows, (windows,
            context_length), whole numbers, which are taken in their order.
        samples: Windows of text for the forward pass; fewer if the text is short.
        context_length: Tokens of a window; None is 2048, or the length of windows that are given.
        fisher_samples: Windows that are run backward too; None is a quarter of ``samples``.
        rows_per_layer: Output rows of each linear that the bundle keeps; 0 keeps all.
        projection_rows: Rows of the random projection of the activations; 0 keeps the full Gram
            matrix.
        kernel_sizes: Windows that candidates may use, odd.
        bos: Whether windows start with BOS: ``auto`` (as the tokenizer does), ``always``,
            ``never``. Windows that are given as tokens are not changed.
        seed: Seed of the text sample, the row sample and the projection.
        mixed_precision: Matrix products of a float32 model are in bfloat16.
        stop: ``early`` takes windows in doublings, from 8 on, until both halves of them rank random
            candidates alike; ``samples`` is the most then.
        memory_bytes: What the model's device may have in use at the peak, the model included;
            None is a GPU's free memory, and no limit on a CPU.
        progress: Show a bar on stderr.

    Raises:
        InvalidInput: A setting breaks a rule; or the model is in training mode, has hooks or
            adapters, or is quantised.
        ModelError: It cannot be pruned as a whole, or the tokenizer is of another model.
        TextError: The text cannot be read, or does not fill one window.
        NumericalError: A weight, an activation or a gradient is NaN or infinite.
        OutOfMemory: It does not fit.
    """
    source = text_of(texts)
    if isinstance(source, GivenWindows):
        if bos == "always":
            raise InvalidInput(
                "bos='always' has no effect on windows that are given as tokens. Put BOS into "
                "them, or give the text."
            )
        bos = "never"  # nothing is put before them
    settings = CalibrationSettings(
        samples=samples,
        context_length=length_of(texts, context_length, _DEFAULT.context_length),
        fisher_samples=fisher_samples,
        rows_per_layer=rows_per_layer,
        projection_rows=projection_rows,
        kernel_sizes=tuple(kernel_sizes),
        bos=bos,
        seed=seed,
        mixed_precision=mixed_precision,
        stop=stop,
        memory_bytes=memory_bytes,
    )
    loaded = opened(model, tokenizer)
    text = calibration_text(loaded, source, settings)
    bundle = make_bundle(loaded, text, settings, bars(progress))
    parts = {part.name: getattr(bundle, part.name) for part in fields(bundle)}
    # As its file has it, so that what comes of it has the bytes of the command line.
    parts["provenance"] = json.loads(json.dumps(bundle.provenance, sort_keys=True))
    return Bundle(**parts, text=text, tokenizer=loaded.tokenizer)
