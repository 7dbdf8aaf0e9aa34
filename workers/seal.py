"""
What the first stage of a job read, so that later stages notice when a file has changed since.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from pho_service.errors import ChangedInput
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.rating import ReportText, windows_key


@dataclass(frozen=True, kw_only=True)
class Seal:
    """
    Hashes of the inputs of one model of a job. A None is not compared.

    Attributes:
        local: Whether the model lay on this service's disks, and not on the hub.
        revision: Commit of a hub model.
        weights_sha256: Hash of the weights, as loaded.
        dtype: Type that the weights were loaded in.
        calibration: Hash of the calibration windows.
        confirmation: Hash of the windows that perplexities are measured on.
    """

    local: bool | None = None
    revision: str | None = None
    weights_sha256: str | None = None
    dtype: str | None = None
    calibration: str | None = None
    confirmation: str | None = None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        text: CalibrationText,
        confirmation: ReportText | None,
        *,
        local: bool,
    ) -> Self:
        """Write down what was read."""
        return cls(
            local=local,
            revision=model.revision,
            weights_sha256=model.weights_sha256,
            dtype=model.to_dict()["dtype"],
            calibration=windows_key(text.calibration),
            confirmation=None if confirmation is None else confirmation.key,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def check_place(self, name: str, *, local: bool) -> None:
        """Raise ChangedInput if the model was local, and would be asked of the hub now."""
        if self.local and not local:
            raise ChangedInput(
                f"the model {name} was a local one when the job began, and is no longer there; "
                "the hub is not asked for a model of the same name. Put it back, then resume the "
                "job."
            )

    def check_model(self, name: str, weights_sha256: Callable[[str | None], str]) -> None:
        """Raise ChangedInput if the hash of the weights, in the given dtype, is another one."""
        if self.weights_sha256 is not None:
            _compare(f"the model {name}", self.weights_sha256, weights_sha256(self.dtype))

    def check_calibration(self, name: str, text: CalibrationText) -> None:
        """Raise ChangedInput if these are not the windows that the job was calibrated on."""
        if self.calibration is not None:
            now = windows_key(text.calibration)
            _compare(f"the calibration text {name}", self.calibration, now)

    def check_confirmation(self, name: str, text: ReportText) -> None:
        """Raise ChangedInput if these are not the windows that the job began with."""
        if self.confirmation is not None:
            _compare(f"the text {name}, which perplexities are measured on,", self.confirmation,
                     text.key)  # fmt: skip


def _compare(what: str, before: str, now: str) -> None:
    if before != now:
        raise ChangedInput(
            f"{what} has changed since the job began (hash {before[:12]} then, {now[:12]} now): "
            "what would be measured now cannot be compared with what was measured before. Put "
            "the former files back and resume the job, or submit it again for the present ones."
        )
