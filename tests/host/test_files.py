"""Files and folders appear whole or not at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pho_service.errors import OutputError
from pho_service.host.files import check_file, check_free, new_file, new_folder

LimitedDisk = Callable[[int], AbstractContextManager[None]]


def write_and_interrupt(path: Path) -> None:
    """Half of some work, then Ctrl-C."""
    path.write_text("half")
    raise KeyboardInterrupt


def test_new_file(tmp_path: Path) -> None:
    """A file takes its place only when it is complete, and nothing is left beside it."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with new_file(path) as partial:
        partial.write_text("new")
        during = path.read_text()

    assert during == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_file(tmp_path: Path) -> None:
    """An interruption leaves the old file, and no part of the new one."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as partial:
        write_and_interrupt(partial)

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path: Path, limited_disk: LimitedDisk) -> None:
    """A file that the disk does not take is reported with its path, and leaves nothing."""
    path = tmp_path / "a.txt"
    with (
        limited_disk(1000),
        pytest.raises(OutputError, match=r"a\.txt was not written: File too large"),
        new_file(path) as partial,
    ):
        partial.write_text("x" * 2000)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_before", [True, False])
def test_new_folder(tmp_path: Path, made_before: bool) -> None:
    """A folder takes its place when it is complete; an empty one may be there already."""
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


def test_interrupted_folder(tmp_path: Path) -> None:
    """An interruption leaves no folder, and no part of one."""
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        write_and_interrupt(partial / "a.txt")

    assert list(tmp_path.iterdir()) == []


def test_folder_in_use(tmp_path: Path) -> None:
    """A folder that holds files is not touched."""
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="is in use: it holds files"), new_folder(tmp_path):
        pytest.fail("the body must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_file_for_a_folder(tmp_path: Path) -> None:
    """A file is not replaced by a folder."""
    path = tmp_path / "a.txt"
    path.write_text("mine")

    with pytest.raises(OutputError, match=r"a\.txt is a file\. Give the name of a new folder"):
        check_free(path)


def test_folder_for_a_file(tmp_path: Path) -> None:
    """A folder is not replaced by a file."""
    with (
        pytest.raises(OutputError, match=r"is a folder\. Give the name of a file"),
        new_file(tmp_path),
    ):
        pytest.fail("the body must not run")


def test_no_parent(tmp_path: Path) -> None:
    """A path whose folder is not there is refused before any work, and by the writers too."""
    path = tmp_path / "none" / "a.txt"

    with pytest.raises(OutputError, match=r"the folder .*none does not exist"):
        check_file(path)
    with pytest.raises(OutputError, match=r"the folder .*none does not exist"), new_file(path):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match=r"the folder .*none does not exist"), new_folder(path):
        pytest.fail("the body must not run")


def test_file_where_a_folder_is(tmp_path: Path) -> None:
    """A folder is told from a file before any work."""
    with pytest.raises(OutputError, match="is a folder"):
        check_file(tmp_path)


def test_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder can be given as "." too."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with new_folder(Path()) as partial:
        (partial / "a.txt").write_text("a")

    assert (here / "a.txt").read_text() == "a"
