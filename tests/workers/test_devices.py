"""One GPU for each worker of a machine, as far as they go."""

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from pho_service.errors import InvalidInput
from workers.devices import take_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch says that it has two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_one_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two workers get different GPUs, without a warning."""
    with take_device("auto", tmp_path) as first, take_device("auto", tmp_path) as second:
        assert (first, second) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert caplog.records == []


@pytest.mark.usefixtures("two_gpus")
def test_more_workers_than_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A third worker shares the first GPU, and a warning says so."""
    with ExitStack() as stack:
        devices = [stack.enter_context(take_device("auto", tmp_path)) for _ in range(3)]

    assert devices[2] == torch.device("cuda:0")
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "sharing the first" in caplog.text


@pytest.mark.usefixtures("two_gpus")
def test_given_back(tmp_path: Path) -> None:
    """A GPU that a worker has left, even by an error, is the next one's."""
    with pytest.raises(RuntimeError), take_device("auto", tmp_path):
        raise RuntimeError

    with take_device("auto", tmp_path) as device:
        assert device == torch.device("cuda:0")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:1"])
def test_named(tmp_path: Path, name: str) -> None:
    """A device that is asked for by name is given, and kept from nobody."""
    with take_device(name, tmp_path) as first, take_device(name, tmp_path) as second:
        assert first == second == torch.device(name)
    assert list(tmp_path.iterdir()) == []


def test_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, all work on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with take_device("auto", tmp_path) as first, take_device("auto", tmp_path) as second:
        assert first == second == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "gpu", "meta", "", "cuda:x"])
def test_no_such_device(tmp_path: Path, name: str) -> None:
    """What is not there, or not known, is refused by name."""
    with pytest.raises(InvalidInput, match=repr(name)), take_device(name, tmp_path):
        pass
