"""The whole product on a pretended GPU: every path, and what it gives is what the CPU gives."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from pretended_subjects import CONFIGS, SETTINGS, Subject, unchanged

from pho_service.models.blockwise import measure_perplexity
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import calibrate, measure, plan_calibration
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.rating import rate_pruned
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.objective import WEIGHTINGS
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import (
    ALLOCATION_UNITS,
    ALLOCATIONS,
    CHOOSING,
    PERMUTATIONS,
    REPRUNINGS,
    UPDATES,
    Allocation,
    Candidate,
    Steps,
)

pytestmark = pytest.mark.thorough

SUBJECTS = tuple(CONFIGS)
CREPE = Coefficients(
    row=0.4, column=1, neighbourhood=0.8, kernel_size=5, activation_exponent=0.7,
    gradient_exponent=0.3,
)  # fmt: skip
PATTERNS = [
    Pattern.parse(text, scope)
    for text, scope in (("0.5", "row"), ("0.5", "layer"), ("0.6", "global"), ("2:4", "row"))
]
AFTERWARDS = [
    (r, u)
    for r, u in product(REPRUNINGS, UPDATES)
    if (u not in CHOOSING or r == "none") and (r, u) != ("admm", "none")
]
FEW = {("none", "none"), ("swaps", "obs"), ("dsnot", "least-squares")}


ALIKE = ("llama-bfloat16-streamed", "llama-two-cards")  # as others in most


@pytest.fixture(params=SUBJECTS)
def subject(request, subject_of):
    """Each kind of model."""
    return subject_of(request.param)


def assert_close(found, expected, *, rtol):
    """The same statistics but for rounding."""
    for mine, theirs in zip(found.inputs, expected.inputs, strict=True):
        torch.testing.assert_close(
            mine.activation_norm, theirs.activation_norm, rtol=rtol, atol=1e-6
        )
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(found.fisher[name], fisher, rtol=rtol, atol=1e-9)


def test_a_bundle_is_written_and_read(subject, tmp_path):
    with unchanged(subject.model):
        bundle = subject.bundle
    write_bundle(bundle, tmp_path / "b.safetensors")
    read = read_bundle(tmp_path / "b.safetensors")
    read.check_model(subject.model.linears)

    assert len(read.layers) == len(subject.model.linears)


def test_without_a_projection_moments_are_in_full(subject):
    settings = replace(SETTINGS, projection_rows=0)
    bundle = calibrate(subject.model, subject.text_for(settings), settings)

    assert all(entry.root.shape[0] == entry.root.shape[1] for entry in bundle.inputs)
    assert_close(bundle.statistics(), subject.bundle.statistics(), rtol=1e-2)


def test_recompute(subject, monkeypatch):
    """Where memory is short activations are computed again; the statistics stay the same."""
    if subject.model.stream:
        pytest.skip("a streamed model keeps one block's activations anyway")

    def frugal(*args, **kwargs):
        plan = plan_calibration(*args, **kwargs)
        return replace(plan, run=replace(plan.run, windows=1, recompute=True))

    monkeypatch.setattr("pho_service.models.calibration.plan_calibration", frugal)
    found = measure(subject.model, subject.text, SETTINGS)

    assert_close(found, subject.bundle.statistics(), rtol=1e-2)


def test_products_in_bfloat16_are_those_of_a_float32_model(subject):
    if subject.dtype != "float32":
        pytest.skip("mixed precision is for float32 models")
    settings = replace(SETTINGS, mixed_precision=True)
    found = measure(subject.model, subject.text_for(settings), settings)

    assert_close(found, subject.bundle.statistics(), rtol=0.5)


def test_perplexity_and_divergence_are_the_cpus(subject):
    windows = subject.report().windows
    there = measure_perplexity(subject.model, windows).perplexity
    on_cpu = replace_device(subject, "cpu")

    assert there == pytest.approx(measure_perplexity(on_cpu.model, windows).perplexity, rel=1e-5)
    if not subject.model.stream:
        reference = dense_reference(subject.model.model, windows)
        assert rate_divergence(subject.model.model, reference) == pytest.approx(0, abs=1e-5)


def replace_device(subject, device):
    """The same model elsewhere."""
    return Subject(subject.name, subject.folder, subject.texts, device)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p}-{p.scope}")
def test_every_proxy_rates_as_on_the_cpu(subject, pattern):
    allocations = [Allocation()]
    if pattern.scope != "global":
        methods = product(ALLOCATIONS[1:], ALLOCATION_UNITS)
        allocations += [Allocation(method=m, unit=u, spread=0.25) for m, u in methods]
    candidates = [
        Candidate(method="x", coefficients=CREPE, pattern=pattern, steps=Steps(allocation=each))
        for each in allocations
    ]
    there = ProxyEvaluator(subject.bundle, subject.device)
    on_cpu = ProxyEvaluator(subject.bundle)
    found = there.evaluate(candidates, with_gini=True)
    expected = on_cpu.evaluate(candidates, with_gini=True)
    for mine, theirs in zip(found, expected, strict=True):
        for value in (*WEIGHTINGS, "gini"):
            assert getattr(mine, value) == pytest.approx(getattr(theirs, value), rel=1e-3)
    assert there.evaluate(candidates[:1])[0].gini is None
    assert there.layer_errors(candidates[0]) == pytest.approx(
        on_cpu.layer_errors(candidates[0]), rel=1e-3
    )


def combinations():
    """
    Of steps, for every way that a model is loaded.

    All of them on one card, at a ratio by layer and at N:M; a few by row. Where a model is another
    or lies elsewhere, each step once at N:M; where it is alike in both, a few.
    """
    once = FEW | {("admm", "least-squares"), *(("none", update) for update in CHOOSING)}

    def wanted(name, pattern, steps):
        if name == "llama":
            return steps in FEW or pattern != "0.5 row"
        if pattern != "2:4 row":
            return steps == ("swaps", "obs")
        return steps in (FEW if name in ALIKE else once)

    return [
        (name, pattern, *steps)
        for name, pattern in product(SUBJECTS, ("0.5 row", "0.5 layer", "2:4 row"))
        for steps in AFTERWARDS
        if wanted(name, pattern, steps)
    ]


@pytest.mark.parametrize(("name", "pattern", "repruning", "update"), combinations())
def test_every_combination_of_steps_prunes_to_the_pattern_and_the_model_is_dense_again(
    subject_of, name, pattern, repruning, update
):
    subject, parsed = subject_of(name), Pattern.parse(*pattern.split())
    permutations = PERMUTATIONS if parsed.group else PERMUTATIONS[:1]
    every = name == "llama" and (repruning, update) in FEW
    for permutation in permutations if every else permutations[-1:]:
        steps = Steps(permutation=permutation, repruning=repruning, update=update)
        candidate = Candidate(method="x", coefficients=CREPE, pattern=parsed, steps=steps)
        statistics = subject.bundle.statistics()
        with unchanged(subject.model):
            result, sparsity = rate_pruned(
                subject.model,
                statistics,
                candidate,
                subject.report().windows,
                calibration=subject.text.calibration,
            )
        assert sparsity == pytest.approx(0.5, abs=1e-3)
        assert math.isfinite(result.perplexity)


@pytest.mark.parametrize("method", ALLOCATIONS[1:])
@pytest.mark.parametrize("pattern", ["0.5 row", "2:4 row"])
def test_allocated(subject, pattern, method):
    """Allocations of the whole model, from its weights on the card."""
    parsed = Pattern.parse(*pattern.split())
    candidate = Candidate(
        method="x",
        coefficients=CREPE,
        pattern=parsed,
        steps=Steps(allocation=Allocation(method=method, spread=0.25)),
    )
    with (
        unchanged(subject.model),
        pruned_model(subject.model, subject.bundle.statistics(), candidate, None) as shares,
    ):
        assert len(shares) == len(subject.model.linears)
        if parsed.group == 0:  # an N:M may leave no other choice
            assert len({round(share, 3) for share in shares.values()}) > 1
