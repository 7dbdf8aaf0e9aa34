"""A model on two GPUs is calibrated, measured and pruned as on one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pho_service.models.loading import load_model
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.compare import ComparisonRequest, compare_over_seeds
from pho_service.pipeline.confirmation import validate_job
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Allocation, Steps
from pho_service.tuning.plan import SearchRequest

COEFFICIENTS = Coefficients(
    row=0.2, column=0.3, neighbourhood=0.5, kernel_size=3, activation_exponent=0.5
)


@pytest.fixture
def two_cards(model_folder, bundle, pretended_gpus):
    """Two cards, after the model was stored and calibrated."""
    assert model_folder.is_dir()
    assert bundle.layers
    return pretended_gpus


@pytest.fixture
def model(model_folder, two_cards):
    assert len(two_cards) == 2
    return load_model(str(model_folder), device="cuda:0")


@pytest.fixture
def spread(model_folder, two_cards):
    """The tiny model, a block on each card."""
    assert len(two_cards) == 2
    model = load_model(str(model_folder), device_map="auto")
    assert len({linear.weight.device for linear in model.linears.values()}) == 2
    return model


@pytest.mark.parametrize("projection_rows", [pytest.param(0, marks=pytest.mark.thorough), 16])
def test_the_bundle_is_that_of_one_card(spread, model, calibrated, projection_rows):
    settings = CalibrationSettings(
        samples=2, context_length=16, rows_per_layer=4, projection_rows=projection_rows,
        kernel_sizes=(3,),
    )  # fmt: skip
    expected, found = (calibrated(each, settings) for each in (model, spread))

    for a, b in zip(expected.layers, found.layers, strict=True):
        assert torch.equal(a.rows, b.rows)
    a, b = expected.statistics(), found.statistics()
    for name in model.linears:
        torch.testing.assert_close(b.activation_norm(name), a.activation_norm(name))
        torch.testing.assert_close(b.fisher[name], a.fisher[name])


@pytest.mark.parametrize(
    ("pattern", "scope", "steps"),
    [
        pytest.param("0.5", "global", {}, marks=pytest.mark.thorough),
        pytest.param(
            "0.5", "layer", {"allocation": Allocation(method="fisher"), "update": "obs"},
            marks=pytest.mark.thorough,
        ),
        ("2:4", "row", {"permutation": "score", "repruning": "swaps", "update": "least-squares"}),
    ],
)  # fmt: skip
def test_masks_orders_and_weights_are_those_of_one_card_and_pass_their_check(
    spread, model, bundle, report, tmp_path, pattern, scope, steps
):
    configuration = Configuration(
        method="crepe", coefficients=COEFFICIENTS, pattern=pattern, scope=scope,
        steps=Steps(**steps),
    )  # fmt: skip
    results = []
    for each, out in ((model, tmp_path / "one"), (spread, tmp_path / "two")):
        prune_job(Work.of(bundle, each, calibration=report.windows), configuration, out)
        recipe = json.loads((out / "pruning.json").read_text())
        masks = [layer["mask_sha256"] for layer in recipe["layers"].values()]
        results.append((masks, recipe["folded"], load_file(out / "model.safetensors")))
    (masks, folded, weights), (others, refolded, spread_weights) = results

    assert (masks, folded) == (others, refolded)
    for name, weight in weights.items():
        torch.testing.assert_close(spread_weights[name], weight)
    assert all(check.passed for check in check_folder(tmp_path / "two", original=None))


@pytest.mark.thorough
def test_so_are_perplexities_and_ratings_by_the_proxies_and_the_model_is_dense_afterwards(
    spread, model, report, bundle
):
    before = spread.weights_sha256
    run = Run(device="cuda:0")
    plan = SearchRequest(pattern=Pattern.parse("2:4")).plan(bundle.kernel_sizes)
    validations = [
        validate_job(Work.of(bundle, each, report), plan, ValidationSpec(candidates=8), run=run)
        for each in (model, spread)
    ]
    rows = [
        compare_over_seeds(
            each, report, ComparisonRequest(pattern=Pattern.parse("0.5")),
            {0: lambda: Work.of(bundle=bundle, calibration=report.windows)}, run=run,
        ).rows
        for each in (model, spread)
    ]  # fmt: skip
    del spread.__dict__["weights_sha256"]

    assert validations[0].perplexity == pytest.approx(validations[1].perplexity, rel=1e-5)
    assert [row.method for row in rows[0]] == [row.method for row in rows[1]]
    for one, two in zip(*rows, strict=True):
        assert two.perplexity == pytest.approx(one.perplexity, rel=1e-4)
        assert (two.memory_bytes or 0) > 0
    assert spread.weights_sha256 == before
