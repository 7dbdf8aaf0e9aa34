"""Minutes in Python: sizes that are not given are chosen for the time."""

import pytest

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.interface.inputs import opened_for
from pho_service.interface.minutes import within_minutes
from pho_service.pipeline.work import Work
from pho_service.planning.minutes import LEVELS
from pho_service.progress import Run
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.tuning.plan import SearchRequest

FREE = ["confirm/finalists", "in_full"]


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
    pattern = Pattern.parse("0.5")
    preset = Preset.of("best", pattern)
    request = SearchRequest(pattern=pattern, bounds=preset.bounds, steps=preset.steps)

    work = Work(bundles={model.name: bundle}, dense=model)

    fitted, run = within_minutes(minutes, request, work, Run(), 8, FREE)

    assert fitted.in_full == in_full
    assert run.passes is not None


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
