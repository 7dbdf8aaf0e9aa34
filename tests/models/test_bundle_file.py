"""Bundles on disk: what is written is read, and what is damaged is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pho_service.errors import BundleError, InvalidInput, OutputError
from pho_service.models.bundle_file import FORMAT, read_bundle, write_bundle
from pho_service.models.calibration import (
    cached_bundle,
    calibrate,
    calibration_text,
)
from pho_service.models.data_sets import TextSource
from pho_service.pruning.bundle import sample_bundle
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(
    samples=6, context_length=24, rows_per_layer=4, projection_rows=8, kernel_sizes=(3, 5)
)


@pytest.fixture
def bundle(linears, statistics):
    return sample_bundle(
        linears, statistics, rows_per_layer=4, kernel_sizes=(3, 5), seed=0,
        provenance={"key": "k", "model": {"name": "tiny"}},
    )  # fmt: skip


@pytest.fixture
def file(bundle, tmp_path):
    path = tmp_path / "b.safetensors"
    write_bundle(bundle, path)
    return path


def test_everything_comes_back_bit_for_bit(bundle, file):
    again = read_bundle(file)

    assert again.provenance == bundle.provenance
    assert again.kernel_sizes == (3, 5)
    for old, new in zip(bundle.layers, again.layers, strict=True):
        assert (old.name, old.out_features, old.input_index, old.output_energy) == (
            new.name, new.out_features, new.input_index, new.output_energy,
        )  # fmt: skip
        for field in ("row_index", "rows", "row_mean", "column_mean", "fisher"):
            assert torch.equal(getattr(old, field), getattr(new, field))
        assert all(torch.equal(old.window_means[k], new.window_means[k]) for k in (3, 5))
    for before, after in zip(bundle.inputs, again.inputs, strict=True):
        assert torch.equal(before.activation_norm, after.activation_norm)
        assert torch.equal(before.root, after.root)
    write_bundle(bundle, file.with_name("again"))
    assert file.with_name("again").read_bytes() == file.read_bytes()
    with pytest.raises(OutputError, match="was not written"):
        write_bundle(bundle, file.parent / "no-folder" / "b.safetensors")


def rewrite(file, metadata=None, change=lambda _: None):
    with safe_open(file, framework="pt") as opened:
        metadata = metadata or opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def cut_off(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def with_fewer_rows(file):
    with safe_open(file, framework="pt") as opened:
        document = json.loads(opened.metadata()[FORMAT])
    document["layers"][0]["out_features"] = 2
    rewrite(file, {FORMAT: json.dumps(document)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((cut_off(share), "damaged or truncated.*pho calibrate") for share in (0.0, 0.01, 0.999)),
        (lambda file: rewrite(file, {FORMAT: '{"version": 2}'}),
         "format version 2, but this PHO reads version 1"),
        (lambda file: rewrite(file, {"format": "pt"}), "no proxy bundle"),
        *((lambda file, text=text: rewrite(file, {FORMAT: text}), "is damaged")
          for text in ("", '{"version": 1}', '{"version": 1, "layers": 3}')),
        (with_fewer_rows, "is damaged"),
        (lambda file: rewrite(file, change=lambda t: t["layers.3.fisher"].mul_(1.001)),
         "its contents have the hash"),
        (lambda file: file.unlink(), "does not exist"),
    ],
)  # fmt: skip
def test_what_is_cut_off_another_file_or_not_what_was_written_is_refused(file, damage, message):
    damage(file)

    with pytest.raises(BundleError, match=message):
        read_bundle(file)


@pytest.mark.parametrize("name", ["layers.3.rows", "layers.3.fisher", "layers.3.window_mean.3"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, name: tensors.pop(name),
        lambda tensors, name: tensors[name].view(-1)[1:2].fill_(torch.nan),
        lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
    ],
    ids=["missing", "nan", "shape"],
)
def test_a_tensor_that_is_missing_misshapen_or_not_finite_is_named(file, name, change):
    rewrite(file, change=lambda tensors: change(tensors, name))

    with pytest.raises(BundleError, match=r"layers\.3\."):
        read_bundle(file)


@pytest.fixture
def source(texts):
    return TextSource(path=str(texts["calibration"]))


@pytest.fixture
def text(model, source):
    return calibration_text(model, source, SETTINGS)


def test_the_second_calibration_with_the_same_inputs_does_not_run_the_model(model, text, own_cache):
    first = cached_bundle(model, text, SETTINGS, own_cache)
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    second = cached_bundle(model, text, SETTINGS, own_cache)

    assert calls == []
    assert torch.equal(first.layers[5].rows, second.layers[5].rows)
    assert first.provenance == second.provenance


def test_a_damaged_file_in_the_cache_is_made_again(model, text, own_cache):
    first = cached_bundle(model, text, SETTINGS, own_cache)
    (path,) = own_cache.glob("bundles/*")
    path.write_bytes(path.read_bytes()[:1000])
    again = cached_bundle(model, text, SETTINGS, own_cache)

    assert torch.equal(first.inputs[2].root, again.inputs[2].root)


def test_products_in_bfloat16_give_nearly_the_same_bundle_of_another_key(model, text, source):
    settings = replace(SETTINGS, mixed_precision=True)
    mixed_text = calibration_text(model, source, settings)
    exact, mixed = calibrate(model, text, SETTINGS), calibrate(model, mixed_text, settings)

    assert mixed_text.bundle_key != text.bundle_key
    for a, b in zip(mixed.inputs[1:], exact.inputs[1:], strict=True):
        assert not torch.equal(a.root, b.root)
        assert float((a.root - b.root).norm() / b.root.norm()) < 0.02
    assert all(a.fisher.dtype == torch.float32 for a in mixed.layers)


def test_a_model_that_is_bfloat16_already_is_refused(model, text):
    model.model.to(torch.bfloat16)

    with pytest.raises(InvalidInput, match="loaded as bfloat16"):
        calibrate(model, text, replace(SETTINGS, mixed_precision=True))


def test_another_seed_text_setting_or_version_of_calibration_is_another_bundle_a_memory_is_not(
    model, texts, monkeypatch
):
    def key(name="calibration", **changes):
        source = TextSource(path=str(texts[name]))
        return calibration_text(model, source, replace(SETTINGS, **changes)).bundle_key

    keys = {key(), key(memory_bytes=2**40), key("report"), key(seed=1), key(rows_per_layer=5)}
    monkeypatch.setattr("pho_service.models.calibration.ALGORITHM", 1)

    assert len({*keys, key()}) == 5
