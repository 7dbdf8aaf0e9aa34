"""`pho.curve` and `pho.search_within` on a model in memory."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import pho_service as pho
from pho_service.errors import InvalidInput

ELSEWHERE = {"sampler", "finalists"}


def test_a_point_is_what_pho_search_finds_there_beside_its_references_the_model_is_left_dense(
    tiny_llama: PreTrainedModel, bundle: Any, texts: dict[str, Path], weights: Callable[[], bool],
    tmp_path: Path,
) -> None:  # fmt: skip
    options: dict[str, Any] = {
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


def test_within(tiny_llama: PreTrainedModel, bundle: Any, texts: dict[str, Path]) -> None:
    """The answer can be pruned with, and says its target; a rule that is broken is named."""
    options: dict[str, Any] = {
        "model": tiny_llama, "confirm": texts["confirmation"], "trials": 9, "preset": "score",
    }  # fmt: skip
    found = pho.search_within(bundle, 0.2, step=0.25, lowest=0.6, highest=0.9, **options)

    assert found.answer.perplexity <= found.target.limit(found.answer.dense)
    assert found.result.configuration.search["target"]["limit"] == found.answer.dense * 1.2
    assert "answer: " in repr(found)
    with pytest.raises(InvalidInput, match="perplexity_rise: Input should be greater than 0"):
        pho.search_within(bundle, -0.1, **options)


@pytest.mark.parametrize("name", ["curve", "search_within"])
def test_options_that_pho_search_has_too_have_its_defaults(name: str) -> None:
    mine = inspect.signature(getattr(pho, name)).parameters
    theirs = inspect.signature(pho.search).parameters
    shared = (mine.keys() & theirs.keys()) - {"bundle", "model", *ELSEWHERE}

    assert len(shared) >= 15
    assert {n: mine[n].default for n in shared} == {n: theirs[n].default for n in shared}
