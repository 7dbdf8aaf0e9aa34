"""The jobs that measure or write: rating, compare, validate, prune."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pho_service.errors import BundleError, ConfigurationError, NumericalError, OutputError
from pho_service.models.loading import LanguageModel, load_model
from pho_service.pipeline.compare import compare_job
from pho_service.pipeline.confirmation import validate_job
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.rating import (
    Glances,
    ReportText,
    Subject,
    compared_count,
    rate_by_perplexity,
    rate_pruned,
)
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import model_masks, pruned
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

CONFIGURATION = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.2, column=0.3, neighbourhood=0.5, kernel_size=3, activation_exponent=0.5
    ),
    pattern="0.5",
    scope="global",
)


def bits(model: LanguageModel) -> dict[str, Tensor]:
    """A copy of all weights, as integers: 0 and -0 differ."""
    return {n: p.detach().clone().view(torch.int32) for n, p in model.model.named_parameters()}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether all weights are the same to the last bit."""
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_rate_pruned(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """The model is rated pruned, and given back dense."""
    before = bits(model)
    dense = rate_perplexity(model.model, report.windows).perplexity
    (candidate, *_) = comparison_baselines(Pattern.parse("0.9"))
    rating, sparsity = rate_pruned(model, bundle.statistics(), candidate, report.windows)

    assert rating.perplexity != dense
    assert sparsity == pytest.approx(0.9, abs=1e-3)
    assert same(before, bits(model))


def test_a_candidate_whose_perplexity_is_no_number_fails_alone_with_its_cause(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    before = bits(model)
    huge = Candidate(
        method="crepe",
        coefficients=Coefficients(row=1, column=1, neighbourhood=0, activation_exponent=300.0),
        pattern=Pattern.parse("0.5"),
    )
    fine = comparison_baselines(Pattern.parse("0.5"))[0]
    evaluate = rate_by_perplexity(model, bundle.statistics(), report.windows, None)
    failed, rated = evaluate([huge, fine])

    assert failed.value is None
    assert "score is NaN or infinite" in str(failed.failure)
    assert rated.value is not None
    assert same(before, bits(model))


def test_glance(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """A candidate is compared with the dense model, which is given back."""
    before = bits(model)
    candidate = comparison_baselines(Pattern.parse("0.5", "layer"))[1]
    statistics = bundle.statistics()
    glances = Glances(Subject(model=model, bundle=bundle, text=report), compared=[0])
    value = glances(candidate, [0]).divergence
    after = bits(model)
    with torch.no_grad():
        first = report.windows[:1]
        dense = model.model(input_ids=first).logits[0, :-1].double().log_softmax(-1)
        with pruned(model.linears, model_masks(model.linears, statistics, candidate)):
            other = model.model(input_ids=first).logits[0, :-1].double().log_softmax(-1)
    whole = float((dense.exp() * (dense - other)).sum(dim=-1).mean())

    assert same(before, after)
    assert value is not None
    assert 0.3 * whole < value <= whole  # 64 of 256 tokens of a model that knows little


@pytest.mark.parametrize(
    ("windows", "context_length", "compared"),
    [(16, 512, 1), (8, 128, 2), (16, 128, 4), (16, 2048, 1), (3, 32, 1), (1, 32, 1), (400, 32, 16)],
)
def test_compared_count(windows: int, context_length: int, compared: int) -> None:
    """About 512 tokens are compared, at most a quarter of the windows, at least one."""
    text = torch.arange(windows * context_length).view(windows, context_length)

    assert compared_count(text) == compared


def test_text_key(report: ReportText) -> None:
    """The key is of exactly the windows: one token changes it, the record does not."""
    changed = report.windows.clone()
    changed[0, 0] += 1

    assert replace(report, record=replace(report.record, source="b")).key == report.key
    assert replace(report, windows=changed).key != report.key
    assert replace(report, windows=report.windows[:2]).key != report.key


def test_compare(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """Each row has its own scope; a configuration keeps its own; the model is given back dense."""
    before = bits(model)
    rows = compare_job(
        model, bundle, report, Pattern.parse("0.5", "layer"), [("mine", CONFIGURATION)]
    )

    assert {row.method: row.scope for row in rows}.items() >= {
        "dense": None, "magnitude": "layer", "wanda": "row", "owl-wanda": "row", "mine": "global",
    }.items()  # fmt: skip
    assert rows[0].perplexity == rate_perplexity(model.model, report.windows).perplexity
    assert all(row.proxy is not None and row.proxy > 0 for row in rows[1:])
    assert all(row.sparsity == pytest.approx(0.5) for row in rows[1:])
    assert same(before, bits(model))


def test_a_configuration_whose_kernel_size_the_bundle_lacks_has_a_perplexity_but_no_proxy(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    document = replace(CONFIGURATION.coefficients, kernel_size=7)
    other = CONFIGURATION.model_copy(update={"coefficients": document})
    rows = compare_job(model, bundle, report, Pattern.parse("0.5", "layer"), [("seven", other)])

    assert rows[-1].proxy is None
    assert rows[-1].perplexity > 1


def test_a_configuration_for_another_pattern_is_refused_by_name(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    with pytest.raises(ConfigurationError, match=r"mine is for the pattern 0\.5, .* 2:4"):
        compare_job(model, bundle, report, Pattern.parse("2:4"), [("mine", CONFIGURATION)])


def test_validate(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """Every candidate is rated by every proxy and by perplexity; the seed decides which."""
    before = bits(model)
    pattern = Pattern.parse("2:4")
    result = validate_job(model, bundle, report, pattern, count=8, seed=2)
    first, _ = rate_pruned(model, bundle.statistics(), result.candidates[0], report.windows)

    assert len(result.candidates) == len(result.perplexity) == 8
    assert result.perplexity[0] == first.perplexity
    assert {len(values) for values in result.proxies.values()} == {8}
    assert all(c.pattern == pattern for c in result.candidates)
    assert {c.coefficients.gradient_exponent for c in result.candidates} == {0.0}
    assert same(before, bits(model))


def test_prune(
    model: LanguageModel, bundle: ProxyBundle, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    """Every linear has the zeros that the recipe counts, and all else is as it was."""
    dense = dict(tiny_llama.named_parameters())
    result = prune_job(model, bundle, CONFIGURATION, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())
    pruned = dict(load_model(str(tmp_path / "out"), device="cpu").model.named_parameters())

    assert {n: entry["sparsity"] for n, entry in recipe["layers"].items()} == result.layers
    assert recipe["sparsity"] == result.sparsity == pytest.approx(0.5, abs=1e-4)
    assert len(set(result.layers.values())) > 1  # in scope global layers differ
    for name, weight in pruned.items():
        share = result.layers.get(name.removesuffix(".weight"), 0.0)
        assert float((weight == 0).float().mean()) == pytest.approx(share, abs=1e-6)
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])


def test_a_bfloat16_checkpoint_stays_one_and_its_kept_weights_stay_bit_for_bit(
    tiny_llama: LlamaForCausalLM, model_folder: Path, bundle: ProxyBundle, tmp_path: Path
) -> None:
    stored = tiny_llama.to(torch.bfloat16)
    stored.save_pretrained(model_folder)
    model = load_model(str(model_folder), device="cpu")
    layers = [replace(layer, rows=layer.rows.bfloat16().float()) for layer in bundle.layers]
    prune_job(model, replace(bundle, layers=layers), CONFIGURATION, tmp_path / "out")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    dense = dict(stored.named_parameters())

    assert saved.dtype == torch.bfloat16
    for name, weight in saved.named_parameters():
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])


def test_prune_into_a_folder_in_use(
    model: LanguageModel, bundle: ProxyBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())

    with pytest.raises(OutputError, match="is in use"):
        prune_job(model, bundle, CONFIGURATION, folder)
    assert [p.name for p in folder.iterdir()] == ["a.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_prune_another_model(model: LanguageModel, bundle: ProxyBundle, tmp_path: Path) -> None:
    """A bundle of other weights prunes nothing."""
    name = "model.layers.1.mlp.down_proj"
    model.linears[name].weight.add_(1)
    before = bits(model)

    with pytest.raises(BundleError, match=name):
        prune_job(model, bundle, CONFIGURATION, tmp_path / "out")
    assert same(before, bits(model))
    assert not (tmp_path / "out").exists()


def test_a_score_beyond_float32_names_the_layer_and_no_folder_is_written(
    model: LanguageModel, bundle: ProxyBundle, tmp_path: Path
) -> None:
    document = replace(CONFIGURATION.coefficients, activation_exponent=300.0)
    wild = CONFIGURATION.model_copy(update={"coefficients": document})

    with pytest.raises(NumericalError, match=r"model\.layers\.0\.\S+: a score is NaN or infinite"):
        prune_job(model, bundle, wild, tmp_path / "out")
    assert not (tmp_path / "out").exists()
