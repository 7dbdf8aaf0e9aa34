"""Cards of data sets, and where they try to lead."""

import pytest

from pho_service.errors import InvalidInput
from pho_service.host.access import Access
from pho_service.host.data_sets import MOST_BYTES, check_card, check_cards
from pho_service.host.settings import Settings


def card(data_files):
    """A README with these files, in YAML."""
    return (
        "---\nlicense: mit\nconfigs:\n- config_name: default\n"
        f"  data_files: {data_files}\n---\n\n# A data set\n"
    ).encode()


def test_files_of_the_data_set_may_be_named_in_every_form_but_no_absolute_paths_and_urls():
    for data_files in (
        "train.jsonl", "data/*.parquet", '["a.jsonl", "b.jsonl"]', "a..b.jsonl",
        "\n  - split: train\n    path: en/*.json.gz\n  - split: test\n    path: [t.json]",
        '{"train": "a.jsonl", "test": ["b.jsonl"]}',
    ):  # fmt: skip
        check_card("README.md", card(data_files), "data set 'd'")
    for data_files in (
        "/etc/passwd", "~/x", "../x.csv", "a/../../x", "'..'", '"\\x2e\\x2e/x"', "C:\\x",
        "http://127.0.0.1/latest/x.json", "s3://bucket/x", "zip://x::a.zip", '["a", "/b"]',
        "\n  - split: train\n    path: [a.json, ../b.json]", '{"train": {"path": "file:///x"}}',
        "!!str ../x", "|\n    ../x",
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=r"data set 'd': its README.md names the files"):
            check_card("README.md", card(data_files), "data set 'd'")


def test_data_dir_is_checked_as_well_in_the_other_card_too_what_is_not_about_files_is_not():
    with pytest.raises(InvalidInput, match=r"its \.huggingface\.yaml names"):
        check_card(".huggingface.yaml", b"configs: [{data_dir: ../x}]", "d")
    check_card("README.md", b"---\nhomepage: https://example.org\n---\n", "d")
    check_card("README.md", b"# No YAML\n\n---\nconfigs: [{data_files: ../x}]\n---\n", "d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"configs: [", "cannot be read: while parsing"),
        (b"a: &a [x]\nconfigs: [*a]", "cannot be read: it has an alias"),
        (b"configs: " + b"[" * 60, "lists and mappings deep"),
        (b"configs: " + b"[" * 200_000, "cannot be read"),
        (b"a: b\n" * MOST_BYTES, "is longer than"),
    ],
)
def test_what_is_no_yaml_or_more_than_it_seems_is_refused(content, message):
    with pytest.raises(InvalidInput, match=message):
        check_card(".huggingface.yaml", content[: MOST_BYTES + 1], "d")


def test_a_readme_may_be_long_but_not_its_yaml(tmp_path):
    (tmp_path / "README.md").write_bytes(card("a.jsonl") + b"words\n" * MOST_BYTES)
    check_cards(tmp_path, "d")
    (tmp_path / "README.md").write_bytes(b"---\n" + b"a: b\n" * MOST_BYTES)

    with pytest.raises(InvalidInput, match="is longer than"):
        check_cards(tmp_path, "d")


def test_such_a_data_set_is_refused_at_the_door(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_bytes(card("../secret.csv"))
    access = Access.of(Settings(text_roots=(tmp_path,)))

    with pytest.raises(InvalidInput, match=r"names the files '\.\./secret\.csv'"):
        access.dataset("d")
    (tmp_path / "d" / "README.md").write_bytes(card("a.csv"))
    assert access.dataset("d") == str(tmp_path / "d")
