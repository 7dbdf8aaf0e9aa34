"""Linears sorted by block and kind."""

import pytest

from pho_service.shown.report import LayerCell, layer_cells


def test_the_block_is_the_name_up_to_the_first_number_the_kind_what_follows_it():
    name = "model.layers.3.self_attn.q_proj"

    assert layer_cells({name: 0.25}, {name: 0.5}) == [
        LayerCell(block="model.layers.3", kind="self_attn.q_proj", error=0.25, sparsity=0.5)
    ]
    for without in ("lm_head", "layers.3"):
        assert layer_cells({without: 1.0}, {without: 0.0})[0].block == ""


def test_the_experts_of_a_block_are_one_by_their_mean_a_shared_one_is_another_kind():
    names = ["h.0.experts.0.up", "h.0.experts.1.up", "h.0.shared.up"]
    cells = layer_cells(
        dict(zip(names, (0.1, 0.3, 0.5), strict=True)),
        dict(zip(names, (0.4, 0.5, 0.6), strict=True)),
    )

    assert [(cell.block, cell.kind) for cell in cells] == [
        ("h.0", "experts.up"), ("h.0", "shared.up"),
    ]  # fmt: skip
    assert (cells[0].error, cells[0].sparsity) == pytest.approx((0.2, 0.45))


def test_what_is_stored_of_a_cell_is_read_again_with_six_digits():
    (cell,) = layer_cells({"h.0.up": 1 / 3}, {"h.0.up": 0.5})

    assert cell.to_list() == ["h.0", "up", 0.333333, 0.5]
    assert LayerCell.of(cell.to_list()) == cell
