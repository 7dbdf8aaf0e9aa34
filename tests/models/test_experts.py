"""Fused experts get modules of their own, and nothing but the hooks can tell the difference."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pho_service.errors import ModelError
from pho_service.models.architecture import Expert, experts_of, prunable_linears, unfuse_experts
from pho_service.models.loading import load_model
from pho_service.pruning.statistics import collect_statistics

EXPERTS = "model.layers.1.mlp.experts"


def mixtral_config() -> MixtralConfig:
    """Two blocks of four experts, two of which each token is routed to."""
    return MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    """A random Mixtral in evaluation mode, its experts fused."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(mixtral_config()).float().eval()


@pytest.fixture
def window() -> Tensor:
    """(1, 20), int64."""
    return torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))


def routing(tokens: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, 16), two different experts a token, and their weights."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2]
    hidden = torch.randn(tokens, 16, generator=generator)
    return hidden, chosen, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_same_logits(mixtral: MixtralForCausalLM, window: Tensor, implementation: str) -> None:
    """Whichever kernel computed the fused experts, the logits stay what they were."""
    mixtral.set_experts_implementation(implementation)
    with torch.no_grad():
        fused = mixtral(input_ids=window).logits
        unfuse_experts(mixtral)
        unfused = mixtral(input_ids=window).logits

    torch.testing.assert_close(unfused, fused, rtol=1e-5, atol=1e-6)


def test_same_gradients(mixtral: MixtralForCausalLM, window: Tensor) -> None:
    """The gradients of the fused parameters stay what they were."""
    fused = copy.deepcopy(mixtral)
    unfuse_experts(mixtral)
    for model in (fused, mixtral):
        model(input_ids=window, labels=window).loss.backward()

    for name, parameter in mixtral.named_parameters():
        torch.testing.assert_close(parameter.grad, fused.get_parameter(name).grad)


def test_experts_that_gate_in_their_own_way_keep_it() -> None:
    class Clamped(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.sigmoid() * up.clamp(-0.1, 0.1)

    config = mixtral_config()
    config._experts_implementation = "batched_mm"
    experts = Clamped(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        fused = experts(*routing(9, 4))
        unfuse_experts(experts)
        unfused = experts(*routing(9, 4))

    assert experts_of(experts)
    torch.testing.assert_close(unfused, fused)


def test_hooks_see_routed_tokens(mixtral: MixtralForCausalLM) -> None:
    """Each linear is called once, with just the tokens that were routed to its expert, in order."""
    unfuse_experts(mixtral)
    experts = mixtral.get_submodule(EXPERTS)
    hidden, index, weights = routing(11, 4)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in experts.named_modules():
        module.register_forward_hook(
            lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0])
        )
    experts(hidden, index, weights)

    for expert in range(4):
        routed = hidden[(index == expert).any(dim=1)]
        for matrix in ("gate_proj", "up_proj"):
            (seen,) = inputs[f"{expert}.{matrix}"]
            assert torch.equal(seen, routed)
        assert len(inputs[f"{expert}.down_proj"]) == 1
    assert inputs["0.gate_proj"][0] is inputs["0.up_proj"][0]  # so they share their statistics


def test_unused_expert(mixtral: MixtralForCausalLM) -> None:
    """An expert that no token is routed to is not called; an index beyond the last is none."""
    experts = mixtral.get_submodule(EXPERTS)
    mixtral.set_experts_implementation("eager")  # the others take no index beyond the last
    hidden, weights = routing(3, 4)[0], torch.ones(3, 2)
    index = torch.tensor([[0, 3], [3, 4], [4, 4]])  # four experts: 4 stands for none
    fused = experts(hidden, index, weights)
    unfuse_experts(mixtral)
    called: set[str] = set()
    for name, module in experts.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    unfused = experts(hidden, index, weights)

    torch.testing.assert_close(unfused, fused)
    assert bool((unfused[2] == 0).all())
    assert {name for name in called if name.endswith("down_proj")} == {"0.down_proj", "3.down_proj"}


