"""A model's files name files beside them, and nothing else is ever opened."""

import json

import pytest

from pho_service.errors import InvalidInput, ModelError
from pho_service.host.model_files import MAX_BYTES, check_model_folder, is_plain

OUTSIDE = [
    "../secret/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "",
    "..\\secret\\model.safetensors", "C:\\model.safetensors", "C:model.safetensors",
    "https://example.org/model.safetensors", "file:model.safetensors", "a\x00b", "a\nb", "a" * 256,
]  # fmt: skip


def written(folder, name, document):
    """The folder, with one more JSON file."""
    (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_in_an_index_is_a_files_name_alone(tmp_path, name):
    weight_map = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": name}
    written(tmp_path, "model.safetensors.index.json", {"weight_map": weight_map})

    with pytest.raises(
        InvalidInput, match=r"model\.safetensors\.index\.json names .*lie in the"
    ) as e:
        check_model_folder(tmp_path)
    assert "weight_map of lm_head.weight" in str(e.value)
    assert str(tmp_path) not in str(e.value)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    "document",
    [
        {"tokenizer_file": "/home/other/tokenizer.json"},
        {"vocab_file": "../vocab.json"},
        {"merges_file": "..\\merges.txt"},
        {"vocab": "/etc/vocab.json"},
        {"init_inputs": ["/etc/vocab.json", "merges.txt"]},
        {"fast_tokenizer_files": ["tokenizer.json", "../../x/tokenizer.4.0.json"]},
    ],
)
def test_a_tokenizer_may_name_no_path(tmp_path, document):
    (key,) = document
    written(tmp_path, "tokenizer_config.json", document)

    with pytest.raises(InvalidInput, match=rf"tokenizer_config\.json names .*\({key}\)"):
        check_model_folder(tmp_path)


def test_transformers_weights_would_lead_to_an_index_elsewhere(tmp_path):
    written(tmp_path, "config.json", {"transformers_weights": "sub/a.safetensors.index.json"})

    with pytest.raises(InvalidInput, match=r"config\.json names .*transformers_weights"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**8},
        {"n_layer": 1001},
        {"text_config": {"num_hidden_layers": 10**8}},
        {"num_hidden_layers": 2, "num_local_experts": 10_001},
    ],
)
def test_more_modules_than_any_model_has_are_asked_for_of_no_library(tmp_path, config):
    with pytest.raises(InvalidInput, match=r"config\.json says n\w+=\d+, and 10+ are the most"):
        check_model_folder(written(tmp_path, "config.json", config))


def test_what_models_on_the_hub_have_in_these_files_passes(tmp_path):
    shards = {f"layer.{i}.weight": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    written(tmp_path, "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    written(tmp_path, "config.json", {"_name_or_path": "org/name", "model_type": "llama"})
    tokenizer = {
        "name_or_path": "/home/author/model", "special_tokens_map_file": "/home/author/s.json",
        "tokenizer_file": None, "vocab_file": "vocab.json", "chat_template": "a/b{% c %}",
        "fast_tokenizer_files": ["tokenizer.json"], "init_inputs": [], "merges": [["a", "b"]],
    }  # fmt: skip
    written(tmp_path, "tokenizer_config.json", tokenizer)
    check_model_folder(tmp_path)

    assert is_plain("model.safetensors")


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"[]", b"{}", b'{"weight_map": []}', b"\xff"]
)
def test_an_index_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)

    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json (is not|has no)"):
        check_model_folder(tmp_path)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    with pytest.raises(ModelError, match="larger than 64 MiB"):
        check_model_folder(tmp_path)


def test_a_decoder_that_makes_a_page_of_a_token_is_refused(tmp_path):
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "C" * 1001}
    written(tmp_path, "tokenizer.json", {"decoder": {"decoders": [{"type": "Fuse"}, replace]}})

    with pytest.raises(ModelError, match="text of 1,001 characters in its decoder"):
        check_model_folder(tmp_path)
    replace["content"] = "C" * 1000
    written(tmp_path, "tokenizer.json", {"decoder": replace, "model": {"vocab": ["C" * 5000]}})
    check_model_folder(tmp_path)
