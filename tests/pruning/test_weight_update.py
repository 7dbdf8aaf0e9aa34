"""Weights that make up for those that went, against slow loops and closed forms."""

from itertools import pairwise

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.selection import keep_highest
from pho_service.pruning.weight_update import (
    inverse_factor,
    least_squares_update,
    obs_update,
    sparsegpt,
)


def inputs_gram(width, *, tokens=None, seed=0):
    """E[x x^T] of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * width
    rank = max(width // 4, 1)
    common = torch.randn(tokens, rank, generator=generator) @ torch.randn(
        rank, width, generator=generator
    )
    x = (common + torch.randn(tokens, width, generator=generator)).float()
    x *= torch.exp(0.5 * torch.randn(width, generator=generator))
    return x.T @ x / tokens


def weights(rows, width, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def wanda_mask(weight, gram, removed):
    return keep_highest(weight.abs() * gram.diagonal().sqrt(), removed)


def damped(gram, damping=0.01):
    """H + damping * mean(diag H) I, float64."""
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def textbook_obs(weight, mask, gram):
    """One row and one column at a time, with an explicit inverse for the columns that remain."""
    hessian = damped(gram)
    changed = weight.double().clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for i in range(weight.shape[0]):
            if not mask[i, j]:
                changed[i, j:] -= changed[i, j] / inverse[0, 0] * inverse[0]
                changed[i, j] = 0
    return changed


def slow_sparsegpt(weight, gram, choose, *, block):
    """The published loop, in float64; ``choose`` says which of a block go, given their scores."""
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    current, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        score = current[:, start:stop] ** 2 / factor.diagonal()[start:stop] ** 2
        mask[:, start:stop] = ~choose(score, start, stop)
        for j in range(start, stop):
            error = torch.where(mask[:, j], 0, current[:, j]) / factor[j, j]
            current[:, j:] -= error[:, None] * factor[j, j:]
    return torch.where(mask, current, 0), mask


def closed_form(weight, mask, gram):
    """Row by row, the normal equations over the weights that stay."""
    hessian = damped(gram)
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for i, kept in enumerate(mask):
        aim = hessian[kept] @ weight[i].double()
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], aim)
    return best


def damped_error(weight, changed, gram):
    difference = weight.double() - changed.double()
    return ((difference @ damped(gram)) * difference).sum(dim=1)


@pytest.mark.parametrize(("width", "tokens"), [(1, None), (40, None), (64, 16)])
def test_factor_is_the_cholesky_factor_of_the_inverse_of_a_damped_singular_matrix_too(
    width, tokens
):
    gram = inputs_gram(width, tokens=tokens)

    factor = inverse_factor(gram, layer="q")

    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-3 if tokens else 1e-6)
    product = factor.double().T @ factor.double() @ damped(gram)
    torch.testing.assert_close(product, torch.eye(width).double(), rtol=0, atol=1e-3)
    assert torch.equal(factor, factor.triu())
    dead = inverse_factor(torch.zeros(5, 5), layer="q")  # inputs with nothing to hand on
    assert torch.equal(dead, torch.eye(5))


def test_a_matrix_that_rounding_makes_indefinite_in_float32_is_factored_in_float64():
    x = torch.randint(-9, 10, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    gram = x.T @ x / 16  # whole numbers: exactly singular, and never negative
    damping = 1e-7
    single = gram + damping * gram.diagonal().mean() * torch.eye(64)
    assert int(torch.linalg.cholesky_ex(single.flip(0, 1)).info) > 0

    factor = inverse_factor(gram, damping=damping, layer="q")

    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, damping)), upper=True)
    tolerance = 1e-4 * float(expected.max())  # the inverse of such a matrix is itself rounded
    torch.testing.assert_close(factor.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.full((8, 8), float("nan")), "NaN or infinite"),
        (torch.diag(torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])), "more text.*damping"),
    ],
)
def test_what_damping_does_not_make_positive_definite_names_the_layer_and_the_way_out(
    gram, message
):
    with pytest.raises(NumericalError, match=rf"layers\.3\.q: .*{message}") as caught:
        inverse_factor(gram, layer="layers.3.q")

    assert caught.value.layer == "layers.3.q"


@pytest.mark.parametrize("block", [1, 3, 128])
def test_one_column_after_the_other_as_with_an_explicit_inverse_whatever_the_block(block):
    gram, weight = inputs_gram(37), weights(9, 37)
    mask = wanda_mask(weight, gram, 20)

    changed = obs_update(weight, mask, inverse_factor(gram, layer="q"), block=block)

    torch.testing.assert_close(
        changed.double(), textbook_obs(weight, mask, gram), rtol=1e-4, atol=1e-5
    )


def test_obs_update_without_a_dead_input_is_the_same():
    gram, weight = inputs_gram(24), weights(6, 24)
    gram[5], gram[:, 5] = 0, 0
    mask = wanda_mask(weight, gram, 12)
    live = torch.arange(24) != 5
    # The dead input counts in the mean of the diagonal.
    damping = 0.01 * float(gram.diagonal().mean() / gram.diagonal()[live].mean())
    factor = inverse_factor(gram[live][:, live], damping=damping, layer="q")

    changed = obs_update(weight, mask, inverse_factor(gram, layer="q"))

    torch.testing.assert_close(
        changed[:, live], obs_update(weight[:, live], mask[:, live], factor), rtol=1e-4, atol=1e-5
    )
    assert bool((changed[:, 5] == 0).all())


def test_a_gpu_solves_for_several_columns_at_once(pretended_gpu):
    gram, weight = inputs_gram(160), weights(24, 160)
    gram[:, 7] = gram[7] = 0  # a dead input
    factor, mask = inverse_factor(gram, layer="q"), wanda_mask(weight, gram, 80)
    on_card = [tensor.cuda() for tensor in (weight, mask, factor)]
    with pretended_gpu.counting() as counts:
        changed = obs_update(*on_card)
    chosen, kept = sparsegpt(on_card[0], on_card[2], keep=2, group=4)
    expected, expected_kept = sparsegpt(weight, factor, keep=2, group=4)

    assert counts.launches < 160
    assert counts.waits == 0
    assert torch.allclose(changed.cpu(), obs_update(weight, mask, factor), rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.cpu(), expected_kept)
    assert torch.allclose(chosen.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_no_update_waits_for_a_gpu_in_a_loop(pretended_gpu):
    def counted(rows, width):
        gram, weight = inputs_gram(width).cuda(), weights(rows, width).cuda()
        mask, factor = wanda_mask(weight, gram, width // 2), inverse_factor(gram, layer="q")
        for update in (
            lambda: inverse_factor(gram, layer="q"),
            lambda: obs_update(weight, mask, factor),
            lambda: least_squares_update(weight, mask, gram, start=weight * mask, steps=4),
            lambda: sparsegpt(weight, factor, removed=rows * width // 2),
            lambda: sparsegpt(weight, factor, keep=2, group=4),
        ):
            with pretended_gpu.counting() as counts:
                update()
            yield counts.launches, counts.waits

    low, high, wide = (list(counted(*shape)) for shape in ((12, 32), (96, 32), (12, 48)))

    assert low == high
    assert [waits for _, waits in low] == [waits for _, waits in wide] == [3, 0, 1, 0, 0]


@pytest.mark.parametrize("removed", [0, 1, 333, 900])
def test_sparsegpt_removes_exactly_so_many(removed):
    gram, weight = inputs_gram(50), weights(18, 50)

    changed, mask = sparsegpt(weight, inverse_factor(gram, layer="q"), removed=removed, block=16)

    assert int((~mask).sum()) == removed
    assert bool((changed[~mask] == 0).all())
    for columns in mask.split(16, dim=1):
        share = removed * columns.shape[1] / 50
        assert abs(int((~columns).sum()) - share) < 1


def lowest_half(score, _start, _stop):
    gone = torch.zeros(score.numel(), dtype=torch.bool)
    gone[score.flatten().argsort()[: score.numel() // 2]] = True
    return gone.view(score.shape)


def lowest_two(score, _start, _stop):
    gone = torch.zeros(score.shape, dtype=torch.bool)
    return gone.scatter_(1, score.argsort(dim=1)[:, :2], value=True)


@pytest.mark.parametrize(
    ("counts", "block", "choose", "chosen"),
    [
        ({"removed": 12 * 24}, 16, lowest_half, 16),
        # each run of four is chosen after the columns before it, whatever the block
        *(({"keep": 2, "group": 4}, block, lowest_two, 4) for block in (1, 20, 128)),
    ],
)
def test_sparsegpt_is_the_published_loop(counts, block, choose, chosen):
    gram, weight = inputs_gram(48), weights(12, 48)

    expected, expected_mask = slow_sparsegpt(weight, gram, choose, block=chosen)
    changed, mask = sparsegpt(weight, inverse_factor(gram, layer="q"), **counts, block=block)

    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(changed.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [{"removed": 2000}, {"keep": 2, "group": 4}])
def test_fed_with_the_mask_that_sparsegpt_chose_obs_update_gives_sparsegpts_weights(counts):
    gram, weight = inputs_gram(200), weights(20, 200)
    factor = inverse_factor(gram, layer="q")

    changed, mask = sparsegpt(weight, factor, **counts)

    torch.testing.assert_close(obs_update(weight, mask, factor), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [{"removed": 12}, {"keep": 1, "group": 4}])
def test_sparsegpt_removes_dead_inputs_first(counts):
    gram, weight = inputs_gram(24) * 1e-6, weights(12, 24)
    gram[5], gram[:, 5] = 0, 0
    weight[:, 5] = 100

    _, mask = sparsegpt(weight, inverse_factor(gram, layer="q"), **counts)

    assert not bool(mask[:, 5].any())
    # of equal weights on equal inputs the first of the block stay
    _, mask = sparsegpt(torch.ones(2, 4), inverse_factor(torch.eye(4), layer="q"), removed=3)
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]


def test_the_same_tensors_give_the_same_bits_and_bfloat16_is_what_it_is_in_float32():
    gram, weight = inputs_gram(160), weights(24, 160).bfloat16()
    factor = inverse_factor(gram, layer="q")

    before = weight.clone()
    (first, mask), (single, same) = (
        sparsegpt(each, factor, removed=1900) for each in (weight, weight.float())
    )
    changed, expected = (obs_update(each, mask, factor) for each in (weight, weight.float()))

    assert torch.equal(first, single)
    assert torch.equal(mask, same)
    assert torch.equal(changed, expected)
    assert first.dtype == changed.dtype == torch.float32
    assert torch.equal(weight, before)


@pytest.mark.parametrize("updated", [True, False])
def test_enough_steps_give_the_exact_solution_of_the_normal_equations_from_any_start(updated):
    gram, weight = inputs_gram(32), weights(8, 32)
    mask = wanda_mask(weight, gram, 16)
    start = obs_update(weight, mask, inverse_factor(gram, layer="q")) if updated else weight

    changed = least_squares_update(weight, mask, gram, start=start, steps=60)

    torch.testing.assert_close(
        changed.double(), closed_form(weight, mask, gram), rtol=1e-3, atol=1e-4
    )
    assert bool((changed[~mask] == 0).all())


def test_least_squares_never_raises_the_error_of_a_row():
    gram, weight = inputs_gram(64), weights(16, 64)
    mask = wanda_mask(weight, gram, 32)
    start = obs_update(weight, mask, inverse_factor(gram, layer="q"))

    errors = [damped_error(weight, start, gram)]
    for steps in (1, 2, 3, 5, 8, 20, 60):
        changed = least_squares_update(weight, mask, gram, start=start, steps=steps)
        errors.append(damped_error(weight, changed, gram))

    assert bool((errors[1] < errors[0]).all())
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-6)).all())


def test_least_squares_lives_with_dead_inputs_and_rows_without_weights():
    gram, weight = inputs_gram(16), weights(4, 16)
    gram[3], gram[:, 3] = 0, 0
    mask = wanda_mask(weight, gram, 8)
    mask[2] = False

    changed = least_squares_update(weight, mask, gram, start=weight, damping=0)
    nothing = least_squares_update(weight, mask, torch.zeros(16, 16), start=weight)

    assert bool(changed.isfinite().all())
    assert bool((changed[2] == 0).all())
    assert torch.equal(nothing, weight * mask)
