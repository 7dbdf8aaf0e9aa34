"""
`pho.calibrate`: a proxy bundle of a model, with the windows that it was made of.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.errors import InvalidInput
from pho_service.interface.asked import arguments
from pho_service.interface.models import Model, opened
from pho_service.interface.texts import length_of, text_of
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import CalibrationText, calibration_text
from pho_service.models.calibration import calibrate as make_bundle
from pho_service.models.given_texts import GivenWindows
from pho_service.progress import bars
from pho_service.pruning.bundle import ProxyBundle
from pho_service.shown.parts import Shown, Table
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.numbers import number

if TYPE_CHECKING:
    from pho_service.interface.texts import Texts


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


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrateArguments(CalibrationSettings):
    """
    Arguments of ``pho.calibrate``.

    Attributes:
        model: A model of transformers in memory, on any device; or a folder, a hub id or a .gguf
            file, which is loaded for this call.
        tokenizer: The model's own. None where texts are token windows, or where the model is
            loaded by its name.
        texts: The path of a .txt, .jsonl or .parquet file; a list of documents; a data set of the
            library ``datasets`` with a column ``text``; or token windows, (windows,
            context_length), whole numbers, which are taken in their order.
        samples: Windows of text for the forward pass; fewer if the text is short.
        context_length: Tokens of a window; None is 2048, or the length of windows that are given.
        bos: Whether windows start with BOS: ``auto`` (as the tokenizer does), ``always``,
            ``never``. Windows that are given as tokens are not changed.
        progress: Show a bar on stderr.
    """

    model: Model = field(kw_only=False)
    tokenizer: Any = field(kw_only=False)
    texts: "Texts" = field(kw_only=False)
    context_length: int | None = None  # type: ignore[assignment]  # until the texts are seen
    progress: bool = False

    def __post_init__(self) -> None:
        """Leave the checks to :meth:`settings`."""

    def settings(self, **known: Any) -> CalibrationSettings:
        """The settings alone, with what the texts say."""
        given = {each.name: getattr(self, each.name) for each in fields(CalibrationSettings)}
        length = length_of(self.texts, self.context_length, CalibrationSettings.context_length)
        sizes = tuple(self.kernel_sizes)
        return CalibrationSettings(
            **{**given, "context_length": length, "kernel_sizes": sizes, **known}
        )


@arguments(CalibrateArguments)
def calibrate(asked: CalibrateArguments) -> Bundle:
    """
    Run a dense model once over a text, and keep what a search needs of it.

    The model stays as it is. The same model, text and settings give the bundle of
    `pho calibrate`.

    Raises:
        InvalidInput: A setting breaks a rule; or the model is in training mode, has hooks or
            adapters, or is quantised.
        ModelError: It cannot be pruned as a whole, or the tokenizer is of another model.
        TextError: The text cannot be read, or does not fill one window.
        NumericalError: A weight, an activation or a gradient is NaN or infinite.
        OutOfMemory: It does not fit.
    """
    source = text_of(asked.texts)
    given = isinstance(source, GivenWindows)
    if given and asked.bos == "always":
        raise InvalidInput(
            "bos='always' has no effect on windows that are given as tokens. Put BOS into "
            "them, or give the text."
        )
    # Nothing is put before windows that are given.
    settings = asked.settings(bos="never") if given else asked.settings()
    loaded = opened(asked.model, asked.tokenizer)
    text = calibration_text(loaded, source, settings)
    bundle = make_bundle(loaded, text, settings, bars(asked.progress))
    parts = {part.name: getattr(bundle, part.name) for part in fields(bundle)}
    # As its file has it, so that what comes of it has the bytes of the command line.
    parts["provenance"] = json.loads(json.dumps(bundle.provenance, sort_keys=True))
    return Bundle(**parts, text=text, tokenizer=loaded.tokenizer)
