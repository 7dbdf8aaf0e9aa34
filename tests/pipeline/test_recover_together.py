"""Several processes train one model as one would, and go on after one of them is killed."""

import json
import multiprocessing
import os
import socket
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import ProcessExitedException

from pho_service.errors import InvalidInput, TextError
from pho_service.models.architecture import decoder_blocks
from pho_service.models.loading import LanguageModel, given_model, load_model
from pho_service.models.texts import GivenWindows, RecoveryText
from pho_service.pipeline.lesson import steps_of_each
from pho_service.pipeline.recover import PrunedModel, Workplace, check_trainable, recover_model
from pho_service.progress import Run
from pho_service.pruning.perplexity import dense_reference
from pho_service.pruning.recovery import Processes, recovering
from pho_service.spec.recovery import TRAINS, Recovered, Recovery

COUNT = 2
LENGTH = 32
KILLED = 9  # what the killed one exits with
# What takes longest to import; processes begin with what this one has.
multiprocessing.set_forkserver_preload(["pho_service.pipeline.recover"])
SETTINGS = Recovery(tokens=16 * LENGTH, rate=2e-3)


def _one_of_them(number, port, run, *given):
    os.environ |= {
        "RANK": f"{number}", "LOCAL_RANK": f"{number}", "WORLD_SIZE": f"{COUNT}",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
    }  # fmt: skip
    torch.set_num_threads(1)
    run(*given)


def together(run, *given):
    """Run a function in each of two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, run, *given)
    mp.start_processes(_one_of_them, given, nprocs=COUNT, start_method="forkserver")


@pytest.fixture
def folder(model_folder, tmp_path):
    """The tiny model without the smaller half of each linear, as another tool leaves it."""
    dense = load_model(str(model_folder), device="cpu")
    for linear in dense.linears.values():
        linear.weight.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    dense.model.save_pretrained(tmp_path / "pruned")
    dense.tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def windows(count):
    return torch.randint(256, (count, LENGTH), generator=torch.Generator().manual_seed(0))


def _step(model, dense, train, numbers):
    """The weights after one step along the mean of some windows' gradients, and its length."""
    reference = dense_reference(load_model(str(dense), device="cpu").model, windows(COUNT))
    blocks = [block for _, block in decoder_blocks(model.model)]
    with recovering(
        model.model, blocks, model.linears, Recovery(train=train), Processes()
    ) as trained:
        for number in numbers:
            trained.backward(reference, number)
        for each in trained.trained:
            assert each.grad is not None
            each.grad.div_(len(numbers)).mul_(100)  # longer than 1
        trained.clip()
        for each in trained.trained:
            each.data -= each.grad
    return {name: each.detach().clone() for name, each in model.model.named_parameters()}


def _step_together(folder, dense, out):
    number = Processes().number
    for train in TRAINS:
        model = PrunedModel.read(folder, device="cpu").model
        save_file(_step(model, dense, train, [number]), out / f"{train}-{number}")


def test_a_step_is_along_the_mean_of_all_gradients_and_all_have_the_whole_model(
    folder, model_folder, tmp_path
):
    together(_step_together, folder, model_folder, tmp_path)
    for train in TRAINS:
        model = PrunedModel.read(folder, device="cpu").model
        before = {name: each.detach().clone() for name, each in model.model.named_parameters()}
        expected = _step(model, model_folder, train, [*range(COUNT)])

        assert any(not torch.equal(expected[name], each) for name, each in before.items())
        for number in range(COUNT):
            found = load_file(tmp_path / f"{train}-{number}")
            assert found.keys() == expected.keys()
            for name, each in found.items():
                torch.testing.assert_close(each, expected[name], rtol=1e-5, atol=1e-6)


def _recover(folder, dense, place, out, killed_at, count):
    """Recover, or be killed when the bar of that number begins, if it is the second process."""
    pruned = PrunedModel.read(folder, device="cpu")
    teacher = load_model(str(dense), device="cpu")
    number = Processes().number
    bars = []

    @contextmanager
    def progress(title, steps):
        del steps
        bars.append(title)
        if len(bars) == killed_at and number:
            os._exit(KILLED)
        yield lambda _: None

    text = RecoveryText(source=GivenWindows(tokens=windows(count)), context_length=LENGTH)
    recovered = recover_model(
        pruned, lambda: nullcontext(teacher), text, SETTINGS, place, run=Run(progress=progress)
    )
    weights = {name: each.contiguous() for name, each in pruned.model.model.state_dict().items()}
    save_file(weights, out.with_name(f"{out.name}-{number}"))
    if not number:
        out.write_text(json.dumps(recovered.to_dict()))
    Processes().wait()
    Workplace(place).remove()


def _recover_both(folder, dense, place, out):
    """What was killed, and all of it once more in another place."""
    _recover(folder, dense, place, out / "killed", 0, 20)
    _recover(folder, dense, out / "elsewhere", out / "whole", 0, 20)


@pytest.mark.thorough
def test_it_is_better_keeps_zeros_and_goes_on_to_the_same_bits_after_one_is_killed(
    folder, model_folder, tmp_path
):
    given, place = (folder, model_folder), tmp_path / "workplace"
    with pytest.raises(ProcessExitedException) as died:
        together(_recover, *given, place, tmp_path / "killed", 6, 20)
    kept = {file.parent.name for file in place.glob("*/checkpoint-*/trainer_state.json")}
    together(_recover_both, *given, place, tmp_path)
    recovered = Recovered.from_dict(json.loads((tmp_path / "whole").read_text()))
    before = load_model(str(folder), device="cpu").linears

    assert died.value.exit_code == KILLED
    assert kept  # some steps were not done again
    assert not place.exists()
    assert recovered.kept
    assert recovered.after < recovered.before
    assert (recovered.windows, recovered.held_out, recovered.tokens) == (16, 2, 16 * LENGTH)
    whole = load_file(tmp_path / "whole-0")
    for name in ("whole-1", "killed-0", "killed-1"):
        other = load_file(tmp_path / name)
        assert all(torch.equal(each, other[key]) for key, each in whole.items())
    for name, linear in before.items():
        assert torch.equal(whole[f"{name}.weight"] == 0, linear.weight == 0)


def test_what_several_processes_cannot_train_is_named(folder, monkeypatch):
    with pytest.raises(TextError, match=r"3 windows to recover on are fewer than the 4 processes"):
        steps_of_each(8, 3, 4)
    several = Mock(spec=Processes, count=2)
    model = load_model(str(folder), device="cpu").model
    first, second = (block.mlp for block in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    tied = PrunedModel.of(given_model(model))
    with pytest.raises(InvalidInput, match=r"several processes would part. Train it in one proc"):
        check_trainable(tied.model, tied.masks, SETTINGS, several)
    pruned = PrunedModel.read(folder, device="cpu")
    cards = (torch.device("cuda", 0), torch.device("cuda", 1))
    monkeypatch.setattr(LanguageModel, "devices", cards)
    with pytest.raises(InvalidInput, match=r"on 2 devices, .* by 2 processes.*device_map out"):
        check_trainable(pruned.model, pruned.masks, SETTINGS, several)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match=r"WORLD_SIZE is 2, .* RANK and LOCAL_RANK and MASTER_"):
        Processes()
