"""
What a cell of the quality tables is measured under, and how it is found again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pho_service.spec.pattern import Pattern
from pho_service.spec.space import PRESETS, Preset

CONTEXT_LENGTH = 512
CUT = "structured"  # the method of a smaller model
Place = tuple[int, str, str]  # seed, pattern, method


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """
    What a table is measured under.

    Attributes:
        samples, source: Windows of calibration, and the domain that they are from.
        other, report_windows, other_windows: The second report text, and what is read of both.
        dtype: Of the weights.
        trials, finalists, confirm_steps, confirm_windows: Of searches alone.
        recover_tokens, recover_written, recover_also: What the models of searches and cuts
            are recovered on; 0 for none.
    """

    samples: int
    source: str
    other: str
    report_windows: int
    other_windows: int
    dtype: str
    trials: int
    finalists: int
    confirm_steps: bool
    confirm_windows: int
    recover_tokens: int = 0
    recover_written: int = 0
    recover_also: str = ""

    def dense(self, model: str) -> dict[str, Any]:
        """What the cell of the dense model is found again by."""
        names = ("other", "report_windows", "other_windows", "dtype")
        return {"model": model, "method": "dense", **self._named(names)}

    def calibration(self, model: str, seed: int) -> dict[str, Any]:
        """What the time of a calibration is found again by."""
        key = {"model": model, "method": "calibration", "seed": seed}
        return {**key, **self._named(("samples", "source", "dtype"))}

    def cell(self, model: str, seed: int, pattern: str, method: str) -> dict[str, Any]:
        """
        What a cell is found again by: its place, and the conditions that change it.

        A preset's steps are among them, as a later version may change what a preset means.
        """
        key: dict[str, Any] = {"model": model, "pattern": pattern, "method": method, "seed": seed}
        names = ["samples", "source", "other", "report_windows", "other_windows", "dtype"]
        if method in (*PRESETS, CUT):
            names += ["finalists", "confirm_windows"]
            names += [n for n, value in asdict(self).items() if n.startswith("recover") and value]
        if method in PRESETS:
            names += ["trials", "confirm_steps"]
            key["preset_steps"] = Preset.of(method, Pattern.parse(pattern)).steps.to_dict()
        return {**key, **self._named(names)}

    def _named(self, names: Sequence[str]) -> dict[str, Any]:
        values = asdict(self)
        return {"context_length": CONTEXT_LENGTH, **{name: values[name] for name in names}}
