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

NOBODY = "00000000-0000-0000-0000-000000000000"
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


def test_a_studys_page_has_its_trials_what_was_chosen(pho, searched):
    result = pho("report", searched, "--study", URL, "--config", "config.json")
    text = visible("report.html")

    assert result.exit_code == 0, result.stderr
    assert "written report.html" in result.stderr
    assert "12 rated trials" in text
    assert "(chosen)" in text
    assert "A study does not keep the errors and sparsities of layers" in text
    assert "The time of each stage is not known" in text
    assert "pho prune" in text
    assert "--config config.json" in text


def test_without_the_configuration_the_best_is_shown(pho, searched):
    result = pho("report", searched, "--study", URL)

    assert result.exit_code == 0, result.stderr
    assert "(best so far)" in visible("report.html")
    assert "Without its configuration ( pho report --config )" in visible("report.html")


def test_transfers_of_a_study(pho, searched, bundle_file):
    """A transfer's file in the place of the configuration says what it was worth elsewhere."""
    pho("transfer", "config.json", bundle_file, "--out", "transfer.json")
    result = pho("report", searched, "--study", URL, "--config", "transfer.json")

    assert result.exit_code == 0, result.stderr
    assert "On other models, by proxy" in visible("report.html")
    assert "(chosen)" in visible("report.html")


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


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("mine", 2, "'mine' is not a job id"),
        ("mine --config config.json", 2, "--config is for a local study"),
        (f"mine --study {URL}", 1, "has no study 'mine'"),
        ("mine --study sqlite:///other.db", 1, "there is no such file"),
        ("mine --study study.db", 1, "is not a database URL"),
        ("mine --study sqlite:///config.json", 1, "file is not a database"),
        (f"mine --study {URL} --config none.json", 1, "none.json cannot be read"),
        (f"mine --study {URL} --out no/report.html", 1, "does not exist"),
    ],
)
def test_refused(pho, searched, words, code, message):
    """What cannot be reported is said in one sentence, and nothing is made."""
    del searched
    result = pho("report", *words.split())

    assert result.exit_code == code
    assert message in result.stderr
    assert not Path("report.html").exists()
    assert not Path("other.db").exists()


def test_a_configuration_of_another_study_is_refused(pho, searched):
    optuna.copy_study(
        from_study_name=searched, from_storage=URL, to_storage=URL, to_study_name="copy"
    )
    result = pho("report", "copy", "--study", URL, "--config", "config.json")

    assert result.exit_code == 2
    assert "not of 'copy'" in result.stderr


def test_a_study_that_no_search_of_ours_wrote_is_refused(pho):
    optuna.create_study(storage=URL, study_name="theirs")
    result = pho("report", "theirs", "--study", URL)

    assert result.exit_code == 1
    assert "'theirs' is not one of `pho search`" in result.stderr
