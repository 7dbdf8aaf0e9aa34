"""Block by block a model gives what it gives as a whole, whatever its family."""

from collections import UserDict
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pho_service.errors import ModelError, NumericalError, OutputError
from pho_service.models import blockwise
from pho_service.models.architecture import decoder_blocks, prunable_linears
from pho_service.models.blockwise import (
    collect_statistics_blockwise,
    dense_afterwards,
    measure_perplexity,
    rate_perplexity_blockwise,
    told_by_block,
    walk,
)
from pho_service.models.loading import LanguageModel
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.statistics import gather


def language_model(network):
    return LanguageModel(
        name="it", revision=None, model=network, tokenizer=None, stored_dtype=torch.float32,
        linears=prunable_linears(network),
    )  # fmt: skip


@pytest.fixture
def model(network):
    return language_model(network)


@pytest.fixture
def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, dtype=torch.float32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return language_model(LlamaForCausalLM(config).eval())


@contextmanager
def seen_by(modules):
    """The first arguments of modules' calls, by name."""
    seen = {name: [] for name in modules}

    def see(name, args, kwargs):
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


def whole_inputs(model, windows, modules):
    with seen_by(modules) as seen, torch.no_grad():
        for window in windows:
            model.model(input_ids=window[None], use_cache=False)
    return seen


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_same_statistics(actual, expected):
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


def test_statistics_are_those_of_the_whole_model_inputs_groups_projections_and_gradients(
    model, family, windows
):
    # not of mixtures: experts that the first window does not reach get other random numbers
    mixture = family.endswith("moe") or family in ("mixtral", "deepseek-v3")
    for projection_rows in (0,) if mixture else (0, 7):
        arguments = {
            "fisher_windows": 3, "projection_rows": projection_rows, "seed": 5,
        }  # fmt: skip
        expected = gather(model.model, model.linears, windows, **arguments).statistics(windows)
        actual = collect_statistics_blockwise(model, windows, **arguments)

        assert_same_statistics(actual, expected)


def test_the_perplexity_is_that_of_the_whole_model(model, windows):
    expected = rate_perplexity(model.model, windows)
    actual = rate_perplexity_blockwise(model, windows)

    assert actual.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert (actual.tokens, actual.windows) == (expected.tokens, expected.windows)


def test_a_block_sees_what_the_changed_blocks_before_it_give(model, windows):
    blocks = dict(decoder_blocks(model.model))
    (first, *_), expected = blocks, whole_inputs(model, windows, blocks)
    inputs = {}
    for block in walk(model, windows):
        inputs[block.name] = list(block.inputs)
        for linear in block.linears.values():
            linear.weight[:, ::2] = 0
    changed = whole_inputs(model, windows, blocks)

    assert list(inputs) == list(blocks)
    assert all(int((linear.weight == 0).sum()) for linear in model.linears.values())
    for name, states in {**changed, first: expected[first]}.items():
        for a, b in zip(inputs[name], states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt-2", "mixtral"])
def test_moments_are_sums_over_the_tokens_that_a_hook_on_each_linear_sees(model, windows):
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


@pytest.mark.parametrize("family", ["mixtral"])
def test_an_expert_that_no_token_is_routed_to_has_moments_of_zeros_in_the_shape_of_its_inputs(
    model, windows
):
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


def plain(model):
    return not any(
        "forward" in vars(module) or module._forward_hooks for module in model.model.modules()
    )


def test_body_runs_the_whole_model_and_moments_are_of_the_block_as_it_now_is(llama, windows):
    expected = rate_perplexity(llama.model, windows)
    for _ in walk(llama, windows):
        assert plain(llama)
        assert rate_perplexity(llama.model, windows) == expected
    for block in walk(llama, windows):
        block.linears[f"{block.name}.self_attn.v_proj"].weight.zero_()
        moments, input_of = block.moments()
        assert not moments[input_of[f"{block.name}.self_attn.o_proj"]].gram.any()
    llama.model.get_parameter("model.layers.0.input_layernorm.weight").data[3] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj"):
        next(walk(llama, windows)).moments()


def fail(_):
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
def test_whatever_is_interrupted_leaves_no_hook_no_forward_no_frozen_weight_and_no_grad_mode(
    llama, windows, run
):
    with pytest.raises(KeyboardInterrupt):
        run(llama, windows)

    assert plain(llama)
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in llama.model.parameters())


