"""
Models, texts and bundles, opened one way for whoever asks: a terminal, a program, a service.
"""

from typing import TYPE_CHECKING, TypeAlias

from pho_service.errors import TextError, field_name

if TYPE_CHECKING:
    from torch import Tensor

    from pho_service.models.calibration import CalibrationText
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import MixedText, ReportText, Text
    from pho_service.spec.calibration import CalibrationSettings
    from pho_service.spec.fields import CalibrationSpec

    Cut: TypeAlias = CalibrationSettings | CalibrationSpec  # how a text is cut into windows


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
        from pho_service.models.texts import ReportText, read_windows

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
    ) -> "ReportText":
        """The windows to confirm on: of a text of their own, or those that calibration left."""
        if source is not None:
            return self.report(model, source, how, most, drawn.calibration)
        return self.held_out(drawn, most)

    def held_out(self, drawn: "CalibrationText | None", most: int) -> "ReportText":
        """The windows to confirm on that a calibration left of its own text."""
        from pho_service.models.texts import ReportText

        if drawn is None or len(drawn.held_out) == 0:
            raise TextError(
                "the calibration's text has no windows left to confirm on. Give "
                f"{field_name('confirm/text')}, or fewer {field_name('calibration/samples')}."
            )
        return ReportText(windows=drawn.held_out[:most], record=drawn.record)

    def reported(
        self,
        model: "LanguageModel",
        source: "Text",
        how: "Cut",
        most: int,
        calibration: "Tensor | None",
        confirm: "ReportText | None",
    ) -> "ReportText":
        """The windows to report on: neither calibration nor confirmation has a part of them."""
        import torch

        chosen_on = None if confirm is None else confirm.windows
        seen = [windows for windows in (calibration, chosen_on) if windows is not None]
        return self.report(model, source, how, most, torch.cat(seen) if seen else None)
