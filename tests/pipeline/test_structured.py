"""A model is cut block after block, and what is left makes up for what is gone."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pho_service.errors import InvalidInput, NumericalError
from pho_service.models.loading import given_model
from pho_service.models.structure import Anatomy, block_shapes
from pho_service.pipeline.structured import cut_costs, cut_model, layers_to_keep
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.structured import narrowed, removal_order
from pho_service.spec.structure import Structure


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return given_model(AutoModelForCausalLM.from_config(config).float().eval())


@pytest.fixture
def windows():
    return torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))


def copied(model):
    return given_model(copy.deepcopy(model.model))


def inputs_of(model, name, windows):
    """(tokens, in_features): what a linear reads of some windows."""
    seen = []
    handle = model.linears[name].module.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].flatten(end_dim=-2))
    )
    with torch.no_grad():
        model.model(input_ids=windows)
    handle.remove()
    return torch.cat(seen)


def divergence(cut, reference):
    return rate_divergence(cut.model.model, reference)


def test_all_three_and_what_it_says_of_them(model, windows, tmp_path):
    structure = Structure(neurons=16, query_heads=2, layers=(0, 2, 3))
    cut = cut_model(model, windows, structure)
    cut.model.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert cut.layers == (0, 2, 3)
    assert [*cut.neurons] == [*cut.query_heads] == [f"model.layers.{i}" for i in cut.layers]
    assert all(len(kept) == 16 for kept in cut.neurons.values())
    for kept in cut.query_heads.values():
        assert kept[0] in (0, 1)
        assert kept[1] in (2, 3)
    assert cut.model.linears["model.layers.2.mlp.down_proj"].weight.shape == (16, 16)
    assert loaded.config.num_hidden_layers == 3
    with torch.no_grad():
        expected, actual = (m(input_ids=windows).logits for m in (cut.model.model, loaded))
    assert torch.equal(actual, expected)


def test_the_first_block_by_hand(model, windows):
    """Its FFN's input is that of the dense block; weights are those of least squares."""
    dense = copied(model)
    name = "model.layers.0.mlp.down_proj"
    inputs = inputs_of(dense, name, windows)
    gram, weight = inputs.T @ inputs / len(inputs), dense.linears[name].weight
    fisher = {n: torch.rand(x.weight.shape[0]) for n, x in dense.linears.items()}
    kept = removal_order(weight, gram, fisher[name], layer=name).kept(16)
    cut = cut_model(model, windows, Structure(neurons=16), fisher=fisher)

    assert cut.neurons["model.layers.0"] == kept.tolist()
    expected = narrowed(weight, gram, kept, layer=name)
    torch.testing.assert_close(cut.model.linears[name].weight, expected, rtol=1e-3, atol=1e-4)
    for writer in ("gate_proj", "up_proj"):
        rows = dense.linears[f"model.layers.0.mlp.{writer}"].weight[kept]
        assert torch.equal(cut.model.linears[f"model.layers.0.mlp.{writer}"].weight, rows)


def test_row_weights_are_found_by_the_names_of_the_dense_model(model, windows):
    """After block 0 is gone, block 1 is called 0; its outputs keep their weights."""
    names = [n for n in model.linears if n.endswith(("down_proj", "o_proj"))]
    fisher = {n: torch.full((16,), float("nan")) for n in names if ".0." in n}
    fisher |= {n: torch.ones(16) for n in names if ".0." not in n}
    structure = Structure(neurons=16, query_heads=2, layers=(1, 2, 3))
    cut, plain = (
        cut_model(copied(model), windows, structure, fisher=weights) for weights in (fisher, None)
    )

    assert cut.neurons == plain.neurons


def firsts(_block, _part, count, *_):
    """Choose the first, whatever they are."""
    return torch.arange(count)


@pytest.mark.parametrize("choose", [None, firsts])
def test_least_squares_lower_the_divergence_of_every_choice(model, windows, choose):
    structure = Structure(neurons=16, query_heads=2)
    reference = dense_reference(model.model, windows)
    with_update, without = (
        divergence(
            cut_model(copied(model), windows, structure, choose=choose, update=update), reference
        )
        for update in (True, False)
    )

    assert 0 < with_update < without


def test_blocks_that_do_nothing_leave_first(model, windows):
    for name in ("model.layers.1", "model.layers.3"):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            model.linears[f"{name}.{linear}"].weight.zero_()
    reference = dense_reference(model.model, windows)

    assert layers_to_keep(Anatomy(model), windows, 2) == [0, 2]
    cut = cut_model(model, windows, Structure(dropped=2))
    assert cut.layers == (0, 2)
    assert divergence(cut, reference) == pytest.approx(0, abs=1e-6)


