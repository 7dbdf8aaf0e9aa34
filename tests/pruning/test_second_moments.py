"""Streamed sums of one input, against float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pho_service.pruning.statistics import (
    PANEL,
    SecondMoment,
    add_gram_,
    mirrored_,
    square_root,
    tensor_cores,
)


def random_tokens(tokens, width, seed=0):
    """(tokens, width), float32, with one channel that all others follow a little."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return x + 0.5 * x[:, :1]


def projection(x, rows, seed, parts=1):
    """The sum of a projection's rows, x given in so many parts."""
    moment = SecondMoment(x.shape[1], x.device, projection_rows=rows, seed=seed)
    for part in x.chunk(parts):
        moment.add(part)
    return moment.moment


def test_each_token_is_in_one_row():
    moment = projection(torch.eye(50), rows=8, seed=3)

    assert torch.equal(moment.abs().sum(dim=0), torch.ones(50))
    assert 0 < int((moment < 0).sum()) < 50
    assert int((moment != 0).any(dim=1).sum()) == 8


def test_the_energy_is_right_on_average_and_varies_by_2_over_its_rows():
    x, rows = random_tokens(40, 6).double(), 4
    direction = torch.arange(6.0, dtype=torch.float64) - 2
    along = (x @ direction).square()  # of each token
    exact = along.sum()
    energies = torch.stack(
        [(projection(x, rows, seed).double() @ direction).square().sum() for seed in range(2000)]
    )
    pairs = exact.square() - along.square().sum()  # over i != j

    assert float(energies.mean()) == pytest.approx(float(exact), rel=0.05)
    assert float(energies.var()) == pytest.approx(float(2 / rows * pairs), rel=0.2)


@pytest.mark.parametrize("width", [7, PANEL, 2 * PANEL + 3])
def test_the_upper_triangle_is_summed_panel_by_panel_and_mirrored(width):
    x = random_tokens(20, width)
    gram = torch.zeros(width, width)
    for part in x.chunk(3):
        add_gram_(gram, part)
    mirrored_(gram)

    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_singular_second_moment_has_a_root(tokens):
    x = random_tokens(tokens, 20) * torch.logspace(-4, 4, 20)
    x[:, 5] = 0
    gram = (x.T @ x) / tokens
    root = square_root(gram).double()
    size = gram.diagonal().double().sqrt()

    error = (root.T @ root - gram).abs() / (size[:, None] * size).clamp_min(1e-30)
    assert float(error.max()) < 1e-5
    assert bool((root[:, 5] == 0).all())


@pytest.mark.parametrize("rows", [0, 16])
def test_sums_are_float32_where_products_around_them_are_not(rows):
    x = random_tokens(30, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = projection(x, rows, seed=1)

    assert torch.equal(mixed, projection(x, rows, seed=1))


class Products(TorchDispatchMode):
    """Notes how precisely a GPU would multiply, product by product."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "addmm" in str(function):
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("dtype", "uses_them"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_tensor_cores_are_for_16_bits(dtype, *, uses_them):
    before = torch.backends.cuda.matmul.fp32_precision
    moment = SecondMoment(8, torch.device("cpu"), projection_rows=0, seed=0)
    with Products() as products:
        moment.add(torch.ones(3, 8, dtype=dtype))

    assert products.precisions == (["tf32"] if uses_them else [before])
    assert torch.backends.cuda.matmul.fp32_precision == before != "tf32"


def test_tensor_cores_of_an_older_torch(monkeypatch):
    matmul = SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr("torch.backends.cuda.matmul", matmul)
    with tensor_cores():
        assert matmul.allow_tf32 is True

    assert vars(matmul) == {"allow_tf32": False}


def test_a_gpus_gram_matrix_is_one_launch_a_panel(pretended_gpu):
    x = torch.randn(9, 600, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(600, 600)
    add_gram_(expected, x)
    gram = torch.zeros(600, 600, device="cuda")
    there = x.to("cuda")
    with pretended_gpu.counting() as counts:
        add_gram_(gram, there)

    assert counts.by_operation == {"addmm_": 1}
    assert counts.waits == 0
    torch.testing.assert_close(mirrored_(gram).cpu(), mirrored_(expected))


@pytest.mark.parametrize("rows", [0, 5])
def test_tokens_are_added_without_a_wait(pretended_gpu, rows):
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    here = SecondMoment(12, torch.device("cpu"), projection_rows=rows, seed=3)
    there = SecondMoment(12, torch.device("cuda"), projection_rows=rows, seed=3)
    here.add(x)
    tokens = x.to("cuda")
    with pretended_gpu.counting() as counts:
        there.add(tokens)

    assert counts.waits == 0
    assert counts.h2d_copies == (1 if rows else 0)
    torch.testing.assert_close(there.moment.cpu(), here.moment, rtol=0 if rows else 1e-6, atol=0)
