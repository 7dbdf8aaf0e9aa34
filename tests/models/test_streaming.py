"""A streamed model gives what a loaded one gives, and holds one block in memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pho_service.errors import InvalidInput, OutputError
from pho_service.models import architecture
from pho_service.models.blockwise import (
    collect_statistics_blockwise,
    dense_afterwards,
    rate_perplexity_blockwise,
    walk,
)
from pho_service.models.loading import load_model
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.statistics import gather


@pytest.fixture
def streamed(model_folder):
    return load_model(str(model_folder), device="cpu", stream=True)


def mapped(model):
    return not any(p.untyped_storage().resizable() for p in model.model.parameters())


def halve(model, windows, store=None):
    for block in walk(model, windows, store=store):
        for linear in block.linears.values():
            linear.weight[:, ::2] = 0


def test_a_streamed_model_says_so_and_keeps_its_dtype_on_the_cpu_too(
    streamed, model, tiny_llama, model_folder
):
    assert streamed.stream
    assert not model.stream
    assert streamed.device == model.device == torch.device("cpu")
    assert mapped(streamed)
    assert streamed.weights_sha256 == model.weights_sha256
    tiny_llama.to(torch.bfloat16).save_pretrained(model_folder)
    short = load_model(str(model_folder), device="cpu", stream=True)
    assert short.dtype == short.stored_dtype == torch.bfloat16
    assert mapped(short)


def test_statistics(streamed, model, windows):
    """Statistics are those of the loaded model, and the weights are as before."""
    before = streamed.weights_sha256
    expected = gather(
        model.model, model.linears, windows, fisher_windows=2, projection_rows=5, seed=3
    ).statistics(windows)
    actual = collect_statistics_blockwise(
        streamed, windows, fisher_windows=2, projection_rows=5, seed=3
    )
    del streamed.__dict__["weights_sha256"]

    for a, b in zip(actual.inputs, expected.inputs, strict=True):
        torch.testing.assert_close(a.root, b.root)
        torch.testing.assert_close(a.activation_norm, b.activation_norm)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(actual.fisher[name], fisher)
    assert streamed.weights_sha256 == before
    assert mapped(streamed)


def test_a_walk_changes_a_streamed_model_like_a_loaded_one_it_stays_mapped_and_leaves_no_file(
    streamed, model, windows, tmp_path
):
    store = tmp_path / "store"
    store.mkdir()
    halve(streamed, windows, store)
    halve(model, windows)

    assert mapped(streamed)
    assert not list(store.iterdir())
    for name, parameter in model.model.named_parameters():
        assert torch.equal(streamed.model.get_parameter(name), parameter)
    assert rate_perplexity_blockwise(streamed, windows).perplexity == pytest.approx(
        rate_perplexity(model.model, windows).perplexity, rel=1e-6
    )


def test_weights_that_are_left_alone_stay_mapped_and_the_dense_ones_come_back(streamed, windows):
    changed = "model.layers.1.mlp.up_proj"
    before = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    with dense_afterwards(streamed):
        for block in walk(streamed, windows):
            if changed in block.linears:
                block.linears[changed].weight[0, 0] += 1
        after = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}

    assert {name for name in before if before[name] != after[name]} == {f"{changed}.weight"}
    assert {name: p.data_ptr() for name, p in streamed.model.named_parameters()} == before


def test_a_block_that_is_left_early_is_unchanged(streamed, windows):
    for block in walk(streamed, windows):
        for linear in block.linears.values():
            linear.weight.zero_()
        if block.name.endswith(".1"):
            break

    assert not streamed.linears["model.layers.0.mlp.up_proj"].weight.any()
    assert streamed.linears["model.layers.1.mlp.up_proj"].weight.all()
    assert mapped(streamed)


def test_store_is_missing(streamed, windows, tmp_path):
    """A store that cannot be written is named, and the model is whole afterwards."""
    with pytest.raises(OutputError, match="nowhere"):
        halve(streamed, windows, tmp_path / "nowhere")

    assert mapped(streamed)


@pytest.mark.parametrize(
    ("declared", "dtype", "message"),
    [
        ("float32", "float16", r"as float16.*in float32.*dtype=auto"),
        ("bfloat16", "auto", r"converts weights when it reads them"),
        (None, "auto", r"GGUF is dequantised.*without streaming"),
    ],
)
def test_weights_that_would_have_to_be_cast_are_refused(model_folder, declared, dtype, message):
    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": declared}))
    if declared is None:
        model_folder = model_folder / "model.gguf"
        model_folder.touch()

    with pytest.raises(InvalidInput, match=message):
        load_model(str(model_folder), device="cpu", dtype=dtype, stream=True)


def test_converted_checkpoint_is_refused(tmp_path, monkeypatch):
    """A mixture whose experts are merged, and in no usual layout, is refused before it is read."""
    monkeypatch.setattr(architecture, "_is_fused", lambda _: False)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        )
    ).save_pretrained(tmp_path)  # fmt: skip

    with pytest.raises(InvalidInput, match=r"converts weights.*gate_up_proj.*without streaming"):
        load_model(str(tmp_path), device="cpu", stream=True)


MEMORY_SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from pho_service.models.blockwise import (
    collect_statistics_blockwise, rate_perplexity_blockwise, walk
)
from pho_service.models.loading import load_model

folder, store = Path(sys.argv[1]), Path(sys.argv[2])

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while True:
        peaks[stage[0]] = max(peaks.get(stage[0], 0), anonymous_bytes() - before)
        time.sleep(0.001)

@torch.no_grad()
def warm_up():  # what the libraries take the first time that they are used
    x = torch.randn(64, 64, requires_grad=True)
    with torch.enable_grad():
        torch.nn.functional.cross_entropy(x @ x, torch.zeros(64, dtype=torch.int64)).backward()
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))

warm_up()
windows = torch.randint(64, (4, 48), generator=torch.Generator().manual_seed(0))
before, stage, peaks = anonymous_bytes(), ["load"], {}
threading.Thread(target=watch, daemon=True).start()
model = load_model(str(folder), device="cpu", stream=True)
stage[0] = "hash"
model.weights_sha256
stage[0] = "statistics"
collect_statistics_blockwise(
    model, windows, fisher_windows=2, projection_rows=16, seed=0, spill=store
)
stage[0] = "pruning"
for block in walk(model, windows, store=store):
    block.moments()
    for linear in block.linears.values():
        linear.weight[:, ::2] = 0
stage[0] = "perplexity"
rate_perplexity_blockwise(model, windows)
stage[0] = "saving"
model.model.save_pretrained(store / "pruned")
time.sleep(0.01)
print(json.dumps(peaks))
"""


def peaks_of(folder, store):
    """Peaks of a process's anonymous memory over what it had before it loaded, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.thorough
def test_a_model_is_handled_in_the_memory_of_two_blocks(model_folder, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1376, num_hidden_layers=24,
        num_attention_heads=8, num_key_value_heads=8, dtype=torch.float32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder, max_shard_size="100MB")
    size = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    grams = 4 * (3 * 512**2 + 1376**2)
    del model
    store = tmp_path / "store"
    store.mkdir()
    peaks = peaks_of(model_folder, store)
    limit = 2 * block + grams + 32 * 2**20  # activations, and what the libraries keep

    assert set(peaks) == {"load", "hash", "statistics", "pruning", "perplexity", "saving"}
    assert peaks["pruning"] > block  # the watch sees the copy of a block
    assert max(peaks.values()) < limit < size / 4, peaks