def test_the_best_of_all_blocks_by_trial(model, windows):
    """With fewer blocks than are tried out, the first to leave is the best one of all."""
    reference = dense_reference(model.model, windows)
    divergences = [
        divergence(cut_model(copied(model), windows, Structure(layers=kept)), reference)
        for kept in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))
    ]
    best = divergences.index(min(divergences))

    assert layers_to_keep(Anatomy(model), windows, 1) == [i for i in range(4) if i != best]


def test_the_block_in_front_of_a_gap_gives_what_those_that_left_gave(model, windows):
    """Its last linear is fitted to it by least squares, and no other weight changes."""
    dense = copied(model)
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        states = dense.model(input_ids=windows, output_hidden_states=True).hidden_states
    x, lacking = inputs_of(dense, name, windows), (states[3] - states[1]).flatten(end_dim=-2)
    gram = x.T @ x / len(x)
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = dense.linears[name].weight.clone()
    expected = weight + torch.linalg.solve(gram + ridge, x.T @ lacking / len(x)).T
    cut, plain = (
        cut_model(copied(model), windows, Structure(layers=(0, 3)), update=update)
        for update in (True, False)
    )
    states, before = (each.model.model.state_dict() for each in (cut, plain))
    reference = dense_reference(model.model, windows)

    torch.testing.assert_close(cut.model.linears[name].weight, expected, rtol=1e-3, atol=1e-4)
    changed = {key for key, weight in before.items() if not torch.equal(weight, states[key])}
    assert changed == {f"{name}.weight"}
    assert divergence(cut, reference) < divergence(plain, reference)


def test_a_bridge_that_brings_nothing_is_left_out(model, windows, monkeypatch):
    def worse(weight, *_, **__):
        return weight + 10

    monkeypatch.setattr("pho_service.pipeline.structured.corrected", worse)
    cut, plain = (
        cut_model(copied(model), windows, Structure(layers=(0, 3)), update=update)
        for update in (True, False)
    )

    assert all(
        torch.equal(p, plain.model.model.state_dict()[n])
        for n, p in cut.model.model.state_dict().items()
    )


def test_costs_are_those_of_each_part_and_of_blocks_left_out(model, windows):
    fisher = {name: torch.rand(x.weight.shape[0]) for name, x in model.linears.items()}
    shapes = block_shapes(Anatomy(model))
    structures = [Structure(dropped=2)]
    costs = cut_costs(model, windows, shapes, fisher, structures)
    block = "model.layers.0.mlp.down_proj"
    x = inputs_of(model, block, windows)
    gram = x.T @ x / len(x)
    order = removal_order(model.linears[block].weight, gram, fisher[block], layer=block)

    torch.testing.assert_close(costs.neurons[0], order.errors / 2, rtol=1e-3, atol=1e-6)
    assert costs.neurons.shape == (4, 33)
    assert costs.query_heads.shape == (4, 5)
    assert costs.divergences[0] == 0 < costs.divergences[1]
    assert len({*costs.gone}) == 2
    assert [*costs.kept(2)] == layers_to_keep(Anatomy(model), windows, 2)
    cheap = [Structure(neurons=31), *structures]
    assert cut_costs(model, windows, shapes, fisher, cheap).gone == ()  # one block costs more
    assert cut_costs(model, windows, shapes, fisher, cheap, wanted=2).gone == costs.gone
    narrow, shallow = Structure(neurons=16), Structure(neurons=16, dropped=1)
    rows = [*costs.kept(1)]
    assert costs.of(narrow, shapes) == pytest.approx(float(costs.neurons[:, 16].sum()))
    assert costs.of(shallow, shapes) == pytest.approx(
        costs.divergences[1] + float(costs.neurons[rows, 16].sum())
    )


def test_what_does_not_fit_changes_nothing(model, windows):
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    for structure, message in (
        (Structure(dropped=4), "leaves none of the 4 blocks"),
        (Structure(layers=(1, 4)), "has 4 blocks"),
        (Structure(neurons=15, dropped=1), "multiple of 2"),
        (Structure(query_heads=3, layers=(0,)), "Give 2, 4"),
    ):
        with pytest.raises(InvalidInput, match=message):
            cut_model(model, windows, structure)

    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_activations_that_overflow_are_said_with_their_layer(model, windows):
    broken = replace(model)
    broken.linears["model.layers.1.mlp.up_proj"].weight.fill_(3e38)
    with pytest.raises(NumericalError, match="activations"):
        cut_model(broken, windows, Structure(neurons=16))


@pytest.mark.thorough
def test_on_a_gpu_as_on_a_cpu(model, windows, pretended_gpu):
    structure = Structure(neurons=16, query_heads=2, dropped=1)
    expected = cut_model(copied(model), windows, structure)
    cut = cut_model(given_model(model.model.to(pretended_gpu.device)), windows, structure)

    assert (cut.layers, cut.neurons) == (expected.layers, expected.neurons)
    assert cut.query_heads == expected.query_heads
    assert cut.model.device.type == "cuda"
