"""What a job may name on a machine, and the tricks by which it may not name more."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pho_service.errors import InvalidInput
from pho_service.host.access import Access, check_data_file
from pho_service.host.settings import Settings


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """
    Two roots, a secret beside them, and links of all kinds.

    The roots are ``models`` and ``texts``.
    """
    models, texts = tmp_path / "models", tmp_path / "texts"
    (models / "org" / "local").mkdir(parents=True)
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
def access(disk: Path) -> Access:
    """The rules of that disk."""
    settings = Settings(
        model_roots=(disk / "models",),
        text_roots=(disk / "texts",),
        hub_models=("org/*", "gpt2"),
        hub_datasets=("allenai/c4",),
    )
    return Access.of(settings)


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("org/local", "org/local"),
        ("./org/local", "org/local"),
        ("org/../org/local", "org/local"),
        ("weights.gguf", "weights.gguf"),
        ("in/local", "org/local"),
    ],
)
def test_model_below_a_root(access: Access, disk: Path, name: str, below: str) -> None:
    """A folder or file below a root is found, and given with its absolute path."""
    assert access.model(name) == str(disk / "models" / below)
    assert access.model(str(disk / "models" / name)) == str(disk / "models" / below)


def test_without_places(access: Access, disk: Path) -> None:
    """Paths below a root are named from there; the rest stays, and what would mean another file."""
    model, text = str(disk / "models" / "org" / "local"), str(disk / "texts" / "gone.txt")
    document = {"model": {"name": model}, "texts": [text, 7, None], "other": "/elsewhere/x"}
    shown = access.without_places(document)
    (disk / "models-too" / "org" / "local").mkdir(parents=True)
    two = replace(access, model_roots=(disk / "models-too", disk / "models"))

    assert shown == {
        "model": {"name": "org/local"}, "texts": ["gone.txt", 7, None], "other": "/elsewhere/x",
    }  # fmt: skip
    assert access.model(shown["model"]["name"]) == model
    assert two.without_places([model, str(disk / "models")]) == [model, str(disk / "models")]


TRICKS = [
    "..", "../secret.txt", "org/../../secret.txt", "a/b/../../../secret.txt", "/", "/etc",
    "//etc/passwd", "~", "~/x", "~root/x",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TRICKS, "./out", "./out/secret.txt", "in/../../secret.txt"])
def test_model_outside(access: Access, name: str) -> None:
    """A path that leaves the roots is refused, whichever way it goes, also by a link."""
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.model(name)


@pytest.mark.parametrize("name", [*TRICKS, "out.txt", "./out.txt", "data/../out.txt"])
def test_the_same_for_texts(access: Access, name: str) -> None:
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.text(name)


@pytest.mark.parametrize("name", ["models-too", "secret.txt", "models/../secret.txt"])
def test_absolute_outside(access: Access, disk: Path, name: str) -> None:
    """An absolute path counts as it resolves; a name that begins like a root's is not below it."""
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.model(str(disk / name))


@pytest.mark.parametrize(
    "name",
    [
        "a\0b", "/a\0b", "./a\0b", "a\\b", "\\etc", "..\\secret.txt", "C:\\x",
        "m" * 300, "/" + "m" * 300, "é" * 200, "/" + "é" * 200, "m/" * 3000, "./" + "m/" * 3000,
    ],
)  # fmt: skip
def test_odd_models(access: Access, name: str) -> None:
    """NUL, backslashes and names that no disk can hold are refused as the user's fault."""
    with pytest.raises(InvalidInput):
        access.model(name)


@pytest.mark.parametrize(
    "name",
    [
        "a\0", "a\\..\\b", "t" * 300, "é" * 200, "t/" * 3000, "loop.txt", "loop.txt/x", "a.txt/x",
        "https://example.com/x.txt", "file:///etc/passwd", "zip://a::file:///etc/passwd",
        "missing.txt",
    ],
)  # fmt: skip
def test_odd_texts(access: Access, name: str) -> None:
    """The same for texts, and for URLs, links in a circle and what is not there."""
    with pytest.raises(InvalidInput):
        access.text(name)


@pytest.mark.parametrize("name", ["org/other", "gpt2"])
def test_a_hub_id_that_a_pattern_allows_stays_as_it_is(access: Access, name: str) -> None:
    assert access.model(name) == name


@pytest.mark.parametrize("name", ["other/x", "gpt3", "ORG/x", "gpt2/x", "out/secret.txt"])
def test_other_hub_models(access: Access, name: str) -> None:
    """A hub id that no pattern allows is refused, and the message lists the patterns."""
    with pytest.raises(InvalidInput, match=r"PHO_HUB_MODELS allows org/\*, gpt2"):
        access.model(name)


@pytest.mark.parametrize(
    "name", ["org/x@main", "org/x?y", "org/a--b", "org/a..b", "org/x ", "-org/x", "org/é", "gpt2\n"]
)
def test_no_hub_ids(access: Access, name: str) -> None:
    """What is no hub id does not reach the hub, whatever the patterns."""
    with pytest.raises(InvalidInput, match="neither a hub id"):
        access.model(name)


def test_folder_before_hub(access: Access, disk: Path) -> None:
    """A name that is a folder below a root and could be a hub id is the folder."""
    assert access.model("org/local") == str(disk / "models" / "org" / "local")
    (disk / "models" / "org" / "local").rmdir()
    assert access.model("org/local") == "org/local"


