"""Texts from files and data sets, cut into windows."""

import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pho_service.errors import InvalidInput, TextError
from pho_service.models.calibration import calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_documents, read_windows, sample_windows
from pho_service.spec.calibration import CalibrationSettings

DOCUMENTS = ["the first text", "a second text", "the last text"]


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    """The tiny model with its tokenizer."""
    return load_model(str(model_folder), device="cpu")


def write(path: Path, field: str = "text") -> Path:
    """``DOCUMENTS`` in the form that the file's ending asks for."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: DOCUMENTS}), path)
    else:
        path.write_text("\n".join(json.dumps({field: d}) for d in DOCUMENTS))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows(tmp_path: Path, name: str) -> None:
    """Each row of a table is a document; the field can be named."""
    plain, other = write(tmp_path / name), write(tmp_path / f"other-{name}", field="body")

    assert list(read_documents(TextSource(path=str(plain)))) == DOCUMENTS
    assert list(read_documents(TextSource(path=str(other), field="body"))) == DOCUMENTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")

    assert list(read_documents(TextSource(path=str(path)))) == ["one\n\ntwo"]


def test_dataset(tmp_path: Path) -> None:
    """A data set is read through the datasets library, by folder here, by hub id elsewhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl")
    (folder / "b.jsonl").write_text(json.dumps({"text": "another"}))
    one = TextSource(dataset=str(folder), data_file="a.jsonl")

    assert list(read_documents(one)) == DOCUMENTS
    assert list(read_documents(TextSource(dataset=str(folder)))) == [*DOCUMENTS, "another"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text in the field 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 has no text"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.pdf", b"%PDF", "unknown kind '.pdf'"),
        ("a.parquet", b"nothing", "not a readable parquet file"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A file that cannot be read says where and why."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(TextError, match=message):
        list(read_documents(TextSource(path=str(tmp_path / name))))


def test_a_missing_file_or_data_set_or_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="does not exist"):
        list(read_documents(TextSource(path=str(tmp_path / "a.txt"))))
    with pytest.raises(TextError, match=r"data set .* does not exist"):
        list(read_documents(TextSource(dataset=str(tmp_path / "no-data"))))
    with pytest.raises(TextError, match="no column 'text', only body"):
        list(read_documents(TextSource(path=str(write(tmp_path / "a.parquet", field="body")))))


@pytest.mark.parametrize("content", ["", "  \n\n "])
def test_empty(tmp_path: Path, model: LanguageModel, content: str) -> None:
    """A text without words is refused."""
    path = tmp_path / "a.txt"
    path.write_text(content)

    with pytest.raises(TextError, match="is empty"):
        read_windows(model, TextSource(path=str(path)), context_length=8, bos="auto")


def test_too_short(model: LanguageModel, tmp_path: Path) -> None:
    """A text that does not fill one window is refused with both numbers."""
    path = write(tmp_path / "a.jsonl")

    with pytest.raises(TextError, match="has 9 tokens, which do not fill one window of 16"):
        read_windows(model, TextSource(path=str(path)), context_length=16, bos="auto")


def test_windows(model: LanguageModel, texts: dict[str, Path]) -> None:
    """A text is joined by two newlines, hashed, tokenised once and cut; the tail is dropped."""
    source = TextSource(path=str(texts["report"]))
    text = "\n\n".join(read_documents(source))
    ids = model.tokenizer(text).input_ids
    windows, record = read_windows(model, source, context_length=32, bos="auto")

    assert windows.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert record.sha256 == hashlib.sha256(text.encode()).hexdigest()
    first, _ = read_windows(model, source, context_length=32, bos="auto", max_windows=3)
    assert torch.equal(first, windows[:3])


def test_windows_with_bos(model: LanguageModel, texts: dict[str, Path]) -> None:
    """With BOS, a window of n tokens has n - 1 of the text."""
    source = TextSource(path=str(texts["report"]))
    plain, _ = read_windows(model, source, context_length=31, bos="never")
    windows, _ = read_windows(model, source, context_length=32, bos="always")

    assert windows[:, 0].tolist() == [1] * len(windows)
    assert torch.equal(windows[:, 1:], plain)


def test_sample(model: LanguageModel, texts: dict[str, Path]) -> None:
    """A sample comes from its seed; windows do not overlap; a short text gives what it has."""
    source = TextSource(path=str(texts["calibration"]))

    def sample(count: int, seed: int) -> torch.Tensor:
        return sample_windows(
            model, source, count=count, context_length=16, bos="auto", seed=seed
        )[0]  # fmt: skip

    everything = sample(10_000, 0)
    tokens = sum(len(model.tokenize(d)) for d in read_documents(source))

    assert sample(10, 0).shape == (10, 16)
    assert torch.equal(sample(10, 0), sample(10, 0))
    assert not torch.equal(sample(10, 0), sample(10, 1))
    assert len(everything) == tokens // 16
    assert len(everything.unique(dim=0)) == len(everything)


def test_held_out(model: LanguageModel, texts: dict[str, Path]) -> None:
    """Windows to confirm on are not among those to calibrate on."""
    settings = CalibrationSettings(samples=12, context_length=16)
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    calibration = {tuple(w) for w in text.calibration.tolist()}

    assert len(text.calibration) == 12
    assert len(text.held_out) == 16
    assert not calibration & {tuple(w) for w in text.held_out.tolist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples=0 is below 1"),
        ({"context_length": 4}, "context_length=4 is below 8"),
        ({"fisher_samples": 9, "samples": 8}, "fisher_samples=9 is not in 1..8"),
        ({"kernel_sizes": (4,)}, "not odd whole numbers"),
        ({"seed": -1}, "seed=-1 is below 0"),
        ({"rows_per_layer": -1}, "rows_per_layer=-1"),
        ({"memory_bytes": 0}, "memory_bytes=0 is below 1"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    """A setting that breaks a rule is named with its value."""
    with pytest.raises(InvalidInput, match=message):
        CalibrationSettings(**change)  # type: ignore[arg-type]


def test_context_beyond_the_model(model: LanguageModel, texts: dict[str, Path]) -> None:
    """A window that the model cannot read is refused."""
    settings = CalibrationSettings(context_length=100_000)

    with pytest.raises(InvalidInput, match="context_length=100000 is more than"):
        calibration_text(model, TextSource(path=str(texts["report"])), settings)


@pytest.mark.parametrize("name", ["./nothing", "a/b/c"])
def test_missing_dataset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is not there is no data set of the hub."""
    monkeypatch.setattr("pho_service.models.data_sets._checked_commit", pytest.fail)

    with pytest.raises(TextError, match=f"the data set {name} does not exist"):
        next(read_documents(TextSource(dataset=name)))
