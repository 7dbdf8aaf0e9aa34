"""Activation norms, second moments and Fisher weights, against plain hooks and autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pho_service.errors import ModelError, NumericalError
from pho_service.pruning.statistics import PrunableLinear, Statistics, collect_statistics

Linears = dict[str, PrunableLinear]


def inputs_of(model: nn.Module, linears: Linears, windows: Tensor) -> dict[str, Tensor]:
    """What each linear reads, (windows, tokens, in_features), float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].detach().double()[0])
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.stack(xs) for name, xs in seen.items()}


def gradients_of(model: nn.Module, linears: Linears, windows: Tensor) -> dict[str, Tensor]:
    """Gradient of each window's summed loss by each linear's output, (tokens, out), float64."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in linears}
    outputs: dict[str, Tensor] = {}
    handles = [
        linear.module.register_forward_hook(
            lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
        )
        for name, linear in linears.items()
    ]
    for window in windows:
        log_p = model(input_ids=window[None]).logits[0].log_softmax(dim=-1)
        loss = -sum(log_p[i, window[i + 1]] for i in range(len(window) - 1))
        by_output = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, by_output, strict=True):
            gradients[name].append(gradient.double()[0])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in gradients.items()}


def gram_of(statistics: Statistics, name: str) -> Tensor:
    """E[x x^T] at the input of a linear, float64."""
    root = statistics.inputs[statistics.input_of[name]].root.double()
    return root.T @ root


def test_the_norms_square_is_the_mean_over_windows_of_the_squares_summed_over_tokens(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    for name, x in inputs_of(tiny_llama, linears, windows).items():
        expected = x.square().sum(dim=1).mean(dim=0).sqrt()

        torch.testing.assert_close(
            statistics.activation_norm(name).double(), expected, rtol=1e-5, atol=0
        )


def test_without_projection_the_root_squared_is_the_mean_over_tokens_of_x_x_t(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    for name, x in inputs_of(tiny_llama, linears, windows).items():
        tokens = x.flatten(end_dim=1)
        expected = sum(torch.outer(t, t) for t in tokens) / len(tokens)

        torch.testing.assert_close(gram_of(statistics, name), expected, rtol=1e-4, atol=1e-6)


def test_gram_singular(tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor) -> None:
    """Fewer tokens than channels give a singular Gram matrix, and a finite root of it."""
    few = windows[:1, :5]
    singular = collect_statistics(
        tiny_llama, linears, few, fisher_windows=1, projection_rows=0, seed=0
    )
    for name, x in inputs_of(tiny_llama, linears, few).items():
        torch.testing.assert_close(gram_of(singular, name), x[0].T @ x[0] / 5, rtol=1e-4, atol=1e-6)


def test_the_fisher_weight_is_the_mean_over_the_first_windows_tokens_of_squared_gradients(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    gradients = gradients_of(tiny_llama, linears, windows[:3])

    assert set(gradients) == set(linears)
    for name, gradient in gradients.items():
        expected = gradient.square().mean(dim=0)
        torch.testing.assert_close(
            statistics.fisher[name].double(), expected, rtol=1e-4, atol=1e-12
        )


def test_shared_inputs(linears: Linears, statistics: Statistics) -> None:
    """q, k and v share one input, gate and up another; o and down have their own."""
    readers: dict[int, list[str]] = {}
    for name in linears:
        readers.setdefault(statistics.input_of[name], []).append(name)

    assert list(readers.values()) == [
        [f"model.layers.{block}.{name}" for name in names]
        for block in (0, 1)
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    ]
    assert len(statistics.inputs) == len(readers)


def same_bits(a: Statistics, b: Statistics) -> bool:
    """Whether two results are equal to the last bit."""
    return a.input_of == b.input_of and all(
        torch.equal(x, y)
        for x, y in zip(
            [t for i in a.inputs for t in (i.root, i.activation_norm)] + list(a.fisher.values()),
            [t for i in b.inputs for t in (i.root, i.activation_norm)] + list(b.fisher.values()),
            strict=True,
        )
    )


def test_without_projection_nothing_is_random_another_seed_gives_the_same_bits(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    again = collect_statistics(
        tiny_llama, linears, windows, fisher_windows=3, projection_rows=0, seed=99
    )

    assert same_bits(again, statistics)


@pytest.mark.parametrize(("seed", "same"), [(5, True), (6, False)])
def test_the_same_seed_projects_to_the_same_bits_another_seed_does_not(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, seed: int, *, same: bool
) -> None:
    first, second = (
        collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=10, seed=s
        )
        for s in (5, seed)
    )

    assert same_bits(first, second) is same


def test_the_projection_draws_from_its_own_generator_not_from_torchs_global_one(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor
) -> None:
    before = torch.random.get_rng_state()
    collect_statistics(
        tiny_llama, linears, windows[:1], fisher_windows=1, projection_rows=4, seed=0
    )

    assert torch.equal(torch.random.get_rng_state(), before)


def test_projection_shape(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    """A projection has the asked number of rows, and leaves norms and Fisher weights alone."""
    projected = collect_statistics(
        tiny_llama, linears, windows, fisher_windows=3, projection_rows=11, seed=0
    )

    assert {tuple(i.root.shape) for i in projected.inputs} == {(11, 32), (11, 64)}
    for name in linears:
        assert torch.equal(projected.activation_norm(name), statistics.activation_norm(name))
        assert torch.equal(projected.fisher[name], statistics.fisher[name])


def test_projection_approaches_gram(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    """The projection's error against the Gram matrix falls as one over the root of its rows."""

    def relative_error(rows: int) -> float:
        projected = collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=rows, seed=0
        )
        return max(
            float(
                (gram_of(projected, name) - gram_of(statistics, name)).norm()
                / gram_of(statistics, name).norm()
            )
            for name in linears
        )

    coarse, fine = relative_error(64), relative_error(4096)  # 8 times smaller, in expectation

    assert fine < coarse / 4
    assert fine < 0.15


