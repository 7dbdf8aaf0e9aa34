"""A model, its bundle and a text, as jobs take them: made once, and not to be changed in place."""

import shutil
from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage

from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.texts import ReportText, read_windows
from pho_service.pipeline.search import name_of_study, search_job
from pho_service.pipeline.work import Work
from pho_service.spec.calibration import CalibrationSettings
from storage.studies import open_study

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
)

_made = {}


@pytest.fixture
def model_folder(tiny_llama, texts, tmp_path_factory, tmp_path):
    """A copy of the tiny model's folder, for the test alone."""
    stored = tmp_path_factory.getbasetemp() / "stored"
    if not stored.is_dir():
        shutil.copytree(texts["tokenizer"], stored)
        tiny_llama.save_pretrained(stored)
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture
def texts(texts_of_all):
    """The texts of all tests, which nobody changes here."""
    return texts_of_all


@pytest.fixture
def model(model_folder):
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def original(model_folder):
    """The tiny model once more, for a test that changes ``model``."""
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def streamed(model_folder):
    return load_model(str(model_folder), device="cpu", stream=True)


@pytest.fixture
def text_of(texts):
    def read(model, settings=SETTINGS):
        return calibration_text(model, TextSource(path=str(texts["calibration"])), settings)

    return read


@pytest.fixture
def calibrated(text_of):
    def calibrate_it(model, settings=SETTINGS):
        return calibrate(model, text_of(model, settings), settings)

    return calibrate_it


@pytest.fixture
def bundle(model_folder, calibrated):
    if "bundle" not in _made:
        _made["bundle"] = calibrated(load_model(str(model_folder), device="cpu"))
    return _made["bundle"]


@pytest.fixture
def read_report(texts):
    def read(model, count, context_length):
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
def report(model, read_report):
    if "report" not in _made:
        _made["report"] = read_report(model, 3, 32)
    return _made["report"]


@pytest.fixture
def confirming(bundle, model, report):
    """A model, its bundle and a text, for a search that confirms by perplexity."""
    return Work.of(bundle, model=model, confirm=report)


@pytest.fixture
def studies():
    return InMemoryStorage()


@pytest.fixture
def searched(studies):
    def search(request, work, *, storage=studies, **options):
        study = open_study(
            storage, name_of_study(request, work), direction=request.objective.direction
        )
        return search_job(request, work, study=study, **options)

    return search
