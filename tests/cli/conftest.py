"""The `pho` command in this process, in an empty folder of its own."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from pretended_user import Service

from pho_service.cli import main
from pho_service.host.settings import read_settings
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.pipeline.minutes import Clock
from pho_service.spec.calibration import CalibrationSettings


@pytest.fixture
def pho(tmp_path, monkeypatch):
    """Run `pho` with these words; the current folder is ``tmp_path / "here"``."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*words):
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def made_model(new_llama, texts_of_all, tmp_path_factory):
    """The tiny model as a Hugging Face folder that no test changes."""
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(texts_of_all["tokenizer"], folder)
    new_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made_bundle(made_model, texts_of_all, tmp_path_factory):
    """A small bundle of the tiny model, made as `pho calibrate` makes it."""
    file = tmp_path_factory.mktemp("bundle") / "tiny.safetensors"
    settings = CalibrationSettings(
        samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
    )
    model = load_model(str(made_model), device="cpu")
    source = TextSource(path=str(texts_of_all["calibration"]))
    write_bundle(calibrate(model, calibration_text(model, source, settings), settings), file)
    return file


@pytest.fixture
def bundle_file(made_bundle, tmp_path):
    """A copy of it."""
    return Path(shutil.copy(made_bundle, tmp_path))


@pytest.fixture
def url(database_url, tmp_path):
    """Of a front end that listens on a free port."""
    roots = (tmp_path,)
    service = Service(database_url, read_settings(model_roots=roots, text_roots=roots))
    yield service.url
    service.stop()


@pytest.fixture
def remote(pho, url, monkeypatch):
    """Run a verb against that front end; none ends with a traceback."""
    monkeypatch.setenv("PHO_API_URL", url)

    def run(*words):
        result = pho(*words)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return run


@pytest.fixture
def resumed(pho, monkeypatch):
    """Run a command whose recovery fails the first time, with no time left the second."""

    def run(*words):
        monkeypatch.setattr(Clock, "recovery_s", lambda _: 3.0)
        with monkeypatch.context() as killed:
            killed.setattr("pho_service.cli.searched.recover_pruned", lambda *_: 1 / 0)
            pho(*words)
        monkeypatch.setattr(Clock, "recovery_s", lambda _: 0.0)
        return pho(*words)

    return run
