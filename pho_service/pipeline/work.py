"""
What verbs work on: a dense model with its bundle and its texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pho_service.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pho_service.models.loading import LanguageModel
    from pho_service.models.scratch import Memo
    from pho_service.models.texts import ReportText
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.steps import Candidate
    from pho_service.spec.structure import Structure


@dataclass(frozen=True, kw_only=True)
class Work:
    """A dense model with its bundle and its texts; without the model, proxies alone are known."""

    bundles: "Mapping[str, ProxyBundle]"  # By the names of their models: one, or those of a search
    dense: "LanguageModel | None" = None  # It is given back dense
    calibration: "Tensor | None" = None  # The windows of the bundle, for steps that need a text
    confirm: "ReportText | None" = None  # What perplexities choose on
    report: "ReportText | None" = None  # What they are reported on; nothing was chosen on it
    unused_windows: int | None = None  # Of the calibration's text; None where that is not known
    calibration_s: float | None = None  # Seconds; None if the bundle was there already
    cache_dir: "Path | None" = None  # Where trained blocks are kept; None: not at all

    @classmethod
    def of(
        cls,
        bundle: "ProxyBundle",
        model: "LanguageModel | None" = None,
        confirm: "ReportText | None" = None,
        calibration: "Tensor | None" = None,
    ) -> "Work":
        """One bundle with what there is of its model."""
        bundles = {bundle.model_name: bundle}
        return cls(bundles=bundles, dense=model, confirm=confirm, calibration=calibration)

    def opened(self) -> "Work":
        """The same with all that belongs to one model read, for what is measured in one go."""
        return self

    @property
    def measures(self) -> bool:
        """Whether there are a model and a text, so that perplexities can be measured."""
        return self.dense is not None and self.confirm is not None

    @property
    def bundle(self) -> "ProxyBundle":
        """The bundle of the only model."""
        return only_one(self.bundles, "a model")

    @property
    def model(self) -> "LanguageModel":
        """The dense model, where there is one."""
        assert self.dense is not None
        return self.dense

    @property
    def text(self) -> "ReportText":
        """The text that perplexities choose on, where there is one."""
        assert self.confirm is not None
        return self.confirm

    def blocks(self, winner: "Candidate | Structure") -> "Memo | None":
        """Where the trained or cut blocks of a winner are kept, until it is pruned with."""
        if self.dense is None or self.cache_dir is None:
            return None
        from pho_service.pipeline.blocks import cached_blocks

        return cached_blocks(self.cache_dir, self.dense, self.bundle, winner, self.calibration)

    def check(self) -> str | None:
        """Refuse files that have changed meanwhile; give the hash of the weights, if known."""
        return None


def only_one(bundles: "Mapping[str, ProxyBundle]", what: str) -> "ProxyBundle":
    if len(bundles) > 1:
        raise InvalidInput(
            f"{what} is given for a search on the bundles of {len(bundles)} models, "
            f"{', '.join(bundles)}. Leave it out, or search on one of them."
        )
    return next(iter(bundles.values()))
