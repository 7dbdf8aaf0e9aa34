"""A comparison with methods by name, searches of its own, ablations and several calibrations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextSource
from pho_service.pipeline.compare import (
    Compared,
    ComparisonRequest,
    ComparisonRow,
    check_family,
    compare_job,
    compare_over_seeds,
    mean_rows,
)
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.pipeline import prune_model
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import LinearMask
from pho_service.spec.baselines import OWL_AT_NM, named_baselines
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.spec.steps import Allocation, Steps
from pho_service.tuning.plan import SearchRequest

NM = Pattern.parse("2:4")
HALF = Pattern.parse("0.5", "layer")
STEPS = Steps(
    allocation=Allocation(method="fisher", spread=0.3), repruning="swaps", update="least-squares"
)
MINE = Configuration.of(replace(named_baselines(HALF)["crepe-equal"], method="crepe", steps=STEPS))


@pytest.fixture
def drawn(
    model: LanguageModel, texts: dict[str, Path]
) -> Callable[[int], Callable[[], Calibrated]]:
    """Calibrations on windows that a seed draws."""

    def of_seed(seed: int) -> Callable[[], Calibrated]:
        def make() -> Calibrated:
            settings = CalibrationSettings(
                samples=3, context_length=32, rows_per_layer=4, projection_rows=16,
                kernel_sizes=(3,), seed=seed,
            )  # fmt: skip
            text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
            confirm = ReportText(windows=text.held_out[:2], record=text.record)
            bundle = calibrate(model, text, settings)
            return Calibrated(bundle=bundle, calibration=text.calibration, confirm=confirm)

        return make

    return of_seed


def test_each_permuted_method_removes_2_of_4_in_another_channel_order_than_the_models(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    dense = {name: linear.weight.clone() for name, linear in model.linears.items()}
    for method in ("wanda-permuted", "ria-row-sequential-permuted", "sparsegpt-permuted"):
        candidate = named_baselines(NM)[method]
        masks: dict[str, LinearMask] = {}
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


def test_methods_by_name(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """Named methods are the rows, each as it would be alone; more can be measured of each."""
    names = ["wanda-sequential", "sparsegpt"]
    seen: list[int] = []

    def zeros(pruned: LanguageModel) -> dict[str, float]:
        seen.append(sum(int((each.weight == 0).sum()) for each in pruned.linears.values()))
        return {"zeros": float(seen[-1])}

    options = {"methods": names, "calibration": report.windows}
    rows = compare_job(model, bundle, report, HALF, [], **options)
    more = compare_job(model, bundle, report, HALF, [], also=zeros, **options)
    alone, _ = rate_pruned(
        model, bundle.statistics(), named_baselines(HALF)["wanda-sequential"], report.windows,
        calibration=report.windows,
    )  # fmt: skip

    assert [row.method for row in rows] == ["dense", *names]
    assert rows[1].perplexity == alone.perplexity
    assert [row.perplexity for row in more] == [row.perplexity for row in rows]
    assert seen[1] == seen[2] == sum(each.weight.numel() for each in model.linears.values()) // 2
    assert [row.extra["zeros"] for row in more] == seen


def test_method_without_its_text(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    """A method that needs a text is not left out silently if it was named."""
    with pytest.raises(InvalidInput, match="need a calibration text"):
        compare_job(model, bundle, report, HALF, [], methods=["sparsegpt"])


def test_ablation(model: LanguageModel, bundle: ProxyBundle, report: ReportText) -> None:
    """Each step has its row, and the last one is the configuration's own."""
    options = {"methods": ["wanda"], "calibration": report.windows}
    own = compare_job(model, bundle, report, HALF, [("mine", MINE)], **options)
    rows = compare_job(model, bundle, report, HALF, [("mine", MINE)], ablation=True, **options)

    assert [row.method for row in rows[2:]] == [
        "mine: score", "mine: + allocation fisher", "mine: + re-pruning swaps",
        "mine: + update least-squares",
    ]  # fmt: skip
    assert rows[-1].perplexity == own[-1].perplexity
    assert len({row.perplexity for row in rows}) == len(rows)
    assert all(row.seconds > 0 for row in rows)


def test_seeds(
    model: LanguageModel,
    report: ReportText,
    drawn: Callable[[int], Callable[[], Calibrated]],
) -> None:
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


def test_owl_is_left_out_with_a_sentence(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText
) -> None:
    def compared(methods: list[str] | None) -> Compared:
        request = ComparisonRequest(pattern=NM, methods=methods)
        return compare_over_seeds(model, report, request, {0: lambda: Calibrated(bundle=bundle)})

    assert compared(None).notes == [OWL_AT_NM]
    assert "OWL has no row at N:M" in compared(None).caption
    assert compared(["wanda"]).notes == []


def test_mean_rows() -> None:
    """Means of all but memory, which is the most; a row that one table lacks is of the others."""

    def row(method: str, perplexity: float, memory: int | None) -> ComparisonRow:
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


def test_refused(
    model: LanguageModel, report: ReportText, drawn: Callable[[int], Callable[[], Calibrated]]
) -> None:
    """What has nothing in common, or would be chosen on the text that it is reported on."""
    search = SearchRequest(pattern=HALF, trials=9)

    def asked(**fields: object) -> ComparisonRequest:
        return ComparisonRequest(**{"pattern": HALF, **fields})  # type: ignore[arg-type]

    def compared(given: Calibrated) -> Compared:
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
    with pytest.raises(InvalidInput, match="ablation takes configurations apart"):
        asked(ablation=True)
    with pytest.raises(InvalidInput, match="confirmed on a text of its own"):
        compared(replace(given, confirm=None))
    with pytest.raises(InvalidInput, match="must not be reported on it"):
        compared(replace(given, confirm=report))
    whole = replace(given, left=0)
    with pytest.raises(InvalidInput, match="fills 3 windows, and all of them are drawn"):
        compare_over_seeds(model, report, asked(), {0: lambda: whole, 1: lambda: whole})
    with pytest.raises(ConfigurationError, match=r"b was found on gpt2.*--other-family"):
        check_family(elsewhere, model, "b", other_family=False)
