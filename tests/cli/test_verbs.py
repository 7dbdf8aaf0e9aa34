"""Every verb, as a user calls it, on a model that runs in milliseconds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from pho_service.cli import main
from pho_service.spec.baselines import shown_baselines
from pho_service.spec.document import number
from pho_service.spec.objective import WEIGHTINGS
from pho_service.spec.pattern import Pattern

CALIBRATION = (
    "--samples", "8", "--context-length", "24", "--rows-per-layer", "8", "--projection-rows", "16",
    "--kernel-sizes", "3,5",
)  # fmt: skip


def pho(*arguments: object) -> Result:
    """Call a verb in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments: object) -> dict[str, Any]:
    """The JSON of a verb that must succeed."""
    result = pho(*arguments, "--json")

    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.fixture
def bundle(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle of the tiny model."""
    path = tmp_path / "b.safetensors"
    done("calibrate", model_folder, "--text", texts["calibration"], "--out", path, *CALIBRATION)
    return path


@pytest.fixture
def search_arguments(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> list[object]:
    """A search with confirmation."""
    return [
        "search", model_folder, "--pattern", "0.5", "--preset", "score", "--scope", "global",
        *CALIBRATION,
        "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
        "--trials", 12, "--study", f"sqlite:///{tmp_path / 'study.db'}",
        "--out", tmp_path / "config.json",
    ]  # fmt: skip


def test_a_bundle_is_written_and_nothing_besides(bundle: Path) -> None:
    assert bundle.stat().st_size > 10_000
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(".pho")] == []


def test_search_from_bundle(bundle: Path, tmp_path: Path) -> None:
    """From a bundle a search needs no model and no text; it says that nothing is confirmed."""
    document = done(
        "search", bundle, "--pattern", "0.5", "--preset", "score", "--trials", 20,
        "--kernel-sizes", "3,5", "--study", f"sqlite:///{tmp_path / 's.db'}",
        "--out", tmp_path / "c.json",
    )  # fmt: skip
    found = document["configuration"]

    assert found["confirmation"] is None
    assert any("Not confirmed" in warning for warning in document["warnings"])
    assert all(found["objective"]["value"] <= b["proxy"] for b in found["baselines"])
    assert json.loads((tmp_path / "c.json").read_text()) == found


def test_bundle_needs_no_kernel_sizes(bundle: Path, tmp_path: Path) -> None:
    document = done(
        "search", bundle, "--preset", "score", "--pattern", "2:4", "--trials", 12,
        "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", tmp_path / "c.json",
    )  # fmt: skip

    assert document["configuration"]["search"]["space"]["kernel_sizes"] == [3, 5]


def test_search_confirms(search_arguments: list[object]) -> None:
    """With a text to confirm on, the lowest perplexity wins, baselines included."""
    found = done(*search_arguments)["configuration"]
    measured = [c["perplexity"] for c in found["candidates"] if c["perplexity"] is not None]

    assert found["confirmation"]["perplexity"] == min(measured) == measured[0]
    assert all(c["divergence"] > 0 for c in found["candidates"])
    assert {b["method"] for b in found["baselines"]} <= {c["method"] for c in found["candidates"]}
    assert found["confirmation"]["text"]["sha256"]


def test_search_holds_windows_out(search_arguments: list[object]) -> None:
    """Without a text to confirm on, windows that calibration left are used."""
    at = search_arguments.index("--confirm-text")
    del search_arguments[at : at + 2]
    confirmation = done(*search_arguments)["configuration"]["confirmation"]

    assert confirmation["tokens"] == 16 * 23


def test_search_again(search_arguments: list[object], tmp_path: Path) -> None:
    """A finished search, asked again, gives the same file without measuring anything."""
    done(*search_arguments)
    first = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").unlink()
    done(*search_arguments)

    assert (tmp_path / "config.json").read_bytes() == first


def test_same_seed_same_file(search_arguments: list[object], tmp_path: Path) -> None:
    """From nothing, the same search writes the same bytes."""
    files = []
    for place in range(2):
        done(*[str(a).replace("study.db", f"study{place}.db") for a in search_arguments])
        files.append((tmp_path / "config.json").read_bytes())
        for kept in tmp_path.glob("cache/bundles/*"):
            kept.unlink()

    assert files[0] == files[1]


def test_the_slow_objective_searches_by_perplexity_itself(search_arguments: list[object]) -> None:
    found = done(*search_arguments, "--objective", "perplexity", "--trials", 12)["configuration"]

    assert found["objective"]["value"] == found["confirmation"]["perplexity"]


def test_prune(search_arguments: list[object], texts: dict[str, Path], tmp_path: Path) -> None:
    """The saved model has exact zeros, a true recipe, and the perplexity that the search saw."""
    model = search_arguments[1]
    found = done(*search_arguments)["configuration"]
    folder = tmp_path / "pruned"
    done(
        "prune", model, "--config", tmp_path / "config.json", "--out", folder, *CALIBRATION,
        "--text", texts["calibration"],
    )  # fmt: skip
    recipe = json.loads((folder / "pruning.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(model)
    sparse = AutoModelForCausalLM.from_pretrained(folder)
    zeros = 0
    for name, layer in recipe["layers"].items():
        weight = sparse.get_parameter(f"{name}.weight")
        kept = weight != 0
        zeros += int((~kept).sum())

        assert torch.equal(weight[kept], dense.get_parameter(f"{name}.weight")[kept])
        assert float((~kept).float().mean()) == pytest.approx(layer["sparsity"])
    assert zeros == 18_432 // 2
    assert recipe["sparsity"] == pytest.approx(0.5)
    rated = done(
        "evaluate", folder, "--text", texts["confirmation"], "--context-length", 24,
        "--max-windows", 16,
    )  # fmt: skip
    assert rated["perplexity"] == found["confirmation"]["perplexity"]


def test_prune_from_bundle(search_arguments: list[object], bundle: Path, tmp_path: Path) -> None:
    """A bundle has the statistics in full, so pruning from it is the same."""
    done(*search_arguments)
    arguments = ["prune", search_arguments[1], "--config", tmp_path / "config.json", *CALIBRATION]
    done(*arguments, "--bundle", bundle, "--out", tmp_path / "a")
    done(*arguments, "--text", tmp_path / "calibration.jsonl", "--out", tmp_path / "b")

    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_evaluate(bos_folder: Path, texts: dict[str, Path]) -> None:
    """The perplexity comes with everything that it depends on."""
    rated = done("evaluate", bos_folder, "--text", texts["report"], "--context-length", 24)

    assert rated["tokens"] == rated["windows"] * 23
    assert rated["context_length"] == 24
    assert rated["bos"] is True
    assert len(rated["text_sha256"]) == 64
    assert 1 < rated["perplexity"] < 1000


def test_compare(search_arguments: list[object], texts: dict[str, Path], tmp_path: Path) -> None:
    """The table has dense, the published methods and the configurations, in this order."""
    done(*search_arguments)
    config = tmp_path / "config.json"
    rows = done(
        "compare", search_arguments[1], "--pattern", "0.5", "--scope", "layer", *CALIBRATION,
        "--text", texts["calibration"], "--report-text", texts["report"], "--config", config,
    )["rows"]  # fmt: skip

    published = [each.method for each in shown_baselines(None, Pattern.parse("0.5"))]

    assert [r["method"] for r in rows] == ["dense", *published, str(config)]
    assert rows[0]["sparsity"] == 0
    assert [r["sparsity"] for r in rows[1:]] == pytest.approx([0.5] * len(rows[1:]))
    assert all(r["perplexity"] > 1 and r["seconds"] > 0 for r in rows)


def test_compare_some(model_folder: Path, texts: dict[str, Path]) -> None:
    """Every method prunes the linears that the options choose, and no others count."""
    rows = done(
        "compare", model_folder, "--pattern", "0.5", *CALIBRATION, "--text", texts["calibration"],
        "--report-text", texts["report"], "--ignore", "*.o_proj", "--sparsity", "*.down_proj=0.25",
    )["rows"]  # fmt: skip

    by_hand = (6144 * 0.5 + 2048 * 0.25) / 8192  # of a block
    assert [r["sparsity"] for r in rows[1:]] == pytest.approx([by_hand] * len(rows[1:]), abs=1e-4)


def test_compare_nm(model_folder: Path, texts: dict[str, Path]) -> None:
    """At 2:4 every method removes half of each group, permuted or not, and OWL has no row."""
    rows = done(
        "compare", model_folder, "--pattern", "2:4", *CALIBRATION, "--text", texts["calibration"],
        "--report-text", texts["report"],
    )["rows"]  # fmt: skip
    by_method = {r["method"]: r for r in rows}

    assert {"wanda", "wanda-permuted", "wanda-sequential", "sparsegpt"} < by_method.keys()
    assert not any("owl" in method for method in by_method)
    assert by_method.pop("dense")["sparsity"] == 0
    assert {r["sparsity"] for r in by_method.values()} == {0.5}


def test_validate(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
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


def test_tables(model_folder: Path, texts: dict[str, Path], search_arguments: list[object]) -> None:
    """Without --json, people get tables and sentences."""
    compared = pho(
        "compare", model_folder, "--pattern", "0.5", *CALIBRATION,
        "--text", texts["calibration"], "--report-text", texts["report"],
    )  # fmt: skip
    searched = pho(*search_arguments)

    assert "ria-layer" in compared.stdout
    assert "optuna-dashboard sqlite:///" in searched.stdout
    assert "Calibrating the dense model" in compared.stderr
