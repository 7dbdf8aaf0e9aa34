"""Models of which some linears stay dense, and models that are stored without permutations."""

from dataclasses import replace

import pytest
import torch

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.models.loading import load_model
from pho_service.models.saving import read_recipe
from pho_service.pipeline import bench
from pho_service.pipeline.bench import convert_
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.compare import ComparisonRequest, compare_over_seeds
from pho_service.pipeline.pipeline import prune_model
from pho_service.pipeline.prune import orders_in_words, prune_job
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import transfer_job
from pho_service.pipeline.work import Work
from pho_service.pruning.masks import broken_groups
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
    ("2:4", Steps(permutation="score", repruning="swaps", update="least-squares")),
]


def candidate_of(pattern, steps):
    """A candidate that leaves three linears dense, and has two by hand."""
    sparsities = {"*.down_proj": "3:4" if ":" in pattern else 0.25}
    steps = replace(steps, linears=Linears(ignore=LEFT_OUT, sparsities=sparsities))
    return Candidate(
        method="crepe", coefficients=CREPE, pattern=Pattern.parse(pattern), steps=steps
    )


def is_dense(name):
    return name.endswith("o_proj") or name == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("pattern", "steps"), STEPS)
def test_pruned(model, bundle, report, pattern, steps):
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


OF_SOME = SearchRequest(
    pattern=Pattern.parse("2:4"),
    steps=candidate_of("2:4", Steps(permutation="score")).steps,
    trials=12,
    finalists=1,
)


def test_a_searchs_configuration_says_which_linears_a_pruned_folder_of_it_passes_its_checks(
    bundle, confirming, original, tmp_path
):
    model, report = confirming.model, confirming.text
    found = search_job(OF_SOME, confirming).configuration
    request = ComparisonRequest(pattern=Pattern.parse("2:4"), configurations=[("found", found)])
    given = Work.of(bundle=bundle)
    rows = compare_over_seeds(model, report, request, {0: lambda: given}).rows
    pruned = prune_job(Work.of(bundle, model), found, tmp_path / "out")
    recipe = read_recipe(tmp_path / "out")
    good = check_folder(tmp_path / "out", original=original)
    original.linears["model.layers.1.mlp.up_proj"].weight.mul_(2)

    assert found.candidate().steps.linears == OF_SOME.steps.linears
    assert {row.sparsity for row in rows[1:]} == {rows[-1].sparsity} == {pruned.sparsity}
    assert set(recipe.dense) == {name for name in model.linears if is_dense(name)}
    assert len(recipe.folded) == 2  # one of them renumbers the rows of a dense linear
    assert [check for check in good if not check.passed] == []
    details = {check.name: check.detail for check in good}
    assert details["recipe"] == "complete, 14 linears, 3 of them dense"
    assert details["kept weights"].startswith("as in the original")
    assert details["weight hashes"] == "14 weights as recorded"


def test_two_searches_of_different_linears_have_studies_of_their_own(bundle):
    some = search_job(OF_SOME, Work.of(bundle))
    whole = search_job(replace(OF_SOME, steps=Steps(permutation="score")), Work.of(bundle))

    assert some.study_name != whole.study_name
    assert some.configuration.objective["value"] < whole.configuration.objective["value"]


def test_transferred(bundle):
    """Patterns are looked up anew on each model; one that matches nothing there names it."""
    found = search_job(OF_SOME, Work.of(bundle)).configuration
    other = replace(
        bundle,
        layers=[replace(la, name=la.name.replace("o_proj", "dense")) for la in bundle.layers],
        provenance={"model": {"name": "other/model"}, "key": "other"},
    )
    transfer = transfer_job("same", Work.of(bundle), found)

    assert transfer.proxies["transferred"] == found.objective["value"]
    with pytest.raises(InvalidInput, match=r"'\*\.o_proj' matches none of the 14 .* other/model"):
        transfer_job("other", Work.of(other), found)