def test_parameters_stay(mixtral: MixtralForCausalLM) -> None:
    """Parameters and state dict keep their names, order and tensors; doing it again is nothing."""
    parameters = dict(mixtral.named_parameters())
    state = list(mixtral.state_dict())
    for _ in range(2):
        unfuse_experts(mixtral)

    assert list(mixtral.state_dict()) == state
    assert list(dict(mixtral.named_parameters())) == list(parameters)
    assert all(mixtral.get_parameter(name) is p for name, p in parameters.items())
    assert len(experts_of(mixtral.get_submodule(EXPERTS))) == 4


def test_slices(mixtral: MixtralForCausalLM) -> None:
    """Gate is the first half of the rows and up the second, each a view of the fused parameter."""
    both = mixtral.get_parameter(f"{EXPERTS}.gate_up_proj").detach()
    linears = prunable_linears(mixtral)
    linears[f"{EXPERTS}.2.gate_proj"].weight.fill_(1)
    linears[f"{EXPERTS}.2.up_proj"].weight.fill_(2)
    linears[f"{EXPERTS}.1.down_proj"].weight.fill_(3)

    assert bool((both[2, :24] == 1).all())
    assert bool((both[2, 24:] == 2).all())
    assert int(torch.isin(both, torch.tensor([1.0, 2.0])).sum()) == 2 * 24 * 16
    assert bool((mixtral.get_parameter(f"{EXPERTS}.down_proj")[1] == 3).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cast(mixtral: MixtralForCausalLM, window: Tensor, dtype: torch.dtype) -> None:
    """After a cast of the model, the linears have its dtype and are views of it as before."""
    linear = prunable_linears(mixtral)[f"{EXPERTS}.3.down_proj"]
    mixtral.to(dtype)
    linear.weight.zero_()
    with torch.no_grad():
        logits = mixtral(input_ids=window).logits

    assert linear.weight.dtype == dtype
    assert logits.dtype == dtype
    assert bool((mixtral.get_parameter(f"{EXPERTS}.down_proj")[3] == 0).all())


def test_copy(mixtral: MixtralForCausalLM, window: Tensor) -> None:
    """A copy of the model is on its own: what is done to it leaves the first alone."""
    linears = prunable_linears(mixtral)
    other = copy.deepcopy(mixtral)
    with torch.no_grad():
        before = mixtral(input_ids=window).logits
        for linear in prunable_linears(other).values():
            linear.weight.zero_()
        after = mixtral(input_ids=window).logits
        changed = other(input_ids=window).logits

    assert torch.equal(after, before)
    assert not torch.equal(changed, before)
    assert all(bool((linear.weight != 0).any()) for linear in linears.values())


def test_copy_of_an_expert(mixtral: MixtralForCausalLM) -> None:
    """A copy of one expert alone has its own three matrices, no others, and says the same."""
    prunable_linears(mixtral)
    expert = mixtral.get_submodule(f"{EXPERTS}.2")
    alone = copy.deepcopy(expert).double()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    before = expert(x)
    for parameter in alone.parameters():
        parameter.data.mul_(2)

    assert sum(p.numel() for p in alone.parameters()) == 3 * 24 * 16
    assert torch.equal(expert(x), before)
    torch.testing.assert_close(
        mixtral.get_submodule(EXPERTS)(x, torch.full((5, 1), 2), torch.ones(5, 1)), before
    )
    assert not torch.equal(alone(x.double()).float(), before)


def test_let_go(mixtral: MixtralForCausalLM) -> None:
    """A mixture's parameters are freed with it, without the garbage collector."""
    prunable_linears(mixtral)
    other = copy.deepcopy(mixtral)
    parameters = [weakref.ref(p) for p in other.parameters()]
    gc.collect()  # what transformers made a circle of while it built the model
    gc.disable()
    try:
        del other
        alive = sum(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()

    assert len(parameters) > 10
    assert alive == 0


def test_other_layout() -> None:
    """Experts that are stored transposed, with biases, are refused by name and left as they are."""
    config = GptOssConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        max_position_embeddings=131072,
    )  # fmt: skip
    model = GptOssForCausalLM(config)

    with pytest.raises(ModelError, match=r"experts\.gate_up_proj \(4, 16, 48\).*transposed"):
        prunable_linears(model)
    assert not any(isinstance(module, Expert) for module in model.modules())


@pytest.mark.parametrize("flag", ["has_bias", "is_transposed", "has_post_expert_norm"])
def test_flags(flag: str) -> None:
    """Experts that say they are more than two matrices are left fused, whatever their shapes."""
    experts = MixtralExperts(mixtral_config())
    setattr(experts, flag, True)
    unfuse_experts(experts)

    assert experts_of(experts) == []


def test_save_and_load(mixtral: MixtralForCausalLM, model_folder: Path) -> None:
    """A mixture that is pruned and saved where it was has its zeros and its hash again."""
    mixtral.to(torch.bfloat16).save_pretrained(model_folder)
    keys = set(load_file(model_folder / "model.safetensors"))
    loaded = load_model(str(model_folder), device="cpu", dtype="auto")
    for linear in loaded.linears.values():
        linear.weight[:, ::2] = 0
    expected = {name: linear.weight.clone() for name, linear in loaded.linears.items()}
    digest = loaded.weights_sha256
    loaded.model.to(torch.bfloat16).save_pretrained(model_folder)
    again = load_model(str(model_folder), device="cpu")

    assert set(load_file(model_folder / "model.safetensors")) == keys
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in keys  # as Mistral AI names it
    assert again.weights_sha256 == digest
    assert list(again.linears) == list(expected)
    for name, linear in again.linears.items():
        assert torch.equal(linear.weight, expected[name])
        assert bool((linear.weight[:, ::2] == 0).all())


@pytest.mark.parametrize("projection_rows", [0, 400])
def test_expert_without_tokens(window: Tensor, projection_rows: int) -> None:
    """An expert that no token is routed to has the mean statistics of those that got some."""
    config = mixtral_config()
    config.num_experts_per_tok = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).float().eval()
    for block in model.model.layers:
        router = block.mlp.gate.weight.data  # (4, 16)
        router[1] = -router[0]  # one of the two is positive,
        router[2:] = 0  # and these two never win
    linears = prunable_linears(model)
    statistics = collect_statistics(
        model, linears, window, fisher_windows=1, projection_rows=projection_rows, seed=0
    )

    def gram(name: str) -> Tensor:
        root = statistics.inputs[statistics.input_of[name]].root
        return root.T @ root

    for matrix in ("gate_proj", "up_proj", "down_proj"):
        first, second, third = (f"{EXPERTS}.{i}.{matrix}" for i in range(3))
        squares = [statistics.activation_norm(name).square() for name in (first, second)]
        fisher = (statistics.fisher[first] + statistics.fisher[second]) / 2
        close = {"rtol": 1e-4, "atol": 1e-5} if not projection_rows else {"rtol": 0.3, "atol": 0.3}

        torch.testing.assert_close(
            statistics.activation_norm(third).square(), sum(squares) / 2, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(gram(third), (gram(first) + gram(second)) / 2, **close)
        torch.testing.assert_close(statistics.fisher[third], fisher)


def test_fisher_of_an_expert(mixtral: MixtralForCausalLM, window: Tensor) -> None:
    """Its Fisher weight is a mean over its own tokens: the routing is in its inputs already."""
    linears = prunable_linears(mixtral)
    name = f"{EXPERTS}.0.up_proj"
    seen: list[Tensor] = []

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(seen.append)

    linears[name].module.register_forward_hook(watch)
    statistics = collect_statistics(
        mixtral, linears, window, fisher_windows=1, projection_rows=0, seed=0
    )

    (gradient,) = seen
    assert len(gradient) < window.numel()
    torch.testing.assert_close(statistics.fisher[name], gradient.square().mean(dim=0))
