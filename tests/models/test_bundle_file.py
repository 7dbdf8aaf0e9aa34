"""Bundles on disk: what is written is read, and what is damaged is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pho_service.errors import BundleError, InvalidInput, OutputError
from pho_service.models.bundle_file import FORMAT, read_bundle, write_bundle
from pho_service.models.calibration import (
    CalibrationText,
    cached_bundle,
    calibrate,
    calibration_text,
)
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(
    samples=6, context_length=24, rows_per_layer=4, projection_rows=8, kernel_sizes=(3, 5)
)


@pytest.fixture
def bundle(linears: dict[str, PrunableLinear], statistics: Statistics) -> ProxyBundle:
    """A bundle of the tiny model."""
    return sample_bundle(
        linears, statistics, rows_per_layer=4, kernel_sizes=(3, 5), seed=0,
        provenance={"key": "k", "model": {"name": "tiny"}},
    )  # fmt: skip


@pytest.fixture
def file(bundle: ProxyBundle, tmp_path: Path) -> Path:
    """The same on disk."""
    path = tmp_path / "b.safetensors"
    write_bundle(bundle, path)
    return path


def test_everything_comes_back_bit_for_bit(bundle: ProxyBundle, file: Path) -> None:
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


def test_the_same_bundle_is_the_same_file(bundle: ProxyBundle, file: Path, tmp_path: Path) -> None:
    write_bundle(bundle, tmp_path / "c.safetensors")

    assert (tmp_path / "c.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_wherever_it_ends(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(BundleError, match=r"damaged or truncated.*pho calibrate"):
        read_bundle(file)


def rewrite(file: Path, metadata: dict[str, str]) -> None:
    """The same tensors with other metadata."""
    save_file(tensors_of(file), file, metadata=metadata)


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Copies of the tensors, so that the file may be written again."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def test_another_format_version_is_told_from_damage(file: Path) -> None:
    rewrite(file, {FORMAT: '{"version": 2}'})

    with pytest.raises(BundleError, match="format version 2, but this PHO reads version 1"):
        read_bundle(file)


def test_a_models_weights_are_no_bundle(file: Path) -> None:
    rewrite(file, {"format": "pt"})

    with pytest.raises(BundleError, match="no proxy bundle"):
        read_bundle(file)


@pytest.mark.parametrize(
    "document",
    ["", "[]", '{"version": 1}', "[" * 100_000, "1" * 5000, '{"version": 1, "layers": 3}'],
)
def test_a_header_that_is_no_document_is_refused(file: Path, document: str) -> None:
    rewrite(file, {FORMAT: document})

    with pytest.raises(BundleError, match="is damaged"):
        read_bundle(file)


@pytest.mark.parametrize("field", ["rows", "fisher", "window_mean.3"])
@pytest.mark.parametrize("how", ["missing", "nan", "shape"])
def test_bad_tensor(file: Path, field: str, how: str) -> None:
    """A tensor that is missing, misshapen or not finite is named."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = tensors_of(file)
    name = f"layers.3.{field}"
    if how == "missing":
        del tensors[name]
    elif how == "nan":
        tensors[name].view(-1)[1] = torch.nan
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata=metadata)

    with pytest.raises(BundleError, match=r"layers\.3\."):
        read_bundle(file)


