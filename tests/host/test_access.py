"""What a job may name on a machine, and the tricks by which it may not name more."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pho_service.errors import InvalidInput
from pho_service.host.access import Access, check_data_file
from pho_service.host.settings import Settings


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


@pytest.fixture
def disk(tmp_path):
    """Two roots, ``models`` and ``texts``, a secret beside them, and links of all kinds."""
    models, texts = tmp_path / "models", tmp_path / "texts"
    model_folder(models / "org" / "local")
    (models / "weights.gguf").touch()
    (models / "out").symlink_to(tmp_path)
    (models / "in").symlink_to(models / "org")
    (texts / "data").mkdir(parents=True)
    (texts / "data" / "part.jsonl").touch()
    (texts / "data" / "out.jsonl").symlink_to(tmp_path / "secret.txt")
    (texts / "a.txt").touch()
    (texts / "out.txt").symlink_to(tmp_path / "secret.txt")
    (texts / "loop.txt").symlink_to(texts / "loop.txt")
    (tmp_path / "secret.txt").touch()
    (tmp_path / "models-too").mkdir()
    return tmp_path


@pytest.fixture
def access(disk):
    """The rules of that disk."""
    settings = Settings(
        model_roots=(disk / "models",), text_roots=(disk / "texts",),
        hub_models=("org/*", "gpt2"), hub_datasets=("allenai/c4",),
    )  # fmt: skip
    return Access.of(settings)


def test_what_lies_below_a_root(access, disk):
    for name, below in (
        ("org/local", "org/local"),
        ("./org/local", "org/local"),
        ("org/../org/local", "org/local"),
        ("weights.gguf", "weights.gguf"),
        ("in/local", "org/local"),
    ):
        assert access.model(name) == str(disk / "models" / below)
        assert access.model(str(disk / "models" / name)) == str(disk / "models" / below)


def test_paths_below_a_root_are_named_from_there_the_rest_stays(access, disk):
    model, text = str(disk / "models" / "org" / "local"), str(disk / "texts" / "gone.txt")
    document = {"model": {"name": model}, "texts": [text, 7, None], "other": "/elsewhere/x"}
    shown = access.without_places(document)
    model_folder(disk / "models-too" / "org" / "local")
    two = replace(access, model_roots=(disk / "models-too", disk / "models"))

    assert shown == {
        "model": {"name": "org/local"}, "texts": ["gone.txt", 7, None], "other": "/elsewhere/x",
    }  # fmt: skip
    assert access.model(shown["model"]["name"]) == model
    assert two.without_places([model, str(disk / "models")]) == [model, str(disk / "models")]


def test_a_message_for_people_elsewhere_names_no_place_of_this_machine():
    access = Access(
        model_roots=(Path("/srv/models"),), text_roots=(Path("/srv/models/texts"), Path("/")),
        hub_models=(), hub_datasets=(),
    )  # fmt: skip
    kept = {"/srv": "artifact store", "/var": "temporary folder"}
    told = {
        "/srv/models/org/x has no config.json": "org/x has no config.json",
        "'/srv/models/texts/a.txt', /srv/models/b": "'a.txt', b",
        "/srv/bundles/1 was not written": "[artifact store]/bundles/1 was not written",
        "/var/a/srv/models/b": "[temporary folder]/a/srv/models/b",
        "it is not below /srv/models. Nor in /srv.": "it is not below [folder]. Nor in "
        "[artifact store].",
        "/srv/models.old, /srv/models-2": "[artifact store]/models.old, [artifact store]/models-2",
        "org/srv/models, https://x/srv/models/y, /srvx/y": None,
        "no place: 1/2": None,
    }  # fmt: skip

    for message, found in told.items():
        assert access.hide_places(message, kept) == (found or message)


TRICKS = [
    "..", "../secret.txt", "org/../../secret.txt", "a/b/../../../secret.txt", "/", "/etc",
    "//etc/passwd", "~", "~/x", "~root/x",
]  # fmt: skip


OUTSIDE = [
    *(("model", name) for name in (*TRICKS, "./out", "./out/secret.txt", "in/../../secret.txt")),
    *(("text", name) for name in (*TRICKS, "out.txt", "./out.txt", "data/../out.txt")),
    ("model", "{0}/models-too"), ("model", "{0}/secret.txt"), ("model", "{0}/models/../secret.txt"),
]  # fmt: skip


def test_a_path_that_leaves_the_roots_is_refused(access, disk):
    """Whichever way it goes, also by a link; a name that begins like a root's is not below it."""
    for kind, name in OUTSIDE:
        with pytest.raises(InvalidInput, match="does not lie below"):
            getattr(access, kind)(name.format(disk))


