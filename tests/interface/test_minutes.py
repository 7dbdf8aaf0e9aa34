"""Minutes in Python: sizes that are not given are chosen for the time."""

import pytest

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.interface.inputs import opened_for
from pho_service.interface.minutes import search_clock, sized
from pho_service.interface.search import FoundArguments
from pho_service.pipeline.work import Work
from pho_service.planning.minutes import LEVELS
from pho_service.progress import Run


def calibrated(model, tokenizer, sentences, **sizes):
    bundle = pho.calibrate(model, tokenizer, sentences["calibration"], kernel_sizes=(3,), **sizes)
    return tuple(bundle.text.calibration.shape)


def test_a_calibration_takes_less_text_the_less_time_there_is_and_keeps_what_is_given(
    tiny_llama, tokenizer, sentences
):
    little = calibrated(tiny_llama, tokenizer, sentences, minutes=1e-4)
    given = calibrated(tiny_llama, tokenizer, sentences, minutes=1e-4, samples=6)
    much = calibrated(tiny_llama, tokenizer, sentences, minutes=1000)

    assert little[0] == LEVELS[0][0]
    assert given[0] == 6
    assert much[0] * much[1] > 4 * little[0] * little[1]


@pytest.mark.parametrize(("minutes", "in_full"), [(1e-4, 1), (1000, 5)])
def test_a_search_prunes_as_many_in_full_as_there_is_time_for(
    minutes, in_full, tiny_llama, tokenizer, bundle
):
    model = opened_for(bundle, tiny_llama, tokenizer)
    ask = FoundArguments(bundle, "0.5", confirm_windows=8, minutes=minutes)
    request = ask.request("0.5")
    work = Work(bundles={model.name: bundle}, dense=model)
    clock = search_clock(ask, request, work, pattern="0.5")

    assert sized(request, clock).in_full == in_full
    assert clock.watched(Run()).passes is not None


@pytest.mark.thorough
def test_a_curve_and_a_target_choose_for_all_their_points(tiny_llama, bundle, sentences):
    measured = {"model": tiny_llama, "confirm": sentences["confirmation"], "preset": "score"}
    measured |= {"trials": 20, "confirm_windows": 2}
    hurried = pho.curve(bundle, [0.3, 0.5], minutes=1e-4, **measured)
    within = pho.search_within(
        bundle, perplexity_rise=10.0, highest=0.5, lowest=0.4, step=0.1, minutes=1e-4, **measured
    )
    finalists = [len(point.configuration.finalists) for point in (*hurried.points, *within.points)]
    usual = pho.curve(bundle, [0.3], finalists=9, minutes=1e-4, **measured)

    assert max(finalists) < len(usual.points[0].configuration.finalists)


@pytest.mark.parametrize("presets", [(), ("score",)])
def test_a_comparison_calibrates_on_less_the_less_time_there_is_and_says_on_how_much(
    presets, tiny_llama, tokenizer, sentences
):
    ask = {"texts": sentences["calibration"], "report": sentences["report"], "methods": ["wanda"]}
    ask |= {"presets": presets, "trials": 20, "confirm": sentences["confirmation"]}
    little = pho.compare(tiny_llama, tokenizer, "0.5", minutes=1e-4, report_windows=2, **ask)
    (samples, length) = LEVELS[0]

    assert f"samples={samples} and context_length=" in little.notes[-1]
    again = pho.compare(
        tiny_llama, tokenizer, "0.5", samples=samples, report_windows=2,
        context_length=little.report["context_length"], **ask,
    )  # fmt: skip
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in little.rows]
    assert little.report["context_length"] <= length


def test_minutes_of_a_comparison_have_nothing_to_choose_beside_a_bundle(tiny_llama, bundle, texts):
    with pytest.raises(InvalidInput, match="minutes=5 choose how much is calibrated on"):
        pho.compare(tiny_llama, None, "0.5", bundle=bundle, report=texts["report"], minutes=5)


def test_what_cannot_be_planned_is_refused_in_words(tiny_llama, bundle, sentences):
    ask = {"model": tiny_llama, "confirm": sentences["confirmation"], "minutes": 1}
    with pytest.raises(InvalidInput, match="trials=4 is too few"):
        pho.search(bundle, "0.5", trials=4, **ask)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(minutes, tiny_llama, tokenizer, sentences):
    with pytest.raises(InvalidInput, match=f"minutes={minutes} is not a number above 0"):
        pho.calibrate(tiny_llama, tokenizer, sentences["calibration"], minutes=minutes)


def test_a_search_by_the_clock_needs_the_model_and_keeps_to_one_pass_if_it_must(
    bundle, tiny_llama, sentences
):
    with pytest.raises(InvalidInput, match="minutes are given without the model"):
        pho.search(bundle, 0.5, minutes=1)

    found = pho.search(
        bundle, 0.5, model=tiny_llama, confirm=sentences["confirmation"], trials=8, minutes=1e-4
    )

    assert found.configuration.steps.reconstruction.passes == 1
