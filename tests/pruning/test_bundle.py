"""Proxy bundles, against the model that they are sampled from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pho_service.errors import BundleError
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.scores import window_mean
from pho_service.pruning.statistics import PrunableLinear, Statistics

Linears = dict[str, PrunableLinear]


@pytest.fixture
def bundle(linears: Linears, statistics: Statistics) -> ProxyBundle:
    """10 rows of each linear."""
    return sample_bundle(linears, statistics, rows_per_layer=10, kernel_sizes=(5, 3), seed=0)


def test_rows(linears: Linears, bundle: ProxyBundle) -> None:
    """Sampled rows are the model's, distinct and in order, layer by layer in model order."""
    assert [layer.name for layer in bundle.layers] == list(linears)
    for layer in bundle.layers:
        weight = linears[layer.name].weight
        assert torch.equal(layer.rows, weight[layer.row_index])
        assert layer.row_index.tolist() == sorted(set(layer.row_index.tolist()))
        assert len(layer.rows) == 10
        assert (layer.out_features, layer.in_features) == weight.shape


def test_means(linears: Linears, bundle: ProxyBundle) -> None:
    """Means are those of the whole layer, not of the sample."""
    for layer in bundle.layers:
        magnitude = linears[layer.name].weight.abs()

        torch.testing.assert_close(layer.row_mean, magnitude.mean(dim=1)[layer.row_index])
        torch.testing.assert_close(layer.column_mean, magnitude.mean(dim=0))
        for k in (3, 5):
            torch.testing.assert_close(
                layer.window_means[k], window_mean(magnitude, k)[layer.row_index]
            )


def test_output_energy_is_the_mean_over_calibration_tokens_of_the_outputs_squared_length(
    tiny_llama: LlamaForCausalLM, linears: Linears, windows: Tensor, bundle: ProxyBundle
) -> None:
    energy = dict.fromkeys(linears, 0.0)

    def add(name: str, output: Tensor) -> None:
        energy[name] += float(output.double().square().sum())

    for name, linear in linears.items():
        linear.module.register_forward_hook(lambda _m, _a, output, name=name: add(name, output))
    with torch.no_grad():
        for window in windows:
            tiny_llama(input_ids=window[None])

    assert {layer.name: layer.output_energy for layer in bundle.layers} == pytest.approx(
        {name: total / windows.numel() for name, total in energy.items()}, rel=1e-4
    )


@pytest.mark.parametrize("rows_per_layer", [0, 64, 1000])
def test_all_rows(linears: Linears, statistics: Statistics, rows_per_layer: int) -> None:
    """0 rows, or at least as many as there are, takes all."""
    bundle = sample_bundle(
        linears, statistics, rows_per_layer=rows_per_layer, kernel_sizes=(3,), seed=0
    )

    for layer in bundle.layers:
        assert torch.equal(layer.rows, linears[layer.name].weight)


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_the_same_seed_samples_the_same_rows_another_seed_others(
    linears: Linears, statistics: Statistics, bundle: ProxyBundle, seed: int, *, same: bool
) -> None:
    again = sample_bundle(linears, statistics, rows_per_layer=10, kernel_sizes=(3,), seed=seed)
    pairs = zip(bundle.layers, again.layers, strict=True)

    assert all(torch.equal(a.row_index, b.row_index) for a, b in pairs) is same


def test_layers_of_one_shape_do_not_all_sample_the_same_rows(bundle: ProxyBundle) -> None:
    sampled = {tuple(layer.row_index.tolist()) for layer in bundle.layers if layer.in_features > 32}

    assert len(sampled) == 2


def test_statistics(linears: Linears, statistics: Statistics, bundle: ProxyBundle) -> None:
    """The statistics come back in full, Fisher weights of rows outside the sample included."""
    back = bundle.statistics()

    assert back.input_of == statistics.input_of
    for name in linears:
        assert torch.equal(back.fisher[name], statistics.fisher[name])
        assert torch.equal(back.activation_norm(name), statistics.activation_norm(name))


def test_counts(linears: Linears, bundle: ProxyBundle) -> None:
    """A bundle counts all weights of the model, and names its kernel sizes in order."""
    assert bundle.weights == sum(linear.module.weight.numel() for linear in linears.values())  # type: ignore[operator, union-attr]
    assert bundle.kernel_sizes == (3, 5)
    assert [layer.kind for layer in bundle.layers[:5]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
    ]  # fmt: skip


def test_progress_is_told_once_a_linear(linears: Linears, statistics: Statistics) -> None:
    told: list[int] = []
    sample_bundle(
        linears, statistics, rows_per_layer=2, kernel_sizes=(3,), seed=0, advance=told.append
    )

    assert told == [1] * 14


def test_owns_its_tensors(linears: Linears, bundle: ProxyBundle) -> None:
    """Changing the model afterwards does not change the bundle."""
    layer = bundle.layers[0]
    before = layer.rows.clone()
    linears[layer.name].weight.zero_()

    assert torch.equal(layer.rows, before)


def test_all_rows_own_their_tensors(linears: Linears, statistics: Statistics) -> None:
    bundle = sample_bundle(linears, statistics, rows_per_layer=0, kernel_sizes=(3,), seed=0)
    layer = bundle.layers[0]
    before = layer.rows.clone()
    linears[layer.name].weight.zero_()

    assert torch.equal(layer.rows, before)


def test_accepts_its_model(linears: Linears, bundle: ProxyBundle) -> None:
    """A bundle accepts the model that it was made from, and in bfloat16 as well."""
    bundle.check_model(linears)
    for linear in linears.values():
        linear.module.bfloat16()
    bundle.check_model(linears)

    linears[bundle.layers[0].name].weight[bundle.layers[0].row_index[0], 0] += 1
    with pytest.raises(BundleError):
        bundle.check_model(linears)


def rename(linears: Linears) -> None:
    """One linear of another name."""
    linears["model.layers.1.mlp.last"] = linears.pop("model.layers.1.mlp.down_proj")


def drop(linears: Linears) -> None:
    """One linear less."""
    del linears["model.layers.1.mlp.down_proj"]


def reshape(linears: Linears) -> None:
    """One linear with a row less."""
    name = "model.layers.1.mlp.down_proj"
    weight = linears[name].weight
    narrow = nn.Linear(64, 31, bias=False)
    narrow.weight.data = weight[:31].clone()
    linears[name] = PrunableLinear(name=name, module=narrow)


@pytest.mark.parametrize("change", [rename, drop, reshape])
def test_other_names_or_shapes_are_refused_and_the_message_names_a_linear_that_differs(
    linears: Linears, bundle: ProxyBundle, change: Callable[[Linears], None]
) -> None:
    change(linears)

    with pytest.raises(BundleError, match=r"another model.*model\.layers\.1\.mlp"):
        bundle.check_model(linears)


def test_refuses_changed_weight(linears: Linears, bundle: ProxyBundle) -> None:
    """One weight of a sampled row that differs in its last bit is refused by name."""
    layer = bundle.layers[-1]
    row = linears[layer.name].weight[int(layer.row_index[3])]
    row[7] = torch.nextafter(row[7], torch.tensor(9.0))

    with pytest.raises(BundleError, match=r"layers\.1\.mlp\.down_proj differ"):
        bundle.check_model(linears)
