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
from pho_service.spec.baselines import shown_baselines
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


@pytest.fixture(scope="module")
def searched(made_model, texts_of_all, tmp_path_factory):
    """A folder with a bundle and the configuration found from it alone, and what was printed."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHO_CACHE_DIR", str(folder / "cache"))
        bundle = folder / "b.safetensors"
        words = ("--text", texts_of_all["calibration"], "--out", bundle)
        done("calibrate", made_model, *words, *CALIBRATION)
        document = done(
            "search", bundle, "--pattern", "0.5", "--preset", "score", "--trials", 12,
            "--study", f"sqlite:///{folder / 's.db'}", "--out", folder / "config.json",
        )  # fmt: skip
    return folder, document


def test_from_a_bundle_that_is_written_and_nothing_besides_nothing_is_confirmed(searched):
    folder, document = searched
    configuration = document["configuration"]

    assert (folder / "b.safetensors").stat().st_size > 10_000
    assert {p.name for p in folder.iterdir()} <= {"b.safetensors", "cache", "config.json", "s.db"}
    assert configuration["confirmation"] is None
    assert any("Not confirmed" in warning for warning in document["warnings"])
    lowest = configuration["objective"]["value"]
    assert all(lowest <= baseline["proxy"] for baseline in configuration["baselines"])
    assert configuration["search"]["space"]["kernel_sizes"] == [3, 5]  # the bundle's
    assert json.loads((folder / "config.json").read_text()) == configuration


def test_people_get_tables_and_the_lowest_perplexity_wins_baselines_included(
    made_model, texts, tmp_path
):
    words = (
        "search", made_model, "--pattern", "0.5", "--preset", "score", "--scope", "global",
        *CALIBRATION, "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
        "--trials", 12, "--study", f"sqlite:///{tmp_path / 'study.db'}",
        "--out", tmp_path / "config.json",
    )  # fmt: skip
    shown = pho(*words)
    configuration = done(*words)["configuration"]
    finalists = configuration["finalists"]
    perplexities = [c["perplexity"] for c in finalists if c["perplexity"] is not None]

    assert "optuna-dashboard sqlite:///" in shown.stdout
    assert "8 windows of 24 tokens, 12 trials, 5 finalists on 16 windows: about" in shown.stderr
    assert "Step 1 of 3: calibrate (" in shown.stderr
    assert configuration["confirmation"]["perplexity"] == min(perplexities) == perplexities[0]
    assert all(c["divergence"] > 0 for c in finalists)
    assert {b["method"] for b in configuration["baselines"]} <= {c["method"] for c in finalists}
    assert configuration["confirmation"]["text"]["sha256"]


def test_pruning_from_a_bundle_is_the_same(searched, made_model, texts, tmp_path):
    folder, _ = searched
    arguments = ["prune", made_model, "--config", folder / "config.json", *CALIBRATION]
    done(*arguments, "--bundle", folder / "b.safetensors", "--out", tmp_path / "a")
    done(*arguments, "--text", texts["calibration"], "--out", tmp_path / "b")

    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_a_perplexity_says_all_it_depends_on_auto_adds_bos_as_the_tokenizer(bos_folder, texts):
    words = ("evaluate", bos_folder, "--text", texts["report"], "--context-length", 24)
    rated, always, never = (done(*words, "--bos", bos) for bos in ("auto", "always", "never"))

    assert rated["tokens"] == rated["windows"] * 23
    assert rated["context_length"] == 24
    assert rated["bos"] is True
    assert len(rated["text_sha256"]) == 64
    assert 1 < rated["perplexity"] < 1000
    assert 0 < rated["error"] < rated["perplexity"]
    assert always["perplexity"] == rated["perplexity"] != never["perplexity"]
    assert f"perplexity {number(rated['perplexity'])}" in pho(*words).stdout


def test_dense_published_methods_and_configurations_are_compared_in_this_order(
    searched, made_model, texts
):
    config = searched[0] / "config.json"
    words = (
        "compare", made_model, "--pattern", "0.5", "--scope", "layer", *CALIBRATION,
        "--text", texts["calibration"], "--report-text", texts["report"],
    )  # fmt: skip
    rows = done(*words, "--config", config)["rows"]
    table = pho(*words, "--method", "ria-layer").stdout
    published = [baseline.method for baseline in shown_baselines(None, Pattern.parse("0.5"))]

    assert [r["method"] for r in rows] == ["dense", *published, str(config)]
    assert rows[0]["sparsity"] == 0
    assert [r["sparsity"] for r in rows[1:]] == pytest.approx([0.5] * len(rows[1:]))
    assert all(r["perplexity"] > 1 and r["seconds"] > 0 for r in rows)
    assert all(r["memory_bytes"] > 2**20 for r in rows)
    assert "ria-layer" in table
    assert "sparsegpt" not in table


@pytest.mark.thorough
def test_a_report_on_what_was_calibrated_or_chosen_on_says_so_on_the_terminal_and_in_json(
    made_model, texts, tmp_path
):
    text, other, out = texts["calibration"], texts["confirmation"], tmp_path / "pruned"
    config, cut = tmp_path / "config.json", (*CALIBRATION, "--text", text)
    done(
        "search", made_model, "--pattern", "0.5", "--preset", "score", "--trials", 12, *cut,
        "--confirm-text", other, "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", config,
    )  # fmt: skip
    done("prune", made_model, "--config", config, *cut, "--out", out)
    compared = ("compare", made_model, "--pattern", "0.5", *cut, "--method", "wanda")
    alone = ("evaluate", out, "--context-length", 24, "--beside", made_model, "--text")
    calibrated = "of 6 windows were calibrated on: what is pruned is favoured"
    notes = {
        name: " ".join(done(*words)["notes"])
        for name, words in {
            "calibrated": (*compared, "--report-text", text, "--report-windows", 6),
            "chosen": (*compared, "--report-text", other, "--config", config),
            "neither": (*compared, "--report-text", texts["report"], "--config", config),
            "folder": (*alone, text), "folder, chosen": (*alone, other),
            "folder, neither": (*alone, texts["report"]),
        }.items()
    }  # fmt: skip

    assert re.search(rf"^Note: [1-6] {calibrated}", notes["calibrated"])
    assert f"windows chose {config}, which is favoured" in notes["chosen"]
    assert "windows were calibrated on" in notes["folder"]
    assert "windows chose pruned, which is favoured" in notes["folder, chosen"]
    assert notes["neither"] == notes["folder, neither"] == ""
    shown = pho(*compared, "--report-text", text, "--report-windows", 6).stdout
    assert "windows were calibrated on" in " ".join(shown.split())


def test_validate(made_model, texts, tmp_path):
    """Each proxy comes with its correlations and intervals, on the preset's space, and is drawn."""
    plot = tmp_path / "plot.html"
    document = done(
        "validate", made_model, "--pattern", "0.5", "--candidates", 9, *CALIBRATION,
        "--preset", "crepe-plus", "--text", texts["calibration"], "--plot", plot,
        "--confirm-windows", 2,
    )  # fmt: skip
    proxies = document["proxies"]
    allocations = [candidate["allocation"] for candidate in document["candidates"]]
    charts = re.findall(r'<svg class="chart plot[^"]*".*?</svg>', plot.read_text(), flags=re.DOTALL)

    assert set(proxies) == {*(f"activation-reconstruction/{w}" for w in WEIGHTINGS), "gini"}
    assert {"spearman", "kendall", "regret", "spearman_interval"} <= set(proxies["gini"])
    assert len(allocations) == 9
    assert {allocation["method"] for allocation in allocations} == {"fisher"}
    assert all(0.05 <= allocation["spread"] <= 0.4 for allocation in allocations)
    assert len(charts) == len(proxies)
    for chart in charts:
        assert re.findall(r"perplexity ([\d.,e+]+)<", chart) == [
            number(candidate["perplexity"]) for candidate in document["candidates"]
        ]


