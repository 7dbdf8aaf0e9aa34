"""The gradients of a recovery are those of the divergence, and no removed weight has one."""

import pytest
import torch

from pho_service.models.architecture import decoder_blocks
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.recovery import Processes, mixed, recovering, rounded_at_random
from pho_service.spec.recovery import TRAINS, Recovery

TOP = 7


def half_pruned(linears):
    for linear in linears.values():
        linear.weight.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)


@pytest.fixture
def reference(tiny_llama, linears, windows):
    """What the dense model predicts; it is pruned then."""
    found = dense_reference(tiny_llama, windows, top_k=TOP)
    half_pruned(linears)
    return found


def in_double(model, reference, window):
    """The divergence of a window, by its formula in float64."""
    logs = model(reference.windows[window : window + 1]).logits[0, :-1].log_softmax(dim=-1)
    q = logs.exp().gather(1, reference.tokens[window].long())
    p = reference.log_probabilities[window].double().exp()
    rest_p, rest_q = 1 - p.sum(dim=1), 1 - q.sum(dim=1)
    return ((p * (p / q).log()).sum(dim=1) + rest_p * (rest_p / rest_q).log()).mean()


def blocks_of(model):
    return [block for _, block in decoder_blocks(model)]


@pytest.mark.parametrize(("halves", "error"), [(False, 1e-5), (True, 0.05)])
def test_the_gradient_is_that_of_the_formula_in_float64(
    halves, error, tiny_llama, linears, reference, monkeypatch
):
    """On a CPU without units for products in bfloat16, and on one that has them."""
    monkeypatch.setattr("pho_service.pruning.hardware.multiplies_halves", lambda: halves)
    with recovering(tiny_llama, blocks_of(tiny_llama), linears, Recovery(), Processes()) as trained:
        value = trained.backward(reference, 1)
        found = {n: p.grad for n, p in tiny_llama.named_parameters() if p.grad is not None}
    double = tiny_llama.double()
    double.zero_grad()
    expected = in_double(double, reference, 1)
    expected.backward()
    parameters = dict(double.named_parameters())

    assert value == pytest.approx(float(expected.detach()), rel=error / 10)
    assert found.keys() == {f"{name}.weight" for name in linears}
    for name, gradient in found.items():
        kept = parameters[name] != 0
        own = parameters[name].grad
        assert own is not None
        assert (gradient.double() - own)[kept].norm() < error * own[kept].norm()
        assert not gradient[~kept].any()


def test_activations_that_do_not_fit_are_computed_again_with_the_same_bits(
    tiny_llama, linears, reference, monkeypatch
):
    runs = []
    tiny_llama.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))

    def full(*_):
        monkeypatch.undo()
        raise torch.OutOfMemoryError

    def step():
        """The gradients of a window, and how often a block ran for them."""
        trained.zero_grad()
        runs.clear()
        trained.backward(reference, 0)
        return [each.grad for each in trained.trained], len(runs)

    with recovering(tiny_llama, blocks_of(tiny_llama), linears, Recovery(), Processes()) as trained:
        again, twice = step()
        trained.recompute = False
        kept, once = step()
        monkeypatch.setattr("pho_service.pruning.recovery.window_backward", full)
        after, then = step()
        monkeypatch.setattr("pho_service.pruning.recovery.window_backward", full)
        with pytest.raises(torch.OutOfMemoryError):
            step()  # nothing takes less

    assert (twice, once, then) == (2, 1, 2)
    for one, other, third in zip(again, kept, after, strict=True):
        assert one is not None
        assert other is not None
        assert third is not None
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize("recompute", [True, False])
def test_products_in_bfloat16_see_what_each_step_changed(
    recompute, tiny_llama, linears, reference, monkeypatch
):
    """As on a GPU, where one context is around all steps, and keeps no weights of earlier ones."""
    monkeypatch.setattr("pho_service.pruning.recovery._IN_HALVES", ("cpu",))
    exact = float(in_double(tiny_llama, reference, 0).detach())
    with (
        recovering(tiny_llama, blocks_of(tiny_llama), linears, Recovery(), Processes()) as trained,
        mixed(torch.device("cpu")),
    ):
        trained.recompute = recompute
        before = trained.backward(reference, 0)
        for each in trained.trained:
            each.data.mul_(0.5)
        after = trained.backward(reference, 0)
    halved = float(in_double(tiny_llama, reference, 0).detach())

    assert before == pytest.approx(exact, rel=0.02)
    assert after == pytest.approx(halved, rel=0.02)
    assert after != pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("what", TRAINS)
def test_a_step_lowers_the_divergence_and_removes_and_restores_nothing(
    what, tiny_llama, linears, reference
):
    kept = {name: linear.weight != 0 for name, linear in linears.items()}
    before = rate_divergence(tiny_llama, reference)
    with recovering(
        tiny_llama, blocks_of(tiny_llama), linears, Recovery(train=what), Processes()
    ) as trained:
        adam = torch.optim.Adam(trained.groups(3e-3))
        for window in range(len(reference.windows)):
            trained.backward(reference, window)
            adam.step()
            adam.zero_grad()

    assert rate_divergence(tiny_llama, reference) < before
    assert all(torch.equal(linear.weight != 0, kept[n]) for n, linear in linears.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_below_a_step_of_the_type_are_kept_in_the_mean(dtype):
    before = (torch.randn(200, 500) / 8).to(dtype).float()
    before[:, 0] = 0
    step = torch.finfo(dtype).eps * before.abs()
    after = before + 0.05 * step * (before != 0)
    nearest, rounded, again = (
        after.to(dtype), rounded_at_random(after, dtype, 7), rounded_at_random(after, dtype, 7),
    )  # fmt: skip

    assert torch.equal(nearest.float(), before)  # nothing is left of it
    assert rounded.dtype is dtype
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, rounded_at_random(after, dtype, 8))
    assert torch.equal(rounded == 0, before == 0)
    change, wanted = (rounded.float() - before).double().sum(), (after - before).double().sum()
    assert change == pytest.approx(float(wanted), rel=0.1)
    assert ((rounded.float() - after).abs() <= 2 * step + 1e-7).all()


def test_what_has_no_less_bits_is_not_changed():
    weights = torch.randn(4, 5)

    assert torch.equal(rounded_at_random(weights, torch.float32, 0), weights)
    halves = weights.bfloat16()
    assert torch.equal(rounded_at_random(halves, torch.bfloat16, 0), halves)


def test_low_rank_changes_are_rounded_as_the_weights_are_stored(tiny_llama, linears, reference):
    del reference
    with recovering(
        tiny_llama, blocks_of(tiny_llama), linears, Recovery(train="lora"), Processes()
    ) as trained:
        for each in trained.trained:
            each.data.fill_(0.1)
        trained.round_(torch.bfloat16)

    for linear in linears.values():
        assert torch.equal(linear.weight, linear.weight.bfloat16().float())
        assert linear.weight.dtype is torch.float32
