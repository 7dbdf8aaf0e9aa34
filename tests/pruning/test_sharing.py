"""Slopes are those of the divergence, and sparsity moves to where it costs less."""

import pytest
import torch

from pho_service.models.architecture import decoder_blocks
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.sharing import Border, border_places, fairer, slopes

SPARSITY = 0.6


@pytest.mark.parametrize("by_row", [False, True])
def test_a_border_has_the_next_weights_to_go_and_the_first_to_come_back(by_row):
    score = torch.rand(8, 50, generator=torch.Generator().manual_seed(0))
    lines = score if by_row else score.reshape(1, -1)
    places = border_places(lines, SPARSITY)

    ranks = lines.argsort(dim=1).argsort(dim=1).flatten()
    n = lines.shape[1]
    expected = (ranks >= round(0.56 * n) - 1) & (ranks <= round(0.64 * n) - 1)
    assert places.tolist() == expected.nonzero()[:, 0].tolist()


def test_of_a_large_linear_a_part_is_looked_at_that_is_spread_over_all_of_it():
    score = torch.rand(3000, 2000, generator=torch.Generator().manual_seed(0))
    for lines in (score, score.reshape(1, -1)):
        places = border_places(lines, 0.5)
        assert 90_000 < len(places) < 130_000
        near = score.flatten()[places]
        assert 0.4 < float(near.min()) < float(near.max()) < 0.6
        counts = torch.histc(places.float(), bins=10)
        assert float(counts.min()) > 0.9 * float(counts.max())


def test_a_slope_is_how_the_divergence_rises_when_the_border_goes(tiny_llama, linears, windows):
    """Kept weights shrink and removed ones turn against what they were, by a little."""
    model = tiny_llama.double()
    reference = dense_reference(model, windows[:1], top_k=7)
    dense = {name: linear.weight.clone() for name, linear in linears.items()}
    borders, keeps = {}, {}
    for name, weight in dense.items():
        score = weight.abs().float()
        borders[name] = Border.of(linears[name], score, SPARSITY, by_row=False)
        keeps[name] = score > score.flatten().kthvalue(int(SPARSITY * score.numel())).values
        linears[name].weight.mul_(keeps[name])
    blocks = [block for _, block in decoder_blocks(model)]
    (found,) = slopes(model, blocks, borders, reference)

    assert all(p.grad is None for p in model.parameters())
    for name in [*linears][:9]:
        border, weight = borders[name], linears[name].weight
        change = torch.zeros_like(weight)
        change[border.rows, border.columns] = dense[name][border.rows, border.columns]
        risen = []
        for step in (-1e-2, 1e-2):
            weight.sub_(step * change)
            risen.append(rate_divergence(model, reference))
            weight.add_(step * change)
        expected = (risen[1] - risen[0]) / 2e-2 / len(border.dense)
        assert found[name] == pytest.approx(expected, rel=5e-3, abs=1e-9)


def test_what_costs_more_than_the_mean_keeps_more_by_its_distance_in_deviations():
    found = fairer({"a": 1.0, "b": 3.0, "c": 5.0}, {"a": 1, "b": 2, "c": 1}, rate=0.3)

    assert found == pytest.approx({"a": -0.3 * 2**0.5, "b": 0.0, "c": 0.3 * 2**0.5})


def test_a_linear_far_off_moves_by_two_and_a_half_deviations_and_equal_ones_not_at_all():
    sizes = {str(n): 1 for n in range(100)}
    far = fairer({**dict.fromkeys(sizes, 0.0), "7": 1.0}, sizes, rate=0.2)
    even = fairer(dict.fromkeys(sizes, 0.7), sizes, rate=0.2)

    assert max(far.values()) == far["7"] == pytest.approx(0.5)
    assert set(even.values()) == {0.0}
