"""The data sets of papers, from local copies of their shape: folders, and the hub's cache."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from pho_service.errors import TextError
from pho_service.host.data_sets import USUAL_TEXTS
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import (
    check_text,
    read_documents,
    read_windows,
    sample_windows,
)
from pho_service.spec.fields import CalibrationSpec, ReportSpec

CONFIGS = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
SHA = "0123456789abcdef0123456789abcdef01234567"
WORDS = "the model reads a text and the weights are small "


def rows_of(split):
    """The rows of a split as WikiText has them: lines, many of them empty."""
    return ["", f" = {split} = \n", "", *(f"{WORDS * 4}{number}\n" for number in range(4))]


def write_wikitext(folder):
    """A folder that is laid out as Salesforce/wikitext: a card, and parquet files by split."""
    card = "---\nconfigs:\n"
    for config in CONFIGS:
        card += f"- config_name: {config}\n  data_files:\n"
        (folder / config).mkdir(parents=True)
        for split in ("test", "train", "validation"):
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
            table = pyarrow.table({"text": rows_of(split)})
            pyarrow.parquet.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(f"{card}---\n# WikiText\n")
    return folder


def write_c4(folder):
    """A folder that is laid out as allenai/c4, with two of its 1,032 English files."""
    (folder / "en").mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        part = name.partition("-")[2].partition(".")[0]
        rows = [{"text": f"{part} {number} {WORDS}"} for number in range(1200)]
        with gzip.open(folder / "en" / f"{name}.json.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        "    path: en/c4-train.*.json.gz\n  - split: validation\n"
        "    path: en/c4-validation.*.json.gz\n---\n"
    )
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub with both data sets, and no hub."""
    import datasets
    import huggingface_hub

    for name, write in (("Salesforce--wikitext", write_wikitext), ("allenai--c4", write_c4)):
        place = tmp_path / "hub" / f"datasets--{name}"
        write(place / "snapshots" / SHA)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("cache")
def test_wikitext2_is_measured_on_all_of_test_and_calibrated_on_train(model):
    documents = list(read_documents(TextSource(dataset="wikitext2").usual(measured=True)[0]))
    windows, record = read_windows(
        model, TextSource(dataset="wikitext2"), context_length=16, bos="never"
    )
    _, calibrated = sample_windows(
        model, TextSource(dataset="wikitext2"), count=4, context_length=16, bos="never", seed=0
    )

    assert calibrated.source == "Salesforce/wikitext wikitext-2-raw-v1 train"
    assert calibrated.documents == 1  # whose lines stay in their order
    assert documents == ["\n\n".join(rows_of("test"))]
    assert record.source == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert record.documents == 1
    assert windows.flatten().tolist() == model.tokenize(documents[0])[: windows.numel()].tolist()


@pytest.mark.usefixtures("cache")
def test_c4(model):
    """`c4` is the first file of train, and of validation 256 windows of 1,100 documents."""
    source = TextSource(dataset="c4")
    (document,) = read_documents(source.usual(measured=True)[0])
    windows, measured = read_windows(model, source, context_length=8, bos="never")
    few, _ = read_windows(model, source, context_length=8, bos="never", max_windows=3)
    _, calibrated = sample_windows(model, source, count=4, context_length=16, bos="never", seed=0)

    assert document.startswith("validation 0 ")
    assert f"validation 1099 {WORDS}" in document
    assert "validation 1100" not in document
    assert (len(windows), len(few)) == (256, 3)
    assert "c4-validation.00000-of-00008" in measured.source
    assert "c4-train.00000-of-01024" in calibrated.source


def test_a_copy_in_a_folder_is_the_same_text(tmp_path):
    folder = str(write_wikitext(tmp_path / "wikitext"))
    source = TextSource(dataset=folder, config="wikitext-2-raw-v1", split=None)
    found = check_text(source, measured=True)

    assert found.split == "test"
    assert list(read_documents(found)) == ["\n\n".join(rows_of("test"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "several configurations.*dataset_config.*wikitext-103-raw-v1, wikitext-2-raw-v1"),
        ({"config": "raw"}, "no configuration 'raw'.*dataset_config.*wikitext-103-raw-v1"),
        ({"config": CONFIGS[1], "split": "dev"}, "no split 'dev', only test, train.*with split"),
        ({"config": CONFIGS[1], "field": "body"}, "no column 'body', only text.*with field"),
    ],
)
def test_wrong_part(tmp_path, changes, message):
    """A configuration, split or column that is missing or wrong: what there is, and the option."""
    folder = write_wikitext(tmp_path / "wikitext")

    with pytest.raises(TextError, match=message):
        check_text(TextSource(dataset=str(folder), **changes))


@pytest.mark.usefixtures("cache")
def test_without_a_hub_a_name_that_is_nowhere_is_refused_with_both_possibilities():
    with pytest.raises(TextError, match="no folder here has this name, and as a name on the hub"):
        check_text(TextSource(dataset="org/nosuch"))


def test_the_name_of_a_usual_text_says_its_files_and_splits_more_of_them_is_refused():
    for usual in USUAL_TEXTS:
        assert CalibrationSpec(dataset=usual).dataset == usual
        with pytest.raises(ValueError, match="leave split out"):
            CalibrationSpec(dataset=usual, split="test")
        with pytest.raises(ValueError, match="leave dataset_config out"):
            ReportSpec(dataset=usual, dataset_config="x")
    with pytest.raises(ValueError, match="no dataset is given"):
        CalibrationSpec(dataset_config="x")
