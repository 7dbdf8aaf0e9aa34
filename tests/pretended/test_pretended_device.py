"""The pretended GPU: it refuses what CUDA refuses, counts what costs, and changes no value."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from pretended_device import pretend
from torch import nn
from torch.utils.checkpoint import checkpoint

GPU = torch.device("cuda", 0)


def ones(*shape, device="cuda"):
    return torch.ones(*shape, device=device)


REFUSED = {
    "sum": lambda: ones(3) + torch.ones(3),
    "sum of a number that lies on the card": lambda: torch.ones(3) + ones(3)[0],
    "written number of the CPU": lambda: torch.tensor(1.0).add_(ones(3)[0]),
    "two numbers of the CPU": lambda: torch.addcmul(ones(3), torch.tensor(1.0), torch.tensor(1.0)),
    "product": lambda: ones(2, 2) @ torch.ones(2, 2),
    "linear": lambda: nn.Linear(2, 2)(ones(2)),
    "cat": lambda: torch.cat([ones(2), torch.ones(2)]),
    "gather": lambda: ones(3).gather(0, torch.zeros(1, dtype=torch.int64)),
    "scatter": lambda: torch.zeros(3).scatter_(0, torch.zeros(1, dtype=int), ones(1)),
    "index_select": lambda: ones(3).index_select(0, torch.zeros(1, dtype=torch.int64)),
    "index_add_": lambda: torch.zeros(3).index_add_(0, torch.zeros(1, dtype=int), ones(1)),
    "indices on the card": lambda: torch.ones(3)[torch.zeros(1, dtype=int, device="cuda")],
    "mask on the card": lambda: torch.ones(3)[ones(3) > 0],
    "values on the CPU": lambda: ones(3).__setitem__(torch.zeros(2, dtype=int), torch.ones(2)),
    "masked_fill": lambda: ones(3).masked_fill(torch.ones(3) > 0, 0.0),
    "where": lambda: torch.where(ones(3) > 0, torch.ones(3), 0.0),
    "embedding": lambda: nn.Embedding(3, 2).to("cuda")(torch.zeros(1, dtype=torch.int64)),
    "out": lambda: torch.mul(ones(3), 2, out=torch.empty(3)),
    "weights of bincount": lambda: torch.bincount(ones(3).long(), weights=torch.ones(3)),
    "in a list": lambda: torch.stack([torch.ones(2), ones(2)]),
    "other card": lambda: ones(3) + ones(3, device="cuda:1"),
    "number of another card": lambda: ones(3) + ones(3, device="cuda:1")[0],
    "card that does not exist": lambda: ones(3, device="cuda:2"),
    "generator of the CPU": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "generator of the card": lambda: torch.rand(3, generator=torch.Generator("cuda")),
    "pinned on the card": lambda: ones(3).pin_memory(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what, pretended_gpus):
    with pytest.raises(RuntimeError, match=r"device|pin|ordinal"):
        REFUSED[what]()


READS = [lambda t: t.numpy(), lambda t: np.asarray(t), lambda t: np.from_dlpack(t)]


@pytest.mark.parametrize("read", READS)
def test_a_cards_tensor_is_no_array(read, pretended_gpu):
    with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
        read(ones(3)[1:])


PASSES = {
    "number": lambda: ones(3) * 2,
    "number of the CPU": lambda: ones(3) * torch.tensor(2.0),
    "number of the CPU before": lambda: torch.tensor(2.0) * ones(3),
    "numbers of the CPU in where": lambda: torch.where(
        ones(3) > 0, torch.tensor(1.0), torch.tensor(0.0)
    ),
    "number of the CPU in masked_fill": lambda: ones(3).masked_fill(ones(3) > 0, torch.tensor(0.0)),
    "indices of the CPU": lambda: ones(3)[torch.zeros(1, dtype=torch.int64)],
    "mask of the CPU": lambda: ones(3)[torch.ones(3) > 0],
    "filled": lambda: ones(3).fill_(torch.tensor(2.0)),
    "copied over": lambda: torch.empty(3, device="cuda").copy_(torch.ones(3)),
    "as another": lambda: torch.ones(3).to(ones(1)),
    "new of it": lambda: ones(3).new_zeros(2) + ones(3).new_tensor([1.0, 2.0]),
    "like it": lambda: torch.zeros_like(ones(3)) + torch.ones_like(torch.ones(3), device=GPU),
    "list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "view": lambda: ones(4).view(2, 2)[1:].T,
    "copy": lambda: copy.deepcopy(ones(3)),
    "default device": lambda: _made_under_default_device(),
    "generator": lambda: torch.randn(3, device=GPU, generator=torch.Generator("cuda")),
    "function in Python": lambda: torch.nn.functional.embedding_bag(
        torch.zeros(1, 2, dtype=torch.int64, device="cuda"), ones(3, 2), mode="sum"
    ),
    "nothing": lambda: torch.empty(0, device="cuda") + ones(0),
}


def _made_under_default_device():
    with torch.device("cuda"):
        return torch.zeros(3) + nn.Linear(3, 3).bias.detach()


@pytest.mark.parametrize("what", PASSES)
def test_the_result_lies_on_the_card(what, pretended_gpu):
    result = PASSES[what]()

    assert result.device == GPU
    assert result.is_cuda
    assert result.get_device() == 0


def test_index_put_takes_indices_of_any_device_and_numbers_of_the_cpu(pretended_gpu):
    index = torch.tensor([1], device="cuda")
    main, card = torch.zeros(3), torch.zeros(3, device="cuda")
    main[index] = 1.0
    card[torch.tensor([2])] = torch.tensor(5.0)
    card[card > 4] = 7.0

    assert main.tolist() == [0, 1, 0]
    assert card.tolist() == [0, 0, 7]


def test_forward_and_backward_with_a_recomputed_block_the_cpus_values_on_the_card(
    tiny_llama, windows, pretended_gpu
):
    def gradient(device):
        model = copy.deepcopy(tiny_llama).to(device)
        layer = model.model.layers[0]
        plain = layer.forward
        layer.forward = lambda *args, **kw: checkpoint(plain, *args, use_reentrant=False, **kw)
        loss = model(input_ids=windows.to(device), labels=windows.to(device)).loss
        loss.backward()
        assert loss.device == torch.device(device, 0 if device == "cuda" else None)
        assert {p.grad.device for p in model.parameters()} == {loss.device}
        return loss.detach(), model.model.embed_tokens.weight.grad

    there, here = gradient("cuda"), gradient("cpu")

    assert torch.equal(there[0].cpu(), here[0])
    assert torch.equal(there[1].cpu(), here[1])


def test_gradients_go_back_to_where_tensors_were(pretended_gpus):
    first = ones(2, 2).requires_grad_()
    second = ones(2, 2, device="cuda:1").requires_grad_()
    seen = []
    first.register_hook(lambda gradient: seen.append(gradient.device))
    product = first.to("cuda:1") @ second
    product.to("cpu", torch.float64).sum().backward()

    assert product.device == pretended_gpus[1].device
    assert seen == [first.grad.device] == [first.device]
    assert second.grad.device == second.device
    assert first.grad.dtype == torch.float32
    assert first.grad.tolist() == [[2, 2], [2, 2]]
    assert pretended_gpus[0].counts.p2p_copies == 1


def test_an_operation_is_a_launch_views_are_none(pretended_gpu):
    x = ones(4, 4)
    with pretended_gpu.counting() as counts:
        x.view(2, 8)[1:].T.detach()
        torch.empty(3, device="cuda")
        torch.ones(4, 4) @ torch.ones(4, 4)
        ones(0).add_(1)
        assert counts.launches == 0
        (x @ x).add_(1)

    assert counts.by_operation == {"mm": 1, "add_": 1}
    assert counts.waits == 0
    with torch.inference_mode(), pretended_gpu.counting() as counts:  # whole compositions come
        y = torch.nn.functional.linear(x, x).double()
    assert counts.by_operation == {"mm": 1, "_to_copy": 1}
    assert y.device == GPU


WAITS = {
    "item": (lambda x: x.sum().item(), ["_local_scalar_dense"]),
    "float": (lambda x: float(x.sum()), ["_local_scalar_dense"]),
    "if": (lambda x: bool((x > 0).all()), ["_local_scalar_dense"]),
    "equal": (lambda x: torch.equal(x, x + 1), ["equal"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "mask": (lambda x: x[x > 0], ["nonzero"]),
    "filled by mask": (lambda x: x.__setitem__(x > 0, 1.0), []),
    "tolist": (lambda x: x.tolist(), ["d2h"]),
    "to the CPU": (lambda x: x.cpu(), ["d2h"]),
    "to pinned memory": (lambda x: x.to("cpu", non_blocking=True), []),
    "from the CPU": (lambda x: torch.ones(3).to("cuda"), ["h2d"]),
    "from the CPU, hoping": (lambda x: torch.ones(3).to("cuda", non_blocking=True), ["h2d"]),
    "from pinned memory": (
        lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), []
    ),
    "from pinned memory, blocking": (lambda x: torch.ones(3).pin_memory().to("cuda"), ["h2d"]),
    "copied over": (lambda x: x.copy_(torch.ones(3)), ["h2d"]),
    "copied back": (lambda x: torch.ones(3).copy_(x), ["d2h"]),
    "copied over from pinned memory": (
        lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True), []
    ),
    "made pinned": (
        lambda x: x.copy_(torch.empty(3, pin_memory=True), non_blocking=True), []
    ),
    "indices of the CPU": (lambda x: x[torch.tensor([1])], ["h2d"]),
    "list": (lambda x: torch.tensor([1.0], device="cuda"), ["h2d"]),
    "number": (lambda x: x * torch.tensor(2.0), []),
    "cholesky": (
        lambda x: torch.linalg.cholesky(torch.eye(3, device=x.device)), ["_linalg_check_errors"]
    ),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(torch.eye(3, device=x.device)), []),
    "bincount": (lambda x: torch.bincount(x.long(), minlength=4), ["bincount"]),
    "synchronize": (lambda x: torch.cuda.synchronize(), ["synchronize"]),
    "stream": (lambda x: torch.cuda.current_stream().synchronize(), ["synchronize"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WAITS)
def test_a_number_from_the_card_or_a_copy_is_a_wait(what, pretended_gpu):
    work, causes = WAITS[what]
    x = ones(3)
    with pretended_gpu.counting() as counts:
        work(x)

    assert counts.by_cause == dict.fromkeys(causes, 1)


def test_live_bytes_and_their_peak(pretended_gpu):
    x = ones(1024)
    y = x.view(32, 32)[:1]
    del x
    big = ones(1 << 18)
    del big
    gc.collect()

    assert torch.cuda.memory_allocated() == 4096
    assert torch.cuda.max_memory_allocated("cuda:0") == 4096 + (1 << 20)
    assert torch.cuda.memory_reserved(y.device) == 4096 + (1 << 20)
    free, total = torch.cuda.mem_get_info()
    assert total - free == 4096 + (1 << 20)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_reserved() == torch.cuda.max_memory_allocated() == 4096
    del y
    assert torch.cuda.memory_allocated() == 0


def test_what_autograd_keeps_for_the_backward_pass_counts(pretended_gpu):
    x = ones(1024).requires_grad_()
    loss = (x * 2).exp().sum()
    kept = pretended_gpu.allocated
    loss.backward()

    assert kept == 4096 + 4096 + 512  # x, exp(2 x), the sum
    assert pretended_gpu.allocated == 4096 + 4096 + 512  # x, its gradient, the sum


def test_an_allocation_beyond_the_memory_and_a_fault_raise_torchs_own_errors(pretended_gpu):
    pretended_gpu.memory_bytes = 8192
    kept = ones(1024)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        ones(2048)

    assert pretended_gpu.allocated == kept.numel() * 4
    ones(1024)
    pretended_gpu.others = 4096
    with pytest.raises(torch.OutOfMemoryError):
        kept + 1
    pretended_gpu.fault = torch.AcceleratorError("an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError):
        kept[:1] + 1


def test_reading_before_a_copy_ended(pretended_gpu):
    there = ones(3)
    back = there.to("cpu", non_blocking=True)
    with pytest.raises(RuntimeError, match="is not there yet"):
        back.sum()
    with pytest.raises(RuntimeError, match="is not there yet"):
        back.numpy()
    torch.cuda.current_stream().synchronize()
    assert back.sum() == 3

    source = torch.ones(3).pin_memory()
    there.copy_(source, non_blocking=True)
    assert source.sum() == 3
    with pytest.raises(RuntimeError, match="is still read"):
        source.fill_(2)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    source.fill_(2)


def test_reading_what_another_card_brings(pretended_gpus):
    first, second = (card.device for card in pretended_gpus)
    back = torch.ones(3, device=first).to("cpu", non_blocking=True)
    again = back.to(first, non_blocking=True)
    with pytest.raises(RuntimeError, match="cuda:0 was not waited for"):
        back.to(second, non_blocking=True)
    torch.cuda.synchronize(first)

    assert again.device == first
    assert back.to(second, non_blocking=True).device == second


def test_a_thread_that_begins_inside_sees_the_same_devices(pretended_gpu):
    x, seen = ones(3), []
    thread = threading.Thread(target=lambda: seen.append((x.device, (x + 1).device)))
    thread.start()
    thread.join()

    assert seen == [(GPU, GPU)]


def test_autocast_of_the_card_makes_its_products_in_bfloat16(pretended_gpu):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (ones(2, 2) @ ones(2, 2)).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (ones(2, 2) @ ones(2, 2)).dtype == torch.float32


def test_neither_torch_nor_what_was_made_inside_keeps_anything_of_the_cards():
    names = ("is_available", "device_count", "Event", "synchronize", "device")
    before = [getattr(torch.cuda, name) for name in names]
    with pretend() as cards:
        x = ones(3)

    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.Generator().device == torch.device("cpu")
    assert x.device == torch.device("cpu")  # nobody answers for the card any more
    del x
    assert cards[0].allocated == 0
