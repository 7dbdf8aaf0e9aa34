"""Texts as they are found in the wild."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pho_service.errors import PhoError, TextError
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_documents, read_windows, sample_windows


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    """The tiny model with its tokenizer."""
    return load_model(str(model_folder), device="cpu")


def test_blank_lines_and_documents_without_words_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": "two"}\n')

    assert list(read_documents(TextSource(path=str(path)))) == ["one", "two"]


def test_bytes_that_are_no_utf_8_are_refused_in_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n')

    with pytest.raises(TextError, match=r"is not UTF-8: .* at byte 13"):
        list(read_documents(TextSource(path=str(path))))


@pytest.mark.parametrize("values", [[1, 2], ["a text", None], [["a"], ["b"]]])
def test_column_without_text(tmp_path: Path, values: list[object]) -> None:
    """A column that holds something else is refused, also where only one row does."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)

    with pytest.raises(TextError, match="'text' does not hold text"):
        list(read_documents(TextSource(path=str(path))))


def test_a_parquet_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(TextError, match="not a readable parquet file"):
        list(read_documents(TextSource(path=str(path))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "body"}, "line 1 has no text in the field 'body', only text"),
        ({"split": "test"}, r"data set .* test cannot be read: .*test.* Name one with --split"),
        ({"data_file": "none.jsonl"}, r"cannot be read: .*none\.jsonl"),
    ],
)
def test_bad_dataset(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    """A field, split or file that a data set lacks is named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": "a text"}))

    with pytest.raises(TextError, match=message):
        list(read_documents(TextSource(dataset=str(tmp_path / "data"), **changes)))


def test_sampled_documents_are_recorded(model: LanguageModel, texts: dict[str, Path]) -> None:
    """A sample that needs few documents reads few, and its hash is of those."""
    source = TextSource(path=str(texts["calibration"]))

    def sample(count: int, seed: int) -> tuple[int, str]:
        _, record = sample_windows(
            model, source, count=count, context_length=16, bos="auto", seed=seed
        )
        return record.documents, record.sha256

    few, many = sample(2, 0), sample(10_000, 0)

    assert few[0] < 20 < many[0] == 80
    assert few == sample(2, 0)
    assert few[1] != sample(2, 1)[1]


def test_windows_are_of_the_model(model: LanguageModel, texts: dict[str, Path]) -> None:
    source = TextSource(path=str(texts["calibration"]))
    windows, _ = sample_windows(model, source, count=5, context_length=16, bos="always", seed=0)

    assert windows[:, 0].tolist() == [1] * 5
    assert 1 not in windows[:, 1:]


def test_lone_surrogate(model: LanguageModel, tmp_path: Path) -> None:
    r"""JSON may hold half a character ("\ud83d"): it is read over, or refused in words."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the model " * 50 + "\ud83d"}))
    try:
        windows, _ = read_windows(model, TextSource(path=str(path)), context_length=16, bos="auto")
    except PhoError as error:
        assert "a.jsonl" in str(error)  # noqa: PT017 - either way is right
    else:
        assert len(windows) > 5


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "a", "id": ' + "1" * 5000 + "}"])
def test_lines_beyond_python(tmp_path: Path, line: str) -> None:
    """A line that Python's JSON does not read is refused with its number."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)

    with pytest.raises(TextError, match="line 2"):
        list(read_documents(TextSource(path=str(path))))
