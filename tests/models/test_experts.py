"""Fused experts get modules of their own, and nothing but the hooks can tell the difference."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pho_service.errors import ModelError
from pho_service.models.architecture import Expert, experts_of, prunable_linears, unfuse_experts
from pho_service.pruning.statistics import gather

EXPERTS = "model.layers.1.mlp.experts"


def mixtral_config():
    """Two blocks of four experts, two of which each token is routed to."""
    return MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture
def mixtral():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(mixtral_config()).float().eval()


@pytest.fixture
def window():
    return torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))


def routing(tokens, experts):
    """Hidden states (tokens, 16), two different experts a token, and their weights."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2]
    hidden = torch.randn(tokens, 16, generator=generator)
    return hidden, chosen, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_same_logits(mixtral, window, implementation):
    """Whichever kernel computed the fused experts, the logits stay what they were."""
    mixtral.set_experts_implementation(implementation)
    with torch.no_grad():
        fused = mixtral(input_ids=window).logits
        unfuse_experts(mixtral)
        unfused = mixtral(input_ids=window).logits

    torch.testing.assert_close(unfused, fused, rtol=1e-5, atol=1e-6)


def test_experts_that_gate_in_their_own_way_keep_it():
    class Clamped(MixtralExperts):
        def _apply_gate(self, gate_up):
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


def test_hooks_see_routed_tokens(mixtral):
    """Each linear is called once, with just the tokens that were routed to its expert, in order."""
    unfuse_experts(mixtral)
    experts = mixtral.get_submodule(EXPERTS)
    hidden, index, weights = routing(11, 4)
    inputs = {}
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


def test_an_expert_that_no_token_is_routed_to_is_not_called(mixtral):
    experts = mixtral.get_submodule(EXPERTS)
    mixtral.set_experts_implementation("eager")  # the others take no index beyond the last
    hidden, weights = routing(3, 4)[0], torch.ones(3, 2)
    index = torch.tensor([[0, 3], [3, 4], [4, 4]])  # four experts: 4 stands for none
    fused = experts(hidden, index, weights)
    unfuse_experts(mixtral)
    called = set()
    for name, module in experts.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    unfused = experts(hidden, index, weights)

    torch.testing.assert_close(unfused, fused)
    assert bool((unfused[2] == 0).all())
    assert {name for name in called if name.endswith("down_proj")} == {"0.down_proj", "3.down_proj"}


def test_parameters_and_state_dict_stay_as_they_were(mixtral):
    parameters = dict(mixtral.named_parameters())
    state = list(mixtral.state_dict())
    for _ in range(2):
        unfuse_experts(mixtral)

    assert list(mixtral.state_dict()) == state
    assert list(dict(mixtral.named_parameters())) == list(parameters)
    assert all(mixtral.get_parameter(name) is p for name, p in parameters.items())
    assert len(experts_of(mixtral.get_submodule(EXPERTS))) == 4


def test_gate_and_up_are_halves_and_views_of_one_parameter(mixtral):
    both = mixtral.get_parameter(f"{EXPERTS}.gate_up_proj").detach()
    linears = prunable_linears(mixtral)
    linears[f"{EXPERTS}.2.gate_proj"].weight.fill_(1)
    linears[f"{EXPERTS}.2.up_proj"].weight.fill_(2)
    linears[f"{EXPERTS}.1.down_proj"].weight.fill_(3)

    assert bool((both[2, :24] == 1).all())
    assert bool((both[2, 24:] == 2).all())
    assert int(torch.isin(both, torch.tensor([1.0, 2.0])).sum()) == 2 * 24 * 16
    assert bool((mixtral.get_parameter(f"{EXPERTS}.down_proj")[1] == 3).all())


def test_after_a_cast_of_the_model_the_linears_have_its_dtype_and_are_views_of_it_as_before(
    mixtral, window
):
    linear = prunable_linears(mixtral)[f"{EXPERTS}.3.down_proj"]
    mixtral.to(torch.bfloat16)
    linear.weight.zero_()
    with torch.no_grad():
        logits = mixtral(input_ids=window).logits

    assert linear.weight.dtype == logits.dtype == torch.bfloat16
    assert bool((mixtral.get_parameter(f"{EXPERTS}.down_proj")[3] == 0).all())


def test_parameters_are_freed_without_the_garbage_collector(mixtral):
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


def test_experts_that_are_stored_transposed_are_refused_by_name_and_left_alone():
    config = GptOssConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        max_position_embeddings=131072,
    )  # fmt: skip
    model = GptOssForCausalLM(config)

    with pytest.raises(ModelError, match=r"experts\.gate_up_proj \(4, 16, 48\).*transposed"):
        prunable_linears(model)
    assert not any(isinstance(module, Expert) for module in model.modules())
    for flag in ("has_bias", "is_transposed", "has_post_expert_norm"):
        experts = MixtralExperts(mixtral_config())
        setattr(experts, flag, True)  # so they are more than two matrices
        unfuse_experts(experts)
        assert experts_of(experts) == []


@pytest.mark.parametrize("projection_rows", [0, 400])
def test_an_unreached_expert_has_the_others_mean(window, projection_rows):
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
    statistics = gather(
        model, linears, window, fisher_windows=1, projection_rows=projection_rows, seed=0
    ).statistics(window)

    def gram(name):
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
