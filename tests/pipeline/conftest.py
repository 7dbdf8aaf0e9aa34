"""A model, its bundle and a text, as jobs take them: made once, and not to be changed in place."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from transformers import LlamaForCausalLM

from pho_service.models.calibration import CalibrationText, calibrate, calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import name_of_study, search_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult
from storage.studies import open_study

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
)

_made: dict[str, Any] = {}


@pytest.fixture
def model_folder(
    tiny_llama: LlamaForCausalLM, texts: dict[str, Path], tmp_path_factory: Any, tmp_path: Path
) -> Path:
    """A copy of the tiny model's folder, for the test alone."""
    stored = tmp_path_factory.getbasetemp() / "stored"
    if not stored.is_dir():
        shutil.copytree(texts["tokenizer"], stored)
        tiny_llama.save_pretrained(stored)
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture
def texts(texts_of_all: dict[str, Path]) -> dict[str, Path]:
    """The texts of all tests, which nobody changes here."""
    return texts_of_all


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    """The tiny model, loaded from its folder."""
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def original(model_folder: Path) -> LanguageModel:
    """The tiny model once more, for a test that changes ``model``."""
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def streamed(model_folder: Path) -> LanguageModel:
    """The tiny model, read block by block from its files."""
    return load_model(str(model_folder), device="cpu", stream=True)


@pytest.fixture
def text_of(texts: dict[str, Path]) -> Callable[..., CalibrationText]:
    """What a model is calibrated on."""

    def read(model: LanguageModel, settings: CalibrationSettings = SETTINGS) -> CalibrationText:
        return calibration_text(model, TextSource(path=str(texts["calibration"])), settings)

    return read


@pytest.fixture
def calibrated(text_of: Callable[..., CalibrationText]) -> Callable[..., ProxyBundle]:
    """Calibrates a model on some windows."""

    def calibrate_it(model: LanguageModel, settings: CalibrationSettings = SETTINGS) -> ProxyBundle:
        return calibrate(model, text_of(model, settings), settings)

    return calibrate_it


@pytest.fixture
def bundle(model_folder: Path, calibrated: Callable[..., ProxyBundle]) -> ProxyBundle:
    """What calibration on 6 windows says of ``model``."""
    if "bundle" not in _made:
        _made["bundle"] = calibrated(load_model(str(model_folder), device="cpu"))
    return _made["bundle"]


@pytest.fixture
def read_report(texts: dict[str, Path]) -> Callable[..., ReportText]:
    """Reads windows that nothing was chosen on."""

    def read(model: LanguageModel, count: int, context_length: int) -> ReportText:
        windows, record = read_windows(
            model,
            TextSource(path=str(texts["report"])),
            context_length=context_length,
            bos="auto",
            max_windows=count,
        )
        return ReportText(windows=windows, record=record)

    return read


@pytest.fixture
def report(model: LanguageModel, read_report: Callable[..., ReportText]) -> ReportText:
    """Three windows that nothing was chosen on."""
    if "report" not in _made:
        _made["report"] = read_report(model, 3, 32)
    return _made["report"]


@pytest.fixture
def confirming(model: LanguageModel, report: ReportText) -> dict[str, Any]:
    """What a search takes that confirms by perplexity."""
    return {"model": model, "confirm_text": report}


@pytest.fixture
def studies() -> InMemoryStorage:
    """A record of searches."""
    return InMemoryStorage()


@pytest.fixture
def searched(studies: InMemoryStorage) -> Callable[..., SearchResult]:
    """Searches that go on with what ``studies`` has of them, or another record."""

    def search(
        request: SearchRequest, bundles: Any, *, storage: Any = studies, **options: Any
    ) -> SearchResult:
        name = name_of_study(request, bundles, options.get("confirm_text"))
        study = open_study(storage, name, direction=request.objective.direction)
        return search_job(request, bundles, study=study, **options)

    return search
