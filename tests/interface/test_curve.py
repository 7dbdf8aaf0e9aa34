"""`pho.curve` and `pho.search_within` on a model in memory."""

import copy

import pytest
import torch

import pho_service as pho
from pho_service.errors import InvalidInput, TargetMissed
from pho_service.models.blockwise import Block
from pho_service.spec.structure import ESTIMATE


def test_a_point_is_what_pho_search_finds_there_beside_its_references_the_model_is_left_dense(
    tiny_llama, bundle, texts, weights,
    tmp_path,
):  # fmt: skip
    options = {
        "model": tiny_llama, "confirm": texts["confirmation"], "trials": 9, "preset": "score",
    }  # fmt: skip
    found = pho.curve(bundle, ["2:4", 0.3], **options)
    alone = pho.search(bundle, "2:4", finalists=2, **options)
    low, high = found.points
    found.write(tmp_path / "curve.json")
    found.plot(tmp_path / "curve.html")

    assert (low.pattern, high.pattern) == ("0.3", "2:4")
    assert high.result.configuration == alone.configuration
    assert [high.dense, high.wanda, high.ria] == pytest.approx(
        [row.perplexity for row in alone.table[:3]], rel=1e-6
    )
    assert found.study is not None
    assert len(found.study.trials) == 18
    assert "2:4" in repr(found)
    assert "wanda" in (tmp_path / "curve.html").read_text()
    assert weights()


@pytest.mark.thorough
def test_with_a_report_text_a_point_tells_its_perplexities_on_it_and_a_target_is_not_chosen_on_it(
    tiny_llama, bundle, texts
):
    options = {
        "model": tiny_llama, "confirm": texts["confirmation"], "trials": 9, "preset": "score",
        "report": texts["report"], "report_windows": 4,
    }  # fmt: skip
    curve = pho.curve(bundle, [0.55], **options)
    answer = pho.search_within(bundle, 5.0, step=0.25, lowest=0.3, highest=0.55, **options).answer
    report, chosen = answer.configuration.report, answer.configuration.perplexities
    (point,) = curve.points

    assert point.perplexity == point.configuration.report.pruned == report.pruned
    assert (point.dense, point.rise) == (report.dense, report.rise)
    assert (point.measured_on, answer.measured_on) == ("report text", "chosen on this text")
    assert answer.perplexity == chosen.pruned != report.pruned
    assert "Nothing was chosen" in repr(curve)
    assert "report" in repr(curve)


def test_within(tiny_llama, bundle, texts):
    """The answer can be pruned with, and says its target; a rule that is broken is named."""
    options = {
        "model": tiny_llama, "confirm": texts["confirmation"], "trials": 9, "preset": "score",
    }  # fmt: skip
    found = pho.search_within(bundle, 0.2, step=0.25, lowest=0.6, highest=0.9, **options)

    assert found.answer.perplexity <= found.target.limit(found.answer.dense)
    assert found.result.configuration.search["target"]["limit"] == found.answer.dense * 1.2
    assert "answer: " in repr(found)
    with pytest.raises(InvalidInput, match=r"perplexity_rise: -0\.1 should be greater than 0"):
        pho.search_within(bundle, -0.1, **options)


def test_a_curve_of_cuts_has_the_cut_that_pho_search_finds_at_each_share(
    tiny_llama, bundle, texts, weights, monkeypatch, tmp_path
):
    """What cuts cost is worked out once for all shares."""
    options = {"model": tiny_llama, "confirm": texts["confirmation"]}
    only, looked_at = Block.only, []
    monkeypatch.setattr(
        Block, "only", lambda block, names: looked_at.append(len(names)) or only(block, names)
    )
    found = pho.curve(bundle, ["structured:30%", "structured:15%"], **options)
    rated = looked_at.count(2)  # o_proj and down_proj together; a cut looks at one of them
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "another"))
    alone = pho.search(bundle, "structured:30%", **options)
    low, high = found.points

    assert rated == len(tiny_llama.model.layers) == looked_at.count(2) / 2

    assert (low.pattern, high.pattern) == ("structured:15%", "structured:30%")
    assert high.result.configuration == alone.configuration
    assert len(alone.configuration.finalists) == 2  # as in the terminal and in a job
    assert low.configuration.cut.removed < high.configuration.cut.removed
    assert (low.wanda, low.ria) == (None, None)
    assert found.study.metric_names == ["sparsity", ESTIMATE]
    assert "structured:15%" in repr(found)
    assert weights()


@pytest.mark.thorough
def test_the_largest_cut_within_a_target_is_one_that_a_model_is_cut_with(tiny_llama, bundle, texts):
    options = {"model": tiny_llama, "confirm": texts["confirmation"], "structured": True}
    found = pho.search_within(bundle, 9.0, step=0.1, lowest=0.2, highest=0.4, **options)
    before = sum(p.numel() for p in tiny_llama.parameters())
    smaller = pho.prune(tiny_llama, found.result, bundle)

    assert [point.pattern for point in found.points] == ["structured:30%", "structured:40%"]
    assert found.result.configuration.cut.removed > 0.3
    assert "structured:40% is the highest" in repr(found)
    assert sum(p.numel() for p in smaller.model.parameters()) < before


@pytest.mark.thorough
def test_a_target_that_no_cut_is_within_names_the_smallest(tiny_llama, bundle, texts):
    with pytest.raises(TargetMissed, match=r"or a smaller cut: lowest=0\.1"):
        pho.search_within(
            bundle, 1e-9, model=tiny_llama, confirm=texts["confirmation"], structured=True,
            step=0.1, lowest=0.2, highest=0.4,
        )  # fmt: skip


@pytest.mark.thorough
def test_blocks_that_a_search_has_trained_are_not_trained_again_by_prune(
    tiny_llama, bundle, texts, tmp_path,
    monkeypatch, trained,
):  # fmt: skip
    """Those of the answer of a target wait, and no others; a curve leaves none."""
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path))
    options = {
        "model": tiny_llama, "confirm": texts["confirmation"], "trials": 9, "finalists": 1,
        "steps": {"update": "least-squares", "reconstruction": "block"}, "preset": "crepe",
    }  # fmt: skip
    pho.curve(bundle, [0.5], **options)
    of_curve = [*tmp_path.glob("blocks/*")]
    trained.clear()
    found = pho.search_within(bundle, 9.0, step=0.1, lowest=0.4, highest=0.6, **options)
    waiting = [*tmp_path.glob("blocks/*")]
    before = [*trained]
    other = copy.deepcopy(tiny_llama)
    pho.prune(tiny_llama, found.result, bundle)
    once = [*trained]
    pho.prune(other, found.result, bundle)

    assert [point.pattern for point in found.points] == ["0.5", "0.6"]
    assert found.result.configuration.steps.reconstruction.wanted
    assert of_curve == []
    assert len(waiting) == 1
    assert once == before == 2 * ["model.layers.0", "model.layers.1"]
    assert len(trained) == 6  # there were none any more
    assert [*tmp_path.glob("blocks/*")] == []
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