ODD = {
    "model": [
        "a\0b", "/a\0b", "./a\0b", "a\\b", "\\etc", "..\\secret.txt", "C:\\x",
        "m" * 300, "/" + "m" * 300, "é" * 200, "/" + "é" * 200, "m/" * 3000, "./" + "m/" * 3000,
    ],
    "text": [
        "a\0", "a\\..\\b", "t" * 300, "é" * 200, "t/" * 3000, "loop.txt", "loop.txt/x", "a.txt/x",
        "https://example.com/x.txt", "file:///etc/passwd", "zip://a::file:///etc/passwd",
        "missing.txt",
    ],
}  # fmt: skip


def test_names_that_no_disk_can_hold_are_the_users_fault(access):
    for kind, names in ODD.items():
        for name in names:
            with pytest.raises(InvalidInput):
                getattr(access, kind)(name)


def test_a_hub_id_that_a_pattern_allows_stays_as_it_is_what_is_none_does_not_reach_the_hub(access):
    assert [access.model(name) for name in ("org/other", "gpt2")] == ["org/other", "gpt2"]
    for name in ("other/x", "gpt3", "ORG/x", "gpt2/x", "out/secret.txt"):
        with pytest.raises(InvalidInput, match=r"PHO_HUB_MODELS allows org/\*, gpt2"):
            access.model(name)
    for name in ("org/x@main", "org/x?y", "org/a--b", "org/a..b", "org/x ", "-org/x", "org/é",
                 "gpt2\n"):  # fmt: skip
        with pytest.raises(InvalidInput, match="neither a hub id"):
            access.model(name)


def test_a_folder_below_a_root_goes_before_the_hub(access, disk):
    assert access.model("org/local") == str(disk / "models" / "org" / "local")
    (disk / "models" / "org" / "local" / "config.json").unlink()
    with pytest.raises(InvalidInput, match=r"has no config\.json"):
        access.model("org/local")
    (disk / "models" / "org" / "local").rmdir()
    assert access.model("org/local") == "org/local"


def test_where_no_root_exists_a_path_below_one_is_believed(disk):
    settings = Settings(model_roots=(disk / "elsewhere",), text_roots=(disk / "elsewhere",))
    access = Access.of(settings)

    assert access.text("a.txt") == str(disk / "elsewhere" / "a.txt")
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.text("../a.txt")
    first = Access.of(Settings(text_roots=(disk / "models", disk / "texts")))
    assert first.text("a.txt") == str(disk / "texts" / "a.txt")  # of the first that has it


def test_urls_and_paths_out_of_it_are_no_file_of_a_data_set_a_pattern_inside_may_be():
    for data_file in ("en/c4.00000-of-01024.json.gz", "**/*.json", "a/[0-9].json"):
        check_data_file(data_file)
    for data_file in (
        "https://example.com/x", "file:///etc/passwd", "s3://bucket/x", "zip://x::https://y",
        "hf://datasets/x/y", "a::b", "/etc/passwd", "../x", "./x", "a/../../x", "a/..", "..", "~/x",
        "a\\..\\b", "a\0", "a\n", "a b", "",
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match="not a path inside of the data set"):
            check_data_file(data_file)


