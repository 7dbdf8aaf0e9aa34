"""`pho report`, of a job and of a local study."""

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import click
import optuna
import pytest
from click.testing import CliRunner

from pho_service.cli import main
from pho_service.cli.document import Given
from pho_service.cli.search import search
from pho_service.client import Client
from storage.studies import keep_record, record_of

URL = "sqlite:///study.db"


def visible(path):
    """The words of a page."""
    page = Path(path).read_text(encoding="utf-8").partition("<footer>")[0]
    words = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", words)


@pytest.fixture(scope="module")
def made(made_bundle, tmp_path_factory):
    """A folder with a study and a configuration, and the study's name."""
    folder = tmp_path_factory.mktemp("searched")
    words = [
        "search", made_bundle, "--pattern", "0.5", "--trials", 12, "--json",
        "--study", f"sqlite:///{folder}/study.db", "--out", folder / "config.json",
    ]  # fmt: skip
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)["study"]["name"]


@pytest.fixture
def searched(pho, made):  # noqa: ARG001 - which changes the folder
    """The name of a study in ``study.db``, with a ``config.json`` beside it."""
    folder, name = made
    shutil.copytree(folder, ".", dirs_exist_ok=True)
    return name


def test_a_jobs_page_is_the_one_that_the_service_makes(remote, url):
    with Client(url) as client:
        job = client.submit({"model": "org/name", "pattern": "0.5", "name": "mine"})
    result = remote("report", str(job.id)[:13], "--out", "job.html", "--json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"out": "job.html"}
    assert "Search, queued." in visible("job.html")
    assert job.name in visible("job.html")


def test_a_studys_page_has_its_trials_what_was_chosen_and_what_it_was_worth_elsewhere(
    pho, searched, made_bundle
):
    pho("transfer", "config.json", made_bundle, "--out", "transfer.json")
    pages = {}
    for config in (None, "config.json", "transfer.json"):
        words = ("--config", config) if config else ()
        result = pho("report", searched, "--study", URL, *words)
        pages[config] = visible("report.html")

        assert result.exit_code == 0, result.stderr
        assert "written report.html" in result.stderr
        assert "12 rated trials" in pages[config]

    assert "(best so far)" in pages[None]
    assert "Without its configuration ( pho report --config )" in pages[None]
    assert "(chosen)" in pages["config.json"]
    assert "A study does not store errors and sparsities of layers" in pages["config.json"]
    assert "The time of each stage is not known" in pages["config.json"]
    assert "pho prune" in pages["config.json"]
    assert "--config config.json" in pages["config.json"]
    assert "On other models, by proxy" in pages["transfer.json"]
    assert "(chosen)" in pages["transfer.json"]


def again(name):
    """What the command on the page of a study gives to `pho search`."""
    runner = CliRunner().invoke(main, ["report", name, "--study", URL])
    assert runner.exit_code == 0, runner.stderr
    page = html.unescape(Path("report.html").read_text(encoding="utf-8"))
    (line,) = set(re.findall(r"pho search .* --study sqlite:///study.db", page))
    parent = click.Context(main, **main.context_settings)
    found = search.make_context("search", shlex.split(line)[2:], parent=parent).params["given"]
    assert isinstance(found, Given)
    return found


def test_the_command_on_the_page_searches_the_same_again(pho, bundle_file):
    result = pho(
        "search", bundle_file, "--pattern", "0.5", "--preset", "score", "--trials", 12, "--json",
        "--allocation", "owl", "--allocation-unit", "block", "--allocation-outlier-ratio", 4,
        "--ignore", "*.down_proj",
    )  # fmt: skip
    name = json.loads(result.stdout)["study"]["name"]
    study = optuna.load_study(study_name=name, storage=URL)
    asked = record_of(study)["document"]
    found = again(name)
    spec = found.job(found.document({"model": str(bundle_file)}))
    plan = spec.plan(0)

    assert spec.model_dump(mode="json") == asked
    assert asked["steps"]["allocation"]["outlier_ratio"] == 4
    assert plan.steps.linears.ignore == ("*.down_proj",)
    assert asked["calibration"]["kernel_sizes"] == [3, 5]  # the bundle's

    keep_record(study, "document", None)  # as studies of Python, which keep what was searched
    found = again(name)
    alone = found.job(found.document({"model": "of the bundle"}))
    assert alone.plan(0) == plan
    assert alone.calibration.settings().samples == 6


def test_what_cannot_be_reported_is_said_in_one_sentence_and_nothing_is_made(pho, searched):
    optuna.copy_study(
        from_study_name=searched, from_storage=URL, to_storage=URL, to_study_name="copy"
    )
    optuna.create_study(storage=URL, study_name="theirs")
    for words, code, message in (
        ("mine", 2, "'mine' is not a job id"),
        ("mine --config config.json", 2, "--config is for a local study"),
        (f"mine --study {URL}", 1, "has no study 'mine'"),
        ("mine --study sqlite:///other.db", 1, "there is no such file"),
        ("mine --study study.db", 1, "is not a database URL"),
        ("mine --study sqlite:///config.json", 1, "file is not a database"),
        (f"mine --study {URL} --config none.json", 1, "none.json cannot be read"),
        (f"mine --study {URL} --out no/report.html", 1, "does not exist"),
        (f"copy --study {URL} --config config.json", 2, "not of 'copy'"),
        (f"theirs --study {URL}", 1, "'theirs' is not one of `pho search`"),
    ):
        result = pho("report", *words.split())

        assert result.exit_code == code
        assert message in result.stderr
        assert not Path("report.html").exists()
        assert not Path("other.db").exists()
