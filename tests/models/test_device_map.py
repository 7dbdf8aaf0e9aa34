"""Models are read straight to a GPU, or onto several, and compute what they compute on the CPU."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pho_service.errors import InvalidInput, ModelError
from pho_service.models import blockwise
from pho_service.models.blockwise import walk
from pho_service.models.loading import load_model
from pho_service.pruning.perplexity import rate_perplexity

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {
    "tied": (LlamaForCausalLM, LlamaConfig, {"dtype": torch.float32, "tie_word_embeddings": True}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"dtype": torch.bfloat16, "num_local_experts": 4},
    ),
}


@pytest.fixture
def folder(model_folder, tmp_path, request):
    """A random model of a kind: ``tied`` if the test asks for none."""
    model_class, config, more = KINDS[getattr(request, "param", "tied")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config(**SIZES, **more)).to(more["dtype"])
    model.save_pretrained(tmp_path / "kind")
    for file in model_folder.glob("token*"):
        shutil.copy(file, tmp_path / "kind")
    return tmp_path / "kind"


@pytest.fixture
def two_cards(folder, pretended_gpus):
    assert folder.is_dir()
    return pretended_gpus


def on_cpu(folder):
    model = load_model(str(folder), device="cpu")
    return load_model(str(folder), device="cpu", dtype=str(model.stored_dtype)[6:])


TIED, MIXTRAL = KINDS
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize("folder", [TIED, pytest.param(MIXTRAL, marks=THOROUGH)], indirect=True)
def test_straight_to_a_gpu(folder, windows, pretended_gpu):
    """Each weight is copied once, from its file to the card, and the model is what it is."""
    expected = on_cpu(folder)
    size = sum(parameter.nbytes for parameter in expected.model.parameters())
    with pretended_gpu.counting() as counts:
        model = load_model(str(folder), device="cuda")

    assert model.devices == (torch.device("cuda", 0),)
    assert all(buffer.device.type == "cuda" for buffer in model.model.buffers())
    assert size <= counts.h2d_bytes < 1.05 * size
    assert model.weights_sha256 == expected.weights_sha256
    assert rate_perplexity(model.model, windows) == rate_perplexity(expected.model, windows)


@pytest.mark.parametrize("folder", [pytest.param(TIED, marks=THOROUGH), MIXTRAL], indirect=True)
@pytest.mark.usefixtures("two_cards")
def test_half_of_the_blocks_lie_on_each_card(folder, windows):
    expected = on_cpu(folder)
    model = load_model(str(folder), device_map="auto")
    places = [linear.weight.device.index for linear in model.linears.values()]

    assert [device.index for device in model.devices] == [0, 1]
    assert places == sorted(places)
    assert 0.25 <= sum(places) / len(places) <= 0.75
    assert model.weights_sha256 == expected.weights_sha256
    assert rate_perplexity(model.model, windows) == rate_perplexity(expected.model, windows)


@pytest.mark.parametrize("stays", [True, pytest.param(False, marks=THOROUGH)])
@pytest.mark.usefixtures("two_cards")
def test_a_walk_hands_hidden_states_from_card_to_card_and_prunes_as_it_does_on_one(
    folder, windows, stays, monkeypatch
):
    expected, model = on_cpu(folder), load_model(str(folder), device_map="auto")
    monkeypatch.setattr(blockwise, "_states_fit", lambda *_: stays)
    for here, there in zip(walk(expected, windows), walk(model, windows), strict=True):
        (moments, _), (others, _) = here.moments(), there.moments()
        for a, b in zip(moments, others, strict=True):
            torch.testing.assert_close(b.gram.cpu(), a.gram)
        for block in (here, there):
            for linear in block.linears.values():
                linear.weight[:, ::2] = 0

    assert model.weights_sha256 == expected.weights_sha256
    assert len({block.device for block in model.model.parameters()}) == 2


def test_a_model_leaves_its_cards_when_it_is_let_go_cards_that_are_too_small_take_nothing(
    folder, pretended_gpus
):
    first = load_model(str(folder), device_map="auto")
    before = [card.allocated for card in pretended_gpus]
    del first
    for card in pretended_gpus:
        card.reset_peak()
    again = load_model(str(folder), device_map="auto")
    assert len(again.devices) == 2
    assert all(card.peak < 1.5 * size for card, size in zip(pretended_gpus, before, strict=True))
    del again
    for card in pretended_gpus:
        card.memory_bytes = 2**15
    with pytest.raises(ModelError, match=r"takes .* float32, but .*cuda:0 .*cuda:1 .* stream=True"):
        load_model(str(folder), device_map="auto")
    assert all(card.allocated == 0 for card in pretended_gpus)


@pytest.mark.parametrize(
    ("cards", "options", "message"),
    [
        *((True, {"device_map": "auto", **more}, r"on several GPUs.*Leave device_map out")
          for more in ({"stream": True}, {"device": "cuda:1"}, {"device": "cpu"})),
        (True, {"device": "cuda:2"}, r"'cuda:2' does not exist: torch sees cuda:0 \(.*cuda:1"),
        (True, {"device_map": "balanced"}, "'balanced' is not known"),
        (False, {"device_map": "auto"}, "torch sees none"),
        (False, {"device": "cuda:3"}, r"torch sees no GPU\. Use auto or cpu"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_had_is_refused_with_what_there_is(
    request, folder, cards, options, message
):
    if cards:
        request.getfixturevalue("two_cards")
    with pytest.raises(InvalidInput, match=message):
        load_model(str(folder), **options)
