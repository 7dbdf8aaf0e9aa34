"""Proxy bundles, against the model that they are sampled from."""

import pytest
import torch
from torch import nn

from pho_service.errors import BundleError
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.scores import window_mean
from pho_service.pruning.statistics import PrunableLinear


@pytest.fixture
def bundle(linears, statistics):
    return sample_bundle(linears, statistics, rows_per_layer=10, kernel_sizes=(5, 3), seed=0)


def test_sampled_rows_are_the_models_distinct_and_in_order_and_all_weights_are_counted(
    linears, bundle
):
    assert [layer.name for layer in bundle.layers] == list(linears)
    for layer in bundle.layers:
        weight = linears[layer.name].weight
        assert torch.equal(layer.rows, weight[layer.row_index])
        assert layer.row_index.tolist() == sorted(set(layer.row_index.tolist()))
        assert len(layer.rows) == 10
        assert (layer.out_features, layer.in_features) == weight.shape
    assert bundle.weights == sum(linear.weight.numel() for linear in linears.values())
    assert bundle.kernel_sizes == (3, 5)
    assert [layer.kind for layer in bundle.layers[:5]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
    ]  # fmt: skip
    wide = [tuple(layer.row_index.tolist()) for layer in bundle.layers if layer.in_features > 32]
    assert len({*wide}) == 2  # layers of one shape do not all sample the same ones


def test_means(linears, bundle):
    """Means are those of the whole layer, not of the sample."""
    for layer in bundle.layers:
        magnitude = linears[layer.name].weight.abs()

        torch.testing.assert_close(layer.row_mean, magnitude.mean(dim=1)[layer.row_index])
        torch.testing.assert_close(layer.column_mean, magnitude.mean(dim=0))
        for k in (3, 5):
            torch.testing.assert_close(
                layer.window_means[k], window_mean(magnitude, k)[layer.row_index]
            )


def test_the_same_seed_samples_the_same_rows_another_seed_others(linears, statistics, bundle):
    for seed in (0, 1):
        again = sample_bundle(linears, statistics, rows_per_layer=10, kernel_sizes=(3,), seed=seed)
        pairs = zip(bundle.layers, again.layers, strict=True)

        assert all(torch.equal(a.row_index, b.row_index) for a, b in pairs) is (seed == 0)


def test_statistics(linears, statistics, bundle):
    """The statistics come back in full, Fisher weights of rows outside the sample included."""
    back = bundle.statistics()

    assert back.input_of == statistics.input_of
    for name in linears:
        assert torch.equal(back.fisher[name], statistics.fisher[name])
        assert torch.equal(back.activation_norm(name), statistics.activation_norm(name))


@pytest.mark.parametrize("rows", [0, 10])
def test_changing_the_model_afterwards_does_not_change_the_bundle(linears, statistics, rows):
    bundle = sample_bundle(linears, statistics, rows_per_layer=rows, kernel_sizes=(3,), seed=0)
    layer = bundle.layers[0]
    before = layer.rows.clone()
    linears[layer.name].weight.zero_()

    assert torch.equal(layer.rows, before)


def test_accepts_its_model(linears, bundle):
    """A bundle accepts the model that it was made from, and in bfloat16 as well."""
    bundle.check_model(linears)
    for linear in linears.values():
        linear.module.bfloat16()
    bundle.check_model(linears)


@pytest.mark.parametrize("instead", ["last", "down_proj", None])
def test_other_names_or_shapes_are_refused_and_the_message_names_a_linear_that_differs(
    linears, bundle, instead
):
    del linears["model.layers.1.mlp.down_proj"]
    if instead:
        name = f"model.layers.1.mlp.{instead}"
        linears[name] = PrunableLinear(name=name, module=nn.Linear(64, 31, bias=False))

    with pytest.raises(BundleError, match=r"another model.*model\.layers\.1\.mlp"):
        bundle.check_model(linears)


def test_refuses_changed_weight(linears, bundle):
    """One weight of a sampled row that differs in its last bit is refused by name."""
    layer = bundle.layers[-1]
    row = linears[layer.name].weight[int(layer.row_index[3])]
    row[7] = torch.nextafter(row[7], torch.tensor(9.0))

    with pytest.raises(BundleError, match=r"layers\.1\.mlp\.down_proj differ"):
        bundle.check_model(linears)
