"""Every verb, as a user calls it, on a model that runs in milliseconds."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from pretended_user import answer
from sqlalchemy import text

from pho_service.cli import main
from pho_service.interface.measured import evaluate
from pho_service.models.loading import load_model
from pho_service.spec.baselines import baseline, shown_baselines
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import number
from pho_service.spec.objective import WEIGHTINGS
from pho_service.spec.pattern import Pattern

CALIBRATION = (
    "--samples", "8", "--context-length", "24", "--rows-per-layer", "8", "--projection-rows", "16",
    "--kernel-sizes", "3,5",
)  # fmt: skip


def pho(*arguments):
    """Call a verb in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments):
    """The JSON of a verb that must succeed."""
    return answer(pho(*arguments, "--json"))


@pytest.fixture
def bundle(model_folder, texts, tmp_path):
    """A bundle of the tiny model."""
    path = tmp_path / "b.safetensors"
    done("calibrate", model_folder, "--text", texts["calibration"], "--out", path, *CALIBRATION)
    return path


@pytest.fixture
def found_from_bundle(bundle, tmp_path):
    """What a search says that needs no model and no text; the configuration is in a file."""
    return done(
        "search", bundle, "--pattern", "0.5", "--preset", "score", "--trials", 12,
        "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", tmp_path / "config.json",
    )  # fmt: skip


@pytest.fixture
def search_arguments(model_folder, texts, tmp_path):
    """A search with confirmation."""
    return [
        "search", model_folder, "--pattern", "0.5", "--preset", "score", "--scope", "global",
        *CALIBRATION,
        "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
        "--trials", 12, "--study", f"sqlite:///{tmp_path / 'study.db'}",
        "--out", tmp_path / "config.json",
    ]  # fmt: skip


def test_a_bundle_is_written_and_nothing_besides(bundle):
    assert bundle.stat().st_size > 10_000
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(".pho")] == []


def test_a_search_from_a_bundle_says_that_nothing_is_confirmed(found_from_bundle, tmp_path):
    found = found_from_bundle["configuration"]

    assert found["confirmation"] is None
    assert any("Not confirmed" in warning for warning in found_from_bundle["warnings"])
    assert all(found["objective"]["value"] <= b["proxy"] for b in found["baselines"])
    assert found["search"]["space"]["kernel_sizes"] == [3, 5]  # the bundle's
    assert json.loads((tmp_path / "config.json").read_text()) == found


def test_the_lowest_perplexity_wins_baselines_included(search_arguments):
    found = done(*search_arguments)["configuration"]
    measured = [c["perplexity"] for c in found["finalists"] if c["perplexity"] is not None]

    assert found["confirmation"]["perplexity"] == min(measured) == measured[0]
    assert all(c["divergence"] > 0 for c in found["finalists"])
    assert {b["method"] for b in found["baselines"]} <= {c["method"] for c in found["finalists"]}
    assert found["confirmation"]["text"]["sha256"]


@pytest.mark.usefixtures("found_from_bundle")
def test_pruning_from_a_bundle_is_the_same(model_folder, bundle, tmp_path):
    arguments = ["prune", model_folder, "--config", tmp_path / "config.json", *CALIBRATION]
    done(*arguments, "--bundle", bundle, "--out", tmp_path / "a")
    done(*arguments, "--text", tmp_path / "calibration.jsonl", "--out", tmp_path / "b")

    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_a_perplexity_says_all_it_depends_on(bos_folder, texts):
    rated = done("evaluate", bos_folder, "--text", texts["report"], "--context-length", 24)

    assert rated["tokens"] == rated["windows"] * 23
    assert rated["context_length"] == 24
    assert rated["bos"] is True
    assert len(rated["text_sha256"]) == 64
    assert 1 < rated["perplexity"] < 1000
    assert 0 < rated["error"] < rated["perplexity"]


@pytest.mark.usefixtures("found_from_bundle")
def test_dense_published_methods_and_configurations_are_compared_in_this_order(
    model_folder, texts, tmp_path
):
    config = tmp_path / "config.json"
    rows = done(
        "compare", model_folder, "--pattern", "0.5", "--scope", "layer", *CALIBRATION,
        "--text", texts["calibration"], "--report-text", texts["report"], "--config", config,
    )["rows"]  # fmt: skip

    published = [each.method for each in shown_baselines(None, Pattern.parse("0.5"))]

    assert [r["method"] for r in rows] == ["dense", *published, str(config)]
    assert rows[0]["sparsity"] == 0
    assert [r["sparsity"] for r in rows[1:]] == pytest.approx([0.5] * len(rows[1:]))
    assert all(r["perplexity"] > 1 and r["seconds"] > 0 for r in rows)
    assert all(r["memory_bytes"] > 2**20 for r in rows)


def test_at_2_4_half_of_each_group_goes(model_folder, texts):
    rows = done(
        "compare", model_folder, "--pattern", "2:4", *CALIBRATION, "--text", texts["calibration"],
        "--report-text", texts["report"],
    )["rows"]  # fmt: skip
    by_method = {r["method"]: r for r in rows}

    assert {"wanda", "wanda-permuted", "wanda-sequential", "sparsegpt"} < by_method.keys()
    assert not any("owl" in method for method in by_method)
    assert by_method.pop("dense")["sparsity"] == 0
    assert {r["sparsity"] for r in by_method.values()} == {0.5}


