"""The jobs that measure or write: rating, compare, validate, prune; and repeated comparisons."""

import json
import operator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from pho_service.errors import BundleError, ConfigurationError, InvalidInput, NumericalError
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.texts import RecoveryText, ReportText
from pho_service.pipeline.compare import (
    ComparisonRequest,
    ComparisonRow,
    check_family,
    compare_over_seeds,
    mean_rows,
)
from pho_service.pipeline.confirmation import validate_job
from pho_service.pipeline.pipeline import prune_model
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.rating import Glances, compared_count, rate_by_perplexity, rate_pruned
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.pruning.masks import linear_masks, pruned
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.spec.baselines import OWL_AT_NM, comparison_baselines, named_baselines
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.recovery import Recovery
from pho_service.spec.space import Preset
from pho_service.spec.steps import Allocation, Candidate, Steps
from pho_service.tuning.plan import SearchRequest

CONFIGURATION = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.2, column=0.3, neighbourhood=0.5, kernel_size=3, activation_exponent=0.5
    ),
    pattern="0.5",
    scope="global",
)


def compared_on(model, bundle, report, pattern, configurations, *, text=None, also=None, **asked):
    calibration = asked.pop("calibration", None)
    request = ComparisonRequest(pattern=pattern, configurations=configurations, **asked)
    given = Work.of(bundle=bundle, model=model, calibration=calibration)
    return compare_over_seeds(model, report, request, {0: lambda: given}, text=text, also=also).rows


def test_the_bar_of_a_comparison_counts_the_linears_of_rows_that_a_text_is_run_for(
    model, bundle, report, windows
):
    counts = []

    @contextmanager
    def progress(title, steps):
        counts.append([title, steps, 0])
        yield lambda count: operator.setitem(counts[0], 2, counts[0][2] + count)

    given = Work.of(bundle=bundle, model=model, calibration=windows)
    request = ComparisonRequest(
        pattern=Pattern.parse("0.5"), configurations=[], methods=["wanda", "sparsegpt"]
    )
    compare_over_seeds(model, report, request, {0: lambda: given}, run=Run(progress=progress))

    total = 3 * len(report.windows) + len(model.linears)
    assert counts == [["Measuring perplexities", total, total]]


def bits(model):
    """A copy of all weights, as integers: 0 and -0 differ."""
    return {n: p.detach().clone().view(torch.int32) for n, p in model.model.named_parameters()}


def same(before, after):
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_candidate_whose_perplexity_is_no_number_fails_alone_with_its_cause(
    model, bundle, report
):
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


def test_glance(model, bundle, report):
    """A candidate is compared with the dense model, which is given back."""
    before = bits(model)
    candidate = comparison_baselines(Pattern.parse("0.5", "layer"))[1]
    statistics = bundle.statistics()
    glances = Glances(Work.of(bundle, model, report), compared=[0])
    value = glances(candidate, [0]).divergence
    after = bits(model)
    with torch.no_grad():
        first = report.windows[:1]
        dense = model.model(input_ids=first).logits[0, :-1].double().log_softmax(-1)
        masks = linear_masks(model.linears, statistics, candidate)
        with pruned(model.linears, ((name, mask.keep) for name, mask in masks)):
            other = model.model(input_ids=first).logits[0, :-1].double().log_softmax(-1)
    whole = float((dense.exp() * (dense - other)).sum(dim=-1).mean())

    assert same(before, after)
    assert value is not None
    assert 0.3 * whole < value <= whole  # 64 of 256 tokens of a model that knows little


@pytest.mark.parametrize(
    ("windows", "context_length", "compared"),
    [(16, 512, 1), (8, 128, 2), (16, 128, 4), (16, 2048, 1), (3, 32, 1), (1, 32, 1), (400, 32, 16)],
)
def test_compared_count(windows, context_length, compared):
    """About 512 tokens are compared, at most a quarter of the windows, at least one."""
    text = torch.arange(windows * context_length).view(windows, context_length)

    assert compared_count(text) == compared


def test_text_key(report):
    """The key is of exactly the windows: one token changes it, the record does not."""
    changed = report.windows.clone()
    changed[0, 0] += 1

    assert replace(report, record=replace(report.record, source="b")).key == report.key
    assert replace(report, windows=changed).key != report.key
    assert replace(report, windows=report.windows[:2]).key != report.key


