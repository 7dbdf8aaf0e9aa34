"""A calibration that stops early has the statistics of the windows that it took."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pho_service.errors import InvalidInput
from pho_service.models import halves
from pho_service.models.calibration import CalibrationText, calibrate, calibration_text
from pho_service.models.halves import Agreement, doublings
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.job import JobSpec

SETTINGS = CalibrationSettings(
    samples=20, context_length=16, fisher_samples=5, rows_per_layer=4, projection_rows=64,
    kernel_sizes=(3, 5), stop="early",
)  # fmt: skip


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    """The tiny model."""
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def text(model: LanguageModel, texts: dict[str, Path]) -> CalibrationText:
    """Twenty windows."""
    return calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)


@pytest.mark.parametrize(
    ("windows", "compared"), [(2, [2]), (8, [8]), (20, [8, 16, 20]), (32, [8, 16, 32])]
)
def test_doublings(windows: int, compared: list[int]) -> None:
    """Halves are compared after 8 windows, twice as many each time, and after all."""
    assert [*doublings(windows)] == compared


def test_stops(
    model: LanguageModel, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 8 windows, its activation norms are those of these windows alone."""
    monkeypatch.setattr(halves, "ALIKE", -1.0)
    monkeypatch.setattr(halves, "REGRET", 1e9)
    early = calibrate(model, text, SETTINGS)
    again = calibrate(model, text, SETTINGS)
    first = replace(text, calibration=text.calibration[:8])
    plain = calibrate(model, first, replace(SETTINGS, stop="never", samples=8, fisher_samples=2))

    assert [each["windows"] for each in early.provenance["halves"]] == [8]
    assert early.contents_sha256 == again.contents_sha256
    for mine, theirs in zip(early.inputs, plain.inputs, strict=True):
        torch.testing.assert_close(mine.activation_norm, theirs.activation_norm)
    for a, b in zip(early.layers, plain.layers, strict=True):
        torch.testing.assert_close(a.fisher, b.fisher)  # of windows 0 and 1
        assert torch.equal(a.rows, b.rows)


def test_takes_all(
    model: LanguageModel, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where halves never rank alike all windows are taken, and the bundle says how it went."""
    monkeypatch.setattr(halves, "ALIKE", 1.1)
    told = calibrate(model, text, SETTINGS).provenance["halves"]

    assert [each["windows"] for each in told] == [8, 16, 20]
    assert all(-1 <= each["spearman"] <= 1 and each["regret"] >= 0 for each in told)


def test_same_halves(model: LanguageModel, text: CalibrationText) -> None:
    """Halves of the same windows rank alike, but for their projections."""
    windows = text.calibration[:4].repeat_interleave(2, dim=0)
    settings = replace(SETTINGS, projection_rows=4096, fisher_samples=8)
    (found,) = calibrate(model, replace(text, calibration=windows), settings).provenance["halves"]

    assert found["spearman"] > 0.95


def test_enough() -> None:
    """Both the ranking and the best must hold."""
    assert Agreement(windows=8, spearman=0.99, regret=0.005).is_enough
    assert not Agreement(windows=8, spearman=0.9, regret=0.0).is_enough
    assert not Agreement(windows=8, spearman=0.99, regret=0.1).is_enough


def test_named_apart(model: LanguageModel, texts: dict[str, Path], text: CalibrationText) -> None:
    """A bundle of it has a key of its own; one that takes all windows has the key of before."""
    plain = replace(SETTINGS, stop="never")
    whole = calibration_text(model, TextSource(path=str(texts["calibration"])), plain)

    assert "stop" not in plain.to_dict()
    assert text.bundle_key != whole.bundle_key


@pytest.mark.parametrize("changes", [{"samples": 1, "fisher_samples": 1}, {"projection_rows": 0}])
def test_refused(changes: dict[str, int]) -> None:
    """What cannot be halved is refused, with the way out."""
    with pytest.raises(InvalidInput, match="leave stop out"):
        replace(SETTINGS, **changes)


def test_streamed(model_folder: Path, text: CalibrationText) -> None:
    """A streamed model is run block by block over all windows."""
    streamed = load_model(str(model_folder), device="cpu", stream=True)

    with pytest.raises(InvalidInput, match=r"block by block.* --calibration-stop"):
        calibrate(streamed, text, SETTINGS)


def test_streamed_job() -> None:
    """A job says so at once."""
    with pytest.raises(ValueError, match="cannot stop early"):
        JobSpec.model_validate(
            {"model": "m", "pattern": "0.5", "stream": True, "calibration": {"stop": "early"}}
        )
