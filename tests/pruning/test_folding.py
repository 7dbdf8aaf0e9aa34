"""Hidden channels move only where the module provably computes the same."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
)

from pho_service.models.architecture import prunable_linears
from pho_service.pruning.permutation import (
    find_writers,
    fold_order,
    permute_channels,
    permuted_mask,
)
from pho_service.pruning.selection import nm_mask
from pho_service.pruning.statistics import PrunableLinear

MLP = "model.layers.0.mlp"


def random_order(width, seed=0):
    """(width,), int64: a permutation that is not the identity."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def made(config):
    """A random model with random biases: transformers starts them at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data = torch.randn(parameter.shape)
    return model


def logits(model, windows):
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits


def test_gated_mlp(tiny_llama, linears, windows):
    """Rows of gate and up and columns of down move, and no others; the model says the same."""
    reader, order = linears[f"{MLP}.down_proj"], random_order(64)
    before, said = copy_of(tiny_llama), logits(tiny_llama, windows)
    parameters = {name: id(p) for name, p in tiny_llama.named_parameters()}
    names = fold_order(tiny_llama, reader, linears, order)

    assert names == [f"{MLP}.gate_proj", f"{MLP}.up_proj"]
    assert torch.equal(reader.weight, before[f"{MLP}.down_proj.weight"][:, order])
    for name in names:
        assert torch.equal(linears[name].weight, before[f"{name}.weight"][order])
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith(f"{MLP}."))
    assert torch.allclose(logits(tiny_llama, windows), said, atol=1e-4)
    assert {name: id(p) for name, p in tiny_llama.named_parameters()} == parameters


def test_a_transposed_writer_moves_with_its_bias_the_readers_bias_stays(windows):
    gpt2 = made(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=256, n_positions=32, initializer_range=0.2
        )
    )
    linears, order = prunable_linears(gpt2), random_order(128)
    writer, reader = (f"transformer.h.1.mlp.{name}" for name in ("c_fc", "c_proj"))
    before, said = copy_of(gpt2), logits(gpt2, windows)
    names = fold_order(gpt2, linears[reader], linears, order)
    after = copy_of(gpt2)

    assert names == [writer]
    assert torch.equal(after[f"{writer}.weight"], before[f"{writer}.weight"][:, order])
    assert torch.equal(after[f"{writer}.bias"], before[f"{writer}.bias"][order])
    assert torch.equal(after[f"{reader}.weight"], before[f"{reader}.weight"][order])
    assert torch.equal(after[f"{reader}.bias"], before[f"{reader}.bias"])
    assert torch.allclose(logits(gpt2, windows), said, atol=1e-3)


def test_one_experts_channels_move_all_others_stay(windows):
    model = made(MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
    ))  # fmt: skip
    linears, said = prunable_linears(model), logits(model, windows)
    experts, order = "model.layers.0.mlp.experts", random_order(24)
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    names = fold_order(model, linears[f"{experts}.1.down_proj"], linears, order)

    assert names == [f"{experts}.1.gate_proj", f"{experts}.1.up_proj"]
    for name, linear in linears.items():
        moved = name.startswith(f"{experts}.1.")
        weight = before[name][:, order] if name.endswith("down_proj") else before[name]
        expected = weight if name.endswith("down_proj") or not moved else before[name][order]
        assert torch.equal(linear.weight, expected if moved else before[name])
    assert torch.allclose(logits(model, windows), said, atol=1e-4)


def test_the_parent_may_be_a_whole_block_as_long_as_it_runs_on_one_tensor(windows):
    opt = made(OPTConfig(
        vocab_size=256, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2,
    ))  # fmt: skip
    linears = prunable_linears(opt)
    said = logits(opt, windows)
    reader = linears["model.decoder.layers.0.fc2"]
    names = fold_order(opt, reader, linears, random_order(64))

    assert names == ["model.decoder.layers.0.fc1"]
    assert torch.allclose(logits(opt, windows), said, atol=1e-3)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "self_attn.q_proj", "mlp.gate_proj"])
def test_inputs_that_cannot_move(tiny_llama, linears, name):
    """Attention and the block's own input are left alone, to the bit."""
    before = copy_of(tiny_llama)
    reader = linears[f"model.layers.0.{name}"]

    assert fold_order(tiny_llama, reader, linears, random_order(32)) == []
    del linears[f"{MLP}.up_proj"]  # a writer that is not known
    assert fold_order(tiny_llama, linears[f"{MLP}.down_proj"], linears, random_order(64)) == []
    assert is_unchanged(tiny_llama, before)


class Attention(nn.Module):
    """Two heads over one tensor, as an attention that can be called."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens):
        heads = [
            layer(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def linears_of(model):
    return {
        name: PrunableLinear(name=name, module=module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_a_module_that_computes_something_else_afterwards_is_put_in_no_new_order():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"block": Attention()})
    linears, before = linears_of(model), copy_of(model)
    reader = linears["block.out"]
    order = torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])  # the smallest change there is

    assert find_writers(model, reader, linears)
    assert fold_order(model, reader, linears, order) == []
    assert is_unchanged(model, before)


def test_folding_makes_it_plain_n_m_in_bfloat16_too(tiny_llama):
    model = tiny_llama.to(torch.bfloat16)
    linears = prunable_linears(model)
    reader = linears[f"{MLP}.down_proj"]
    score = reader.weight.float().abs()
    order = permute_channels(score, keep=2, group=4)
    mask = permuted_mask(score, order, keep=2, group=4)
    names = fold_order(model, reader, linears, order)

    assert len(names) == 2
    assert reader.weight.dtype == torch.bfloat16
    assert torch.equal(nm_mask(reader.weight.float().abs(), keep=2, group=4), mask[:, order])
    assert not torch.equal(order, torch.arange(64))