def test_a_model_that_fails_behind_its_blocks_gets_their_forwards_back_a_blocks_own_too(
    llama, windows, monkeypatch
):
    block = decoder_blocks(llama.model)[1][1]
    own = block.forward
    block.forward = own
    list(walk(llama, windows))
    assert vars(block).pop("forward") is own
    monkeypatch.setattr(llama.model.model.norm, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(walk(llama, windows))

    assert not any("forward" in vars(block) for _, block in decoder_blocks(llama.model))


def test_advance(llama, windows):
    """Steps told are blocks times windows; statistics add the Fisher windows' way back."""
    walked = []
    rated = []
    collected = []
    list(walk(llama, windows, advance=walked.append))
    rate_perplexity_blockwise(llama, windows, advance=rated.append)
    collect_statistics_blockwise(
        llama, windows, fisher_windows=2, projection_rows=4, seed=0, advance=collected.append
    )

    assert sum(walked) == sum(rated) == 3 * 4
    assert sum(collected) == 3 * (4 + 2)


@pytest.mark.parametrize("family", ["gemma-3"])
def test_masks_and_positions_that_all_windows_share_take_the_memory_of_one_window(model, windows):
    calls = blockwise.BlockNetwork(model, windows)._calls
    tensors = set()
    blockwise.map_tensors(calls, lambda t: tensors.add(id(t)) or t)

    # cos, sin and mask for both layer types, and the positions
    assert len(tensors) <= 7


def test_spill(llama, windows, tmp_path):
    """Inputs that are spilled to disk give the same bits, and leave no file behind."""
    arguments = {"fisher_windows": 3, "projection_rows": 0, "seed": 0}
    kept = collect_statistics_blockwise(llama, windows, **arguments)
    spilled = collect_statistics_blockwise(llama, windows, **arguments, spill=tmp_path)

    assert all(torch.equal(kept.fisher[name], spilled.fisher[name]) for name in llama.linears)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"nowhere.*No such file"):
        collect_statistics_blockwise(llama, windows, **arguments, spill=tmp_path / "nowhere")


@pytest.mark.parametrize("family", ["gpt-2", "mixtral"])
def test_weights_changed_in_a_walk_are_put_back_to_the_bit_after_an_error_too(model, windows):
    before = state_of(model)
    with suppress(KeyboardInterrupt), dense_afterwards(model):
        for block in walk(model, windows):
            for linear in block.linears.values():
                linear.weight.zero_()
        raise KeyboardInterrupt

    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def change_between(model):
    """Scale what a block reads, outside of it."""
    block = model.model.model.layers[1]
    block.__class__ = type("Scaling", (type(block),), {
        "__call__": lambda self, hidden, **kwargs: nn.Module.__call__(self, hidden * 2, **kwargs)
    })  # fmt: skip


def skip_a_block(model):
    block = model.model.model.layers[2]
    block.__class__ = type(
        "Skipped", (type(block),), {"__call__": lambda _self, hidden, **_: hidden}
    )


def read_from_afar(model):
    first, _, last = (block for _, block in decoder_blocks(model.model))
    given = []
    first.register_forward_hook(lambda _module, _args, output: given.append(output))
    last.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "residual": given[-1]}), with_kwargs=True
    )


def share_notes(model, *, reads):
    """Give all blocks a mapping that the first one writes to, and that the last one may read."""
    blocks = [block for _, block in decoder_blocks(model.model)]
    base = type(blocks[0])
    notes = UserDict()

    def forward(self, hidden, notes, **kwargs):
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


def test_what_no_later_block_reads_does_not_matter(llama, windows):
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
def test_a_model_that_does_more_than_calling_its_blocks_one_by_one_is_refused_not_approximated(
    llama, windows, change, message
):
    classes = set(llama.model._no_split_modules or ())
    llama.model._no_split_modules = [*classes, "Scaling", "Skipped"]
    change(llama)

    with pytest.raises(ModelError, match=message):
        next(walk(llama, windows))


def test_windows_that_run_through_a_model_are_told_block_by_block(llama):
    tokens = torch.arange(32).view(4, 8)
    forward, both = [], []
    measure_perplexity(llama, tokens, advance=forward.append)
    with told_by_block(llama, both.append) as end:
        gather(
            llama.model, llama.linears, tokens, fisher_windows=2, projection_rows=4, seed=0,
            batch_windows=2, advance=end,
        )  # fmt: skip
    blocks = len(decoder_blocks(llama.model))

    for told in (forward, both):
        assert sum(told) == pytest.approx(len(tokens))
        assert len(told) > blocks
    assert both[:blocks] == pytest.approx([2 / 3 / blocks] * blocks)
    assert not decoder_blocks(llama.model)[0][1]._forward_hooks
