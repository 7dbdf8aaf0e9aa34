"""Block by block a model gives what it gives as a whole, whatever its family."""

from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from pho_service.errors import InvalidInput, ModelError, NumericalError, OutputError
from pho_service.models import blockwise
from pho_service.models.architecture import decoder_blocks, prunable_linears
from pho_service.models.blockwise import (
    collect_statistics_blockwise,
    dense_afterwards,
    rate_perplexity_blockwise,
    walk,
)
from pho_service.models.loading import LanguageModel
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.statistics import Statistics, collect_statistics

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GQA),
    "mistral": MistralConfig(**GQA, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **GQA,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": Qwen3Config(
        **GQA,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, init_std=0.2),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**SIZES),
    "falcon": FalconConfig(**SIZES, new_decoder_architecture=False),
    "falcon_alibi": FalconConfig(**SIZES, alibi=True, new_decoder_architecture=True),
    "mixtral": MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
FAMILIES = list(CONFIGS)


def language_model(family: str) -> LanguageModel:
    """A random float32 model of a family, with three blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()
    return LanguageModel(
        name=family,
        revision=None,
        model=network,
        tokenizer=None,
        stored_dtype=torch.float32,
        linears=prunable_linears(network),
    )


@pytest.fixture
def windows() -> Tensor:
    """(5, 20), int64: random tokens."""
    return torch.randint(VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> LanguageModel:
    """The random Llama."""
    return language_model("llama")


@contextmanager
def seen_by(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The first arguments of modules' calls, by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name].append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def whole_inputs(
    model: LanguageModel, windows: Tensor, modules: dict[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """What modules read while the model runs as a whole."""
    with seen_by(modules) as seen, torch.no_grad():
        for window in windows:
            model.model(input_ids=window[None], use_cache=False)
    return seen


def state_of(model: LanguageModel) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_same_statistics(actual: Statistics, expected: Statistics) -> None:
    """Equal up to float32 noise, and to the order of the inputs."""
    pairs = {(actual.input_of[name], index) for name, index in expected.input_of.items()}
    assert len(pairs) == len(actual.inputs) == len(expected.inputs)
    for i, j in pairs:
        a, b = actual.inputs[i], expected.inputs[j]
        torch.testing.assert_close(a.activation_norm, b.activation_norm)
        scale = b.root.T @ b.root
        torch.testing.assert_close(a.root.T @ a.root, scale, rtol=1e-4, atol=1e-5)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(
            actual.fisher[name], fisher, rtol=1e-4, atol=1e-6 * float(fisher.max())
        )


@pytest.mark.parametrize(
    ("family", "projection_rows"),
    # not of the mixture: experts that the first window does not reach get other random numbers
    [(family, 0) for family in FAMILIES]
    + [(family, 7) for family in FAMILIES if family != "mixtral"],
)
def test_statistics(family: str, projection_rows: int, windows: Tensor) -> None:
    """Statistics are those of the whole model: inputs, groups, projections and gradients."""
    model = language_model(family)
    arguments: dict[str, Any] = {
        "fisher_windows": 3, "projection_rows": projection_rows, "seed": 5,
    }  # fmt: skip
    expected = collect_statistics(model.model, model.linears, windows, **arguments)
    actual = collect_statistics_blockwise(model, windows, **arguments)

    assert_same_statistics(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_perplexity_is_that_of_the_whole_model(family: str, windows: Tensor) -> None:
    model = language_model(family)
    expected = rate_perplexity(model.model, windows)
    actual = rate_perplexity_blockwise(model, windows)

    assert actual.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert (actual.tokens, actual.windows) == (expected.tokens, expected.windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_unchanged(family: str, windows: Tensor) -> None:
    """A walk that changes nothing sees the hidden states of the dense model, block by block."""
    model = language_model(family)
    expected = whole_inputs(model, windows, dict(decoder_blocks(model.model)))
    before = state_of(model)
    actual = {block.name: list(block.inputs) for block in walk(model, windows)}

    assert list(actual) == list(expected)
    for name, states in expected.items():
        for a, b in zip(actual[name], states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_sees_what_the_changed_blocks_before_it_give(family: str, windows: Tensor) -> None:
    model = language_model(family)
    names = []
    inputs = []
    for block in walk(model, windows):
        names.append(block.name)
        inputs = list(block.inputs)
        for linear in block.linears.values():
            linear.weight[:, ::2] = 0
    expected = whole_inputs(model, windows, dict(decoder_blocks(model.model)))[names[-1]]

    assert all(int((linear.weight == 0).sum()) for linear in model.linears.values())
    for a, b in zip(inputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_moments(family: str, windows: Tensor) -> None:
    """Moments are sums over the tokens that a hook on each linear sees."""
    model = language_model(family)
    modules = {name: linear.module for name, linear in model.linears.items()}
    expected = whole_inputs(model, windows, modules)

    for block in walk(model, windows):
        moments, input_of = block.moments()
        assert set(input_of) == set(block.linears)
        for name, index in input_of.items():
            x = torch.cat([x.flatten(end_dim=-2) for x in expected[name]]).double()
            norm = (x.square().sum(dim=0) / len(windows)).sqrt()
            close = {"rtol": 1e-4, "atol": 1e-5}
            assert moments[index].seen == len(x)
            assert moments[index].gram.dtype == torch.float32
            torch.testing.assert_close(
                moments[index].gram.double(), x.T @ x / windows.numel(), **close
            )
            torch.testing.assert_close(
                moments[index].mean.double(), x.sum(dim=0) / windows.numel(), **close
            )
            torch.testing.assert_close(moments[index].activation_norm.double(), norm, **close)


def test_moments_are_shared(llama: LanguageModel, windows: Tensor) -> None:
    """Linears that read the same tensor share one entry, others do not."""
    for block in walk(llama, windows):
        moments, input_of = block.moments()
        short = {name.rpartition(".")[2]: index for name, index in input_of.items()}

        assert len(moments) == 4
        assert short["q_proj"] == short["k_proj"] == short["v_proj"]
        assert short["gate_proj"] == short["up_proj"]
        assert len({short[n] for n in ("q_proj", "o_proj", "gate_proj", "down_proj")}) == 4


def test_moments_follow_the_weights(llama: LanguageModel, windows: Tensor) -> None:
    """Moments are of the block as it now is: a value projection of zeros leaves o_proj none."""
    for block in walk(llama, windows):
        block.linears[f"{block.name}.self_attn.v_proj"].weight.zero_()
        moments, input_of = block.moments()

        assert not moments[input_of[f"{block.name}.self_attn.o_proj"]].gram.any()


def test_unreached_expert(windows: Tensor) -> None:
    """An expert that no token is routed to has moments of zeros, in the shape of its inputs."""
    model = language_model("mixtral")
    for block in walk(model, windows[:1, :1]):  # one token, two of the four experts
        moments, input_of = block.moments()
        unreached = [name for name, index in input_of.items() if not moments[index].gram.any()]

        assert len(unreached) == 2 * 3
        for name in unreached:
            entry, width = moments[input_of[name]], block.linears[name].weight.shape[1]
            assert entry.gram.shape == (width, width)
            assert entry.seen == 0
            assert torch.equal(entry.mean, torch.zeros(width))
            assert torch.equal(entry.activation_norm, torch.zeros(width))


def test_bad_activations(llama: LanguageModel, windows: Tensor) -> None:
    """Activations that are not finite are refused with a linear's name."""
    llama.model.get_parameter("model.layers.0.input_layernorm.weight").data[3] = torch.nan

    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj"):
        next(walk(llama, windows)).moments()


