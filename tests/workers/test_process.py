"""The folder that a worker works in, and its GPU: one for each worker of a machine."""

import logging
import os
import time
from types import SimpleNamespace

import pytest
import torch

from pho_service.errors import DeviceLost, InvalidInput
from pho_service.host.access import Access
from pho_service.host.artifacts import PrunedStore
from pho_service.host.machine import faults_told
from pho_service.spec.job import JobSpec
from workers.inputs import BundleStore, WorkerInputs
from workers.process import own_folder, take_device


@pytest.fixture
def killed(tmp_path):
    """The folder of a worker that was killed an hour ago."""
    folder = tmp_path / "pho-worker-killed"
    folder.mkdir()
    (folder / "in-use").touch()
    (folder / "something").touch()
    _age(folder)
    return folder


def _age(folder):
    hour_ago = time.time() - 3600
    os.utime(folder / "in-use", (hour_ago, hour_ago))


def test_killed_workers(tmp_path, killed):
    """What a killed worker has left is removed by the next one; other folders are not."""
    other = tmp_path / "pho-worker"
    other.mkdir()
    with own_folder(tmp_path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, other])

    assert not killed.exists()
    assert not folder.exists()


def test_the_folder_of_a_worker_that_lives_or_was_just_made_stays(tmp_path, killed):
    (killed / "in-use").unlink()
    (killed / "in-use").touch()  # it may be about to be locked
    with own_folder(tmp_path) as first:
        _age(first)
        with own_folder(tmp_path) as second:
            assert {first, second, killed} == {*tmp_path.iterdir()}


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this process sees these cards, in this order."""

    def see(*uuids):
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, **_: ones(*size))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda c: f"card {uuids[c.index]}")
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda c: SimpleNamespace(uuid=uuids[c.index])
        )

    return see


@pytest.fixture
def two_gpus(machine):
    """A machine on which torch says that it has two."""
    machine("aa", "bb")


@pytest.mark.usefixtures("two_gpus")
def test_two_workers_get_different_gpus_a_third_shares_the_first_and_a_warning_says_so(
    tmp_path, caplog
):
    with take_device("auto", tmp_path) as first, take_device("auto", tmp_path) as second:
        warned = [*caplog.records]
        with take_device("auto", tmp_path) as third:
            assert [first, second, third] == [torch.device(f"cuda:{n}") for n in (0, 1, 0)]

    assert warned == []
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "sharing cuda:0" in caplog.text
    with pytest.raises(RuntimeError), take_device("auto", tmp_path):
        raise RuntimeError
    with take_device("auto", tmp_path) as device:  # what was left, even by an error
        assert device == torch.device("cuda:0")


def test_by_the_card(tmp_path, machine):
    """Cards are told apart by what they are, not by the number that CUDA_VISIBLE_DEVICES gives."""
    machine("aa", "bb")
    with take_device("auto", tmp_path) as first:
        machine("bb", "aa")  # another process sees them the other way around
        with take_device("auto", tmp_path) as second:
            assert (first, second) == (torch.device("cuda:0"), torch.device("cuda:0"))
        with pytest.raises(InvalidInput, match=r"cuda:1 \(GPU aa\) is another worker's"):
            take_device("cuda:1", tmp_path).__enter__()


@pytest.mark.usefixtures("two_gpus")
def test_named(tmp_path):
    """A GPU that is asked for by its number is the worker's alone; ``cuda`` takes a free one."""
    with take_device("cuda:0", tmp_path) as first, take_device("cuda", tmp_path) as second:
        assert (first, second) == (torch.device("cuda:0"), torch.device("cuda:1"))
        for name in ("cuda:1", "cuda"):
            with pytest.raises(InvalidInput, match=r"cuda:1 \(GPU bb\) is another worker's"):
                take_device(name, tmp_path).__enter__()


@pytest.mark.usefixtures("two_gpus")
def test_all(tmp_path):
    """A worker with all GPUs leaves none to others, and waits for none that another has."""
    with take_device("all", tmp_path) as first:
        assert first == torch.device("cuda:0")
        for name in ("cuda:0", "cuda:1", "cuda"):
            with pytest.raises(InvalidInput, match="is another worker's"):
                take_device(name, tmp_path).__enter__()
    with (
        take_device("cuda:1", tmp_path),
        pytest.raises(InvalidInput, match=r"cuda:1 \(GPU bb\) is another worker's"),
    ):
        take_device("all", tmp_path).__enter__()
    with take_device("cuda:0", tmp_path) as given_back:
        assert given_back == torch.device("cuda:0")


@pytest.mark.usefixtures("two_gpus")
def test_the_cpu_is_kept_from_nobody_without_gpus_all_work_on_it(tmp_path, monkeypatch):
    with take_device("cpu", tmp_path) as first, take_device("cpu", tmp_path) as second:
        assert first == second == torch.device("cpu")
    assert list(tmp_path.iterdir()) == []
    for name in ("cuda:2", "gpu", "meta", "", "cuda:x"):
        with pytest.raises(InvalidInput, match=repr(name)), take_device(name, tmp_path):
            pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with take_device("auto", tmp_path) as first, take_device("auto", tmp_path) as second:
        assert first == second == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InvalidInput, match="--device all needs GPUs"):
        take_device("all", tmp_path).__enter__()


def test_models_of_a_worker_with_all(model_folder, pretended_gpus):
    root = model_folder.parent
    access = Access(model_roots=(root,), text_roots=(root,), hub_models=(), hub_datasets=())
    bundles = BundleStore(str(root / "bundles"), root / "bundles")
    pruned = PrunedStore(str(root / "bundles"), root / "bundles")
    inputs = WorkerInputs(access, bundles, pruned, pretended_gpus[0].device, spread=True)
    spec = JobSpec.model_validate({"model": "model", "pattern": "0.5"})
    spread = inputs.model(spec).devices
    streamed = inputs.model(spec.model_copy(update={"stream": True})).devices

    assert spread == tuple(card.device for card in pretended_gpus)
    assert streamed == (pretended_gpus[0].device,)


def test_a_card_that_does_not_work_is_passed_over_and_what_it_did_before_is_a_lost_device(
    tmp_path, pretended_gpus, caplog
):
    gone = torch.AcceleratorError("CUDA error: device not ready")
    pretended_gpus[0].fault = gone
    with take_device("auto", tmp_path) as device:
        assert device == torch.device("cuda:1")

    assert "cuda:0 does not work: CUDA error: device not ready" in caplog.text
    with pytest.raises(InvalidInput, match="cuda:0 does not work: CUDA error"):
        take_device("cuda:0", tmp_path).__enter__()
    pretended_gpus[1].fault = gone
    with pytest.raises(DeviceLost, match="device not ready"), faults_told():
        torch.ones(1, device="cuda:1").sum()
