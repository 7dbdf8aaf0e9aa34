"""Models pruned in memory: in place, whole or not at all, and saved as `pho prune` does."""

import copy
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import pho_service as pho
from pho_service import errors
from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.pipeline import prune as pipeline
from pho_service.spec.steps import Steps


def test_the_model_that_was_given_has_the_zeros_masks_layers_and_sparsity_say_where(
    tiny_llama, bundle, configuration, weights
):
    pruned = pho.prune(tiny_llama, configuration, bundle)
    up = "model.layers.0.mlp.up_proj"
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight

    assert pruned.model is tiny_llama
    assert pruned.sparsity == pytest.approx(0.5)
    assert torch.equal(pruned.masks[up].keep, weight != 0)
    assert pruned.masks[up].bits.dtype is torch.uint8
    assert pruned.layers[up] == float((weight == 0).float().mean())
    assert not weights()
    assert "up_proj" in repr(pruned)


def test_fewer_tokens_than_inputs_are_said_once_with_the_number_that_would_do_and_in_the_recipe(
    tiny_llama, tokenizer, texts, with_steps, monkeypatch
):
    said = []
    monkeypatch.setattr("pho_service.pipeline.pipeline.logger.warning", said.append)
    bundle = pho.calibrate(
        tiny_llama, tokenizer, texts["calibration"], samples=2, context_length=11
    )
    steps = Steps(repruning="admm", update="least-squares")
    other = copy.deepcopy(tiny_llama)
    recipes = [pho.prune(model, with_steps(steps), bundle).recipe for model in (tiny_llama, other)]

    assert len(said) == 1
    assert "22 tokens, fewer than the 64 inputs of model.layers.0.mlp.down_proj" in said[0]
    assert said[0].endswith("Take 6 windows of 11 tokens or more (samples=6).")
    assert [recipe["few_tokens"] for recipe in recipes] == said * 2


def test_published_method(tiny_llama, bundle, weights):
    """A published method is a configuration like any other, and the recipe has its name."""
    wanda = pho.baseline("wanda-permuted", "2:4", ignore="*.layers.0.*")
    pruned = pho.prune(tiny_llama, wanda, bundle)

    assert not weights()
    assert pruned.recipe["configuration"]["method"] == "wanda-permuted"
    assert {name.split(".")[2] for name in pruned.layers} == {"1"}
    with pytest.raises(InvalidInput, match=r"crepe.* is not one of those at 0\.5"):
        pho.baseline("crepe", 0.5)


def test_a_smaller_model_is_recovered_in_place_and_saved_as_it_was_left(
    tiny_llama, new_llama, tokenizer, sentences, tmp_path
):
    tiny_llama.model.layers = tiny_llama.model.layers[:1]
    tiny_llama.config.num_hidden_layers = 1
    done = pho.recover(
        tiny_llama.eval(), new_llama(), sentences["report"],
        tokens=256, rate=2e-3, context_length=32, tokenizer=tokenizer,
    )  # fmt: skip
    pho.save(done.model, done.tokenizer, done, tmp_path / "out")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()

    assert done.model is tiny_llama
    assert done.masks == done.layers == {}
    assert done.recovered.after < done.recovered.before
    assert done.recovered.student.teacher_blocks == 2
    assert all(torch.equal(weight, saved[name]) for name, weight in tiny_llama.state_dict().items())
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ModelError, match=r"up_proj are not those that the recovery left"):
        pho.save(done.model, done.tokenizer, done, tmp_path / "again")


def test_a_goal_is_searched_for_as_its_share_is(tiny_llama, bundle, monkeypatch):
    told = {"share": 0.2, "says": "so structured:20%"}
    monkeypatch.setattr("pho_service.pipeline.cuts._told", lambda *_: told)
    found = pho.search(bundle, "faster:1.2x", model=tiny_llama, finalists=2)
    same = pho.search(bundle, "structured:20%", model=tiny_llama, finalists=2)

    assert found.configuration.cut == same.configuration.cut
    assert found.configuration.search["goal"]["says"] == "so structured:20%"
    with pytest.raises(InvalidInput, match="pattern 'bytes:much' is not the size of a file"):
        pho.search(bundle, "bytes:much", model=tiny_llama)


def test_a_cut_that_was_searched_for_is_made_in_place_and_saved(
    tiny_llama, bundle, weights, tmp_path, monkeypatch
):
    """If anything goes wrong in the middle, the model is whole again."""
    found = pho.search(bundle, "structured:20%", model=tiny_llama, finalists=2)
    structure, untouched = found.configuration.cut.structure, weights()
    with monkeypatch.context() as broken:
        broken.setattr("pho_service.pipeline.structured.take_sizes_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pho.prune(tiny_llama, found, bundle)
    whole = weights()
    pruned = pho.prune(tiny_llama, found, bundle)
    pho.save(pruned.model, pruned.tokenizer, pruned, tmp_path / "cut")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "cut")

    assert untouched
    assert whole
    assert found.layers == {}
    assert "of their weights are gone" in repr(found)
    assert pruned.model is tiny_llama
    assert pruned.masks == pruned.layers == {}
    assert "of their weights are gone" in repr(pruned)
    assert saved.config.intermediate_size == (structure.neurons or 64)
    assert saved.config.num_attention_heads == (structure.query_heads or 4)
    state = saved.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "score"}, "has no score, so preset says nothing"),
        ({"space": {"row_share": 0.5}}, "so space says nothing"),
        ({"sampler": "random"}, "so sampler says nothing"),
        ({"trials": 20}, "so trials says nothing"),
        ({"model": None}, "needs the model"),
    ],
)
def test_what_a_cut_does_not_take(tiny_llama, bundle, changes, message):
    with pytest.raises(InvalidInput, match=message):
        pho.search(bundle, "structured:20%", **{"model": tiny_llama, **changes})


