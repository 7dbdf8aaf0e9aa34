"""Models are opened with care: what cannot be pruned whole, or read safely, is refused by name."""

import json
import socket

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.models import loading
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import check_name, load_model


def test_folder(model_folder, tiny_llama):
    """A folder gives the model's own weights, in evaluation mode, with its linears."""
    loaded = load_model(str(model_folder), device="cpu")

    assert not loaded.model.training
    assert loaded.revision is None
    assert "Embedding" not in repr(loaded)
    assert list(loaded.linears) == list(prunable_linears(tiny_llama))
    for name, linear in prunable_linears(tiny_llama).items():
        assert torch.equal(loaded.linears[name].weight, linear.weight)


def test_a_bfloat16_checkpoint_computes_in_float32_on_the_cpu_and_remembers_what_it_was(
    tiny_llama, model_folder
):
    tiny_llama.to(torch.bfloat16).save_pretrained(model_folder)
    loaded = load_model(str(model_folder), device="cpu")

    assert loaded.dtype == torch.float32
    assert loaded.stored_dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["models/tiny", "a/b/c", "a\\b", "./no-such-model", "no.gguf"])
def test_missing_folder(name, tmp_path, monkeypatch):
    """A missing folder beside others is not asked of the hub, where anybody may have its name."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(loading, "cached_file", lambda name, *_, **__: asked.append(name))

    with pytest.raises(ModelError, match="does not exist") as told:
        load_model(name)
    assert asked == []
    assert ("give revision=main" in str(told.value)) is (name == "models/tiny")

    if name == "models/tiny":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model(name, revision="main")
        assert set(asked) == {name}


def test_a_hub_that_is_away_is_asked_once_and_never_for_what_can_be_no_name(monkeypatch):
    with pytest.raises(ModelError, match="is neither a folder or file here nor a name on the hub"):
        check_name("two words", None)
    with socket.create_server(("127.0.0.1", 0)) as server:  # closed below: nobody answers there
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", pytest.fail)  # between two tries

    for ask in (lambda name: check_name(name, None), load_model):
        with pytest.raises(ModelError, match=r"nosuch .*: no folder or file here.* be reached"):
            ask("nosuch")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_in_the_hubs_cache_needs_no_hub(monkeypatch):
    monkeypatch.setattr("pho_service.models.loading.hub_is_away", lambda: True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "config.json")

    check_name("org/name", None)


def test_no_index_leads_out_of_the_folder(tiny_llama, model_folder):
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


def test_an_index_without_metadata_is_told_how_to_be_mended(tiny_llama, model_folder):
    tiny_llama.save_pretrained(model_folder, max_shard_size="40KB")
    (model_folder / "model.safetensors").unlink(missing_ok=True)
    path = model_folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ModelError, match=r'has no "metadata".*: add "metadata": \{\}\.'):
        load_model(str(model_folder), device="cpu")

    path.write_text(json.dumps({"weight_map": index["weight_map"], "metadata": {}}))
    load_model(str(model_folder), device="cpu")


def test_index_of_a_hub_model(monkeypatch, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "/etc/a.safetensors"}}))
    asked = []

    def cached(_name, filename, **_options):
        asked.append(filename)
        return str(index) if filename == index.name else None

    monkeypatch.setattr(loading, "cached_file", cached)

    with pytest.raises(InvalidInput, match="names '/etc/a"):
        load_model("org/name", device="cpu")
    assert asked == ["config.json", index.name]


def test_a_gguf_file_of_more_blocks_than_any_model_has_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(10**8)
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(InvalidInput, match="num_hidden_layers=100000000, and 1000 are the most"):
        load_model(str(path))
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(path))


def test_large_weights_are_accepted(tiny_llama, model_folder):
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
def test_bad_arguments(model_folder, arguments, message):
    """A device, dtype or revision that cannot be is refused."""
    with pytest.raises(InvalidInput, match=message):
        load_model(str(model_folder), **arguments)


def test_bos(model_folder, bos_folder):
    """``auto`` does as the tokenizer does; the others do as they say."""
    plain, adding = load_model(str(model_folder)), load_model(str(bos_folder))

    assert plain.window_prefix("auto") == plain.window_prefix("never") == []
    assert adding.window_prefix("auto") == adding.window_prefix("always") == [1]
    assert plain.window_prefix("always") == [1]
    assert adding.window_prefix("never") == []
    plain.tokenizer.bos_token = None
    with pytest.raises(InvalidInput, match="has no BOS token"):
        plain.window_prefix("always")


LAYER = "model.layers.1.mlp.up_proj.weight"


def rewrite_weights(folder, changes):
    """Replace tensors of a model folder; None takes one away."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def removed(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def written(name, content, without=""):
    return lambda folder: removed(without or name)(folder) and (folder / name).write_bytes(content)


def cut_off(share):
    def cut(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])

    return cut


UNREAD = r"cannot be loaded|config\.json is not"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed("config.json"), r"no config\.json"),
        (removed("*.safetensors"), "has no weights"),
        (written("pytorch_model.bin", b"cos\nsystem\n(S'false'\ntR.", "*.safetensors"),
         r"only pickled weights \(pytorch_model.bin\)"),
        (removed("tokenizer*"), "cannot be loaded"),
        *((written("config.json", content), UNREAD)
          for content in (b"{", b"{}", b'{"model_type": "unheard-of"}')),
        (lambda folder: rewrite_config(folder, num_hidden_layers=3), r"layers\.2"),
        (lambda folder: rewrite_weights(folder, {LAYER: None}), "up_proj"),
        (lambda folder: rewrite_weights(folder, {LAYER: torch.zeros(64, 33)}), "cannot be loaded"),
        *((cut_off(share), "cannot be loaded: SafetensorError") for share in (0, 0.00005, 0.999)),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_a_whole_model_is_refused_with_what_is_wrong(
    model_folder, change, message
):
    change(model_folder)

    with pytest.raises(ModelError, match=message):
        load_model(str(model_folder), device="cpu")


@pytest.mark.parametrize(
    ("value", "stream"), [(-torch.inf, False), (torch.nan, False), (torch.nan, True)]
)
def test_a_weight_that_is_not_finite_names_its_layer_mapped_or_not(model_folder, value, *, stream):
    weight = torch.zeros(64, 32)
    weight[63, 31] = value
    rewrite_weights(model_folder, {LAYER: weight})

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: a weight is NaN"):
        load_model(str(model_folder), device="cpu", stream=stream)


def test_code_that_a_folder_brings_along_is_never_run(model_folder, tmp_path):
    rewrite_config(
        model_folder,
        model_type="unheard-of",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (model_folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ModelError, match="code from a model repository is never run"):
        load_model(str(model_folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_whose_blocks_cannot_be_found_is_refused(tiny_llama):
    tiny_llama._no_split_modules = None

    with pytest.raises(ModelError, match="no decoder blocks found"):
        prunable_linears(tiny_llama)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("We couldn't connect to 'https://huggingface.co' to load the files", "cannot be reached"),
        ("x is not a local folder and is not a valid model identifier", "has no such model"),
        ("x does not appear to have a file named model.safetensors", "no safetensors weights"),
        ("Please pass the argument `trust_remote_code=True`", "is never run"),
        ("something new\n  happened", "OSError: something new happened"),
        ("You are trying to access a gated repo.\n401 Client Error.\n\nCannot access", "gated"),
    ],
)
def test_what_transformers_says_becomes_a_sentence_with_a_way_out(said, told):
    assert told in loading._reason(OSError(said))
