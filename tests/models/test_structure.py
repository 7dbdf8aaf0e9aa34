"""A cut model computes what the dense one does with zeros, and is one that transformers loads."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
)

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import given_model, load_model
from pho_service.models.structure import (
    Anatomy,
    as_cut,
    block_shapes,
    cut_,
    keep_layers_,
    take_sizes_,
)

# What cannot be cut, and what is said of it.
NEURONS = {
    "phi-3": "0 linears whose input channels",
    "mixtral": "mixture of experts, whose neurons are not cut",
    "qwen-2-moe": "mixture of experts",
    "qwen-3-moe": "mixture of experts",
    "deepseek-v3": "mixture of experts",
}
FUSED = "no attention whose heads can be cut"
HEADS = dict.fromkeys(
    ("gpt-2", "gpt-neox", "phi-3", "falcon-7b", "falcon-40b", "falcon-rw", "deepseek-v3"), FUSED
) | dict.fromkeys(("opt", "opt-350m"), "its configuration cannot")
KEPT = torch.tensor([1, 2])  # of four query heads, one of each key


@pytest.fixture
def model(network):
    """A model of each family in float64, in which sums in another order show nothing."""
    given = given_model(network)
    network.double()
    return replace(given, stored_dtype=torch.float64)


def logits(network, windows):
    with torch.no_grad():
        return network(input_ids=windows, use_cache=False).logits


def zeroed(network, part, kept):
    """Set the columns that the reader would lose to zero."""
    gone = torch.ones(part.count * part.group, dtype=torch.bool)
    gone[part.columns(kept)] = False
    prunable_linears(network)[part.reader.name].weight[:, gone] = 0


def is_ordinary(network, windows, folder):
    """Save and load with transformers alone: the same logits, and a cache that changes nothing."""
    said = logits(network, windows)
    network.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prunable_linears(loaded)  # torch multiplies fused experts in no float64
    assert torch.equal(logits(loaded.eval(), windows), said)
    for model in (network, loaded):
        written = model.generate(windows[:1, :6], max_new_tokens=3, do_sample=False)
        again = model.generate(windows[:1, :6], max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(written, again)


def cut_all(model, find, kept, **sizes):
    """Cut the part that ``find`` gives of each block; the dense model with zeros instead."""
    anatomy, masked = Anatomy(model), copy.deepcopy(model.model)
    twin = anatomy.resized(**{"neurons": None, "query_heads": None, **sizes})
    for block in anatomy.blocks:
        part = find(anatomy, block)
        zeroed(masked, part, kept)
        cut_(model.model, twin, part, kept)
    take_sizes_(model.model, twin)
    return masked


def test_neurons(model, family, windows, tmp_path):
    if family in NEURONS:
        with pytest.raises(ModelError, match=NEURONS[family]):
            Anatomy(model).resized(12, None)
        return
    part = Anatomy(model).neurons(next(iter(Anatomy(model).blocks)))
    kept = torch.arange(1, part.count, 2)
    masked = cut_all(model, Anatomy.neurons, kept, neurons=len(kept))

    assert part.weights == sum(w.weight.shape[1] for w in part.writers) + 16
    torch.testing.assert_close(logits(model.model, windows), logits(masked, windows))
    is_ordinary(model.model, windows, tmp_path)


def test_query_heads(model, family, windows, tmp_path):
    if family in HEADS:
        with pytest.raises(ModelError, match=HEADS[family]):
            Anatomy(model).resized(None, 2)
        return
    masked = cut_all(model, Anatomy.query_heads, KEPT, query_heads=2)
    config = model.model.config.get_text_config()

    assert config.num_attention_heads == 2
    torch.testing.assert_close(logits(model.model, windows), logits(masked, windows))
    is_ordinary(model.model, windows, tmp_path)


@pytest.mark.parametrize("kept", [[0], [1]])
def test_layers(model, family, windows, tmp_path, kept):
    anatomy = Anatomy(model)
    if family == "deepseek-v3":  # its first block is no mixture, which a number says
        with pytest.raises(ModelError, match="would be"):
            anatomy.without_layers([1])
        return
    twin = anatomy.without_layers(kept)
    (gone,) = {*anatomy.blocks} - {[*anatomy.blocks][kept[0]]}
    with anatomy.skipped(gone):
        expected = logits(model.model, windows)
    keep_layers_(model.model, twin, kept)

    assert torch.equal(logits(model.model, windows), expected)
    assert len(Anatomy(as_cut(model)).blocks) == 1
    is_ordinary(model.model, windows, tmp_path)


SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def anatomy_of(config):
    return Anatomy(given_model(AutoModelForCausalLM.from_config(config).float().eval()))


def test_layers_of_two_kinds_keep_theirs(windows, tmp_path):
    """What slides in the dense model slides in the cut one, at another place."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds)
    anatomy = anatomy_of(config)
    network = anatomy.model.model.double()
    with anatomy.skipped("model.layers.0"), anatomy.skipped("model.layers.3"):
        expected = logits(network, windows)
    keep_layers_(network, anatomy.without_layers([1, 2]), [1, 2])

    assert network.config.layer_types == kinds[1:3]
    assert torch.equal(logits(network, windows), expected)
    is_ordinary(network, windows, tmp_path)