def plain(model: LanguageModel) -> bool:
    """Whether no forward is replaced and no hook is left."""
    return not any(
        "forward" in vars(module) or module._forward_hooks for module in model.model.modules()
    )


def test_body_runs_the_whole_model(llama: LanguageModel, windows: Tensor) -> None:
    expected = rate_perplexity(llama.model, windows)
    for _ in walk(llama, windows):
        assert plain(llama)
        assert rate_perplexity(llama.model, windows) == expected


def test_error_in_the_body(llama: LanguageModel, windows: Tensor) -> None:
    """After an error in the loop's body the model is itself."""
    expected = rate_perplexity(llama.model, windows)
    with suppress(KeyboardInterrupt):
        for _ in walk(llama, windows):
            raise KeyboardInterrupt

    assert plain(llama)
    assert rate_perplexity(llama.model, windows) == expected


def fail(_: int) -> None:
    """An ``advance`` that is interrupted."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "run",
    [
        lambda model, windows: list(walk(model, windows, advance=fail)),
        lambda model, windows: rate_perplexity_blockwise(model, windows, advance=fail),
        lambda model, windows: collect_statistics_blockwise(
            model, windows, fisher_windows=1, projection_rows=0, seed=0, advance=fail
        ),
    ],
)
def test_interrupted(
    llama: LanguageModel, windows: Tensor, run: Callable[[LanguageModel, Tensor], object]
) -> None:
    """Whatever is interrupted leaves no hook, no forward, no frozen weight and no grad mode."""
    with pytest.raises(KeyboardInterrupt):
        run(llama, windows)

    assert plain(llama)
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in llama.model.parameters())


def test_a_model_that_fails_behind_its_blocks_gets_their_forwards_back(
    llama: LanguageModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.model.model.norm, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(walk(llama, windows))

    assert not any("forward" in vars(block) for _, block in decoder_blocks(llama.model))


def test_own_forward_is_kept(llama: LanguageModel, windows: Tensor) -> None:
    """A forward that someone gave to a single block comes back."""
    block: Any = decoder_blocks(llama.model)[1][1]
    own = block.forward
    block.forward = own
    list(walk(llama, windows))

    assert vars(block)["forward"] is own


def test_advance(llama: LanguageModel, windows: Tensor) -> None:
    """Steps told are blocks times windows; statistics add the Fisher windows' way back."""
    steps: list[int] = []
    list(walk(llama, windows, advance=steps.append))
    assert sum(steps) == 3 * 5
    steps.clear()
    rate_perplexity_blockwise(llama, windows, advance=steps.append)
    assert sum(steps) == 3 * 5
    steps.clear()
    collect_statistics_blockwise(
        llama, windows, fisher_windows=2, projection_rows=4, seed=0, advance=steps.append
    )
    assert sum(steps) == 3 * (5 + 2)


