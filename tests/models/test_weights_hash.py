"""A model's hash is that of its weights, however they are stored, and by however many threads."""

import hashlib

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from pho_service.models import loading
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import sha256_each, weights_sha256


def mixtral():
    """A bfloat16 Mixtral whose weights count up, in the order of their names."""
    config = MixtralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).bfloat16().eval()
    for _, parameter in sorted(model.named_parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32) / parameter.numel()
        parameter.data = values.view(parameter.shape).bfloat16()
    return model


def expected(tensors):
    lines = b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().contiguous().view(torch.int16).numpy().tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        lines += f"{name} {tuple(tensor.shape)} torch.bfloat16 {digest}\n".encode()
    return hashlib.sha256(lines).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_hash_is_that_of_the_tensors_hashes_each_experts_matrices_apart(threads):
    model = mixtral()
    prunable_linears(model)
    tensors = dict(model.named_parameters())
    experts = "model.layers.0.mlp.experts"
    both, down = (tensors.pop(f"{experts}.{name}") for name in ("gate_up_proj", "down_proj"))
    for index in range(3):
        tensors[f"{experts}.{index}.gate_proj.weight"] = both[index, :12]
        tensors[f"{experts}.{index}.up_proj.weight"] = both[index, 12:]
        tensors[f"{experts}.{index}.down_proj.weight"] = down[index]

    assert weights_sha256(model, threads=threads) == expected(tensors)


def test_a_bit_a_name_a_shape_or_a_dtype_is_another_hash_a_shared_tensor_is_one():
    base = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(2, 4)})
    found = {weights_sha256(base)}
    with torch.no_grad():
        base["a"].weight[1, 3] += 1e-6
    found.add(weights_sha256(base))
    found.add(weights_sha256(nn.ModuleDict({"a": base["a"], "c": base["b"]})))
    base["a"].weight.data = base["a"].weight.data.view(4, 2)
    found.add(weights_sha256(base))
    base["a"].weight.data = base["a"].weight.data.view(torch.int32).view(torch.float32)
    same = weights_sha256(base)
    found.add(weights_sha256(base.bfloat16()))
    tied = nn.ModuleDict({"a": base["a"], "z": base["a"], "b": base["b"]})

    assert len(found) == 5
    assert same in found
    assert weights_sha256(tied) == weights_sha256(base)


def test_on_a_gpu(pretended_gpu, monkeypatch):
    """A GPU's weights come in pieces of bounded size, and give the hash that the CPU's give."""
    monkeypatch.setattr(loading, "PIECE", 1000)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config).half()
    weights = [linear.weight for linear in prunable_linears(model).values()]  # transposed
    before, each = weights_sha256(model), list(sha256_each(weights))
    model.to("cuda")  # transformers hides the signature
    allocated = pretended_gpu.allocated
    pretended_gpu.reset_peak()
    on_gpu = [linear.weight for linear in prunable_linears(model).values()]

    assert all(weight.device == pretended_gpu.device for weight in on_gpu)
    assert weights_sha256(model) == before
    assert pretended_gpu.peak == allocated
    assert list(sha256_each(on_gpu)) == each


def test_stored_bfloat16_loaded_as_float32_hashed_as_bfloat16_it_is_the_same_and_so_back():
    stored = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    loaded = torch.nn.Linear(5, 3)
    loaded.load_state_dict(stored.state_dict())

    assert weights_sha256(loaded) != weights_sha256(stored)
    assert weights_sha256(loaded, dtype=torch.bfloat16) == weights_sha256(stored)
    assert weights_sha256(stored, dtype=torch.float32) == weights_sha256(loaded)
