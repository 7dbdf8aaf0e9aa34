"""`pho configurations`, and pruning with what a library has: a folder's, or a service's."""

import json
import uuid
from pathlib import Path

import pytest
from pretended_user import answer
from safetensors.torch import load_file

from pho_service.cli import configurations
from pho_service.spec import document as numbers

PRUNE = "prune {model} --from-library --bundle {bundle} --out pruned"
FROM_FOLDER = PRUNE + " --library {folder} --pattern 0.5"
GOOD = {
    "row": 0.1, "column": 0.8, "neighbourhood": 0.1, "kernel_size": 3, "activation_exponent": 0.9,
    "gradient_exponent": 0.4,
}  # fmt: skip
BAD = GOOD | {
    "row": 0.0, "neighbourhood": 0.0, "activation_exponent": 0.0, "gradient_exponent": 4.0,
}  # fmt: skip


def document(perplexity, **changes):
    """A configuration's file: RIA's perplexity was 24."""
    return {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": GOOD,
        "confirmation": {"perplexity": perplexity, "tokens": 9, "context_length": 8, "text": {}},
        "baselines": [{"method": "ria-layer", "trial": 3, "perplexity": 24.0}],
        "model": {"name": "org/found-on", "family": "llama", "parameters": 134_515_008}, **changes,
    }  # fmt: skip


def transfer(configuration, transferred):
    """What a configuration was worth on an OPT where RIA's perplexity was 40."""
    target = {
        "target": "org/opt", "model": {"name": "org/opt", "family": "opt"}, "own": None,
        "perplexities": {"ria": 40.0, "transferred": transferred}, "proxies": {},
    }  # fmt: skip
    return {
        "format": "pho-transfer", "version": 1, "source": "c.json",
        "configuration": configuration, "targets": [target],
    }  # fmt: skip


def written(path, values):
    """A file of it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def folder(tmp_path):
    """A library of three configurations, and a file that is none."""
    library = tmp_path / "library"
    written(library / "good.json", document(12.0))
    written(library / "failed.json", transfer(document(6.0), 50.0))
    written(library / "group.json", document(6.0, pattern="2:4", scope="row"))
    written(library / "notes.json", {"notes": []})
    return library


def test_a_folders_configurations_are_listed_by_name_best_first(pho, folder):
    words = ("configurations", "--library", folder, "--family", "opt")
    result = pho(*words, "--pattern", "0.5", "--all", "--why")
    table, _, reasons = result.stdout.partition("good.json: ")
    rows = [line.split() for line in table.splitlines() if ".json" in line]
    fitting = pho(*words, "--pattern", "0.5")
    nothing = pho(*words, "--pattern", "1:4")

    assert result.exit_code == 0
    assert rows == [
        ["good.json", "found-on", "0.5", "layer", "crepe", "50.0%", "42.5%"],
        ["failed.json", "found-on", "0.5", "layer", "crepe", "75.0%", "-25.0%"],
        ["group.json", "found-on", "2:4", "row", "crepe", "75.0%", "63.7%"],
    ]
    assert reasons.startswith("fits\n  pattern 0.5, scope layer\n")
    assert "on opt, 25.0% above RIA's perplexity" in reasons
    assert "group.json: does not fit\n  pattern 2:4, scope row, but 0.5 is asked for" in reasons
    assert "Note: left out: " in result.stderr
    assert "notes.json is not a configuration of PHO" in result.stderr
    assert "failed.json" in fitting.stdout
    assert "group.json" not in fitting.stdout
    assert fitting.stdout.count(": fits\n") == 1
    assert "good.json: fits\n  pattern 0.5, scope layer\n" in fitting.stdout
    assert "another pattern or scope: 1. --all lists them." in fitting.stderr
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "another pattern or scope: 3. --all lists them." in nothing.stderr


def test_with_json_stdout_is_what_the_api_would_answer(pho, folder):
    words = ("configurations", "--library", folder, "--pattern", "0.5", "--scope", "layer")
    entries = answer(pho(*words, "--json"))

    assert [(entry["id"], entry["fits"]) for entry in entries] == [
        ("failed.json", True), ("good.json", True), ("group.json", False),
    ]  # fmt: skip
    assert answer(pho(*words, "--limit", 1, "--json")) == entries[:1]
    assert entries[1]["gains"]["perplexity"] == pytest.approx(0.5)
    assert entries[0]["measured"][0]["model"]["family"] == "opt"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"finalists": [{"method": "crepe", "trial": 1, "divergence": 0.3}],
          "baselines": [{"method": "ria-layer", "trial": 3, "divergence": 0.5}]}, "by divergence"),
        ({"confirmation": None, "objective": {"value": 0.03},
          "baselines": [{"method": "ria-layer", "trial": 3, "proxy": 0.04}]}, "in the proxy"),
        ({"baselines": []}, None),
    ],
)  # fmt: skip
def test_a_gain_stands_in_the_column_of_what_it_was_measured_by_and_in_no_other(
    pho, tmp_path, monkeypatch, changes, shown
):
    tables = []
    monkeypatch.setattr(configurations, "print_table", lambda *table, **_: tables.append(table))
    written(tmp_path / "library" / "a.json", document(18.0, **changes))
    pho("configurations", "--library", tmp_path / "library")
    ((_, columns, (row,)),) = tables
    gains = {name: cell for name, cell in zip(columns, row, strict=True) if "gain" in name and cell}

    assert [*gains] == ([f"gain {shown}", f"gain {shown}, expected"] if shown else [])


@pytest.fixture
def ids(remote, folder):
    """Those of the folder's configurations in a service: good, failed, group."""
    files = [folder / f"{name}.json" for name in ("good", "failed", "group")]
    return [entry["id"] for entry in answer(remote("configurations", "import", *files, "--json"))]