def test_what_a_block_does_by_its_place_must_stay():
    """GPT-2 may scale attention by the number of a block, which no configuration gives a list of"""
    config = GPT2Config(
        vocab_size=96, n_embd=16, n_layer=3, n_head=2, scale_attn_by_inverse_layer_idx=True
    )
    anatomy = anatomy_of(config)

    anatomy.without_layers([0, 1])
    with pytest.raises(ModelError, match=r"transformer\.h\.2\.attn\.scaling is 0\.1\d+, but would"):
        anatomy.without_layers([0, 2])


def test_a_norm_over_all_heads_keeps_them_together():
    with pytest.raises(ModelError, match=r"q_norm\.weight would be of shape \(8,\)"):
        anatomy_of(Olmo2Config(**SIZES)).resized(None, 2)


def test_sizes_that_transformers_refuses_or_that_do_not_fit():
    anatomy = anatomy_of(LlamaConfig(**SIZES | {"hidden_size": 24, "num_attention_heads": 12}))
    with pytest.raises(InvalidInput, match=r"cannot load .*\(24\) is not a multiple .*\(10\)"):
        anatomy.resized(None, 10)
    for heads in (0, 3, 14):
        with pytest.raises(InvalidInput, match=r"12 query heads on 2 keys .* Give 2, 4, 6"):
            anatomy.resized(None, heads)
    for neurons in (0, 31, 34):
        with pytest.raises(InvalidInput, match=r"has 32.* a multiple of 2, .* Give (2|30|32)\."):
            anatomy.resized(neurons, None)
    with pytest.raises(InvalidInput, match=r"has 32.* a multiple of 16, .* Give 32\."):
        anatomy.resized(30, None, multiple=16)
    for layers in ([], [0, 4]):
        with pytest.raises(InvalidInput, match="has 4 blocks: name at least one of 0 to 3"):
            anatomy.without_layers(layers)


def test_a_streamed_model_is_refused(model_folder):
    with pytest.raises(InvalidInput, match=r"streamed.* Load it without streaming"):
        Anatomy(load_model(str(model_folder), device="cpu", stream=True))


def test_shapes():
    """Llama takes only numbers of heads that divide its width: 8 of 12 for 24, not 10."""
    sizes = SIZES | {"hidden_size": 24, "num_attention_heads": 12}
    shapes = block_shapes(anatomy_of(LlamaConfig(**sizes)))

    assert shapes.query_heads == (12, 8, 6, 4, 2)
    assert (shapes.layers, shapes.width, shapes.multiple) == (4, 32, 2)
    assert shapes.neuron_weights == 3 * 24
    assert shapes.head_weights == 2 * 2 * 24
    assert shapes.layer_weights == 2 * 24 * 24 + 2 * 24 * 4 + 3 * 24 * 32


def test_shapes_where_nothing_but_blocks_can_be_cut(family, model):
    shapes = block_shapes(Anatomy(model))

    assert (shapes.width == 0) == (family in NEURONS)
    assert (shapes.query_heads == (4,)) == (family in HEADS)
    assert shapes.weights == sum(x.weight.numel() for x in model.linears.values())
