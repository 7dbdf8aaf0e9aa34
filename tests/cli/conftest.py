"""The `pho` command in this process, in an empty folder of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pho_service.cli import main
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.spec import CalibrationSettings

Pho = Callable[..., Result]


@pytest.fixture
def pho(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pho:
    """Run `pho` with these words; the current folder is ``tmp_path / "here"``."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


@pytest.fixture
def bundle_file(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> Path:
    """A small bundle of the tiny model, made as `pho calibrate` makes it."""
    settings = CalibrationSettings(
        samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
    )
    model = load_model(str(model_folder), device="cpu")
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    path = tmp_path / "tiny.safetensors"
    write_bundle(calibrate(model, text, settings), path)
    return path
