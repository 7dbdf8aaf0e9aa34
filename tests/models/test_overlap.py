"""What a model is confirmed on was never calibrated on, however the texts are given."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pho_service.errors import TextError
from pho_service.models.calibration import calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import apart, read_windows
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
)


def runs(windows, length):
    return {
        tuple(window[i : i + length])
        for window in windows.tolist()
        for i in range(len(window) - length + 1)
    }


@settings(settings.get_profile("suite"))
@given(seed=st.integers(0, 10_000), length=st.integers(8, 48), kept=st.integers(1, 5))
def test_as_one_by_one(seed, length, kept):
    """A window stays if none of its runs is one of the others', as a slow loop finds them."""
    generator = torch.Generator().manual_seed(seed)
    windows, others = (torch.randint(2, (n, length), generator=generator) for n in (6, 2))
    run = 8 if length < 32 else length // 4
    seen = runs(others, run)
    expected = [w for w in windows.tolist() if not runs(torch.tensor([w]), run) & seen]

    assert apart(windows, others).tolist() == expected
    assert apart(windows, others, kept).tolist() == expected[:kept]


def test_in_long_windows_32_tokens_in_a_row_are_an_overlap_and_31_are_not():
    generator = torch.Generator().manual_seed(0)
    windows, others = (torch.randint(50_000, (3, 512), generator=generator) for _ in range(2))
    windows[0, 100:132] = others[2, 300:332]
    windows[1, 100:131] = others[2, 300:331]

    assert torch.equal(apart(windows, others), windows[1:])


@pytest.mark.parametrize("same", ["the path", "the documents", "a part of the documents"])
def test_confirmed_on_the_calibration_text(model, texts, tmp_path, same):
    path = texts["calibration"]
    lines = path.read_text().splitlines()
    if same != "the path":
        path = tmp_path / "other.jsonl"
        path.write_text("\n".join(lines if same == "the documents" else lines[::2]))
    calibrated = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    options = {"context_length": 32, "bos": "auto"}
    whole, _ = read_windows(model, TextSource(path=str(path)), **options)
    windows, _ = read_windows(
        model, TextSource(path=str(path)), **options, unlike=calibrated.calibration
    )

    assert 0 < len(windows) < len(whole)
    assert not runs(windows, 8) & runs(calibrated.calibration, 8)


def test_if_nothing_of_the_text_is_left_that_is_said_with_the_way_out(model, texts, tmp_path):
    book = tmp_path / "book.txt"
    lines = texts["calibration"].read_text().splitlines()
    book.write_text(" ".join(json.loads(line)["text"] for line in lines))
    source = TextSource(path=str(book))
    text = calibration_text(model, source, CalibrationSettings(context_length=32))

    with pytest.raises(TextError, match=r"book\.txt has no window of 32 tokens that nothing was"):
        read_windows(model, source, context_length=32, bos="auto", unlike=text.calibration)


def test_documents_that_come_twice(model, texts):
    """Windows that are held out are of no passage that the calibration has from elsewhere."""
    lines = texts["calibration"].read_text().splitlines()
    long = json.dumps({"text": " ".join(json.loads(line)["text"] for line in lines[:20])})
    texts["calibration"].write_text("\n".join([long] * 8))
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)

    assert not runs(text.held_out, 8) & runs(text.calibration, 8)