def test_each_files_id_is_printed_a_folder_stands_for_all_configurations_below_it(remote, folder):
    files = [folder / "good.json", folder / "group.json"]
    first = remote("configurations", "import", *files)
    again = remote("configurations", "import", *files[::-1])
    lines = [line.split("  ") for line in first.stdout.splitlines()]
    imported = answer(remote("configurations", "--json"))
    result = remote("configurations", "import", folder)
    names = [line.split("  ")[1] for line in result.stdout.splitlines()]

    assert [name for _, name in lines] == list(map(str, files))
    assert all(uuid.UUID(entry_id) for entry_id, _ in lines)
    assert again.stdout.splitlines() == first.stdout.splitlines()[::-1]
    assert len(imported) == 2
    assert result.exit_code == 0
    assert names == [str(folder / f"{name}.json") for name in ("failed", "good", "group")]
    assert result.stderr.count("Note: left out: ") == 1
    assert "notes.json is not a configuration" in result.stderr


def test_an_empty_one_says_so_and_exports_nothing(remote):
    for words in (("configurations",), ("configurations", "export", "--out", "out")):
        result = remote(*words)

        assert (result.exit_code, result.stdout) == (0, "")
        assert "The library is empty" in result.stderr
        assert answer(remote(*words, "--json")) == []
        assert not Path("out").exists()


def test_a_services_library_is_listed_as_a_folders_is_and_exported_as_one(remote, url, ids, folder):
    words = ["--pattern", "0.5", "--family", "opt"]
    size = ("--parameters", 134_515_008, "--json")
    listed = answer(remote("configurations", *words, *size))
    originals = answer(remote("configurations", "--library", folder, *words, *size))
    table = remote("configurations", "--library", url, *words, "--all", "--why").stdout
    exported = remote("configurations", "export", "--out", "some/out")
    files = exported.stdout.splitlines()
    copies = answer(remote("configurations", "--library", "some/out", *words, *size))

    assert [entry["id"] for entry in listed] == ids
    for entry, original in zip(listed, originals, strict=True):
        for key in original.keys() - {"id"}:
            assert entry[key] == original[key], key
    assert table.index(ids[0]) < table.index(ids[1]) < table.index(ids[2])
    assert f"{ids[2]}: does not fit" in table
    assert exported.exit_code == 0
    assert sorted(map(str, Path("some/out").iterdir())) == sorted(files)
    assert sorted(files) == sorted(
        f"some/out/found-on-{pattern}-{scope}-{entry_id[:8]}.json"
        for entry_id, pattern, scope in zip(
            ids, ("0.5", "0.5", "2-4"), ("layer", "layer", "row"), strict=True
        )
    )
    assert [{**copy, "id": ""} for copy in copies] == [{**entry, "id": ""} for entry in originals]


