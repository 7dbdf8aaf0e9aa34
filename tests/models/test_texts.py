"""Texts from files and data sets, cut into windows."""

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pho_service.errors import InvalidInput, PhoError, TextError
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import (
    GivenText,
    MixedText,
    read_documents,
    read_windows,
    recut,
    sample_windows,
)
from pho_service.spec.calibration import CalibrationSettings

DOCUMENTS = ["the first text", "a second text", "the last text"]


def write(path, field="text"):
    """``DOCUMENTS`` in the form that the file's ending asks for."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: DOCUMENTS}), path)
    else:
        path.write_text("\n".join(json.dumps({field: d}) for d in DOCUMENTS))
    return path


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", "one\n\ntwo", ["one\n\ntwo"]),
        ("a.jsonl", '{"text": "one"}\n\n{"text": " \\n"}\n{"text": "two"}\n', ["one", "two"]),
    ],
)
def test_a_text_file_is_one_document_of_a_table_each_row_is_unless_it_has_no_words(
    tmp_path, name, content, documents
):
    (tmp_path / name).write_text(content)
    table = write(tmp_path / "b.parquet", field="body")

    assert list(read_documents(TextSource(path=str(tmp_path / name)))) == documents
    assert list(read_documents(TextSource(path=str(table), field="body"))) == DOCUMENTS


def test_dataset(tmp_path):
    """A data set is read through the datasets library, by folder here, by hub id elsewhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl")
    (folder / "b.jsonl").write_text(json.dumps({"text": "another"}))
    one = TextSource(dataset=str(folder), data_file="a.jsonl")

    assert list(read_documents(one)) == DOCUMENTS
    assert list(read_documents(TextSource(dataset=str(folder)))) == [*DOCUMENTS, "another"]


