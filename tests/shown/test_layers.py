"""Linears sorted by block and kind."""

import pytest

from pho_service.shown.report import LayerCell, layer_cells


def test_by_block_and_kind() -> None:
    """The block is the name up to the first number, the kind what follows it."""
    name = "model.layers.3.self_attn.q_proj"

    assert layer_cells({name: 0.25}, {name: 0.5}) == [
        LayerCell(block="model.layers.3", kind="self_attn.q_proj", error=0.25, sparsity=0.5)
    ]


def test_experts() -> None:
    """The experts of a block are one, by their mean; a shared expert is another kind."""
    names = ["h.0.experts.0.up", "h.0.experts.1.up", "h.0.shared.up"]
    cells = layer_cells(
        dict(zip(names, (0.1, 0.3, 0.5), strict=True)),
        dict(zip(names, (0.4, 0.5, 0.6), strict=True)),
    )

    assert [(cell.block, cell.kind) for cell in cells] == [
        ("h.0", "experts.up"), ("h.0", "shared.up"),
    ]  # fmt: skip
    assert (cells[0].error, cells[0].sparsity) == pytest.approx((0.2, 0.45))


@pytest.mark.parametrize("name", ["lm_head", "layers.3"])
def test_a_linear_that_is_in_no_block_has_none(name: str) -> None:
    assert layer_cells({name: 1.0}, {name: 0.0})[0].block == ""


def test_what_is_stored_of_a_cell_is_read_again_with_six_digits() -> None:
    (cell,) = layer_cells({"h.0.up": 1 / 3}, {"h.0.up": 0.5})

    assert cell.to_list() == ["h.0", "up", 0.333333, 0.5]
    assert LayerCell.of(cell.to_list()) == cell
