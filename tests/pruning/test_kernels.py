"""The compiled selections of the CPU mark what the plain torch versions mark."""

import importlib

import pytest
import torch
from numba.core.caching import FunctionCache

from pho_service.pruning import kernels
from pho_service.pruning.selection import (
    keep_highest,
    plain_add_digits,
    plain_keep_highest,
    plain_nm_mask,
)

GENERATOR = torch.Generator()


# Scores that are hard to select from.
KINDS = {
    "normal": lambda x: x,
    "positive": torch.abs,
    "ties": lambda x: x.abs().mul(2).round(),
    "wide": lambda x: (x * 20).exp(),
    "close": lambda x: 1 + x.abs() * 1e-6,
    "tiny": lambda x: x.abs() * 1e-42,
    "mostly zero": lambda x: x.abs() * (x > 1.3),
    "outliers": lambda x: torch.where(x.abs() > 2.5, 1e30, x.abs() * 1e-30),
    "signed zeros": lambda x: torch.where(x > 1, x, torch.copysign(torch.zeros(()), x)),
    "infinite": lambda x: torch.where(x > 1.5, torch.inf, x),
}


def drawn(kind, lines, n):
    return KINDS[kind](torch.randn(lines, n, generator=GENERATOR.manual_seed(n)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_line_keeps_its_own_number_of_scores_the_same_ones_as_by_sorting(kind):
    for n in (1, 2, 23, 24, 25, 576, 40_000):
        score = drawn(kind, 7, n)
        removed = torch.tensor([0, 1, n // 3, n // 2, n - 1, n, n]).clamp(0, n)

        assert torch.equal(kernels.keep_highest(score, removed), plain_keep_highest(score, removed))


@pytest.mark.parametrize("kind", KINDS)
def test_each_line_keeps_its_own_n_of_m_the_same_ones_as_by_counting_rivals(kind):
    for group in (2, 4, 7, 64):
        score = drawn(kind, 5, 12 * group)
        keep = torch.tensor([1, group - 1, group // 2, 1, 1]).clamp(1, group - 1)

        assert torch.equal(kernels.nm_mask(score, keep, group), plain_nm_mask(score, keep, group))


@pytest.mark.parametrize(("shift", "width", "prefix"), [(16, 16, 0), (0, 16, 16256), (22, 11, 0)])
def test_weights_are_added_up_as_bincount_does(shift, width, prefix):
    score = drawn("positive", 6, 3000)
    weights = torch.rand(6, generator=GENERATOR, dtype=torch.float64)
    ours, plain = (torch.zeros(1 << width, dtype=torch.float64) for _ in range(2))
    kernels.add_digits(score, weights, shift, width, prefix, ours)
    plain_add_digits(score, weights, shift, width, prefix, plain)

    assert float(plain.sum()) > 0
    assert torch.allclose(ours, plain, rtol=1e-12)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_lines_that_several_threads_share_out_are_marked_as_by_one():
    score = drawn("ties", 50, 3000)
    removed = torch.arange(50) * 60

    assert torch.equal(keep_highest(score, removed), plain_keep_highest(score, removed))


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """A function of a module of its own, whose machine code is kept beside it."""
    module = tmp_path.name  # another one for each test: numba imports it again
    (tmp_path / f"{module}.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(module).twice
    return function


def test_where_machine_code_cannot_be_kept_it_is_compiled_anew(twice, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", refuse)

    assert kernels._compiled(twice)(3) == 6


@pytest.mark.parametrize("fault", ["not readable", "empty", "broken"])
def test_what_was_kept_and_cannot_be_read_is_compiled_again(twice, tmp_path, fault):
    assert kernels._compiled(twice)(3) == 6
    kept = list(tmp_path.rglob("*.nb*"))
    for path in kept:
        path.unlink()
        if fault == "not readable":
            path.mkdir()
        else:
            path.write_bytes(b"" if fault == "empty" else b"broken")

    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    assert kernels._compiled(twice)(3) == 6


def test_nor_does_a_full_disk_keep_anything_from_being_computed(twice, tmp_path, limited_disk):
    compiled = kernels._compiled(twice)
    with limited_disk(10):
        found = compiled(3)

    assert found == 6
    assert not list(tmp_path.rglob("*.nb*"))