def test_those_that_are_named_are_exported_or_deleted_and_the_others_stay(remote, ids):
    (file,) = answer(remote("configurations", "export", ids[1], "--out", "out", "--json"))
    document = json.loads(Path(file).read_text())
    imported = answer(remote("configurations", "import", file, "--json"))
    deleted = remote("configurations", "delete", ids[0])
    again = remote("configurations", "delete", ids[0])
    as_json = answer(remote("configurations", "delete", ids[1], "--json"))

    assert list(map(str, Path("out").iterdir())) == [file]
    assert document["source"] == ids[1]
    assert document["targets"][0]["perplexities"] == {"ria": 40.0, "transferred": 50.0}
    assert imported[0]["id"] == ids[1]
    assert (deleted.exit_code, deleted.stderr) == (0, "deleted\n")
    assert again.exit_code == 1
    assert "No configuration has this id" in again.stderr
    assert as_json == {"deleted": ids[1]}
    assert [entry["id"] for entry in answer(remote("configurations", "--json"))] == ids[2:]


def test_an_odd_names_file_lies_in_the_folder(remote, tmp_path):
    for number, name in enumerate(["../../up", "x" * 300, "a\nb", "."]):
        file = written(tmp_path / "c.json", document(12.0, model={"name": name}))
        (entry,) = answer(remote("configurations", "import", file, "--json"))
        words = ("configurations", "export", entry["id"], "--out", f"out{number}", "--json")
        (exported,) = answer(remote(*words))
        copies = answer(remote("configurations", "--library", f"out{number}", "--json"))

        assert Path(exported).parent == Path(f"out{number}")
        assert copies[0]["pattern"] == "0.5"


@pytest.fixture
def places(made_model, made_bundle, folder, tmp_path):
    """What words in braces stand for."""
    (tmp_path / "empty").mkdir()
    return {
        "model": made_model, "bundle": made_bundle, "folder": folder,
        "empty": tmp_path / "empty", "config": folder / "good.json",
    }  # fmt: skip


def test_the_best_of_a_folder_prunes_as_its_file_does(pho, places):
    (places["folder"] / "failed.json").unlink()
    result = pho(*FROM_FOLDER.format(**places).split(), "--json")
    by_hand = pho("prune", places["model"], "--config", places["config"], "--bundle",
                  places["bundle"], "--out", "by-hand")  # fmt: skip
    recipe = json.loads(Path("pruned/pruning.json").read_text())
    origin = recipe["origin"]
    weights, by_hand_weights = (
        load_file(f"{name}/model.safetensors") for name in ("pruned", "by-hand")
    )

    assert by_hand.exit_code == 0, by_hand.output
    assert answer(result)["origin"] == origin
    assert (origin["library"], origin["id"]) == (str(places["folder"]), "good.json")
    assert origin["reasons"][-1] == "where it was found, 50.0% below RIA's perplexity (found-on)"
    assert "found on found-on, llama, 135 M parameters: the family asked for" in origin["reasons"]
    assert f"Taking good.json of the library: {'; '.join(origin['reasons'])}." in result.stderr
    assert recipe["sparsity"] == pytest.approx(0.5)
    assert all(bool((weights[name] == by_hand_weights[name]).all()) for name in by_hand_weights)
    assert "origin" not in json.loads(Path("by-hand/pruning.json").read_text())


@pytest.mark.parametrize(
    ("coefficients", "sentence"),
    [(GOOD, r"By the proxy it holds on "), (BAD, "Note: ")],
)
def test_the_proxy_says_before_whether_a_configuration_is_better_than_ria_on_the_model(
    pho, places, coefficients, sentence
):
    written(places["folder"] / "best.json", document(1.0, coefficients=coefficients))
    result = pho(*FROM_FOLDER.format(**places).split(), "--force")
    proxies = answer(
        pho("transfer", places["folder"] / "best.json", places["bundle"], "--json")
    )["targets"][0]["proxies"]  # fmt: skip
    ria, mine = proxies["ria"], proxies["transferred"]
    (said,) = [line for line in result.stderr.splitlines() if numbers.number(mine) in line]

    assert result.exit_code == 0, result.output
    assert "Taking best.json" in result.stderr
    assert said.startswith(sentence)
    assert (mine < ria) is (coefficients is GOOD)
    assert (f"{1 - mine / ria:.1%} below RIA's" in said) is (coefficients is GOOD)
    assert ("it does not transfer" in said) is (coefficients is BAD)