def test_validate(model_folder, texts, tmp_path):
    """Each proxy comes with its correlations and intervals, on the preset's space, and is drawn."""
    plot = tmp_path / "plot.html"
    document = done(
        "validate", model_folder, "--pattern", "0.5", "--candidates", 9, *CALIBRATION,
        "--preset", "crepe-plus", "--text", texts["calibration"], "--plot", plot,
        "--confirm-windows", 2,
    )  # fmt: skip
    proxies = document["proxies"]

    assert set(proxies) == {
        *(f"activation-reconstruction/{w}" for w in WEIGHTINGS),
        "gini",
    }
    assert {"spearman", "kendall", "regret", "spearman_interval"} <= set(proxies["gini"])
    allocations = [candidate["allocation"] for candidate in document["candidates"]]
    assert len(allocations) == 9
    assert {each["method"] for each in allocations} == {"fisher"}
    assert all(0.05 <= each["spread"] <= 0.4 for each in allocations)
    drawn = re.findall(r'<svg class="chart".*?</svg>', plot.read_text(), flags=re.DOTALL)
    assert len(drawn) == len(proxies)
    for chart in drawn:
        assert re.findall(r"perplexity ([\d.,e+]+)<", chart) == [
            number(candidate["perplexity"]) for candidate in document["candidates"]
        ]


def test_what_is_compared_is_recovered_too(model_folder, texts, tmp_path):
    found = tmp_path / "found.json"
    found.write_text(
        Configuration.of(baseline("ria-layer", Pattern.parse("0.5"))).model_dump_json()
    )
    compared = done(
        "compare", model_folder, "--pattern", "0.5", *CALIBRATION, "--method", "wanda",
        "--config", found, "--text", texts["calibration"], "--report-text", texts["report"],
        "--recover-tokens", 256, "--recover-rate", 0.02,
    )  # fmt: skip

    rows = {row["method"]: row["perplexity"] for row in compared["rows"]}
    assert list(rows) == ["dense", "wanda", str(found), f"{found}, recovered"]
    assert len({*rows.values()}) == 4


def test_tables(model_folder, texts, search_arguments):
    """Without --json, people get tables and sentences."""
    compared = pho(
        "compare", model_folder, "--pattern", "0.5", *CALIBRATION, "--method", "ria-layer",
        "--text", texts["calibration"], "--report-text", texts["report"],
    )  # fmt: skip
    searched = pho(*search_arguments)

    assert "ria-layer" in compared.stdout
    assert "optuna-dashboard sqlite:///" in searched.stdout
    assert "Calibrating the dense model" in compared.stderr


def test_without_a_context_length_windows_are_what_the_model_reads_on_every_face(
    model_folder, texts, tmp_path
):
    short = Path(shutil.copytree(model_folder, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    words = ("evaluate", short, "--text", texts["report"], "--device", "cpu")
    result = pho(*words, "--json")
    model = load_model(str(short), device="cpu")

    assert f"{short} reads 24 tokens: that is the context length." in result.stderr
    assert answer(result)["context_length"] == 24
    assert evaluate(model, None, texts["report"]).context_length == 24
    assert "48 is more than" in pho(*words, "--context-length", 48).stderr


def test_doctor_tells_the_size_of_a_service_and_which_table_needs_a_vacuum(
    tmp_path, database, database_url, monkeypatch
):
    monkeypatch.setenv("PHO_DATABASE_URL", database_url)
    monkeypatch.setenv("PHO_ARTIFACTS", str(tmp_path))
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "file").write_bytes(bytes(3 * 2**20))
    with database.transaction() as connection:
        connection.execute(text("INSERT INTO pho.service VALUES (1, '')"))
        for _ in range(3):
            connection.execute(text("UPDATE pho.service SET store = store || 'x'"))
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
    first = {each["what"]: each for each in done("doctor")}
    monkeypatch.setattr("storage.database.MANY_DEAD", 2)
    second = {each["what"]: each for each in done("doctor")}

    assert re.search(r"PostgreSQL \d\d.*MiB$", first["database"]["detail"])
    assert "pruned 3.0 MiB" in first["artifact store"]["detail"]
    told = "3 beside 1 rows in pho.service, vacuumed never"
    assert first["dead rows"]["state"] == "ok"
    assert first["dead rows"]["detail"] == f"{told}, which has the most"
    assert second["dead rows"]["state"] == "note"
    assert second["dead rows"]["detail"] == f"{told}: is autovacuum off? `VACUUM` it"


def test_doctor_looks_at_all_and_fails_where_a_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PHO_DATA_DIR", str(tmp_path / "data"))
    well = done("doctor")
    monkeypatch.setenv("PHO_DATABASE_URL", "postgresql://nobody@127.0.0.1:9/pho")
    broken = pho("doctor")

    assert {"cpu", "hub", "database", "cache of bundles"} <= {e["what"] for e in well}
    assert not [each for each in well if each["state"] == "fails"]
    assert broken.exit_code == 1
    assert re.search(r"database +fails", broken.stdout)
