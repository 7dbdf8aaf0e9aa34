"""Columns leave in the order that exact solves of every choice give, in float64."""

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.structured import (
    narrowed,
    removal_order,
)

WIDTH = 24


def case(width=WIDTH, rows=7):
    """Weights, the second moments of correlated inputs, and row weights, all float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = draw(4 * width, width // 2) @ draw(width // 2, width)
    inputs = (common + 2 * draw(4 * width, width)) * draw(width).exp()
    return draw(rows, width), inputs.T @ inputs / len(inputs), draw(rows).exp()


def damped(gram, damping):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def least_error(weight, gram, row_weights, kept, damping=0.01):
    """The weighted error when the columns ``kept`` make up for all others, and their weights."""
    matrix = damped(gram, damping)
    change, solution = weight.clone(), weight[:, kept]
    if kept:
        solution = torch.linalg.solve(matrix[kept][:, kept], (weight @ matrix)[:, kept].T).T
        change[:, kept] -= solution
    return float((row_weights * ((change @ matrix) * change).sum(dim=1)).sum()), solution


def columns(groups, group):
    return [g * group + offset for g in groups for offset in range(group)]


def greedy(weight, gram, row_weights, group, within):
    """Try every group at every step, each by a solve of its own."""
    left, order, errors = list(range(weight.shape[1] // group)), [], [0.0]
    gone = dict.fromkeys(within, 0)
    while left:
        fewest = min(gone[within[g]] for g in left)
        costs = {
            g: least_error(weight, gram, row_weights, columns([k for k in left if k != g], group))[
                0
            ]
            for g in left
            if gone[within[g]] == fewest
        }
        best = min(costs, key=costs.get)
        left.remove(best)
        gone[within[best]] += 1
        order.append(best)
        errors.append(costs[best])
    return order, errors


@pytest.mark.parametrize("within", [None, [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 2, 2]])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_each_step_is_the_best_one(group, within):
    count = WIDTH // group
    classes = [0] * count if within is None else [within[i * 6 // count] for i in range(count)]
    arguments = case()
    expected, errors = greedy(*arguments, group, classes)
    order = removal_order(
        *arguments, group=group, within=None if within is None else torch.tensor(classes),
        layer="linear",
    )  # fmt: skip

    assert order.groups.tolist() == expected
    torch.testing.assert_close(order.errors, torch.tensor(errors, dtype=torch.float64))
    assert (order.errors.diff() >= 0).all()


def test_every_width_beyond_what_the_matrices_catch_up_with_at_a_time():
    """150 columns are more than twice 64: errors are those of solves, in float32 nearly so."""
    weight, gram, row_weights = case(150)
    order = removal_order(weight, gram, row_weights, layer="linear")
    rough = removal_order(weight.float(), gram.float(), row_weights.float(), layer="linear")

    assert sorted(order.groups.tolist()) == list(range(150))
    for count in (1, 20, 86, 87, 149, 150):
        kept = order.kept(count).tolist()
        error, _ = least_error(weight, gram, row_weights, kept)
        assert order.errors[150 - count] == pytest.approx(error, rel=1e-9)
    torch.testing.assert_close(rough.errors, order.errors, rtol=1e-3, atol=0)


def test_one_of_each_class_leaves_before_any_gives_a_second():
    arguments = case()
    within = torch.tensor([0, 0, 1, 1, 2, 2])
    order = removal_order(*arguments, group=4, within=within, layer="linear")

    for first in (0, 3):
        assert set(within[order.groups[first : first + 3]].tolist()) == {0, 1, 2}
    assert within[order.kept(3)].tolist() == [0, 1, 2]


def test_dead_inputs_leave_first_and_cost_nothing():
    weight, gram, row_weights = case()
    gram[[3, 11]] = 0
    gram[:, [3, 11]] = 0
    order = removal_order(weight, gram, row_weights, layer="linear")

    assert set(order.groups[:2].tolist()) == {3, 11}
    assert order.errors[2] <= 1e-9 * order.errors[-1]


def test_inputs_that_are_all_dead():
    weight, gram, row_weights = case()
    order = removal_order(weight, torch.zeros_like(gram), row_weights, layer="linear")

    assert sorted(order.groups.tolist()) == list(range(WIDTH))


def test_a_copy_of_a_neuron_is_free_and_its_twin_takes_over():
    weight, gram, row_weights = case()
    twin = torch.arange(WIDTH)
    twin[5] = 9  # input 5 is the same number as input 9
    gram = gram[twin][:, twin]
    order = removal_order(weight, gram, row_weights, damping=1e-9, layer="linear")
    kept = torch.tensor([i for i in range(WIDTH) if i != order.groups[0]])
    after = narrowed(weight, gram, kept, damping=1e-9, layer="linear")

    assert int(order.groups[0]) in {5, 9}
    place = kept.tolist().index({5: 9, 9: 5}[int(order.groups[0])])
    torch.testing.assert_close(after[:, place], weight[:, 5] + weight[:, 9], rtol=1e-5, atol=1e-6)


def test_narrowed_is_least_squares():
    weight, gram, row_weights = case()
    root = torch.linalg.cholesky(damped(gram, 0.01)).T
    for kept in ([4], [0, 7, 3], list(range(WIDTH))):
        solution = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution.T
        after = narrowed(weight, gram, torch.tensor(kept), layer="linear")

        torch.testing.assert_close(after, solution)
        torch.testing.assert_close(after, least_error(weight, gram, row_weights, kept)[1])
    torch.testing.assert_close(after, weight)  # all stay


def test_a_linear_of_one_column():
    order = removal_order(
        torch.ones(2, 1), torch.full((1, 1), 3.0), torch.tensor([1.0, 2.0]), layer="linear"
    )

    assert order.groups.tolist() == [0]
    assert order.errors.tolist() == [0, pytest.approx(3 * 3 * 1.01)]


def test_what_cannot_be_solved_is_said_with_the_layer():
    weight, gram, row_weights = case()
    for broken, message in ((-gram, "positive definite"), (gram * torch.nan, "NaN")):
        with pytest.raises(NumericalError, match=f"down_proj: .*{message}") as caught:
            removal_order(weight, broken, row_weights, layer="down_proj")

        assert caught.value.layer == "down_proj"
    with pytest.raises(ValueError, match="group=5"):
        removal_order(weight, gram, row_weights, group=5, layer="down_proj")
    with pytest.raises(ValueError, match="within"):
        removal_order(weight, gram, row_weights, within=torch.zeros(3), layer="down_proj")
    with pytest.raises(ValueError, match="damping=-1"):
        narrowed(weight, gram, torch.tensor([0]), damping=-1, layer="down_proj")
