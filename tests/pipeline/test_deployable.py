"""Only orders of channels that fold into the weights: what is stored needs no permutation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pho_service as pho
from pho_service.models.loading import LanguageModel, load_model
from pho_service.pipeline import bench
from pho_service.pipeline.bench import convert_
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.prune import orders_in_words, prune_job
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import broken_groups
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Permutation, Steps
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult

PERMUTED = pho.baseline("wanda-permuted", "2:4")


def permuted_by(permutation: Permutation, *, deployable: bool) -> Configuration:
    """Wanda's score with channels in an order that keeps the most score, or the least error."""
    steps = replace(PERMUTED.steps, permutation=permutation)
    found = PERMUTED.model_copy(update={"steps": steps})
    return found.deployable() if deployable else found


@pytest.mark.parametrize("permutation", ["score", "error"])
@pytest.mark.parametrize("deployable", [True, False])
def test_stored_order(
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    permutation: Permutation,
    deployable: bool,
) -> None:
    """Every linear is 2:4 as it is stored, and only the MLPs' readers are permuted."""
    found = permuted_by(permutation, deployable=deployable)
    pruned = prune_job(model, bundle, found, tmp_path / "out", calibration=report.windows)
    stored = load_model(str(tmp_path / "out"), device="cpu", dtype="bfloat16")
    broken = {name for name, each in stored.linears.items() if broken_groups(each.weight)}
    monkeypatch.setattr(bench, "check_gpu", lambda _: None)
    monkeypatch.setattr(bench, "to_semi_structured", torch.clone)
    done = convert_(stored, tmp_path / "out")

    readers = [name for name in model.linears if name.endswith("down_proj")]
    assert [each["reader"] for each in pruned.recipe["folded"]] == readers
    assert pruned.orders is not None
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
        assert all("--deployable" in reason for reason in done.left.values())
        assert "--deployable" in orders_in_words(pruned.orders)


def test_foldable(model: LanguageModel) -> None:
    """What can be folded is proven on the model, which stays as it is."""
    before = {name: each.weight.clone() for name, each in model.linears.items()}

    assert model.foldable == {name for name in model.linears if name.endswith("down_proj")}
    assert all(torch.equal(each.weight, before[name]) for name, each in model.linears.items())
    assert not load_model(model.name, device="cpu", stream=True).foldable


def test_price(
    searched: Callable[..., SearchResult],
    model: LanguageModel,
    bundle: ProxyBundle,
    report: ReportText,
) -> None:
    """A search says what its result would be with every order free, as measured so."""
    request = SearchRequest(
        pattern=Pattern.parse("2:4"),
        steps=Steps(permutation="score", deployable=True),
        trials=8,
        finalists=1,
    )
    texts = {"model": model, "confirm_text": report}
    first, second = (searched(request, bundle, **texts) for _ in range(2))
    found = first.configuration
    free = replace(found.candidate(), steps=replace(found.steps, deployable=False))
    measured, _ = rate_pruned(model, bundle.statistics(), free, report.windows, calibration=None)

    assert second.configuration == found
    assert found.steps.deployable
    assert found.confirmation is not None
    assert found.confirmation.any_order == pytest.approx(measured.perplexity, rel=1e-6)
    assert found.confirmation.any_order != found.confirmation.perplexity
    assert any("12 of 14 linears keep" in warning for warning in first.warnings)


def test_unchanged_documents() -> None:
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