def test_collecting_changes_no_weight_no_requires_grad_makes_no_grad_and_leaves_no_hook(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor
) -> None:
    frozen = "model.norm.weight"
    tiny_llama.get_parameter(frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    collect_statistics(tiny_llama, linears, windows, fisher_windows=3, projection_rows=0, seed=0)

    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad is (name != frozen)
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_if_the_model_fails_midway_its_weights_are_trainable_again_and_no_hook_stays(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor
) -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=0, seed=0, advance=fail
        )

    assert all(p.requires_grad for p in tiny_llama.parameters())
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_a_model_whose_weights_are_all_frozen_gives_the_same_statistics_and_stays_frozen(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    tiny_llama.requires_grad_(False)
    frozen = collect_statistics(
        tiny_llama, linears, windows, fisher_windows=3, projection_rows=0, seed=0
    )

    assert same_bits(frozen, statistics)
    assert not any(p.requires_grad for p in tiny_llama.parameters())


def test_unused_linear(tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor) -> None:
    """A linear that the model never calls is refused by name."""
    linears["spare.adapter"] = PrunableLinear(name="spare.adapter", module=nn.Linear(32, 32))

    with pytest.raises(ModelError, match=r"1 linears .*spare\.adapter"):
        collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=0, seed=0
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("projection_rows", [0, 8])
def test_bad_activations(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, projection_rows: int,
    bad: float,
) -> None:  # fmt: skip
    """Activations that are NaN or infinite are refused with the first linear that reads them."""
    norm = tiny_llama.get_parameter("model.layers.1.post_attention_layernorm.weight")
    norm.data[3] = bad

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj: the activations"):
        collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=projection_rows, seed=0
        )


def test_bad_gradients(tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor) -> None:
    """Gradients that are NaN, with finite activations, are refused with a linear's name."""
    tiny_llama.get_parameter("lm_head.weight").data[3] = math.nan

    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj: the gradients"):
        collect_statistics(
            tiny_llama, linears, windows, fisher_windows=1, projection_rows=0, seed=0
        )


def test_how_many_windows_run_backward_does_not_change_norms_and_moments(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, statistics: Statistics
) -> None:
    every = collect_statistics(
        tiny_llama, linears, windows, fisher_windows=6, projection_rows=0, seed=0
    )

    for name in linears:
        torch.testing.assert_close(every.activation_norm(name), statistics.activation_norm(name))
        torch.testing.assert_close(
            gram_of(every, name), gram_of(statistics, name), rtol=1e-4, atol=1e-6
        )


def test_progress(tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor) -> None:
    """Progress is told once a window."""
    told: list[int] = []
    advance: Callable[[int], None] = told.append
    collect_statistics(
        tiny_llama, linears, windows, fisher_windows=2, projection_rows=4, seed=0, advance=advance
    )

    assert told == [1] * 6


def test_writing_to_a_linears_weight_changes_the_model_whichever_way_it_is_stored() -> None:
    module = nn.Linear(3, 2, bias=False)
    PrunableLinear(name="a", module=module).weight[1, 2] = 7
    PrunableLinear(name="b", module=module, transposed=True).weight[0, 1] = 8

    assert module.weight[1].tolist()[0] == 8
    assert module.weight[1].tolist()[2] == 7