def test_what_is_worse_than_ria_is_left_out_what_is_not_known_is_not(pho, places):
    written(places["folder"] / "best.json", document(1.0, coefficients=BAD))
    written(places["folder"] / "next.json", document(2.0, coefficients=GOOD | {"kernel_size": 9}))
    result = pho(*FROM_FOLDER.format(**places).split())
    recipe = json.loads(Path("pruned/pruning.json").read_text())

    assert result.exit_code == 0, result.output
    assert "Leaving best.json of the library out: its proxy" in result.stderr
    assert "is not known: " in result.stderr
    assert "kernel" in result.stderr
    assert recipe["origin"]["id"] == "next.json"


def test_if_none_holds_nothing_is_pruned(pho, places):
    for file in places["folder"].glob("*.json"):
        file.unlink()
    for number in range(7):
        configuration = document(1.0 + number, coefficients=BAD)
        written(places["folder"] / f"{number}.json", configuration)
    words = FROM_FOLDER.format(**places).split()
    refused = pho(*words)
    there = Path("pruned").exists()
    forced = pho(*words, "--force")
    recipe = json.loads(Path("pruned/pruning.json").read_text())

    assert refused.exit_code == 1
    assert refused.stderr.count("Leaving ") == 5
    assert "none of the library's 5 most promising configurations for 0.5" in refused.stderr
    assert "--force" in refused.stderr
    assert not there
    assert forced.exit_code == 0, forced.output
    assert recipe["origin"]["id"] == "0.json"


def test_from_a_text_the_statistics_have_the_kernel_size_of_what_the_library_has(
    pho, places, texts
):
    coefficients = {**GOOD, "kernel_size": 9}
    written(places["folder"] / "best.json", document(1.0, coefficients=coefficients))
    result = pho(
        "prune", places["model"], "--from-library", "--library", places["folder"],
        "--pattern", "0.5", "--text", texts["calibration"], "--samples", 6,
        "--context-length", 32, "--kernel-sizes", "3,5", "--out", "pruned",
    )  # fmt: skip
    recipe = json.loads(Path("pruned/pruning.json").read_text())

    assert result.exit_code == 0, result.output
    assert "is not known" not in result.stderr
    assert recipe["calibration"]["settings"]["kernel_sizes"] == [3, 5, 9]


def test_the_service_that_the_settings_name_is_the_library_where_none_is_given(
    remote, ids, made_model, made_bundle
):
    words = PRUNE.format(model=made_model, bundle=made_bundle).split()
    result = remote(*words, "--pattern", "2:4", "--force")
    origin = json.loads(Path("pruned/pruning.json").read_text())["origin"]

    assert result.exit_code == 0, result.output
    assert (origin["library"], origin["id"]) == ("service", ids[2])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("prune {model} --out pruned --from-library --library {folder}", 2, "needs a --pattern"),
        ("prune {model} --out pruned --from-library --config {config} --pattern 0.5", 2,
         "one of --pattern, --config, --method, --from-library, --smaller"),
        ("prune {model} --out pruned --config {config} --library {folder}", 2,
         "--library: for --from-library alone"),
        ("prune {model} --out pruned --config {config} --force", 2, "--force: for --from-libr"),
        ("configurations --library {folder}/good.json", 1, "good.json is no folder"),
        ("configurations --library http://127.0.0.1:9", 1, "127.0.0.1:9 cannot be reached"),
        ("configurations import {folder}/good.json {folder}/notes.json", 1, "notes.json is not a"),
        ("configurations import {empty}", 1, "empty holds no configuration"),
        ("configurations export --out {folder}/good.json", 2, "good.json is a file. Give a folder"),
        ("configurations delete x", 2, "'x' is not a configuration's id"),
        (PRUNE + " --library {empty} --pattern 0.5", 1, "empty is empty. Search on any model"),
        (PRUNE + " --library {folder} --pattern 0.6", 1,
         "has nothing for 0.6, and the best coefficients differ from pattern to pattern. It has "
         "0.5 in scope layer, 2:4 in scope row."),
        (PRUNE + " --library http://127.0.0.1:9 --pattern 0.5", 1, "cannot be reached"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_sentence_and_leaves_nothing_behind(
    pho, places, words, code, message
):
    result = pho(*words.format(**places).split())

    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert list(Path().iterdir()) == []
