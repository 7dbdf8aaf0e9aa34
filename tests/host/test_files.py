"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from pho_service.errors import OutputError
from pho_service.host.files import check_file, check_free, new_file, new_folder


def write_and_interrupt(path):
    """Half of some work, then Ctrl-C."""
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_file_takes_its_place_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with new_file(path) as partial:
        partial.write_text("new")
        during = path.read_text()

    assert during == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_no_part_of_anything_new(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as partial:
        write_and_interrupt(partial)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        write_and_interrupt(partial / "a.txt")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_full_disk_refuses_is_named(tmp_path, limited_disk):
    path = tmp_path / "a.txt"
    with (
        limited_disk(1000),
        pytest.raises(OutputError, match=r"a\.txt was not written: File too large"),
        new_file(path) as partial,
    ):
        partial.write_text("x" * 2000)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_before", [True, False])
def test_a_folder_takes_its_place_when_it_is_complete(tmp_path, made_before):
    path = tmp_path / "out"
    if made_before:
        path.mkdir()
    with new_folder(path) as partial:
        (partial / "a.txt").write_text("a")
        during = list(path.iterdir()) if path.exists() else []

    assert during == []
    assert [p.name for p in path.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_holds_files_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="is in use: it holds files"), new_folder(tmp_path):
        pytest.fail("the body must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"a\.txt is a file\. Give the name of a new folder"):
        check_free(path)
    said = r"is a folder\. Give the name of a file"
    with pytest.raises(OutputError, match=said):
        check_file(tmp_path)
    with pytest.raises(OutputError, match=said), new_file(tmp_path):
        pytest.fail("the body must not run")


def test_a_file_whose_folder_is_not_there_is_refused_before_any_work(tmp_path):
    path = tmp_path / "none" / "a.txt"
    said = r"the folder .*none does not exist"
    with pytest.raises(OutputError, match=said):
        check_file(path)
    with pytest.raises(OutputError, match=said), new_file(path):
        pytest.fail("the body must not run")


def test_folders_above_a_new_one_are_made_unless_a_file_is_in_the_way(tmp_path):
    with new_folder(tmp_path / "zoo" / "large" / "llama") as partial:
        (partial / "a.txt").write_text("a")
    file = tmp_path / "zoo" / "large" / "llama" / "a.txt"

    assert file.read_text() == "a"
    with pytest.raises(OutputError, match=r"the folder .*a\.txt does not exist"):
        check_free(file / "small" / "llama")


def test_an_empty_folder_can_be_a_dot(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with new_folder(Path()) as partial:
        (partial / "a.txt").write_text("a")

    assert (here / "a.txt").read_text() == "a"