def test_compare(model, bundle, report):
    """Each row has its own scope; a configuration keeps its own; the model is given back dense."""
    before = bits(model)
    rows = compared_on(
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
    model, bundle, report
):
    document = replace(CONFIGURATION.coefficients, kernel_size=7)
    other = CONFIGURATION.model_copy(update={"coefficients": document})
    mine = [("seven", other)]
    rows = compared_on(
        model, bundle, report, Pattern.parse("0.5", "layer"), mine, methods=["magnitude"]
    )

    assert rows[-1].proxy is None
    assert rows[-1].perplexity > 1


def test_validate(model, bundle, report):
    """Every candidate is rated by every proxy and by perplexity; the seed decides which."""
    before = bits(model)
    pattern = Pattern.parse("2:4")
    plan = SearchRequest(pattern=pattern).plan(bundle.kernel_sizes)
    asked = ValidationSpec(candidates=8, seed=2)
    result = validate_job(Work.of(bundle, model, report), plan, asked)
    first, _ = rate_pruned(model, bundle.statistics(), result.candidates[0], report.windows)

    assert len(result.candidates) == len(result.perplexity) == 8
    assert result.perplexity[0] == first.perplexity
    assert {len(values) for values in result.proxies.values()} == {8}
    assert all(c.pattern == pattern for c in result.candidates)
    assert {c.coefficients.gradient_exponent for c in result.candidates} == {0.0}
    assert same(before, bits(model))


def test_prune(model, bundle, tmp_path, tiny_llama):
    """Every linear has the zeros that the recipe counts, and all else is as it was."""
    dense = dict(tiny_llama.named_parameters())
    result = prune_job(Work.of(bundle, model), CONFIGURATION, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())
    pruned = dict(load_model(str(tmp_path / "out"), device="cpu").model.named_parameters())

    assert {n: entry["sparsity"] for n, entry in recipe["layers"].items()} == result.layers
    assert recipe["sparsity"] == result.sparsity == pytest.approx(0.5, abs=1e-4)
    assert len(set(result.layers.values())) > 1  # in scope global layers differ
    for name, weight in pruned.items():
        share = result.layers.get(name.removesuffix(".weight"), 0.0)
        assert float((weight == 0).float().mean()) == pytest.approx(share, abs=1e-6)
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])


