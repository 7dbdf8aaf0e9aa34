"""What the API takes for models and texts, and what it refuses."""

import datasets
import pytest
import torch
from torch import nn

import pho_service as pho
from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.interface.inputs import opened
from pho_service.models.calibration import calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import MixedText
from pho_service.spec.calibration import CalibrationSettings

SMALL = {"samples": 6, "context_length": 32, "rows_per_layer": 4, "kernel_sizes": (3, 5)}


def test_a_path_a_list_of_strings_and_data_sets_of_the_same_documents_give_the_same_bundle(
    tiny_llama, tokenizer, bundle, texts, sentences
):
    documents = sentences["calibration"]
    rows = datasets.Dataset.from_dict({"text": documents, "other": documents})
    for given in (str(texts["calibration"]), documents, rows, rows.to_iterable_dataset()):
        made = pho.calibrate(tiny_llama, tokenizer, given, **SMALL)

        assert made.key == bundle.key
        assert made.contents_sha256 == bundle.contents_sha256


def test_several_texts_with_their_shares_are_pairs(tiny_llama, tokenizer, texts, sentences):
    pairs = [(texts["calibration"], 2), (sentences["report"], 1)]
    bundle = pho.calibrate(tiny_llama, tokenizer, pairs, **SMALL)
    files = MixedText(
        texts=tuple(TextSource(path=str(texts[name])) for name in ("calibration", "report")),
        shares=(4, 2),
    )
    model = opened(tiny_llama, tokenizer)
    settings = CalibrationSettings(samples=6, context_length=32)
    windows = calibration_text(model, files, settings).calibration

    assert torch.equal(bundle.text.calibration, windows)
    assert "a text in memory (33.3%)" in str(bundle)


def test_a_folder_gives_the_bundle_of_the_model_in_memory_with_or_without_a_tokenizer_of_its_own(
    bundle, model_folder, texts, tmp_path
):
    made = pho.calibrate(model_folder, None, texts["calibration"], **SMALL)
    opened = pho.load_model(str(model_folder), device="cpu")
    again = pho.calibrate(opened, None, texts["calibration"], **SMALL)
    again.write(tmp_path / "bundle.safetensors")

    assert made.key == again.key == bundle.key
    assert pho.read_bundle(tmp_path / "bundle.safetensors").contents_sha256 == made.contents_sha256
    assert made.provenance["model"]["name"] == str(model_folder)
    assert bundle.provenance["model"]["name"] == "LlamaForCausalLM"


def test_token_windows_need_no_tokenizer(tiny_llama, windows):
    bundle = pho.calibrate(tiny_llama, None, windows, samples=4, rows_per_layer=4)
    measured = pho.evaluate(tiny_llama, None, windows)

    assert torch.equal(bundle.text.calibration, windows[:4])
    assert torch.equal(bundle.text.beside, windows[4:])
    assert (measured.windows, measured.context_length, measured.tokens) == (6, 24, 6 * 23)
    assert not measured.bos
    assert f"± {measured.error:.1f}" in repr(measured)
    (row,) = measured.to_dataframe().to_dict("records")
    assert (row["perplexity"], row["tokens"]) == (measured.perplexity, 6 * 23)


def test_a_model_stands_beside_another_one_on_the_same_windows(
    tiny_llama, model_folder, tokenizer, texts
):
    how = {"context_length": 24, "max_windows": 6}
    dense = pho.evaluate(model_folder, None, texts["report"], **how)
    with torch.no_grad():
        tiny_llama.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.5)
    found = pho.evaluate(tiny_llama, tokenizer, texts["report"], beside=model_folder, **how)
    alike = pho.evaluate(model_folder, None, texts["report"], beside=model_folder, **how)

    assert found.beside is not None
    assert found.beside["perplexity"] == dense.perplexity
    assert found.beside["error"] == dense.error
    assert found.beside["rise"] == pytest.approx(found.perplexity / dense.perplexity - 1)
    assert 0 < found.beside["rise_error"] < found.error / dense.perplexity  # it is paired
    assert alike.beside["rise"] == alike.beside["rise_error"] == 0
    assert "the same as" in repr(alike)


def test_models_with_other_tokens_do_not_stand_beside_each_other(
    tiny_llama, tokenizer, bos_folder, texts
):
    with pytest.raises(InvalidInput, match="into other tokens than the model that it stands"):
        pho.evaluate(tiny_llama, tokenizer, texts["report"], beside=bos_folder, context_length=24)


def test_calibration_changes_no_weight_leaves_no_gradient_and_no_hook_and_keeps_what_needs_one(
    tiny_llama, tokenizer, texts, weights
):
    pho.calibrate(tiny_llama, tokenizer, texts["calibration"], **SMALL)

    assert weights()
    assert all(p.grad is None and p.requires_grad for p in tiny_llama.parameters())
    assert not any(m._forward_hooks or m.training for m in tiny_llama.modules())


def spoil(model, how):
    """Make a model one that cannot be taken as it is."""
    mlp = model.model.layers[0].mlp
    if how == "in training":
        model.model.layers[1].train()
    elif how == "hooked":
        mlp.register_forward_hook(lambda *_: None)
    elif how == "quantised":
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
    elif how == "of bytes":
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    elif how == "parametrised":
        nn.utils.parametrizations.weight_norm(mlp.up_proj)
        model.eval()
    elif how == "adapted":
        model._hf_peft_config_loaded = True
    elif how == "offloaded":
        mlp.to("meta")
    elif how == "damaged":
        mlp.up_proj.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("in training", InvalidInput, r"training mode \(model.layers.1\).*model.eval"),
        ("hooked", InvalidInput, r"hooks \(model.layers.0.mlp\)"),
        ("quantised", InvalidInput, "quantised already"),
        ("of bytes", InvalidInput, "up_proj, of torch.int8"),
        ("parametrised", InvalidInput, r"parametrised weights \(model.layers.0.mlp.up_proj\)"),
        ("adapted", InvalidInput, "adapters.*merge_and_unload"),
        ("offloaded", InvalidInput, "device meta"),
        ("damaged", NumericalError, "NaN or infinite"),
    ],
)
def test_a_model_that_cannot_be_taken_as_it_is_is_refused_by_name_with_the_way_out(
    tiny_llama, windows, how, kind, said
):
    spoil(tiny_llama, how)

    with pytest.raises(kind, match=said):
        pho.evaluate(tiny_llama, None, windows)


def test_a_tokenizer_that_begins_otherwise_than_the_bundles_is_refused(
    tiny_llama, windows, bos_folder, bundle
):
    other = pho.load_model(str(bos_folder), device="cpu").tokenizer
    with pytest.raises(ModelError, match=r"begins windows with the tokens \[1\], but.*\[\]"):
        pho.compare(tiny_llama, other, "0.5", bundle=bundle, report=windows)
