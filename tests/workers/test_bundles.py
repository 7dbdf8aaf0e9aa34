"""Where all workers keep their bundles: made once, found by everybody, whole or not at all."""

import os
import time
import uuid
from dataclasses import dataclass

import fsspec
import pytest
import torch

from pho_service.errors import BundleError, InvalidInput, OutputError
from pho_service.models.calibration import CalibrationText, calibration_text, measure_shard
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.scratch import Memo
from pho_service.progress import silent
from pho_service.spec.calibration import CalibrationSettings
from workers.inputs import BundleStore

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
)


@dataclass
class Source:
    """Makes the bundle of the tiny model, and counts how often it was really made."""

    model: LanguageModel
    text: CalibrationText
    made: int = 0

    @property
    def key(self):
        return self.text.bundle_key

    def ensure(self, store):
        """The bundle, from ``store`` if it is there."""

        def progress(title, steps):
            self.made += title.startswith("Calibrating")
            return silent(title, steps)

        return store.ensure(self.model, self.text, SETTINGS, progress)


@pytest.fixture
def source(model_folder, texts):
    """A model and what it is calibrated on."""
    model = load_model(str(model_folder), device="cpu")
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    return Source(model=model, text=text)


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path):
    """A fresh place for bundles: a folder, or an object store."""
    if request.param == "folder":
        return str(tmp_path / "artifacts")
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def worker(url, tmp_path):
    """The store as a machine sees it that has a cache of its own."""
    return lambda name: BundleStore(url, tmp_path / name)


def stored(url):
    """The names of all files there."""
    files, root = fsspec.core.url_to_fs(url)
    return [name.rpartition("/")[2] for name in files.find(root)]


def damage(url, key):
    """Leave half of a stored bundle."""
    files, root = fsspec.core.url_to_fs(url)
    path = f"{root}/bundles/{key}.safetensors"
    files.pipe_file(path, files.cat_file(path)[:1000])


def same(a, b):
    """Whether two bundles hold the same numbers."""
    return a.provenance == b.provenance and all(
        x.name == y.name and torch.equal(x.rows, y.rows)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def test_the_second_machine_finds_what_the_first_has_made_and_there_is_one_file_of_it(
    source, url, worker
):
    """One that has never seen the model reads it by its key."""
    first = source.ensure(worker("a"))
    second = source.ensure(worker("b"))

    assert source.made == 1
    assert same(first, second)
    assert same(worker("c").read(source.key), first)
    assert stored(url) == [f"{source.key}.safetensors"]


def test_a_damaged_bundle_is_refused_and_made_again_by_the_next_that_needs_it_for_everybody(
    source, url, worker
):
    made = source.ensure(worker("a"))
    damage(url, source.key)

    with pytest.raises(BundleError):
        worker("b").read(source.key)
    assert same(source.ensure(worker("b")), made)
    assert source.made == 2
    assert same(worker("c").read(source.key), made)
    with pytest.raises(BundleError):
        worker("a").read("0" * 64)  # which nobody has made
    files, root = fsspec.core.url_to_fs(url)
    files.rm(f"{root}/bundles/{source.key}.safetensors")
    source.ensure(worker("d"))
    assert stored(url) == [f"{source.key}.safetensors"]


def test_two_at_once(source, tmp_path, monkeypatch):
    """Two machines that store the same bundle at the same time do not disturb each other."""
    url = f"memory://{uuid.uuid4().hex}"
    slow, fast = BundleStore(url, tmp_path / "slow"), BundleStore(url, tmp_path / "fast")
    files, _ = fsspec.core.url_to_fs(url)
    put = files.put_file

    def interrupted(*arguments, **more):
        monkeypatch.setattr(files, "put_file", put)
        put(*arguments, **more)
        source.ensure(fast)

    monkeypatch.setattr(files, "put_file", interrupted)
    source.ensure(slow)

    assert source.made == 2
    assert stored(url) == [f"{source.key}.safetensors"]


@pytest.fixture
def sums(source, monkeypatch):
    """What the second of six shards gives."""
    monkeypatch.setattr("pho_service.spec.calibration.SHARDED_FROM", 1)
    return measure_shard(source.model, source.text, SETTINGS, 1)


def test_shards(source, sums, url, worker):
    """What one machine has gathered, another finds, until the bundle is made."""
    worker("a").keep_sums(source.key, 1, sums)
    found = worker("b").sums(source.key, 1)
    kept = stored(url)
    source.ensure(worker("b"))

    assert all(map(torch.equal, found.moments, sums.moments))
    assert worker("a").sums(source.key, 2) is None
    assert kept == ["1.safetensors"]
    assert stored(url) == [f"{source.key}.safetensors"]
    assert worker("a").sums(source.key, 1) is None


def test_a_shard_whose_folder_has_been_removed_since_the_bundle_is_made_is_no_error(
    source, sums, worker, monkeypatch
):
    def fail(*_, **__):
        raise OutputError("no such folder")  # as if somebody had removed it just now

    store = worker("a")
    monkeypatch.setattr(Memo, "keep", fail)
    with pytest.raises(OutputError, match="no such folder"):
        store.keep_sums(source.key, 1, sums)
    source.ensure(store)

    store.keep_sums(source.key, 1, sums)


def test_abandoned_shards(source, sums, tmp_path):
    """Shards of a calibration that nobody has ended go after a week, with the next bundle."""
    store = BundleStore(str(tmp_path / "artifacts"), tmp_path / "cache")
    for key, days in (("old", 8), ("young", 6)):
        store.keep_sums(key, 0, sums)
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "artifacts" / "shards" / key / "0.safetensors", (then, then))
    source.ensure(store)

    assert [p.name for p in (tmp_path / "artifacts" / "shards").iterdir()] == ["young"]


def test_unusable(tmp_path):
    """A URL that fsspec does not understand, or has no package for, is named with its setting."""
    for url in ("nonsense://x", "wandb://entity/pho"):
        with pytest.raises(InvalidInput, match=f"PHO_ARTIFACTS='{url}'"):
            BundleStore(url, tmp_path)