def test_other_disk(disk: Path) -> None:
    """Where no root exists, a path below one is believed: the workers have another disk."""
    settings = Settings(model_roots=(disk / "elsewhere",), text_roots=(disk / "elsewhere",))
    access = Access.of(settings)

    assert access.text("a.txt") == str(disk / "elsewhere" / "a.txt")
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.text("../a.txt")


def test_the_first_root_that_has_the_file_gives_it(disk: Path) -> None:
    settings = Settings(text_roots=(disk / "models", disk / "texts"))

    assert Access.of(settings).text("a.txt") == str(disk / "texts" / "a.txt")


@pytest.mark.parametrize(
    "data_file", [None, "en/c4-train.00000-of-01024.json.gz", "**/*.json", "a/part-[0-9].parquet"]
)
def test_dataset(access: Access, data_file: str | None) -> None:
    """An allowed data set and a file or a pattern of files inside of it."""
    if data_file is not None:
        check_data_file(data_file)
    assert access.dataset("allenai/c4") == "allenai/c4"


@pytest.mark.parametrize(
    "data_file",
    [
        "https://example.com/x", "file:///etc/passwd", "s3://bucket/x", "zip://x::https://y",
        "hf://datasets/x/y", "a::b", "/etc/passwd", "../x", "./x", "a/../../x", "a/..", "..", "~/x",
        "a\\..\\b", "a\0", "a\n", "a b", "",
    ],
)  # fmt: skip
def test_urls_chains_of_them_absolute_paths_and_are_no_file_of_a_data_set(data_file: str) -> None:
    with pytest.raises(InvalidInput, match="not a path inside of the data set"):
        check_data_file(data_file)


def test_data_file_is_a_link(access: Access, disk: Path) -> None:
    with pytest.raises(InvalidInput, match="link to something outside"):
        access.dataset("data")
    (disk / "texts" / "data" / "out.jsonl").unlink()
    assert access.dataset("data") == str(disk / "texts" / "data")


@pytest.mark.parametrize("name", ["other/x", "allenai/c4x", "c4x", "wikitext2"])
def test_a_data_set_that_no_pattern_allows_is_refused(access: Access, name: str) -> None:
    with pytest.raises(InvalidInput, match="PHO_HUB_DATASETS allows allenai/c4"):
        access.dataset(name)


@pytest.mark.parametrize("name", ["../texts/../secret.txt", "/etc", "~/data"])
def test_a_local_data_set_must_lie_below_the_folders_for_texts(access: Access, name: str) -> None:
    with pytest.raises(InvalidInput, match="does not lie below"):
        access.dataset(name)


def test_many_files(access: Access, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submission looks at a model's own files, and at no more of any folder than a limit."""
    looked_at = []
    scandir = os.scandir
    monkeypatch.setattr(
        "os.scandir", lambda path: looked_at.append(Path(path)) or scandir(path)
    )  # fmt: skip
    deep = disk / "models" / "big" / "checkpoints"
    deep.mkdir(parents=True)
    (deep / "out").symlink_to(disk)

    assert access.model("./big") == str(disk / "models" / "big")
    assert set(looked_at) == {disk / "models" / "big"}
    for number in range(1001):
        (disk / "models" / "big" / str(number)).touch()
    with pytest.raises(InvalidInput, match="too many files"):
        access.model("big")


def test_many_files_of_a_dataset(
    access: Access, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = disk / "texts" / "data"
    (data / "out.jsonl").unlink()
    (data / "again").symlink_to(data)
    assert access.dataset("data") == str(data)
    (data / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.setattr("pho_service.host.access._IN_A_DATASET", 3)

    with pytest.raises(InvalidInput, match=r"too many files .* Give one of its folders"):
        access.dataset("data")


def test_link_behind_a_link(access: Access, disk: Path) -> None:
    """A link to a folder below the root is followed, and what leads out there is refused."""
    (disk / "texts" / "set").mkdir()
    (disk / "texts" / "set" / "more").symlink_to(disk / "texts" / "data")

    with pytest.raises(InvalidInput, match=r"link to something outside .*out\.jsonl"):
        access.dataset("set")


def test_templates_of_a_model(access: Access, disk: Path) -> None:
    """The one folder that loaders look into below a model's own is looked at, too."""
    folder = disk / "models" / "org" / "local" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool.jinja").symlink_to(disk / "secret.txt")

    with pytest.raises(InvalidInput, match="link to something outside"):
        access.model("org/local")


def test_names_in_a_model(access: Access, disk: Path) -> None:
    """What a model's own files name elsewhere is refused at the door."""
    index = disk / "models" / "org" / "local" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../../secret.txt"}}')

    with pytest.raises(InvalidInput, match=r"model 'org/local': .*index\.json names"):
        access.model("org/local")
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    access.model("org/local")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("org/local", "./org/local"),
        ("./org/local", "./org/local"),
        ("weights.gguf", "weights.gguf"),
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
    ],
)
def test_placed(access: Access, name: str, kept: str) -> None:
    """A job keeps the name of what is local now as a path, and a hub id as it is."""
    assert access.placed_model(name) == kept
    assert access.model(kept) == access.model(name)


def test_placed_and_deleted(access: Access, disk: Path) -> None:
    """What was local and is gone is missing, though the hub has something of the same name."""
    kept = access.placed_model("org/local")
    shutil.rmtree(disk / "models" / "org")

    assert access.model("org/local") == "org/local"
    with pytest.raises(InvalidInput, match=r"'\./org/local' does not exist below"):
        access.model(kept)