def parquet(**columns):
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    return table.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text in the field 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 has no text"),
        ("a.jsonl", b"[" * 100_000, "line 1"),  # Python's JSON does not read these
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "id": ' + b"1" * 5000 + b"}", "line 2"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8: .* at byte 13"),
        ("a.pdf", b"%PDF", "unknown kind '.pdf'"),
        ("a.parquet", b"nothing", "not a readable parquet file"),
        ("a.parquet", parquet(body=["x"]), "no column 'text', only body"),
        *(("a.parquet", parquet(text=values), "'text' does not hold text")
          for values in ([1, 2], ["a text", None], [["a"], ["b"]])),
        ("a.txt", None, r"a\.txt does not exist"),
        ("a.txt", b"  \n\n ", "is empty"),
        ("a.jsonl", b'{"text": "the first text"}', r"a\.jsonl has 3 .* fill one window of 16"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_or_is_too_short_says_where_and_why(
    tmp_path, model, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(TextError, match=message):
        read_windows(model, TextSource(path=str(tmp_path / name)), context_length=16, bos="auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "body"}, "line 1 has no text in the field 'body', only text"),
        ({"split": "test"}, r"data set .* test cannot be read: .*test.* Name one with split"),
        ({"data_file": "none.jsonl"}, r"cannot be read: .*none\.jsonl"),
        ({"dataset": "/no-data"}, r"data set .* does not exist"),
    ],
)
def test_a_field_split_or_file_that_a_data_set_lacks_is_named(tmp_path, changes, message):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a text"}))

    with pytest.raises(TextError, match=message):
        list(read_documents(TextSource(**{"dataset": str(tmp_path), **changes})))


def test_windows(model, texts):
    """A text is joined by two newlines, hashed, tokenised once and cut; the tail is dropped."""
    source = TextSource(path=str(texts["report"]))
    text = "\n\n".join(read_documents(source))
    ids = model.tokenizer(text).input_ids
    windows, record = read_windows(model, source, context_length=32, bos="auto")
    first, _ = read_windows(model, source, context_length=32, bos="auto", max_windows=3)
    with_bos, _ = read_windows(model, source, context_length=33, bos="always")

    assert windows.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert record.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert torch.equal(first, windows[:3])
    assert with_bos[:, 0].tolist() == [1] * len(windows)
    assert torch.equal(with_bos[:, 1:], windows)


def test_sample(model, texts):
    """A sample comes from its seed; windows do not overlap; a short text gives what it has."""
    source = TextSource(path=str(texts["calibration"]))

    def sample(count, seed, bos="auto"):
        return sample_windows(model, source, count=count, context_length=16, bos=bos, seed=seed)[0]

    everything = sample(10_000, 0)
    tokens = sum(len(model.tokenize(d)) for d in read_documents(source))

    assert sample(10, 0).shape == (10, 16)
    assert torch.equal(sample(10, 0), sample(10, 0))
    assert not torch.equal(sample(10, 0), sample(10, 1))
    assert len(everything) == tokens // 16
    assert len(everything.unique(dim=0)) == len(everything)
    assert sample(5, 0, "always")[:, 0].tolist() == [1] * 5


def of(texts, *names, shares):
    sources = tuple(TextSource(path=str(texts[name])) for name in names)
    return MixedText(texts=sources, shares=shares)


def whose(windows, everything):
    return [
        next(name for name, known in everything.items() if tuple(window) in known)
        for window in windows.tolist()
    ]


@pytest.mark.parametrize(
    ("shares", "counts", "held_out"),
    [((1, 1), (6, 6), (8, 8)), ((3, 1), (9, 3), (12, 4)), ((0.9, 0.3), (9, 3), (12, 4)),
     ((2, 0.2), (11, 1), (15, 1))],
)  # fmt: skip
def test_several_texts_give_their_shares_to_the_window_spread_evenly(
    model, texts, shares, counts, held_out
):
    settings = CalibrationSettings(samples=12, context_length=16)
    mixed = of(texts, "calibration", "report", shares=shares)
    text = calibration_text(model, mixed, settings)
    known = {
        name: {*map(tuple, sample_windows(model, TextSource(path=str(texts[name])), count=10_000,
                                          context_length=16, bos="auto", seed=0)[0].tolist())}
        for name in ("calibration", "report")
    }  # fmt: skip
    drawn, beside = whose(text.calibration, known), whose(text.beside, known)

    assert (drawn.count("calibration"), drawn.count("report")) == counts
    assert (beside.count("calibration"), beside.count("report")) == held_out
    for end in range(1, 13):  # those that are run backward are the first
        share = counts[0] / 12
        assert abs(drawn[:end].count("calibration") - share * end) < 1
    assert len(text.calibration.unique(dim=0)) == 12
    assert torch.equal(calibration_text(model, mixed, settings).calibration, text.calibration)


def test_a_record_has_each_of_several_texts_with_its_hash_and_share(model, texts):
    settings = CalibrationSettings(samples=4, context_length=16)
    text = calibration_text(model, of(texts, "calibration", "report", shares=(3, 1)), settings)
    alone = calibration_text(model, TextSource(path=str(texts["report"])), settings)
    provenance = calibrate(model, text, settings).provenance["text"]

    assert provenance["source"] == "calibration.jsonl (75%) and report.jsonl (25%)"
    assert [each["source"] for each in provenance["texts"]] == [
        str(texts["calibration"]), str(texts["report"]),
    ]  # fmt: skip
    assert [each["share"] for each in provenance["texts"]] == [0.75, 0.25]
    assert provenance["texts"][1]["sha256"] != provenance["sha256"]
    assert "texts" not in calibrate(model, alone, settings).provenance["text"]


def test_what_is_wrong_with_one_of_several_texts_names_it(model, texts, tmp_path):
    settings = CalibrationSettings(samples=4, context_length=16)
    good = TextSource(path=str(texts["calibration"]))
    tiny, copy = write(tmp_path / "tiny.jsonl"), tmp_path / "copy.jsonl"
    short = GivenText(documents=["the model " * 10], name="short")
    copy.write_bytes(texts["calibration"].read_bytes())
    (tmp_path / "link.jsonl").symlink_to(texts["calibration"])

    def draw(other, share=1):
        mixed = MixedText(texts=(good, other), shares=(1, share))
        calibration_text(model, mixed, settings)

    with pytest.raises(InvalidInput, match=r"the share of short is 0\. Give"):
        draw(short, 0)
    with pytest.raises(InvalidInput, match="the text short gets none of 4 windows"):
        draw(short, 0.01)
    with pytest.raises(TextError, match=r"short fills too few windows of 16 .*: \d, .* of 4 is 3"):
        draw(short, 3)
    with pytest.raises(TextError, match=r"the text .*tiny\.jsonl has 9 tokens"):
        draw(TextSource(path=str(tiny)))
    with pytest.raises(TextError, match=r"no\.jsonl does not exist"):
        draw(TextSource(path=str(tmp_path / "no.jsonl")))
    with pytest.raises(TextError, match=r"copy\.jsonl has the documents of .*calibration\.jsonl"):
        draw(TextSource(path=str(copy)))
    with pytest.raises(InvalidInput, match=r"link\.jsonl is given twice"):
        draw(TextSource(path=str(tmp_path / "link.jsonl")))
    with pytest.raises(InvalidInput, match="there are 1 shares of 2 texts"):
        MixedText(texts=(good, short), shares=(1,))


@pytest.mark.parametrize("bos", [0, 1])
def test_a_text_that_is_read_again_is_cut_at_other_places(bos):
    """Each time all of its tokens, in windows that were not there before; a BOS stays in front."""
    tokens = torch.arange(5 * 16).reshape(5, 16) + 100
    windows = torch.cat([torch.ones(5, bos, dtype=torch.int64), tokens], dim=1)
    found = recut(windows, 13, seed=3)
    every = recut(windows, 15, seed=3)

    assert torch.equal(found, every[:13])
    assert torch.equal(recut(windows, 4, seed=3), windows[:4])
    assert torch.equal(every[:5], windows)
    assert len(every.unique(dim=0)) == 15
    assert bool((every[:, :bos] == 1).all())
    for again in every[:, bos:].split(5):
        assert torch.equal(again.flatten().sort().values, tokens.flatten())
        # All but what lies at a cut is followed by what follows it in the text.
        assert int((again.flatten().diff() == 1).sum()) >= 5 * 16 - 1 - 5
    assert not torch.equal(every, recut(windows, 15, seed=4))


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
def test_a_bad_setting_is_named_with_its_value(change, message):
    with pytest.raises(InvalidInput, match=message):
        CalibrationSettings(**change)


def test_a_window_that_the_model_cannot_read_is_refused(model, texts):
    settings = CalibrationSettings(context_length=100_000)

    with pytest.raises(InvalidInput, match="context_length=100000 is more than"):
        calibration_text(model, TextSource(path=str(texts["report"])), settings)


@pytest.mark.parametrize("name", ["./nothing", "a/b/c"])
def test_a_missing_path_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("pho_service.models.data_sets._checked_commit", pytest.fail)

    with pytest.raises(TextError, match=f"the data set {name} does not exist"):
        next(read_documents(TextSource(dataset=name)))


def test_a_sample_that_needs_few_documents_reads_few_and_its_hash_is_of_those(model, texts):
    source = TextSource(path=str(texts["calibration"]))
    few, many = (
        sample_windows(model, source, count=count, context_length=16, bos="auto", seed=0)[1]
        for count in (2, 10_000)
    )

    assert few.documents < 20 < many.documents == 80
    assert few.sha256 != many.sha256


def test_lone_surrogate(model, tmp_path):
    r"""JSON may hold half a character ("\ud83d"): it is read over, or refused in words."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the model " * 50 + "\ud83d"}))
    try:
        windows, _ = read_windows(model, TextSource(path=str(path)), context_length=16, bos="auto")
    except PhoError as error:
        assert "a.jsonl" in str(error)  # noqa: PT017 - either way is right
    else:
        assert len(windows) > 5
