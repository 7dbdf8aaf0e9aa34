"""
Every family of models that is supported, as a tiny random instance of its own code.

The references know nothing of the code under test: names written down by hand,
hooks of the test's own, and mixtures of experts computed token by token.
"""

import copy
import weakref
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from pho_service.models.architecture import decoder_blocks, footprint_of, prunable_linears
from pho_service.pruning.masks import model_masks, pruned
from pho_service.pruning.perplexity import frozen, rate_perplexity, recomputed, run_backward
from pho_service.pruning.statistics import Statistics, collect_statistics
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
GATED = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
WIDE_HEADS = GATED | {"head_dim": 8}  # heads that together are wider than the model
MIXTURE = WIDE_HEADS | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-2": LlamaConfig(**GATED | {"num_key_value_heads": 4}),
    "llama-3": LlamaConfig(
        **GATED,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(**GATED, sliding_window=6),
    "qwen-2": Qwen2Config(**GATED),
    "qwen-3": Qwen3Config(**WIDE_HEADS),
    "gemma-2": Gemma2Config(**WIDE_HEADS, sliding_window=6, query_pre_attn_scalar=8),
    "gemma-3": Gemma3TextConfig(
        **WIDE_HEADS, sliding_window=6, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma-3-vision": Gemma3Config(
        text_config=WIDE_HEADS | {"sliding_window": 6, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "opt": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16),
    "opt-350m": OPTConfig(
        **COMMON, ffn_dim=24, word_embed_proj_dim=12, do_layer_norm_before=False
    ),
    "gpt-2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=24),
    "phi": PhiConfig(**GATED),
    "phi-3": Phi3Config(**GATED),
    "falcon-7b": FalconConfig(**COMMON, multi_query=True, parallel_attn=True),
    "falcon-40b": FalconConfig(**COMMON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": FalconConfig(
        **COMMON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen-2-moe": Qwen2MoeConfig(
        **MIXTURE, decoder_sparse_step=1, shared_expert_intermediate_size=4
    ),
    "qwen-3-moe": Qwen3MoeConfig(**MIXTURE),
    "deepseek-v3": DeepseekV3Config(
        **GATED, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2,
        n_shared_experts=1, moe_intermediate_size=12, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip
# Those whose code differs most; the others are thorough.
FIRST = ("llama-3", "gemma-3", "opt", "gpt-2", "falcon-40b", "phi-3", "mixtral", "deepseek-v3")

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
BLOCKS: dict[str, tuple[str, list[str], list[str]]] = {
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


@pytest.fixture(
    params=[
        name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough)
        for name in CONFIGS
    ]
)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family in turn."""
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """Two random blocks in evaluation mode, biases and norms random as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
            made.get_input_embeddings().weight *= 4  # tokens differ, so no expert is left out
    return made


@pytest.fixture
def windows() -> Tensor:
    """(4, 20), int64."""
    return torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(1))


def losses(logits: Tensor, window: Tensor) -> Tensor:
    """(tokens - 1,), float64: the negative log-likelihood of each token but the first."""
    logits = logits[0, :-1].double()
    return logits.logsumexp(dim=-1) - logits[torch.arange(len(logits)), window[1:]]


def expert_loop(
    experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, seen: dict, name: str
) -> Tensor:
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


def watched(model: PreTrainedModel, window: Tensor) -> tuple[Tensor, dict]:
    """
    Logits of a model whose experts are fused, and what each matrix read and said.

    Returns:
        The logits, and (input, output) pairs by the matrix's name, (..., features) each.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
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
    logits = model(input_ids=window[None], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def reference_statistics(
    model: PreTrainedModel, windows: Tensor, fisher_windows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Sums over all tokens of x², x xᵀ; mean of (dL/dy)² over those that a matrix got; float64."""
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    products: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    gradients: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    reached: dict[str, int] = defaultdict(int)
    for number, window in enumerate(windows):
        logits, seen = watched(model, window)
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


def gathered(model: PreTrainedModel, windows: Tensor) -> Statistics:
    """The code under test, with the full second moments."""
    return collect_statistics(
        model, prunable_linears(model), windows, fisher_windows=3, projection_rows=0, seed=0
    )


def test_blocks(model: PreTrainedModel, family: str) -> None:
    """The blocks are found where the family has them, in their order, and only those."""
    place, *contents = BLOCKS.get(family, ("model.layers", LLAMA, LLAMA))

    assert [name for name, _ in decoder_blocks(model)] == [f"{place}.0", f"{place}.1"]
    assert len(contents) == 2


def test_linears(model: PreTrainedModel, family: str) -> None:
    """Exactly the matrices of the blocks are prunable; routers and gates of one row are not."""
    place, *contents = BLOCKS.get(family, ("model.layers", LLAMA, LLAMA))
    names = {f"{place}.{i}.{name}" for i, block in enumerate(contents) for name in block}
    in_blocks = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(place) and parameter.dim() > 1 and not name.endswith(DENSE_IN_BLOCKS)
    )
    linears = prunable_linears(model)

    assert set(linears) == names
    assert all(linear.name == name for name, linear in linears.items())
    assert sum(linear.weight.numel() for linear in linears.values()) == in_blocks


def test_weights_are_views(model: PreTrainedModel) -> None:
    """Writing to the weights of all linears changes every prunable matrix of the model itself."""
    for linear in prunable_linears(model).values():
        linear.weight.fill_(7)
    left = {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not bool((parameter == 7).all())
    }
    blocks = tuple(name for name, _ in decoder_blocks(model))

    assert all(name.endswith(DENSE_IN_BLOCKS) for name in left if name.startswith(blocks))
    assert any(not name.startswith(blocks) for name in left)  # the embedding


def test_outputs_stay(model: PreTrainedModel, windows: Tensor) -> None:
    """Looking for the linears leaves the logits what they were, experts computed in plain loops."""
    expected, _ = watched(copy.deepcopy(model), windows[0])
    prunable_linears(model)
    with torch.no_grad():
        logits = model(input_ids=windows[:1], use_cache=False).logits

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_statistics(model: PreTrainedModel, windows: Tensor) -> None:
    """Norms, second moments and Fisher weights are those of the test's own hooks and autograd."""
    squares, products, fishers = reference_statistics(copy.deepcopy(model), windows, 3)
    statistics = gathered(model, windows)

    for name in prunable_linears(model):
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

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the operation, and count what is new."""
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
def test_memory_estimate(model: PreTrainedModel, *, recompute: bool) -> None:
    """What is estimated for a forward and a backward pass is more than what they take."""
    tokens = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    footprint = footprint_of(model)
    blocks = [block for _, block in decoder_blocks(model)]
    running_again = recomputed(blocks if recompute else (), nullcontext)
    with frozen(model), running_again, _TensorBytes() as taken:
        run_backward(model, tokens)

    weights = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
    seen = sum(size for key, size in weights.items() if key in taken.sizes)
    assert 0 < taken.peak - seen < footprint.backward(30, 2, recompute=recompute)


def test_recompute(model: PreTrainedModel, windows: Tensor) -> None:
    """Blocks that run again in the backward pass change no bit, nor do they stay changed."""
    expected = gathered(model, windows)
    actual = collect_statistics(
        model, prunable_linears(model), windows, fisher_windows=3, projection_rows=0, seed=0,
        recompute=[block for _, block in decoder_blocks(model)],
    )  # fmt: skip

    for a, b in zip(actual.inputs, expected.inputs, strict=True):
        assert torch.equal(a.root, b.root)
    for name, fisher in expected.fisher.items():
        assert torch.equal(actual.fisher[name], fisher)
    assert not any("forward" in vars(block) for _, block in decoder_blocks(model))


def test_batches(model: PreTrainedModel, windows: Tensor) -> None:
    """Windows that are run at once give the same statistics, but for rounding."""
    arguments = {"fisher_windows": 3, "projection_rows": 5, "seed": 0}
    linears = prunable_linears(model)
    expected = collect_statistics(model, linears, windows, **arguments)
    actual = collect_statistics(model, linears, windows, **arguments, batch_windows=2)

    for name in linears:
        a, b = (s.inputs[s.input_of[name]] for s in (actual, expected))
        close = {"rtol": 1e-3, "atol": 1e-5 * float(b.root.abs().max())}
        torch.testing.assert_close(a.root, b.root, **close)
        torch.testing.assert_close(a.activation_norm, b.activation_norm, rtol=1e-4, atol=1e-6)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(
            actual.fisher[name], fisher, rtol=1e-3, atol=1e-6 * float(fisher.max())
        )


def test_perplexity(model: PreTrainedModel, windows: Tensor) -> None:
    """Perplexity is exp of the mean loss, taken from the logits before anything was unfused."""
    with torch.no_grad():
        each = torch.cat([losses(watched(model, window)[0], window) for window in windows])
    prunable_linears(model)
    rated = rate_perplexity(model, windows)

    assert rated.tokens == len(each) == 4 * 19
    assert rated.perplexity == pytest.approx(float(each.mean().exp()), rel=1e-5)


def test_round_trip(model: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """A pruned model that is saved and loaded has the same files, weights and zeros."""
    model.save_pretrained(tmp_path / "dense")
    linears, statistics = prunable_linears(model), gathered(model, windows)
    candidate = Candidate(method="crepe", coefficients=CREPE, pattern=Pattern.parse("2:4"))
    masks = dict(model_masks(linears, statistics, candidate))
    with pruned(linears, iter(masks.items())):
        model.save_pretrained(tmp_path / "pruned")
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
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
