"""Models are opened with care: what cannot be pruned whole, or read safely, is refused by name."""

import json
import math
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.models import loading
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import check_name, load_model


def test_folder(model_folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    """A folder gives the model's own weights, in evaluation mode, with its linears."""
    loaded = load_model(str(model_folder), device="cpu")

    assert not loaded.model.training
    assert loaded.revision is None
    assert list(loaded.linears) == list(prunable_linears(tiny_llama))
    for name, linear in prunable_linears(tiny_llama).items():
        assert torch.equal(loaded.linears[name].weight, linear.weight)


def test_stored_dtype(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    """A bfloat16 checkpoint computes in float32 on the CPU and remembers what it was."""
    tiny_llama.to(torch.bfloat16).save_pretrained(model_folder)
    loaded = load_model(str(model_folder), device="cpu")

    assert loaded.dtype == torch.float32
    assert loaded.stored_dtype == torch.bfloat16


def test_weights_hash(model_folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    """The hash is that of the weights: one bit changes it, loading again does not."""
    first = load_model(str(model_folder), device="cpu").weights_sha256
    again = load_model(str(model_folder), device="cpu").weights_sha256
    tiny_llama.get_parameter("model.norm.weight").data[0] += 1e-6
    tiny_llama.save_pretrained(model_folder)

    assert first == again
    assert load_model(str(model_folder), device="cpu").weights_sha256 != first


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model("./no-such-model")
    with pytest.raises(ModelError, match="does not exist"):
        load_model("no-such-model.gguf")


@pytest.mark.parametrize("name", ["models/tiny", "a/b/c", "a\\b"])
def test_missing_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder beside others is not asked of the hub, where anybody may have its name."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(loading, "cached_file", lambda name, *_, **__: asked.append(name))

    with pytest.raises(ModelError, match="does not exist") as told:
        load_model(name)
    assert asked == []
    assert ("give --revision main" in str(told.value)) is (name == "models/tiny")

    if name == "models/tiny":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model(name, revision="main")
        assert set(asked) == {name}


def test_hub_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer is told from a model that does not exist."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ModelError, match=r"no folder or file here.*hub cannot be reached"):
        load_model("nobody/no-such-model")


def test_hub_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached is asked once, and not again and again."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # closed below: nobody answers there
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", pytest.fail)  # between two tries

    for ask in (lambda name: check_name(name, None), load_model):
        with pytest.raises(ModelError, match=r"nosuch cannot be loaded: no folder or file here"):
            ask("nosuch")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_in_the_hubs_cache_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pho_service.models.loading.hub_is_away", lambda: True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "config.json")

    check_name("org/name", None)


def test_not_a_name() -> None:
    """What can be neither a path nor a name of the hub is said to be neither."""
    with pytest.raises(ModelError, match="is neither a folder or file here nor a name on the hub"):
        check_name("two words", None)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_folder_without_weights_is_said_to_have_none(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(model_folder))


def test_pickled_weights_are_refused_and_never_opened(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(str(model_folder))


def test_index_that_leads_out(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    """Weights outside of the folder are not read, whatever its index says."""
    (model_folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(model_folder, max_shard_size="20KB")
    path = model_folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    (model_folder / first).rename(model_folder.parent / first)
    index["weight_map"] = {
        tensor: f"../{name}" if name == first else name
        for tensor, name in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))

    with pytest.raises(InvalidInput, match=rf"index\.json names '\.\./{first}'"):
        load_model(str(model_folder), device="cpu")


def test_index_of_a_hub_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "/etc/a.safetensors"}}))
    asked: list[str] = []

    def cached(_name: str, filename: str, **_options: object) -> str | None:
        asked.append(filename)
        return str(index) if filename == index.name else None

    monkeypatch.setattr(loading, "cached_file", cached)

    with pytest.raises(InvalidInput, match="names '/etc/a"):
        load_model("org/name", device="cpu")
    assert asked == ["config.json", index.name]


def test_a_file_that_only_ends_in_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")

    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(path))


def test_a_nan_weight_names_its_layer(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    tiny_llama.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = math.nan
    tiny_llama.save_pretrained(model_folder)

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_model(str(model_folder))


def test_large_weights(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    """Finite weights are accepted, even if their sum is not finite."""
    tiny_llama.get_parameter("model.layers.1.mlp.up_proj.weight").data.fill_(3e38)
    tiny_llama.save_pretrained(model_folder)

    assert len(load_model(str(model_folder)).linears) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"device": "cuda:99"}, "device 'cuda:99' does not exist"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"revision": "main"}, "is for hub ids"),
    ],
)
def test_bad_arguments(model_folder: Path, arguments: dict[str, str], message: str) -> None:
    """A device, dtype or revision that cannot be is refused."""
    with pytest.raises(InvalidInput, match=message):
        load_model(str(model_folder), **arguments)


def test_bos(model_folder: Path, bos_folder: Path) -> None:
    """``auto`` does as the tokenizer does; the others do as they say."""
    plain, adding = load_model(str(model_folder)), load_model(str(bos_folder))

    assert plain.window_prefix("auto") == plain.window_prefix("never") == []
    assert adding.window_prefix("auto") == adding.window_prefix("always") == [1]
    assert plain.window_prefix("always") == [1]
    assert adding.window_prefix("never") == []


def test_always_needs_a_tokenizer_that_has_a_bos_token(model_folder: Path) -> None:
    loaded = load_model(str(model_folder))
    loaded.tokenizer.bos_token = None

    with pytest.raises(InvalidInput, match="has no BOS token"):
        loaded.window_prefix("always")


def test_llama_linears(tiny_llama: LlamaForCausalLM) -> None:
    """Seven linears a block; neither the embedding nor the head."""
    names = list(prunable_linears(tiny_llama))

    assert len(names) == 14
    assert all(name.startswith("model.layers.") for name in names)


def test_gpt_2s_conv1d_is_a_linear_whose_weight_is_stored_the_other_way_round() -> None:
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    linears = prunable_linears(GPT2LMHeadModel(config))

    assert len(linears) == 8
    assert linears["transformer.h.0.attn.c_attn"].weight.shape == (96, 32)