def test_a_link_of_a_data_set_that_leads_out_is_refused(access, disk):
    """Also behind a link to a folder below the root, which is followed."""
    (disk / "texts" / "set").mkdir()
    (disk / "texts" / "set" / "more").symlink_to(disk / "texts" / "data")
    for name in ("data", "set"):
        with pytest.raises(InvalidInput, match=r"link to something outside .*out\.jsonl"):
            access.dataset(name)
    (disk / "texts" / "data" / "out.jsonl").unlink()

    assert access.dataset("data") == str(disk / "texts" / "data")


def test_a_data_set_is_one_that_a_pattern_allows_or_lies_below_the_texts(access):
    for name in ("other/x", "allenai/c4x", "c4x", "wikitext2"):
        with pytest.raises(InvalidInput, match="PHO_HUB_DATASETS allows allenai/c4"):
            access.dataset(name)
    for name in ("../texts/../secret.txt", "/etc", "~/data"):
        with pytest.raises(InvalidInput, match="does not lie below"):
            access.dataset(name)

    assert access.dataset("allenai/c4") == "allenai/c4"


def test_many_files(access, disk, monkeypatch):
    """A submission looks at a model's own files, and at no more of any folder than a limit."""
    looked_at = []
    scandir = os.scandir
    monkeypatch.setattr(
        "os.scandir", lambda path: looked_at.append(Path(path)) or scandir(path)
    )  # fmt: skip
    deep = disk / "models" / "big" / "checkpoints"
    model_folder(disk / "models" / "big")
    deep.mkdir()
    (deep / "out").symlink_to(disk)

    assert access.model("./big") == str(disk / "models" / "big")
    assert set(looked_at) == {disk / "models" / "big"}
    for number in range(1001):
        (disk / "models" / "big" / str(number)).touch()
    with pytest.raises(InvalidInput, match="too many files"):
        access.model("big")
    data = disk / "texts" / "data"
    (data / "out.jsonl").unlink()
    (data / "again").symlink_to(data)
    assert access.dataset("data") == str(data)
    (data / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.setattr("pho_service.host.access._IN_A_DATASET", 3)

    with pytest.raises(InvalidInput, match=r"too many files .* Give one of its folders"):
        access.dataset("data")


def test_what_a_models_files_name_or_link_elsewhere_is_refused(access, disk):
    index = disk / "models" / "org" / "local" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../../secret.txt"}}')

    with pytest.raises(InvalidInput, match=r"model 'org/local': .*index\.json names"):
        access.model("org/local")
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    access.model("org/local")
    folder = index.with_name("additional_chat_templates")
    folder.mkdir()
    (folder / "tool.jinja").symlink_to(disk / "secret.txt")
    with pytest.raises(InvalidInput, match="link to something outside"):
        access.model("org/local")


def test_a_job_keeps_what_is_local_as_a_path_and_what_is_gone_is_missing(access, disk):
    for name, placed in (
        ("org/local", "./org/local"),
        ("./org/local", "./org/local"),
        ("weights.gguf", "weights.gguf"),
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
    ):
        assert access.placed_model(name) == placed
        assert access.model(placed) == access.model(name)
    kept = access.placed_model("org/local")
    shutil.rmtree(disk / "models" / "org")

    assert access.model("org/local") == "org/local"
    with pytest.raises(InvalidInput, match=r"'\./org/local' does not exist below"):
        access.model(kept)


def test_a_folder_is_not_a_text_and_no_message_says_where_the_roots_lie(access, disk):
    for kind, name, says in (
        ("text", "data", "'data' is a folder"), ("text", ".", "'.' is a folder"),
        ("text", "../secret.txt", "does not lie below the folders of PHO_TEXT_ROOTS"),
        ("model", "./none", "does not exist below the folders of PHO_MODEL_ROOTS"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=says) as error:
            getattr(access, kind)(name)
        assert str(disk) not in str(error.value)
