"""
Models, texts and bundles, opened one way for whoever asks: a terminal, a program, a service.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pho_service.models.calibration import CalibrationText
    from pho_service.models.loading import LanguageModel
    from pho_service.models.scratch import KeptBlocks
    from pho_service.models.texts import MixedText, Text
    from pho_service.pipeline.rating import ReportText, Subject
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.calibration import CalibrationSettings
    from pho_service.spec.fields import CalibrationSpec
    from pho_service.spec.steps import Candidate

    Cut: TypeAlias = CalibrationSettings | CalibrationSpec  # how a text is cut into windows


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A bundle, and what there is of its model beside."""

    bundle: "ProxyBundle"  # Bundle of the model
    name: str = ""  # What its user calls the model
    model: "LanguageModel | None" = None  # Dense; None: only proxies are known
    # The windows that the bundle was made of, for steps that need a text.
    calibration: "Tensor | None" = None
    confirm: "ReportText | None" = None  # What perplexities choose on
    # What perplexities are reported on; nothing may have been chosen on it.
    report: "ReportText | None" = None
    # How many windows of the text were not drawn; None where that is not known.
    left: int | None = None
    seconds: float | None = None  # Duration of the calibration; None if there was one already
    cache_dir: "Path | None" = None  # Where trained blocks are kept; None: not at all

    @property
    def subject(self) -> "Subject":
        """What is pruned and measured, where there are a model and a text to confirm on."""
        from pho_service.pipeline.rating import Subject

        assert self.model is not None
        assert self.confirm is not None
        return Subject(
            model=self.model,
            bundle=self.bundle,
            text=self.confirm,
            calibration=self.calibration,
            blocks=self.blocks,
        )

    def blocks(self, winner: "Candidate") -> "KeptBlocks | None":
        """Where the trained blocks of a search's winner are kept, until it is pruned with."""
        from pho_service.pipeline.prune import cached_blocks

        if self.model is None or self.cache_dir is None:
            return None
        return cached_blocks(self.cache_dir, self.model, self.bundle, winner, self.calibration)


class Inputs:
    """Reads texts for a model; who asks adds where they may lie, what is said, what is kept."""

    def windows(
        self, model: "LanguageModel", source: "Text | MixedText", settings: "CalibrationSettings"
    ) -> "CalibrationText":
        """The windows to calibrate on, and those that are left."""
        from pho_service.models.calibration import calibration_text

        return calibration_text(model, source, settings)

    def report(
        self,
        model: "LanguageModel",
        source: "Text",
        how: "Cut",
        most: int | None,
        unlike: "Tensor | None" = None,
    ) -> "ReportText":
        """The first windows of a text, for perplexity; none overlaps with those of ``unlike``."""
        from pho_service.models.texts import read_windows
        from pho_service.pipeline.rating import ReportText

        windows, record = read_windows(
            model,
            source,
            context_length=how.context_length,
            bos=how.bos,
            max_windows=most,
            unlike=unlike,
        )
        return ReportText(windows=windows, record=record)

    def confirmation(
        self,
        model: "LanguageModel",
        source: "Text | None",
        how: "Cut",
        most: int,
        drawn: "CalibrationText",
    ) -> "ReportText | None":
        """The windows to confirm on: of a text of their own, or those that calibration left."""
        if source is not None:
            return self.report(model, source, how, most, drawn.calibration)
        return self.held_out(drawn, most)

    def held_out(self, drawn: "CalibrationText | None", most: int) -> "ReportText | None":
        """The windows to confirm on that a calibration left of its own text."""
        from pho_service.pipeline.rating import ReportText

        if drawn is None or len(drawn.held_out) == 0:
            self.nothing_left()
            return None
        return ReportText(windows=drawn.held_out[:most], record=drawn.record)

    def nothing_left(self) -> None:
        """Called where there are no windows to confirm on; may raise."""