def test_over_models(bundle):
    """Over several models RIA, which all is relative to, prunes what the candidates prune."""
    joint = replace(OF_SOME, objective=Objective(over="mean"))
    found = search_job(joint, Work(bundles={"one": bundle, "two": bundle})).configuration
    linears = found.candidate().steps.linears
    ria = reference_methods(Pattern.parse("2:4"), linears)["ria"]
    mine, its = ProxyEvaluator(bundle).evaluate([found.candidate(), ria])

    assert found.objective["value"] == pytest.approx(mine.blend / its.blend)


PERMUTED = pho.baseline("wanda-permuted", "2:4")


@pytest.mark.parametrize("deployable", [True, False])
def test_stored_order(model, bundle, report, tmp_path, monkeypatch, deployable):
    """Every linear is 2:4 as it is stored, and only the MLPs' readers are permuted."""
    found = PERMUTED.deployable() if deployable else PERMUTED
    pruned = prune_job(Work.of(bundle, model, calibration=report.windows), found, tmp_path / "out")
    stored = load_model(str(tmp_path / "out"), device="cpu", dtype="bfloat16")
    broken = {name for name, each in stored.linears.items() if broken_groups(each.weight)}
    monkeypatch.setattr(bench, "check_gpu", lambda _: None)
    monkeypatch.setattr(bench, "to_semi_structured", torch.clone)
    done = convert_(stored, tmp_path / "out")

    readers = [name for name in model.linears if name.endswith("down_proj")]
    assert [each["reader"] for each in pruned.recipe["folded"]] == readers
    assert pruned.orders["folded"] == len(readers)
    assert {*done.left} == broken
    assert all(check.passed for check in check_folder(tmp_path / "out", original=None))
    if deployable:
        assert not broken
        assert pruned.orders["kept"] == len(model.linears) - len(readers)
        assert "No runtime has to permute" in orders_in_words(pruned.orders)
    else:
        assert broken
        assert pruned.orders["kept"] == 0
        assert all("another channel order" in reason for reason in done.left.values())
        assert all("deployable=True" in reason for reason in done.left.values())
        assert "deployable=True" in orders_in_words(pruned.orders)


def test_foldable(model, streamed):
    """What can be folded is proven on the model, which stays as it is."""
    before = {name: each.weight.clone() for name, each in model.linears.items()}

    assert model.foldable == {name for name in model.linears if name.endswith("down_proj")}
    assert all(torch.equal(each.weight, before[name]) for name, each in model.linears.items())
    assert not streamed.foldable


def test_price(searched, bundle, confirming):
    """A search says what its result would be with every order free, as measured so."""
    model, report = confirming.model, confirming.text
    request = SearchRequest(
        pattern=Pattern.parse("2:4"),
        steps=Steps(permutation="score", deployable=True),
        trials=8,
        finalists=1,
    )
    first, second = (searched(request, confirming) for _ in range(2))
    found = first.configuration
    free = replace(found.candidate(), steps=replace(found.steps, deployable=False))
    measured, _ = rate_pruned(model, bundle.statistics(), free, report.windows, calibration=None)

    assert second.configuration == found
    assert found.steps.deployable
    assert found.confirmation.any_order == pytest.approx(measured.perplexity, rel=1e-6)
    assert found.confirmation.any_order != found.confirmation.perplexity
    assert any("12 of 14 linears keep" in warning for warning in first.warnings)


def test_unchanged_documents():
    """What asks for nothing new is written as before; what measured other orders is left out."""
    measured = PERMUTED.model_copy(
        update={"confirmation": {"perplexity": 1.0, "tokens": 1, "context_length": 2, "text": {}}}
    )
    asked = measured.deployable()

    assert "deployable" not in PERMUTED.steps.to_dict()
    assert "deployable" not in PERMUTED.model_dump(mode="json")["steps"]
    assert asked.model_dump(mode="json")["steps"]["deployable"] is True
    assert asked.confirmation is None
    assert Steps.from_dict(asked.steps.to_dict()) == asked.steps
    assert asked.deployable() == asked
    plain = pho.baseline("wanda", "2:4")
    assert plain.deployable() == plain