def test_by_name(model_folder, texts, configuration):
    """A folder is loaded, pruned and given back; the text is cut with its own tokenizer."""
    bundle = pho.calibrate(model_folder, None, texts["calibration"], samples=6, context_length=32)
    pruned = pho.prune(model_folder, configuration, bundle)

    assert pruned.tokenizer is not None
    assert pruned.model.model.layers[0].mlp.up_proj.weight.count_nonzero() < 64 * 32


def test_twice(tiny_llama, bundle, configuration):
    """A pruned model is neither pruned again nor searched on, and stays as it is."""
    pho.prune(tiny_llama, configuration, bundle)
    once = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ModelError, match=r"has been pruned already: 4\d\.\d%"):
        pho.prune(tiny_llama, configuration, bundle)
    with pytest.raises(ModelError, match="has been pruned already"):
        pho.search(bundle, "0.5", preset="score", model=tiny_llama)

    assert all(torch.equal(once[name], tensor) for name, tensor in tiny_llama.state_dict().items())


def test_a_bundle_from_a_file_has_no_windows_a_configuration_that_needs_a_text_asks_for_it(
    tiny_llama, tokenizer, bundle, texts,
    with_steps, weights, tmp_path,
):  # fmt: skip
    bundle.write(tmp_path / "b.safetensors")
    updating = with_steps(Steps(update="obs"))
    with pytest.raises(InvalidInput, match="need a calibration text"):
        pho.prune(tiny_llama, updating, tmp_path / "b.safetensors")
    with pytest.raises(InvalidInput, match="but no tokenizer"):
        pho.prune(tiny_llama, updating, tmp_path / "b.safetensors", texts=texts["calibration"])
    assert weights()
    other = copy.deepcopy(tiny_llama)
    pho.prune(
        tiny_llama, updating, str(tmp_path / "b.safetensors"), texts=texts["calibration"],
        tokenizer=tokenizer,
    )  # fmt: skip
    pho.prune(other, updating, bundle)

    assert all(
        torch.equal(other.state_dict()[name], tensor)
        for name, tensor in tiny_llama.state_dict().items()
    )


def test_what_goes_wrong_in_the_middle_leaves_no_weight_changed(
    tiny_llama, bundle, configuration, weights, monkeypatch
):
    def breaks(*_):
        assert not weights()
        raise NumericalError("too late")

    monkeypatch.setattr(pipeline, "_fold", breaks)
    with pytest.raises(NumericalError, match="too late"):
        pho.prune(tiny_llama, configuration, bundle)

    assert weights()


def test_another_family_another_model_an_n_m_that_does_not_fit_named_and_nothing_is_changed(
    tiny_llama, bundle, configuration, weights
):
    elsewhere = configuration.model_copy(update={"model": {"family": "gpt2"}})
    with pytest.raises(errors.ConfigurationError, match=r"found on gpt2, .* the family llama"):
        pho.prune(tiny_llama, elsewhere, bundle)
    odd = configuration.model_copy(update={"pattern": "1:3", "scope": "row"})
    with pytest.raises(InvalidInput, match="not a multiple of M=3"):
        pho.prune(tiny_llama, odd, bundle)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=1, n_head=1, n_embd=16)).eval()
    with pytest.raises(errors.BundleError, match="of another model"):
        pho.prune(gpt2, configuration, bundle)
    assert weights()

    assert pho.prune(tiny_llama, elsewhere, bundle, other_family=True).sparsity > 0.49


def test_only_the_model_that_was_pruned_is_saved_and_replaces_a_pruned_one_and_no_other_folder(
    tiny_llama, tokenizer, bundle, configuration, tmp_path
):
    dense = copy.deepcopy(tiny_llama)
    pruned = pho.prune(tiny_llama, configuration, bundle)
    folder, other = tmp_path / "out", tmp_path / "other"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=1, n_head=1, n_embd=16)).eval()
    for model, given, kind, said in (
        (dense, tokenizer, ModelError, "q_proj are not those that the pruning left"),
        (gpt2, tokenizer, ModelError, "other linears"),
        (tiny_llama, None, InvalidInput, "no tokenizer"),
        ("folder", tokenizer, InvalidInput, "model is a str"),
    ):
        with pytest.raises(kind, match=said):
            pho.save(model, given, pruned, folder)
        assert not folder.exists()
    pho.save(tiny_llama, tokenizer, pruned, folder)
    (folder / "of the first").touch()
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(errors.OutputError, match="Give overwrite=True"):
        pho.save(tiny_llama, tokenizer, pruned, folder)
    with pytest.raises(errors.OutputError, match=r"holds files, but no pruning\.json"):
        pho.save(tiny_llama, tokenizer, pruned, other, overwrite=True)
    pho.save(tiny_llama, tokenizer, pruned, folder, overwrite=True)

    assert json.loads((folder / "pruning.json").read_text())["sparsity"] == pruned.sparsity
    assert not (folder / "of the first").exists()
    assert not [*tmp_path.glob(".pho-*")]
