"""
Every family of models that is supported, as a tiny random instance of its own code.

The references know nothing of the code under test: names written down by hand,
hooks of the test's own, and mixtures of experts computed token by token.
"""

import copy
import weakref
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import pho_service as pho
from pho_service.errors import ModelError
from pho_service.models.architecture import decoder_blocks, footprint_of, prunable_linears
from pho_service.pruning.masks import linear_masks, pruned
from pho_service.pruning.perplexity import frozen, rate_perplexity, recomputed, run_backward
from pho_service.pruning.statistics import gather
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MATRICES = ["gate_proj", "up_proj", "down_proj"]
LLAMA = [*ATTENTION, *(f"mlp.{matrix}" for matrix in MATRICES)]
OPT = [*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2"]
FALCON = [
    "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
]  # fmt: skip
EXPERTS = [f"mlp.experts.{expert}.{matrix}" for expert in range(4) for matrix in MATRICES]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LATENT_ATTENTION = [f"self_attn.{matrix}" for matrix in LATENT]

# Of each family: where the blocks are, and what is in each of the two.
BLOCKS = {
    "opt": ("model.decoder.layers", OPT, OPT),
    "opt-350m": ("model.decoder.layers", OPT, OPT),
    "gpt-2": ("transformer.h", *2 * [["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]]),
    "gpt-neox": (
        "gpt_neox.layers",
        *2 * [[name.replace("self_attention", "attention") for name in FALCON]],
    ),
    "gemma-3-vision": ("model.language_model.layers", LLAMA, LLAMA),
    "phi": ("model.layers", *2 * [[*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"]]),
    "phi-3": (
        "model.layers",
        *2 * [["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]],
    ),
    "falcon-7b": ("transformer.h", FALCON, FALCON),
    "falcon-40b": ("transformer.h", FALCON, FALCON),
    "falcon-rw": ("transformer.h", FALCON, FALCON),
    "mixtral": ("model.layers", *2 * [[*ATTENTION, *EXPERTS]]),
    "qwen-2-moe": (
        "model.layers",
        *2 * [[*ATTENTION, *EXPERTS, *(f"mlp.shared_expert.{matrix}" for matrix in MATRICES)]],
    ),
    "qwen-3-moe": ("model.layers", *2 * [[*ATTENTION, *EXPERTS]]),
    "deepseek-v3": (
        "model.layers",
        [*LATENT_ATTENTION, *(f"mlp.{matrix}" for matrix in MATRICES)],
        [*LATENT_ATTENTION, *EXPERTS, *(f"mlp.shared_experts.{matrix}" for matrix in MATRICES)],
    ),
}
DENSE_IN_BLOCKS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")

CREPE = Coefficients(row=1, column=0.7, neighbourhood=0.4, gradient_exponent=0.5)


def losses(logits, window):
    """(tokens - 1,), float64: the negative log-likelihood of each token but the first."""
    logits = logits[0, :-1].double()
    return logits.logsumexp(dim=-1) - logits[torch.arange(len(logits)), window[1:]]


def expert_loop(experts, hidden, index, weights, seen, name):
    """The output of fused experts, a token and an expert at a time; each matrix is recorded."""
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for rank, expert in enumerate(index[token].tolist()):
            gate, up = experts.gate_up_proj[expert].chunk(2)  # (intermediate, hidden) each
            x = hidden[token]
            a, b = gate @ x, up @ x
            inner = experts.act_fn(a) * b
            y = experts.down_proj[expert] @ inner
            for matrix, pair in zip(MATRICES, [(x, a), (x, b), (inner, y)], strict=True):
                seen[f"{name}.{expert}.{matrix}"].append(pair)
            total = total + weights[token, rank] * y
        rows.append(total)
    return torch.stack(rows)


def watched(network, window):
    """
    Logits of a model whose experts are fused, and what each matrix read and said.

    Returns:
        The logits, and (input, output) pairs by the matrix's name, (..., features) each.
    """
    seen = defaultdict(list)
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, name=name: seen[name].append((args[0], output))
                )
            )
        elif name.endswith(".experts"):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, _, name=name: expert_loop(module, *args, seen, name)
                )
            )
    logits = network(input_ids=window[None], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def reference_statistics(network, windows, fisher_windows):
    """Sums over all tokens of x², x xᵀ; mean of (dL/dy)² over those that a matrix got; float64."""
    squares = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    products = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    gradients = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    reached = defaultdict(int)
    for number, window in enumerate(windows):
        logits, seen = watched(network, window)
        for name, pairs in seen.items():
            for x, _ in pairs:
                flat = x.detach().double().reshape(-1, x.shape[-1])
                squares[name] = squares[name] + flat.square().sum(dim=0)
                products[name] = products[name] + flat.T @ flat
        if number >= fisher_windows:
            continue
        outputs = [(name, y) for name, pairs in seen.items() for _, y in pairs]
        grads = torch.autograd.grad(
            losses(logits, window).sum(), [y for _, y in outputs], allow_unused=True
        )
        for (name, _), grad in zip(outputs, grads, strict=True):
            if grad is not None:  # the head's
                flat = grad.double().reshape(-1, grad.shape[-1])
                gradients[name] = gradients[name] + flat.square().sum(dim=0)
                reached[name] += len(flat)
    fisher = {name: gradients[name] / reached[name] for name in reached}
    return squares, products, fisher


def gathered(network, windows):
    return gather(
        network, prunable_linears(network), windows, fisher_windows=3, projection_rows=0, seed=0
    ).statistics(windows)


def test_linears(network, family):
    """Exactly the matrices of the blocks are prunable; routers and gates of one row are not."""
    place, *contents = BLOCKS.get(family, ("model.layers", LLAMA, LLAMA))
    names = {f"{place}.{i}.{name}" for i, block in enumerate(contents) for name in block}
    in_blocks = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if name.startswith(place) and parameter.dim() > 1 and not name.endswith(DENSE_IN_BLOCKS)
    )
    linears = prunable_linears(network)

    assert [name for name, _ in decoder_blocks(network)] == [f"{place}.0", f"{place}.1"]
    assert set(linears) == names
    assert all(linear.name == name for name, linear in linears.items())
    assert sum(linear.weight.numel() for linear in linears.values()) == in_blocks


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_without_weights_is_refused_by_its_name():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=0, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"mlp\.gate_proj has no weights: its shape is \(0, 8\)"):
        prunable_linears(LlamaForCausalLM(config))


def test_statistics(network, windows):
    """Norms, second moments and Fisher weights are those of the test's own hooks and autograd."""
    squares, products, fishers = reference_statistics(copy.deepcopy(network), windows, 3)
    statistics = gathered(network, windows)

    for name in prunable_linears(network):
        root = statistics.inputs[statistics.input_of[name]].root.double()
        norm = statistics.activation_norm(name).double()
        gram = products[name] / windows.numel()
        fisher = fishers[name]
        close = {"rtol": 1e-3, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(norm, (squares[name] / 4).sqrt(), atol=1e-6, **close)
        torch.testing.assert_close(root.T @ root, gram, atol=1e-5 * float(gram.max()), **close)
        torch.testing.assert_close(
            statistics.fisher[name].double(), fisher, atol=1e-6 * float(fisher.max()), **close
        )


class _TensorBytes(TorchDispatchMode):
    """The most bytes that the results of operations take together while it is entered."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_more_is_estimated_than_is_taken(network, *, recompute):
    tokens = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))
    footprint = footprint_of(network)
    blocks = [block for _, block in decoder_blocks(network)]
    running_again = recomputed(blocks if recompute else (), nullcontext)
    with frozen(network), running_again, _TensorBytes() as taken:
        run_backward(network, tokens)

    weights = {p.untyped_storage()._cdata: p.nbytes for p in network.parameters()}
    seen = sum(size for key, size in weights.items() if key in taken.sizes)
    assert 0 < taken.peak - seen < footprint.backward(30, 2, recompute=recompute)


def test_recompute(network, windows):
    """Blocks that run again in the backward pass change no bit, nor do they stay changed."""
    expected = gathered(network, windows)
    actual = gather(
        network, prunable_linears(network), windows, fisher_windows=3, projection_rows=0, seed=0,
        recompute=[block for _, block in decoder_blocks(network)],
    ).statistics(windows)  # fmt: skip

    for a, b in zip(actual.inputs, expected.inputs, strict=True):
        assert torch.equal(a.root, b.root)
    for name, fisher in expected.fisher.items():
        assert torch.equal(actual.fisher[name], fisher)
    assert not any("forward" in vars(block) for _, block in decoder_blocks(network))


def test_windows_at_once_give_the_same(network, windows):
    arguments = {"fisher_windows": 3, "projection_rows": 5, "seed": 0}
    linears = prunable_linears(network)
    expected = gather(network, linears, windows, **arguments).statistics(windows)
    actual = gather(network, linears, windows, **arguments, batch_windows=2).statistics(windows)

    for name in linears:
        a, b = (s.inputs[s.input_of[name]] for s in (actual, expected))
        close = {"rtol": 1e-3, "atol": 1e-5 * float(b.root.abs().max())}
        torch.testing.assert_close(a.root, b.root, **close)
        torch.testing.assert_close(a.activation_norm, b.activation_norm, rtol=1e-4, atol=1e-6)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(
            actual.fisher[name], fisher, rtol=1e-3, atol=1e-6 * float(fisher.max())
        )


def test_perplexity(network, windows):
    """Perplexity is exp of the mean loss, taken from the logits before anything was unfused."""
    with torch.no_grad():
        each = torch.cat([losses(watched(network, window)[0], window) for window in windows])
    prunable_linears(network)
    rated = rate_perplexity(network, windows)

    assert rated.tokens == len(each) == 4 * 19
    assert rated.perplexity == pytest.approx(float(each.mean().exp()), rel=1e-5)


def test_round_trip(network, windows, tmp_path):
    """A pruned model that is saved and loaded has the same files, weights and zeros."""
    network.save_pretrained(tmp_path / "dense")
    linears, statistics = prunable_linears(network), gathered(network, windows)
    candidate = Candidate(method="crepe", coefficients=CREPE, pattern=Pattern.parse("2:4"))
    masks = {n: m.keep for n, m in linear_masks(linears, statistics, candidate)}
    with pruned(linears, iter(masks.items())):
        network.save_pretrained(tmp_path / "pruned")
        expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    dense, sparse = (
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (tmp_path / "dense", tmp_path / "pruned")
    )

    assert sparse == dense
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    for name, linear in prunable_linears(loaded).items():
        assert torch.equal(linear.weight != 0, masks[name])


def test_in_memory_from_the_calibration_to_a_folder_that_can_be_loaded(
    network, windows, model_folder, tmp_path
):
    bundle = pho.calibrate(network, None, windows[:2], rows_per_layer=2, kernel_sizes=(3,))
    found = pho.search(
        bundle, "0.5", preset="crepe", model=network, confirm=windows[2:], trials=6, finalists=1
    )
    pruned = pho.prune(network, found, bundle)
    pho.save(network, AutoTokenizer.from_pretrained(model_folder), pruned, tmp_path / "pruned")
    loaded = pho.load_model(str(tmp_path / "pruned"))

    assert found.perplexities is not None
    assert pruned.sparsity == pytest.approx(0.5, abs=0.02)
    with torch.no_grad():
        assert torch.equal(loaded.model(windows).logits, network(windows).logits)
