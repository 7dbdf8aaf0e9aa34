"""The compiled selections of the CPU mark what the plain torch versions mark."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pho_service.pruning import kernels
from pho_service.pruning.scores import plain_combine_terms
from pho_service.pruning.selection import (
    keep_highest,
    plain_add_digits,
    plain_keep_highest,
    plain_nm_mask,
)

GENERATOR = torch.Generator()


def drawn(kind: str, lines: int, n: int) -> Tensor:
    """Scores of a kind that is hard to select from."""
    generator = GENERATOR.manual_seed(n)
    normal = torch.randn(lines, n, generator=generator)
    return {
        "normal": normal,
        "positive": normal.abs(),
        "ties": normal.abs().mul(2).round(),
        "wide": (normal * 20).exp(),
        "close": 1 + normal.abs() * 1e-6,
        "tiny": normal.abs() * 1e-42,
        "mostly zero": normal.abs() * (torch.rand(lines, n, generator=generator) < 0.1),
        "outliers": torch.where(normal.abs() > 2.5, 1e30, normal.abs() * 1e-30),
        "signed zeros": torch.where(normal > 1, normal, torch.copysign(torch.zeros(()), normal)),
        "infinite": torch.where(normal > 1.5, torch.inf, normal),
    }[kind]


KINDS = (
    "normal", "positive", "ties", "wide", "close", "tiny", "mostly zero", "outliers",
    "signed zeros", "infinite",
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 23, 24, 25, 576, 5000, 40_000])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_highest(kind: str, n: int) -> None:
    """Each line keeps its own number of scores, the same ones as by sorting."""
    score = drawn(kind, 7, n)
    removed = torch.tensor([0, 1, n // 3, n // 2, n - 1, n, n]).clamp(0, n)

    assert torch.equal(kernels.keep_highest(score, removed), plain_keep_highest(score, removed))


@pytest.mark.parametrize("group", [2, 4, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_nm_mask(kind: str, group: int) -> None:
    """Each line keeps its own N of M, the same ones as by counting rivals."""
    score = drawn(kind, 5, 12 * group)
    keep = torch.tensor([1, group - 1, group // 2, 1, 1]).clamp(1, group - 1)

    assert torch.equal(kernels.nm_mask(score, keep, group), plain_nm_mask(score, keep, group))


def test_scores_are_those_of_plain_torch_bit_by_bit_with_and_without_a_neighbourhood() -> None:
    generator = GENERATOR.manual_seed(0)

    def drawn_like(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).abs()

    terms = (
        drawn_like(2, 3, 50, 129), drawn_like(4, 2, 3, 50), drawn_like(4, 2, 3, 129),
        [0.0, 0.7, 1.3, 0.7], drawn_like(2, 2, 3, 50, 129) + 0.1, [0, 1, 0, 0],
        drawn_like(4, 2, 3, 129), drawn_like(4, 2, 3, 50),
    )  # fmt: skip
    ours, plain = (torch.empty(2, 4, 3, 50, 129) for _ in range(2))
    kernels.combine_terms(*terms, out=ours)
    plain_combine_terms(*terms, out=plain)

    assert torch.equal(ours, plain)


@pytest.mark.parametrize(("shift", "width", "prefix"), [(16, 16, 0), (0, 16, 16256), (22, 11, 0)])
def test_add_digits(shift: int, width: int, prefix: int) -> None:
    """Weights are added up by digit as ``bincount`` adds them."""
    score = drawn("positive", 6, 3000)
    weights = torch.rand(6, generator=GENERATOR, dtype=torch.float64)
    ours, plain = (torch.zeros(1 << width, dtype=torch.float64) for _ in range(2))
    kernels.add_digits(score, weights, shift, width, prefix, ours)
    plain_add_digits(score, weights, shift, width, prefix, plain)

    assert float(plain.sum()) > 0
    assert torch.allclose(ours, plain, rtol=1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    """Three threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_lines_that_several_threads_share_out_are_marked_as_by_one() -> None:
    score = drawn("ties", 50, 3000)
    removed = torch.arange(50) * 60

    assert torch.equal(keep_highest(score, removed), plain_keep_highest(score, removed))


def test_a_transposed_score_as_gpt_2s_is_marked_in_its_own_order() -> None:
    score = drawn("ties", 40, 30).T

    assert torch.equal(
        keep_highest(score, 11), plain_keep_highest(score.contiguous(), torch.full((30,), 11))
    )


def test_where_machine_code_cannot_be_kept_selections_are_compiled_anew_in_each_process() -> None:
    script = (
        "import numba.core.caching as c\n"
        "def refuse(*_): raise RuntimeError('no locator available')\n"
        "c.FunctionCache.__init__ = refuse\n"
        "import torch\n"
        "from pho_service.pruning.selection import keep_highest\n"
        "print(keep_highest(torch.tensor([[1.0, 3.0, 2.0]]), 1).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[[False, True, True]]"


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """A function of a module of its own, whose machine code is kept beside it."""
    module = tmp_path.name  # another one for each test: numba imports it again
    (tmp_path / f"{module}.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    function: Callable[[int], int] = importlib.import_module(module).twice
    return function


@pytest.mark.parametrize("fault", ["not readable", "empty", "broken"])
def test_what_was_kept_and_cannot_be_read_is_compiled_again(
    twice: Callable[[int], int], tmp_path: Path, fault: str
) -> None:
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


def test_nor_does_a_full_disk_keep_anything_from_being_computed(
    twice: Callable[[int], int],
    tmp_path: Path,
    limited_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    compiled = kernels._compiled(twice)
    with limited_disk(10):
        found = compiled(3)

    assert found == 6
    assert not list(tmp_path.rglob("*.nb*"))