def test_a_bundle_of_other_weights_prunes_nothing_and_a_score_beyond_float32_names_the_layer(
    model, original, bundle, tmp_path
):
    """No folder is written."""
    name = "model.layers.1.mlp.down_proj"
    model.linears[name].weight.add_(1)
    before = bits(model)
    coefficients = replace(CONFIGURATION.coefficients, activation_exponent=300.0)
    wild = CONFIGURATION.model_copy(update={"coefficients": coefficients})

    with pytest.raises(BundleError, match=name):
        prune_job(Work.of(bundle, model), CONFIGURATION, tmp_path / "out")
    assert same(before, bits(model))
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.\S+: a score is NaN or infinite"):
        prune_job(Work.of(bundle, original), wild, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NM = Pattern.parse("2:4")
HALF = Pattern.parse("0.5", "layer")
STEPS = Steps(
    allocation=Allocation(method="fisher", spread=0.3), repruning="swaps", update="least-squares"
)
MINE = Configuration.of(replace(named_baselines(HALF)["crepe-equal"], method="crepe", steps=STEPS))


@pytest.fixture
def drawn(model, texts):
    """Calibrations on windows that a seed draws."""

    def of_seed(seed):
        def make():
            settings = CalibrationSettings(
                samples=3, context_length=32, rows_per_layer=4, projection_rows=16,
                kernel_sizes=(3,), seed=seed,
            )  # fmt: skip
            text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
            confirm = ReportText(windows=text.held_out[:2], record=text.record)
            bundle = calibrate(model, text, settings)
            return Work.of(bundle=bundle, calibration=text.calibration, confirm=confirm)

        return make

    return of_seed


def test_each_permuted_method_removes_2_of_4_in_another_channel_order_than_the_models(
    model, bundle, report
):
    dense = {name: linear.weight.clone() for name, linear in model.linears.items()}
    for method in ("wanda-permuted", "ria-row-sequential-permuted", "sparsegpt-permuted"):
        candidate = named_baselines(NM)[method]
        masks = {}
        prune_model(model, bundle.statistics(), candidate, report.windows, kept=masks.__setitem__)
        moved = False
        for name, linear in model.linears.items():
            order = masks[name].order
            assert order is not None
            moved = moved or not torch.equal(order, torch.arange(len(order)))
            groups = (linear.weight == 0)[:, order].unflatten(1, (-1, 4)).sum(dim=2)
            assert bool((groups == 2).all())
            linear.weight.copy_(dense[name])
        assert moved


def test_methods_by_name(model, bundle, report):
    """Named methods are the rows, each as it would be alone; more can be measured of each."""
    names = ["wanda-sequential", "sparsegpt"]
    seen = []

    def zeros(pruned):
        seen.append(sum(int((each.weight == 0).sum()) for each in pruned.linears.values()))
        return {"zeros": float(seen[-1])}

    options = {"methods": names, "calibration": report.windows}
    rows = compared_on(model, bundle, report, HALF, [], **options)
    more = compared_on(model, bundle, report, HALF, [], also=zeros, **options)
    alone, _ = rate_pruned(
        model, bundle.statistics(), named_baselines(HALF)["wanda-sequential"], report.windows,
        calibration=report.windows,
    )  # fmt: skip

    assert [row.method for row in rows] == ["dense", *names]
    assert rows[1].perplexity == alone.perplexity
    assert [row.perplexity for row in more] == [row.perplexity for row in rows]
    assert seen[1] == seen[2] == sum(each.weight.numel() for each in model.linears.values()) // 2
    assert [row.extra["zeros"] for row in more] == seen

    best, other = sorted(rows[1:], key=lambda row: row.perplexity)
    assert rows[0].behind is best.behind is None
    assert 0 < other.behind < 1
    with pytest.raises(InvalidInput, match="need a calibration text"):
        compared_on(model, bundle, report, HALF, [], methods=["sparsegpt"])


def test_ablation(model, bundle, report):
    """Each step has its row, and the last one is the configuration's own."""
    options = {"methods": ["wanda"], "calibration": report.windows}
    own = compared_on(model, bundle, report, HALF, [("mine", MINE)], **options)
    rows = compared_on(model, bundle, report, HALF, [("mine", MINE)], ablation=True, **options)

    assert [row.method for row in rows[2:]] == [
        "mine: score", "mine: + allocation fisher", "mine: + re-pruning swaps",
        "mine: + update least-squares",
    ]  # fmt: skip
    assert rows[-1].perplexity == own[-1].perplexity
    assert len({row.perplexity for row in rows}) == len(rows)
    assert all(row.seconds > 0 for row in rows)


@pytest.mark.parametrize("ablation", [False, True])
def test_what_was_found_is_recovered_in_rows_of_their_own(model, bundle, report, texts, ablation):
    before = bits(model)
    source = TextSource(path=str(texts["calibration"]))
    text = RecoveryText(source=source, context_length=32, unlike=report.windows)
    recovery = Recovery(tokens=256, rate=0.02)
    options = {"methods": ["wanda"], "calibration": report.windows}
    options |= {"ablation": ablation}
    plain = compared_on(model, bundle, report, HALF, [("mine", MINE)], **options)
    rows = compared_on(
        model, bundle, report, HALF, [("mine", MINE)], text=text, recovery=recovery, **options
    )
    found = {row.method: row for row in rows}

    new = ["mine: score + recovery", "mine: + recovery"] if ablation else ["mine, recovered"]
    old = ["mine: score", "mine: + update least-squares"] if ablation else ["mine"]
    assert [name for name in found if name not in new] == [row.method for row in plain]
    assert [found[row.method].perplexity for row in plain] == [row.perplexity for row in plain]
    assert rows[-1].method == new[-1]
    for pruned_alone, recovered in zip(old, new, strict=True):
        mine, other = found[recovered], found[pruned_alone]
        assert mine.perplexity != other.perplexity
        assert (mine.sparsity, mine.proxy) == (other.sparsity, other.proxy)
        assert mine.seconds > other.seconds
    assert same(before, bits(model))


def test_seeds(model, report, drawn):
    """Each seed has a calibration and a search of its own; rows are their mean and deviation."""
    preset = Preset.of("crepe", HALF)
    search = SearchRequest(pattern=HALF, bounds=preset.bounds, trials=9, finalists=1)
    request = ComparisonRequest(
        pattern=HALF, methods=["magnitude", "wanda"], searches={"crepe": search}
    )
    found = compare_over_seeds(model, report, request, {s: drawn(s) for s in (0, 3)})
    again = compare_over_seeds(model, report, request, {3: drawn(3)})

    assert list(found.seeds) == [0, 3]
    assert [row.method for row in found.rows] == ["dense", "magnitude", "wanda", "crepe"]
    for row, first, second in zip(found.rows, *found.seeds.values(), strict=True):
        values = [first.perplexity, second.perplexity]
        assert row.perplexity == pytest.approx(sum(values) / 2)
        if row.method != "dense":
            assert row.deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert found.rows[1].deviation == 0  # it looks at no text
    assert found.rows[2].deviation
    assert found.rows[0].deviation is None
    assert [r.perplexity for r in again.rows] == [r.perplexity for r in found.seeds[3]]
    assert again.configurations[3]["crepe"] == found.configurations[3]["crepe"]
    assert found.configurations[3]["crepe"].search["seed"] == 3
    assert "±" in found.table.cells[2][2]
    assert "seeds 0, 3" in found.caption


def test_the_summary_names_the_best_published_variant_a_note_says_what_is_left_out(
    model, bundle, report
):
    names = ["wanda", "wanda-sequential", "ria-row", "ria-layer"]
    request = ComparisonRequest(pattern=HALF, methods=names)
    given = Work.of(bundle=bundle, calibration=report.windows)
    found = compare_over_seeds(model, report, request, {0: lambda: given})
    values = {row.method: row.perplexity for row in found.rows}
    best = [min(names[:2], key=values.__getitem__), min(names[2:], key=values.__getitem__)]
    said = found.summary.replace("Wanda", "wanda").split(", ")

    assert said[1:] == [f"{name} {number(values[name])}" for name in best]
    for methods, notes in ((None, [OWL_AT_NM]), (["wanda"], [])):
        request = ComparisonRequest(pattern=NM, methods=methods)
        found = compare_over_seeds(model, report, request, {0: lambda: Work.of(bundle=bundle)})
        assert found.notes == notes
        assert ("OWL has no row at N:M" in found.caption) is bool(notes)


def test_mean_rows():
    """Means of all but memory, which is the most; a row that one table lacks is of the others."""

    def row(method, perplexity, memory):
        return ComparisonRow(
            method=method, scope="row", perplexity=perplexity, sparsity=0.5, proxy=None,
            seconds=perplexity, memory_bytes=memory,
        )  # fmt: skip

    tables = [[row("a", 2, 5)], [row("a", 4, 7), row("b", 1, None)], [row("a", 9, None)]]
    a, b = mean_rows(tables)

    assert (a.perplexity, a.deviation, a.seconds, a.memory_bytes, a.calibrations) == (
        5, pytest.approx(13**0.5), 5, 7, 3,
    )  # fmt: skip
    assert (b.perplexity, b.deviation, b.calibrations) == (1, None, 1)


def test_refused(model, report, drawn):
    """What has nothing in common, or would be chosen on the text that it is reported on."""
    search = SearchRequest(pattern=HALF, trials=9)

    def asked(**fields):
        return ComparisonRequest(**{"pattern": HALF, **fields})

    def compared(given):
        return compare_over_seeds(
            model, report, asked(searches={"best": search}), {0: lambda: given}
        )

    given = drawn(0)()
    other = Configuration.of(named_baselines(NM)["wanda"])
    elsewhere = MINE.model_copy(update={"model": {"family": "gpt2"}})
    with pytest.raises(ConfigurationError, match=r"b is for the pattern 2:4, .* for 0\.5"):
        asked(configurations=[("a", MINE), ("b", other)])
    with pytest.raises(InvalidInput, match="two rows would be called 'wanda'"):
        asked(configurations=[("wanda", MINE)])
    with pytest.raises(InvalidInput, match="configurations are taken apart, and there is none"):
        asked(ablation=True)
    with pytest.raises(InvalidInput, match="confirmed on a text of its own"):
        compared(replace(given, confirm=None))
    with pytest.raises(InvalidInput, match="must not be reported on it"):
        compared(replace(given, confirm=report))
    with pytest.raises(InvalidInput, match="configurations are recovered, and there is none"):
        asked(recovery=Recovery())
    whole = replace(given, unused_windows=0)
    with pytest.raises(InvalidInput, match="fills 3 windows, and all of them are drawn"):
        compare_over_seeds(model, report, asked(), {0: lambda: whole, 1: lambda: whole})
    with pytest.raises(ConfigurationError, match=r"b was found on gpt2.*other_family"):
        check_family(elsewhere, model, "b", other_family=False)
