"""A streamed model gives what a loaded one gives, and holds one block in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pho_service.errors import InvalidInput, NumericalError, OutputError
from pho_service.models import architecture
from pho_service.models.blockwise import (
    collect_statistics_blockwise,
    dense_afterwards,
    rate_perplexity_blockwise,
    walk,
)
from pho_service.models.loading import LanguageModel, load_model
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.statistics import collect_statistics

VOCABULARY = 42  # tokens that the folder's tokenizer knows, or less


@pytest.fixture
def windows() -> Tensor:
    """(4, 16), int64: random tokens."""
    return torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def streamed(model_folder: Path) -> LanguageModel:
    """The random Llama, streamed on the CPU."""
    return load_model(str(model_folder), device="cpu", stream=True)


@pytest.fixture
def loaded(model_folder: Path) -> LanguageModel:
    """The random Llama, in memory."""
    return load_model(str(model_folder), device="cpu")


def mapped(model: LanguageModel) -> bool:
    """Whether all weights lie in files."""
    return not any(p.untyped_storage().resizable() for p in model.model.parameters())


def halve(model: LanguageModel, windows: Tensor, store: Path | None = None) -> None:
    """Zero every other input channel, block by block."""
    for block in walk(model, windows, store=store):
        for linear in block.linears.values():
            linear.weight[:, ::2] = 0


def test_attributes(streamed: LanguageModel, loaded: LanguageModel) -> None:
    """A streamed model says so, and where it computes."""
    assert streamed.stream
    assert not loaded.stream
    assert streamed.device == loaded.device == torch.device("cpu")
    assert mapped(streamed)
    assert streamed.weights_sha256 == loaded.weights_sha256


def test_stored_dtype(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    """Streamed weights keep their dtype on the CPU, too."""
    tiny_llama.to(torch.bfloat16).save_pretrained(model_folder)
    model = load_model(str(model_folder), device="cpu", stream=True)

    assert model.dtype == model.stored_dtype == torch.bfloat16
    assert mapped(model)


def test_statistics(streamed: LanguageModel, loaded: LanguageModel, windows: Tensor) -> None:
    """Statistics are those of the loaded model, and the weights are as before."""
    before = streamed.weights_sha256
    expected = collect_statistics(
        loaded.model, loaded.linears, windows, fisher_windows=2, projection_rows=5, seed=3
    )
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


def test_pruned(
    streamed: LanguageModel, loaded: LanguageModel, windows: Tensor, tmp_path: Path
) -> None:
    """A walk changes a streamed model like a loaded one; it stays mapped, and leaves no file."""
    store = tmp_path / "store"
    store.mkdir()
    halve(streamed, windows, store)
    halve(loaded, windows)

    assert mapped(streamed)
    assert not list(store.iterdir())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(streamed.model.get_parameter(name), parameter)
    assert rate_perplexity_blockwise(streamed, windows).perplexity == pytest.approx(
        rate_perplexity(loaded.model, windows).perplexity, rel=1e-6
    )


def test_moments(streamed: LanguageModel, loaded: LanguageModel, windows: Tensor) -> None:
    """Blocks of both have the same moments, with changes before them."""
    for a, b in zip(walk(streamed, windows), walk(loaded, windows), strict=True):
        (moments, input_of), (expected, _) = a.moments(), b.moments()
        a.linears[f"{a.name}.mlp.down_proj"].weight.zero_()
        b.linears[f"{b.name}.mlp.down_proj"].weight.zero_()

        assert set(input_of) == set(b.linears)
        for x, y in zip(moments, expected, strict=True):
            torch.testing.assert_close(x.gram, y.gram)


def test_pruned_twice(streamed: LanguageModel, loaded: LanguageModel, windows: Tensor) -> None:
    """A second walk goes on from what the first one left."""
    for model in (streamed, loaded):
        halve(model, windows)
        for block in walk(model, windows):
            for linear in block.linears.values():
                linear.weight[:, 1::4] = 0

    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(streamed.model.get_parameter(name), parameter)


def test_only_changes_are_stored(streamed: LanguageModel, windows: Tensor) -> None:
    """Weights that a walk leaves alone stay where they were mapped."""
    changed = "model.layers.1.mlp.up_proj"
    before = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    for block in walk(streamed, windows):
        if changed in block.linears:
            block.linears[changed].weight[0, 0] += 1

    after = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == {f"{changed}.weight"}


def test_left_early(streamed: LanguageModel, windows: Tensor) -> None:
    """A block whose turn is broken off forgets its changes; the ones before it keep theirs."""
    for block in walk(streamed, windows):
        for linear in block.linears.values():
            linear.weight.zero_()
        if block.name.endswith(".1"):
            break

    assert not streamed.linears["model.layers.0.mlp.up_proj"].weight.any()
    assert streamed.linears["model.layers.1.mlp.up_proj"].weight.all()
    assert mapped(streamed)


def test_dense_afterwards(streamed: LanguageModel, windows: Tensor) -> None:
    """The dense weights come back, from their files."""
    before = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    with dense_afterwards(streamed):
        halve(streamed, windows)

    assert {name: p.data_ptr() for name, p in streamed.model.named_parameters()} == before


def test_saved(streamed: LanguageModel, windows: Tensor, tmp_path: Path) -> None:
    """A pruned streamed model is saved and loaded as any other."""
    halve(streamed, windows)
    streamed.model.save_pretrained(tmp_path / "pruned", max_shard_size="20KB")
    streamed.tokenizer.save_pretrained(tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"), device="cpu")

    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    for name, parameter in streamed.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)


def test_store_is_missing(streamed: LanguageModel, windows: Tensor, tmp_path: Path) -> None:
    """A store that cannot be written is named, and the model is whole afterwards."""
    with pytest.raises(OutputError, match="nowhere"):
        halve(streamed, windows, tmp_path / "nowhere")

    assert mapped(streamed)


def test_a_gguf_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()

    with pytest.raises(InvalidInput, match=r"GGUF is dequantised.*without streaming"):
        load_model(str(tmp_path / "model.gguf"), stream=True)


def test_converted_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def other_dtype(config: dict[str, object]) -> None:
    """Declare another dtype than that of the file."""
    config["dtype"] = "bfloat16"


def nothing(_: dict[str, object]) -> None:
    """Leave the config as it is."""


@pytest.mark.parametrize(
    ("edit", "dtype", "message"),
    [
        (nothing, "float16", r"as float16.*in float32.*--dtype auto"),
        (other_dtype, "auto", r"converts weights when it reads them"),
    ],
)
def test_weights_that_would_have_to_be_cast_are_refused(
    model_folder: Path, edit: Callable[[dict[str, object]], None], dtype: str, message: str
) -> None:
    path = model_folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))

    with pytest.raises(InvalidInput, match=message):
        load_model(str(model_folder), device="cpu", dtype=dtype, stream=True)


def test_asking_for_the_dtype_that_the_weights_have_is_no_cast(model_folder: Path) -> None:
    assert load_model(str(model_folder), device="cpu", dtype="float32", stream=True).stream


def test_mapped_weights_are_checked_too(tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    tiny_llama.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = torch.nan
    tiny_llama.save_pretrained(model_folder)

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(str(model_folder), device="cpu", stream=True)


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


def peaks_of(folder: Path, store: Path) -> dict[str, int]:
    """Peaks of a process's anonymous memory over what it had before it loaded, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.thorough
def test_memory(model_folder: Path, tmp_path: Path) -> None:
    """A model is measured, pruned and saved in the memory of two blocks and what they compute."""
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
