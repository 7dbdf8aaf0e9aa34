"""Models of which some linears stay dense: pruned, streamed, updated, saved and checked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pho_service.errors import InvalidInput
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.saving import read_recipe
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.compare import compare_job
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.pipeline import prune_model
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import transfer_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps
from pho_service.tuning.plan import SearchRequest

LEFT_OUT = ("*.o_proj", "*.layers.1.mlp.up_proj")
CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)
STEPS = [
    ("0.5", Steps()),
    ("0.5", Steps(allocation=Allocation(method="fisher", spread=0.3), update="obs")),
    ("0.5", Steps(update="sparsegpt")),
    ("2:4", Steps(permutation="error", repruning="swaps", update="least-squares")),
]


def candidate_of(pattern: str, steps: Steps) -> Candidate:
    """A candidate that leaves three linears dense, and has two by hand."""
    sparsities = {"*.down_proj": "3:4" if ":" in pattern else 0.25}
    steps = replace(steps, linears=Linears(ignore=LEFT_OUT, sparsities=sparsities))
    return Candidate(
        method="crepe", coefficients=CREPE, pattern=Pattern.parse(pattern), steps=steps
    )


def is_dense(name: str) -> bool:
    """What LEFT_OUT says, written out."""
    return name.endswith("o_proj") or name == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("pattern", "steps"), STEPS)
def test_pruned(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText, pattern: str, steps: Steps
) -> None:
    """Dense linears keep every bit whatever the steps, and those by hand have their sparsity."""
    before = {name: linear.weight.clone() for name, linear in model.linears.items()}
    candidate = candidate_of(pattern, steps)
    shares = prune_model(model, bundle.statistics(), candidate, report.windows)
    others = {name: share for name, share in shares.items() if not name.endswith("down_proj")}
    sizes = {name: before[name].numel() for name in others}
    total = sum(share * sizes[name] for name, share in others.items()) / sum(sizes.values())

    for name, linear in model.linears.items():
        assert torch.equal(linear.weight, before[name]) == is_dense(name)
        assert (name in shares) != is_dense(name)
        if name.endswith("down_proj"):
            assert float((linear.weight == 0).float().mean()) == shares[name] == 0.25
    assert total == pytest.approx(0.5, abs=1e-4)


def test_streamed(
    model_folder: Path, model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    """Streamed, the same is removed of the same linears, for good and for a measurement."""
    streamed = load_model(str(model_folder), device="cpu", stream=True)
    candidate = candidate_of("0.5", Steps())
    expected = rate_pruned(model, bundle.statistics(), candidate, report.windows)
    found = rate_pruned(streamed, bundle.statistics(), candidate, report.windows)
    for each in (model, streamed):
        prune_model(each, bundle.statistics(), candidate, None)

    assert found[0].perplexity == pytest.approx(expected[0].perplexity, rel=1e-6)
    assert found[1] == expected[1] != 0.5
    for name, parameter in model.model.named_parameters():
        assert torch.equal(streamed.model.get_parameter(name), parameter)


@pytest.fixture
def request_of_some() -> SearchRequest:
    """A search at 2:4 of all but a few linears."""
    steps = candidate_of("2:4", Steps(permutation="score")).steps
    return SearchRequest(pattern=Pattern.parse("2:4"), steps=steps, trials=12, finalists=1)


def test_a_searchs_configuration_says_which_linears_a_pruned_folder_of_it_passes_its_checks(
    request_of_some: SearchRequest,
    model: LanguageModel,
    model_folder: Path,
    bundle: ProxyBundle,
    report: ReportText,
    tmp_path: Path,
) -> None:
    found = search_job(request_of_some, bundle, model=model, confirm_text=report).configuration
    rows = compare_job(model, bundle, report, Pattern.parse("2:4"), [("found", found)])
    pruned = prune_job(model, bundle, found, tmp_path / "out")
    recipe = read_recipe(tmp_path / "out")
    original = load_model(str(model_folder), device="cpu")
    good = check_folder(tmp_path / "out", original=original)
    original.linears["model.layers.1.mlp.up_proj"].weight.mul_(2)

    assert found.candidate().steps.linears == request_of_some.steps.linears
    assert {row.sparsity for row in rows[1:]} == {rows[-1].sparsity} == {pruned.sparsity}
    assert set(recipe.dense) == {name for name in model.linears if is_dense(name)}
    assert len(recipe.folded) == 2  # one of them renumbers the rows of a dense linear
    assert [check for check in good if not check.passed] == []
    details = {check.name: check.detail for check in good}
    assert details["recipe"] == "complete, 14 linears, 3 of them dense"
    assert details["dense linears"] == "3 as in the original"
    assert details["weight hashes"] == "14 weights as recorded"


def test_two_searches_of_different_linears_have_studies_of_their_own_in_one_database(
    request_of_some: SearchRequest, bundle: ProxyBundle
) -> None:
    some = search_job(request_of_some, bundle)
    whole = search_job(replace(request_of_some, steps=Steps(permutation="score")), bundle)

    assert some.study_name != whole.study_name
    assert some.configuration.objective["value"] < whole.configuration.objective["value"]


def test_transferred(request_of_some: SearchRequest, bundle: ProxyBundle) -> None:
    """Patterns are looked up anew on each model; one that matches nothing there names it."""
    found = search_job(request_of_some, bundle).configuration
    other = replace(
        bundle,
        layers=[replace(la, name=la.name.replace("o_proj", "dense")) for la in bundle.layers],
        provenance={"model": {"name": "other/model"}, "key": "other"},
    )
    transfer = transfer_job(Calibrated(name="same", bundle=bundle), found)

    assert transfer.proxies["transferred"] == found.objective["value"]
    with pytest.raises(InvalidInput, match=r"'\*\.o_proj' matches none of the 14 .* other/model"):
        transfer_job(Calibrated(name="other", bundle=other), found)


def test_over_models(request_of_some: SearchRequest, bundle: ProxyBundle) -> None:
    """Over several models RIA, which all is relative to, prunes what the candidates prune."""
    joint = replace(request_of_some, objective=Objective(over="mean"))
    found = search_job(joint, {"one": bundle, "two": bundle}).configuration
    linears = found.candidate().steps.linears
    ria = reference_methods(Pattern.parse("2:4"), linears)["ria"]
    mine, its = ProxyEvaluator(bundle).evaluate([found.candidate(), ria])

    assert found.objective["value"] == pytest.approx(mine.blend / its.blend)