def test_arguments_are_kept_once(windows: Tensor) -> None:
    """Masks and position embeddings that all windows share take the memory of one window."""
    network = blockwise.BlockNetwork(language_model("gemma3"), windows)
    tensors: set[int] = set()
    blockwise.map_tensors(network._calls, lambda t: tensors.add(id(t)) or t)

    # cos, sin and mask for both layer types, and the positions
    assert len(tensors) <= 7


def test_spill(llama: LanguageModel, windows: Tensor, tmp_path: Path) -> None:
    """Inputs that are spilled to disk give the same bits, and leave no file behind."""
    arguments: dict[str, Any] = {"fisher_windows": 3, "projection_rows": 0, "seed": 0}
    kept = collect_statistics_blockwise(llama, windows, **arguments)
    spilled = collect_statistics_blockwise(llama, windows, **arguments, spill=tmp_path)

    assert all(torch.equal(kept.fisher[name], spilled.fisher[name]) for name in llama.linears)
    assert not list(tmp_path.iterdir())


def test_spill_folder_is_missing(llama: LanguageModel, windows: Tensor, tmp_path: Path) -> None:
    """A folder that cannot be written is named."""
    with pytest.raises(OutputError, match=r"nowhere.*No such file"):
        collect_statistics_blockwise(
            llama, windows, fisher_windows=1, projection_rows=0, seed=0, spill=tmp_path / "nowhere"
        )