def test_row_numbers_must_lie_in_the_layer(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    document = json.loads(metadata[FORMAT])
    document["layers"][0]["out_features"] = 2
    save_file(tensors_of(file), file, metadata={FORMAT: json.dumps(document)})

    with pytest.raises(BundleError, match="is damaged"):
        read_bundle(file)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        read_bundle(tmp_path / "none.safetensors")


def test_unwritable(bundle: ProxyBundle, tmp_path: Path) -> None:
    """Where nothing can be written, nothing is, and the reason is told."""
    with pytest.raises(OutputError, match="was not written"):
        write_bundle(bundle, tmp_path / "no-folder" / "b.safetensors")


@pytest.fixture
def calibrating(
    model_folder: Path, texts: dict[str, Path]
) -> tuple[LanguageModel, CalibrationText]:
    """The tiny model and its calibration windows."""
    model = load_model(str(model_folder), device="cpu")
    source = TextSource(path=str(texts["calibration"]))
    return model, calibration_text(model, source, SETTINGS)


def test_cached(calibrating: tuple[LanguageModel, CalibrationText], own_cache: Path) -> None:
    """The second calibration with the same inputs does not run the model."""
    model, text = calibrating
    first = cached_bundle(model, text, SETTINGS, own_cache)
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    second = cached_bundle(model, text, SETTINGS, own_cache)

    assert calls == []
    assert torch.equal(first.layers[5].rows, second.layers[5].rows)
    assert first.provenance == second.provenance


def test_damaged_cache(calibrating: tuple[LanguageModel, CalibrationText], own_cache: Path) -> None:
    """A damaged file in the cache is made again."""
    model, text = calibrating
    first = cached_bundle(model, text, SETTINGS, own_cache)
    (path,) = own_cache.glob("bundles/*")
    path.write_bytes(path.read_bytes()[:1000])
    again = cached_bundle(model, text, SETTINGS, own_cache)

    assert torch.equal(first.inputs[2].root, again.inputs[2].root)


def test_key_of_another_algorithm(
    calibrating: tuple[LanguageModel, CalibrationText],
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an older calibration has left in the cache is not taken for the present one's."""
    model, text = calibrating
    monkeypatch.setattr("pho_service.models.calibration.ALGORITHM", 1)
    older = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)

    assert torch.equal(older.calibration, text.calibration)
    assert older.bundle_key != text.bundle_key


def test_products_in_bfloat16_give_nearly_the_same_bundle_of_another_key(
    calibrating: tuple[LanguageModel, CalibrationText], texts: dict[str, Path]
) -> None:
    model, text = calibrating
    settings = replace(SETTINGS, mixed_precision=True)
    mixed_text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    exact, mixed = calibrate(model, text, SETTINGS), calibrate(model, mixed_text, settings)

    assert mixed_text.bundle_key != text.bundle_key
    for a, b in zip(mixed.inputs[1:], exact.inputs[1:], strict=True):
        assert not torch.equal(a.root, b.root)
        assert float((a.root - b.root).norm() / b.root.norm()) < 0.02
    assert all(a.fisher.dtype == torch.float32 for a in mixed.layers)


def test_a_model_that_is_bfloat16_already_is_refused(
    calibrating: tuple[LanguageModel, CalibrationText],
) -> None:
    model, text = calibrating
    model.model.to(torch.bfloat16)

    with pytest.raises(InvalidInput, match="loaded as bfloat16"):
        calibrate(model, text, replace(SETTINGS, mixed_precision=True))


def test_key(calibrating: tuple[LanguageModel, CalibrationText], texts: dict[str, Path]) -> None:
    """Another seed, text or setting is another bundle."""
    model, text = calibrating
    other_seed = CalibrationSettings(**{**SETTINGS.__dict__, "seed": 1})
    other_rows = CalibrationSettings(**{**SETTINGS.__dict__, "rows_per_layer": 5})
    keys = {
        text.bundle_key,
        calibration_text(model, TextSource(path=str(texts["report"])), SETTINGS).bundle_key,
        *(
            calibration_text(model, TextSource(path=str(texts["calibration"])), s).bundle_key
            for s in (other_seed, other_rows)
        ),
    }

    assert len(keys) == 4


def test_changed_contents(file: Path) -> None:
    """A file whose tensors are not those that were written is refused by its hash."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["layers.3.fisher"] = tensors["layers.3.fisher"] * 1.001
    save_file(tensors, file, metadata=metadata)

    with pytest.raises(BundleError, match="its contents have the hash"):
        read_bundle(file)
