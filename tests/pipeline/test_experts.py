"""A mixture of experts goes through the jobs as any other model does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pho_service.models.blockwise import measure_perplexity, walk
from pho_service.models.calibration import calibrate
from pho_service.models.loading import load_model
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Coefficients
from pho_service.spec.steps import Reconstruction, Steps

SETTINGS = CalibrationSettings(
    samples=3, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3,)
)
CONFIGURATION = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.5, column=0.5, neighbourhood=0.2, kernel_size=3, activation_exponent=0.5
    ),
    pattern="2:4",
    scope="row",
    steps=Steps(permutation="score"),
)


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "initializer_range": 0.2, "dtype": torch.bfloat16,
}  # fmt: skip
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=32
        ),
    ),
    "qwen3": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, head_dim=8),
    ),
}


def saved(family, model_folder, target, *, as_stored=True, blocks=2):
    """A random bfloat16 mixture of four experts in each block, stored as it is published."""
    model_class, config = FAMILIES[family]
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": blocks})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).bfloat16()
    model.save_pretrained(target, max_shard_size="20KB", save_original_format=as_stored)
    for file in model_folder.glob("token*"):
        shutil.copy(file, target)
    return target


@pytest.fixture
def mixtral_folder(model_folder, tmp_path):
    return saved("mixtral", model_folder, tmp_path / "mixtral")


def test_every_experts_channel_order_is_folded_into_its_weights_what_is_saved_passes_its_check(
    mixtral_folder, text_of, tmp_path
):
    model = load_model(str(mixtral_folder), device="cpu")
    text = text_of(model, SETTINGS)
    bundle = calibrate(model, text, SETTINGS)
    prune_job(Work.of(bundle, model, calibration=text.calibration), CONFIGURATION, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())
    original = load_model(str(mixtral_folder), device="cpu")
    checks = check_folder(tmp_path / "out", original=original)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    next(t for n, t in tensors.items() if n.endswith("gate.weight"))[0, 0] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    changed = check_folder(tmp_path / "out", original=original)

    assert {entry["reader"] for entry in recipe["folded"]} == {
        f"model.layers.{block}.mlp.experts.{expert}.down_proj"
        for block in range(2)
        for expert in range(4)
    }
    assert [check.detail for check in checks if not check.passed] == []
    assert [check.name for check in changed if not check.passed] == ["other parameters"]


TRAINED = Steps(update="obs", reconstruction=Reconstruction(method="block", learning_rate=0.05))


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        pytest.param("mixtral", TRAINED, id="mixtral-trained"),
        pytest.param("qwen2", Steps(update="obs"), id="qwen2-obs"),
        pytest.param("qwen3", Steps(), id="qwen3"),
    ],
)
def test_streamed(family, steps, model_folder, text_of, tmp_path):
    """A streamed mixture has the bundle, the hash and the pruned weights of a loaded one."""
    folder = saved(family, model_folder, tmp_path / family)
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    configuration = CONFIGURATION.model_copy(update={"steps": steps})
    bundles, hashes, pruned = [], [], []
    for stream in (False, True):
        model = load_model(str(folder), device="cpu", dtype="bfloat16", stream=stream)
        text = text_of(model, SETTINGS)
        bundles.append(calibrate(model, text, SETTINGS))
        hashes.append((model.weights_sha256, list(model.linears)))
        out = tmp_path / f"out-{stream}"
        prune_job(Work.of(bundles[0], model, calibration=text.calibration), configuration, out)
        pruned.append(
            {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
        )
        checks = check_folder(
            out, original=load_model(str(folder), device="cpu", dtype="bfloat16", stream=stream)
        )
        assert [check.detail for check in checks if not check.passed] == []

    assert hashes[0] == hashes[1]
    recipe = json.loads((tmp_path / "out-True" / "pruning.json").read_text())
    assert [b["kept"] for b in recipe.get("blocks", {}).values()] == [True] * 2 * (steps is TRAINED)
    assert set(pruned[0]) == set(pruned[1]) == stored
    whole, streamed = (bundle.statistics() for bundle in bundles)
    for first, second in zip(bundles[0].layers, bundles[1].layers, strict=True):
        name = first.name
        norm, fisher = streamed.activation_norm(name), streamed.fisher[name]
        assert second.name == name
        assert torch.equal(second.rows, first.rows)
        torch.testing.assert_close(norm, whole.activation_norm(name))
        torch.testing.assert_close(fisher, whole.fisher[name])
    for name, tensor in pruned[0].items():
        assert torch.equal(pruned[1][name], tensor), name


def test_streamed_as_it_lies(model_folder, tmp_path):
    """Experts that are stored in one tensor are mapped as one, others stay in their files."""
    folder = saved("qwen3", model_folder, tmp_path / "fused", as_stored=False)
    model = load_model(str(folder), device="cpu", stream=True)
    whole = load_model(str(folder), device="cpu", dtype="bfloat16")

    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(model.model.named_parameters())
    assert model.weights_sha256 == whole.weights_sha256
    assert list(model.linears) == list(whole.linears)
    apart = saved("mixtral", model_folder, tmp_path / "mixtral")
    model = load_model(str(apart), device="cpu", stream=True)
    expert = model.linears["model.layers.1.mlp.experts.3.down_proj"]
    assert not any(p.untyped_storage().resizable() for p in model.model.parameters())
    assert expert.weight.shape == (16, 24)
    assert expert.siblings == "model.layers.1.mlp.experts.down_proj"


def test_streamed_to_a_gpu(model_folder, pretended_gpu, tmp_path):
    """A card holds one block of a streamed mixture at a time, while it is pruned and measured."""
    folder = saved("mixtral", model_folder, tmp_path / "mixtral", blocks=12)
    model = load_model(str(folder), device="cuda", stream=True)
    size = sum(parameter.nbytes for parameter in model.model.parameters())
    windows = torch.randint(42, (2, 8), generator=torch.Generator().manual_seed(1))
    pretended_gpu.reset_peak()
    for block in walk(model, windows):
        for linear in block.linears.values():
            assert linear.weight.device == pretended_gpu.device
            linear.weight[:, ::2] = 0
    found = measure_perplexity(model, windows)
    peak = pretended_gpu.peak
    on_cpu = load_model(str(folder), device="cpu", dtype="bfloat16")
    for linear in on_cpu.linears.values():
        linear.weight[:, ::2] = 0

    assert peak < size / 4
    assert found.perplexity == pytest.approx(measure_perplexity(on_cpu, windows).perplexity)
