"""The `pho` command in this process, in an empty folder of its own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner, Result

from pho_service.api.app import create_app
from pho_service.cli import main
from pho_service.host.settings import read_settings
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.spec.calibration import CalibrationSettings
from storage.database import Database

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


@pytest.fixture
def url(database_url: str, tmp_path: Path) -> Iterator[str]:
    """Of a front end that listens on a free port."""
    roots = (tmp_path,)
    settings = read_settings(model_roots=roots, text_roots=roots)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(Database(database_url, pool=4), settings)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def remote(pho: Pho, url: str, monkeypatch: pytest.MonkeyPatch) -> Pho:
    """Run a verb against that front end; none ends with a traceback."""
    monkeypatch.setenv("PHO_API_URL", url)

    def run(*words: object) -> Result:
        result = pho(*words)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return run
