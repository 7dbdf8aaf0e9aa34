"""What can be picked below the roots: within them, and within bounds."""

import pytest

from pho_service.host import access
from pho_service.host.access import list_roots


def make(root, *names):
    """Empty files, with the folders that they lie in."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root.resolve()


def test_models_and_texts_by_name_near_ones_first(tmp_path):
    root = make(
        tmp_path,
        "org/b/config.json", "org/b/vocab.txt", "org/b/sub/config.json", "org/a/config.json",
        "c.gguf", "texts/z.jsonl", "a.txt", "deep/er/t.parquet", "a.csv", ".cache/x/config.json",
        ".hidden.txt", "~x.txt",
    )  # fmt: skip
    found = list_roots([root], [root])

    assert found.models == ("c.gguf", "org/a", "org/b")
    assert found.texts == ("a.txt", "./~x.txt", "texts/z.jsonl", "deep/er/t.parquet")
    assert found.is_whole


def test_links_out_of_a_root_or_in_a_circle_are_left_out(tmp_path):
    outside = make(tmp_path / "outside", "m/config.json", "secret.txt")
    root = make(tmp_path / "root", "real/config.json", "folder/a.txt")
    (root / "inside").symlink_to(root / "real")
    (root / "out").symlink_to(outside / "m")
    (root / "secret.txt").symlink_to(outside / "secret.txt")
    (root / "self").symlink_to(root / "self")
    (root / "folder" / "up").symlink_to(root)
    found = list_roots([root], [root])

    assert found.models == ("inside",)
    assert found.texts == ("folder/a.txt",)
    assert found.is_whole


def test_a_name_that_an_earlier_root_has_too_is_given_in_full(tmp_path):
    first = make(tmp_path / "first", "a.txt")
    second = make(tmp_path / "second", "a.txt", "b.txt")
    found = list_roots([], [tmp_path / "missing", first, second])

    assert found.texts == ("a.txt", str(second / "a.txt"), "b.txt")


@pytest.mark.parametrize(
    ("bound", "value"), [("DEEPEST", 0), ("MOST", 2), ("MOST_ENTRIES", 4), ("MOST_S", -1.0)]
)
def test_bounds(tmp_path, monkeypatch, bound, value):
    """However large a tree is, few of its entries are looked at, and the rest is not denied."""
    root = make(tmp_path, *(f"folder/{n}.txt" for n in range(5)))
    monkeypatch.setattr(access, bound, value)
    found = list_roots([root], [root])

    assert len(found.texts) < 5
    assert not found.is_whole
