"""Allocations on a GPU: what the CPU allocates, with launches that no linear adds to."""

from dataclasses import replace

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps

METHODS = ("owl", "fisher", "curves")


def bundle_of(linears, statistics, rows=8, blocks=2):
    """Some rows (0: all) of each linear of the first blocks."""
    some = {n: linear for n, linear in linears.items() if int(n.split(".")[2]) < blocks}
    return sample_bundle(some, statistics, rows_per_layer=rows, kernel_sizes=(3,), seed=0)


def candidate_of(method, unit="linear", pattern="0.5"):
    return Candidate(
        method="wanda",
        coefficients=Coefficients(
            row=1, column=0, neighbourhood=0, activation_exponent=1, normalisation="none"
        ),
        pattern=Pattern.parse(pattern),
        steps=Steps(allocation=Allocation(method=method, unit=unit, spread=0.3)),
    )


# With ``rows=0`` a linear has 64 or 32 rows, of which an error curve takes some only.
@pytest.mark.parametrize(
    ("unit", "pattern", "rows"), [("linear", "0.5", 0), ("block", "0.5", 8), ("linear", "4:8", 8)]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_allocates_what_the_cpu_allocates(
    linears, statistics, method, unit, pattern, rows, pretended_gpu, monkeypatch
):
    for module in ("layer_view", "layer_errors"):
        monkeypatch.setattr(f"pho_service.pruning.{module}.CURVE_ROWS", 20)
    bundle = bundle_of(linears, statistics, rows)
    candidate = candidate_of(method, unit, pattern)
    expected = ProxyEvaluator(bundle).layer_sparsities(candidate)
    found = ProxyEvaluator(bundle, "cuda").layer_sparsities(candidate)

    assert found == pytest.approx(expected, abs=2 / 256)  # a weight of a sample of 8 rows
    assert len(set(found.values())) > 1
    assert pretended_gpu.counts.launches


@pytest.mark.parametrize("method", METHODS)
def test_twice_as_many_linears_of_the_same_shapes_as_many_launches_waits_and_copies(
    linears, statistics, method, pretended_gpu
):
    def counts(blocks):
        evaluator = ProxyEvaluator(bundle_of(linears, statistics, blocks=blocks), "cuda")
        with pretended_gpu.counting() as found:
            evaluator.layer_sparsities(candidate_of(method))
        return found

    one, two = counts(1), counts(2)

    assert (two.launches, two.waits) == (one.launches, one.waits)
    assert two.d2h_copies == one.d2h_copies <= 4  # one for each pass, one for the highest scores


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("method", METHODS)
def test_bad_scores_on_a_gpu(linears, statistics, method):
    inputs = [replace(e, activation_norm=e.activation_norm.clone()) for e in statistics.inputs]
    inputs[statistics.input_of["model.layers.1.mlp.down_proj"]].activation_norm[3] = torch.inf
    bundle = bundle_of(linears, replace(statistics, inputs=inputs))

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj: a score is NaN or inf"):
        ProxyEvaluator(bundle, "cuda").layer_sparsities(candidate_of(method))
