"""A model, its bundle and a text, as jobs take them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import opened_study, search_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    """The tiny model, loaded from its folder."""
    return load_model(str(model_folder), device="cpu")


@pytest.fixture
def bundle(model: LanguageModel, texts: dict[str, Path]) -> ProxyBundle:
    """What calibration on 6 windows says of ``model``."""
    settings = CalibrationSettings(
        samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
    )
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    return calibrate(model, text, settings)


@pytest.fixture
def report(model: LanguageModel, texts: dict[str, Path]) -> ReportText:
    """Three windows that nothing was chosen on."""
    windows, record = read_windows(
        model, TextSource(path=str(texts["report"])), context_length=32, bos="auto", max_windows=3
    )
    return ReportText(windows=windows, record=record)


@pytest.fixture
def searched(study_url: str) -> Callable[..., SearchResult]:
    """Searches with the study in a database, as `pho search` does."""

    def search(
        request: SearchRequest, bundles: Any, *, url: str = study_url, **options: Any
    ) -> SearchResult:
        with opened_study(url, request, bundles, options.get("confirm_text")) as study:
            return search_job(request, bundles, study=study, **options)

    return search


@pytest.fixture
def study_url(tmp_path: Path) -> str:
    """A fresh database."""
    return f"sqlite:///{tmp_path / 'study.db'}"