def test_what_is_compared_is_recovered_too(searched, made_model, texts):
    config = searched[0] / "config.json"
    compared = done(
        "compare", made_model, "--pattern", "0.5", *CALIBRATION, "--method", "wanda",
        "--config", config, "--text", texts["calibration"], "--report-text", texts["report"],
        "--report-windows", 3, "--recover-tokens", 96, "--recover-rate", 0.02,
    )  # fmt: skip

    rows = {row["method"]: row["perplexity"] for row in compared["rows"]}
    assert list(rows) == ["dense", "wanda", str(config), f"{config}, recovered"]
    assert len({*rows.values()}) == 4


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
    first = {row["what"]: row for row in done("doctor")}
    monkeypatch.setattr("storage.database.MANY_DEAD", 2)
    second = {row["what"]: row for row in done("doctor")}

    assert re.search(r"PostgreSQL \d\d.*MiB$", first["database"]["detail"])
    assert "pruned 3.0 MiB" in first["artifact store"]["detail"]
    rows = "3 beside 1 rows in pho.service, vacuumed never"
    assert first["dead rows"]["state"] == "ok"
    assert first["dead rows"]["detail"] == f"{rows}, which has the most"
    assert second["dead rows"]["state"] == "note"
    assert second["dead rows"]["detail"] == f"{rows}: is autovacuum off? `VACUUM` it"


def test_doctor_looks_at_all_and_fails_where_a_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PHO_DATA_DIR", str(tmp_path / "data"))
    well = done("doctor")
    monkeypatch.setenv("PHO_DATABASE_URL", "postgresql://nobody@127.0.0.1:9/pho")
    broken = pho("doctor")

    assert {"cpu", "hub", "database", "cache of bundles"} <= {row["what"] for row in well}
    assert not [row for row in well if row["state"] == "fails"]
    assert broken.exit_code == 1
    assert re.search(r"database +fails", broken.stdout)