@pytest.mark.parametrize("count", [0, 6])
def test_fisher_windows(llama: LanguageModel, windows: Tensor, count: int) -> None:
    """Fisher windows are some of the windows."""
    with pytest.raises(InvalidInput, match=f"fisher_windows={count}"):
        collect_statistics_blockwise(
            llama, windows, fisher_windows=count, projection_rows=0, seed=0
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_dense_afterwards(family: str, windows: Tensor) -> None:
    """Weights changed in a walk, or by hand, are put back to the bit, after an error too."""
    model = language_model(family)
    before = state_of(model)
    with suppress(KeyboardInterrupt), dense_afterwards(model):
        for block in walk(model, windows):
            for linear in block.linears.values():
                linear.weight.zero_()
        raise KeyboardInterrupt

    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def change_between(model: LanguageModel) -> None:
    """Scale what a block reads, outside of it."""
    block: Any = model.model.model.layers[1]
    block.__class__ = type("Scaling", (type(block),), {
        "__call__": lambda self, hidden, **kwargs: nn.Module.__call__(self, hidden * 2, **kwargs)
    })  # fmt: skip


def skip_a_block(model: LanguageModel) -> None:
    """Call one block less."""
    block: Any = model.model.model.layers[2]
    block.__class__ = type(
        "Skipped", (type(block),), {"__call__": lambda _self, hidden, **_: hidden}
    )


def read_from_afar(model: LanguageModel) -> None:
    """Give the last block what the first one gave, too."""
    first, _, last = (block for _, block in decoder_blocks(model.model))
    given: list[Tensor] = []
    first.register_forward_hook(lambda _module, _args, output: given.append(output))
    last.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "residual": given[-1]}), with_kwargs=True
    )


def share_notes(model: LanguageModel, *, reads: bool) -> None:
    """Give all blocks a mapping that the first one writes to, and that the last one may read."""
    blocks: list[Any] = [block for _, block in decoder_blocks(model.model)]
    base = type(blocks[0])
    notes: UserDict[str, Tensor] = UserDict()

    def forward(self: Any, hidden: Tensor, notes: UserDict[str, Tensor], **kwargs: Any) -> Tensor:
        if self is blocks[0]:
            notes["hidden"] = hidden
        if self is blocks[-1] and reads:
            hidden = hidden + notes["hidden"]
        return base.forward(self, hidden, **kwargs)

    for block in blocks:
        block.__class__ = type("Noting", (base,), {"forward": forward})
        block.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "notes": notes}), with_kwargs=True
        )
    model.model._no_split_modules = ["Noting"]


def test_unread_notes(llama: LanguageModel, windows: Tensor) -> None:
    """What a block leaves for later ones does not matter if none reads it."""
    expected = rate_perplexity(llama.model, windows).perplexity
    share_notes(llama, reads=False)

    assert rate_perplexity_blockwise(llama, windows).perplexity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_between, r"layers\.1 does not read just what the block before it gives"),
        (skip_a_block, r"layers\.2 is not called"),
        (partial(share_notes, reads=True), r"layers\.2 reads more than what the block before"),
        (read_from_afar, r"layers\.2 reads more than what the block before it gives"),
    ],
)
def test_refused(
    llama: LanguageModel, windows: Tensor, change: Callable[[LanguageModel], None], message: str
) -> None:
    """A model that does more than calling its blocks one by one is refused, not approximated."""
    classes = set(llama.model._no_split_modules or ())
    llama.model._no_split_modules = [*classes, "Scaling", "Skipped"]
    change(llama)

    with pytest.raises(ModelError, match=message):
        next(walk(llama, windows))
