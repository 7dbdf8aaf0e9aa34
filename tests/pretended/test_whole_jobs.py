"""
What users ask for as a whole, on a pretended GPU: jobs from the model to the result, and verbs.

`make test` runs the verbs; all else is thorough.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from pretended_subjects import SETTINGS, unchanged

from pho_service.cli import main
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.compare import ComparisonRequest, compare_over_seeds
from pho_service.pipeline.confirmation import validate_job
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import transfer_job
from pho_service.progress import Run
from pho_service.spec.configuration import Configuration, read_configuration
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.tuning.plan import SearchRequest

SEARCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "row": ("0.5", "row", {}),
    "layer": ("0.5", "layer", {}),
    "global": ("0.5", "global", {}),
    "2:4": ("2:4", "row", {}),
    "gini": ("0.5", "layer", {"objective": Objective(name="gini")}),
    "perplexity": ("0.5", "layer", {"objective": Objective(name="perplexity")}),
    "crepe-plus": ("0.5", "layer", {"preset": "crepe-plus"}),
    "best": ("0.5", "layer", {"preset": "best"}),
    "best at 2:4": ("2:4", "row", {"preset": "best"}),
}
LONG = ("perplexity", "crepe-plus", "best", "best at 2:4")  # each finalist is pruned with a text


MODELS = ("llama", "llama-bfloat16", "llama-streamed", "mixtral", "gpt-2")


def searches():
    """Each kind of model with each search, but where one is as scope layer; two with long ones."""
    short = [
        (name, how)
        for name in MODELS
        for how in SEARCHES
        if how not in LONG and (how not in ("row", "gini") or name in ("llama", "gpt-2"))
    ]
    return short + [(name, how) for name in ("llama-bfloat16", "gpt-2") for how in LONG]


@pytest.fixture(params=MODELS)
def subject(request, subject_of):
    """Each kind of model; tests/pipeline/test_two_gpus.py takes the one on two cards."""
    return subject_of(request.param)


def search(subject, how):
    """A search of nine trials, confirmed; the model is dense afterwards."""
    pattern, scope, given = SEARCHES[how]
    parsed = Pattern.parse(pattern, scope)
    preset = Preset.of(given.get("preset", "score"), parsed)
    request = SearchRequest(
        pattern=parsed,
        steps=preset.steps,
        bounds=preset.bounds,
        objective=given.get("objective", Objective()),
        trials=9 if how not in LONG else 8,
        finalists=1,
    )
    with unchanged(subject.model):
        return search_job(
            request,
            subject.bundle,
            model=subject.model,
            confirm_text=subject.report("confirmation"),
            calibration=subject.text.calibration,
            run=Run(device=subject.device),
        )


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "how"), searches())
def test_every_scope_pattern_and_objective_is_searched_and_confirmed(subject_of, name, how):
    found = search(subject_of(name), how).configuration

    assert found.confirmation is not None
    assert found.confirmation.perplexity > 1


def configuration_of(subject, pattern, preset):
    """A configuration with a preset's steps, as a file has it."""
    parsed = Pattern.parse(pattern)
    steps = Preset.of(preset, parsed).steps
    return Configuration.model_validate(
        {
            "method": "crepe",
            "coefficients": {
                "row": 0.4, "column": 1, "neighbourhood": 0.8, "kernel_size": 5,
                "activation_exponent": 0.7, "gradient_exponent": 0.3,
            },
            "pattern": pattern,
            "scope": "row",
            "steps": steps.to_dict(),
        }
    )  # fmt: skip


@pytest.mark.thorough
def test_baselines_of_each_kind_beside_a_configuration(subject):
    pattern = "0.5" if "bfloat16" in subject.name else "2:4"
    parsed = Pattern.parse(pattern)
    own = "wanda-permuted" if parsed.group else "owl-wanda"
    methods = ["wanda", "wanda-sequential", "ria-layer", own, "sparsegpt"]
    with unchanged(subject.model):
        request = ComparisonRequest(
            pattern=parsed,
            configurations=[("mine", configuration_of(subject, pattern, "crepe-plus"))],
            methods=methods,
        )
        given = Calibrated(bundle=subject.bundle, calibration=subject.text.calibration)
        rows = compare_over_seeds(
            subject.model, subject.report(), request, {0: lambda: given},
            run=Run(device=subject.device),
        ).rows  # fmt: skip

    assert [row.method for row in rows] == ["dense", *methods, "mine"]
    assert all(row.memory_bytes for row in rows)


@pytest.mark.thorough
def test_random_candidates_by_every_proxy_and_by_perplexity(subject):
    result = validate_job(
        subject.model,
        subject.bundle,
        subject.report(),
        SearchRequest(pattern=Pattern.parse("0.5", "global")).plan(subject.bundle.kernel_sizes),
        ValidationSpec(candidates=8),
        calibration=subject.text.calibration,
        run=Run(device=subject.device),
    )

    assert len(result.perplexity) == 8


@pytest.mark.thorough
def test_transfer(subject):
    """A configuration that was found elsewhere, and the model's own best."""
    target = Calibrated(
        name=subject.name,
        bundle=subject.bundle,
        model=subject.model,
        report=subject.report(),
        calibration=subject.text.calibration,
        confirm=subject.report("confirmation"),
    )
    request = SearchRequest(
        pattern=Pattern.parse("0.5"),
        trials=8,
        finalists=1,
    )
    done = transfer_job(
        target,
        configuration_of(subject, "0.5", "score"),
        search=request,
        run=Run(device=subject.device),
    )

    assert set(done.perplexities) == {"dense", "wanda", "ria", "transferred", "own"}


@pytest.mark.thorough
@pytest.mark.parametrize("over", ["mean", "worst"])
def test_one_search_over_three_families(subject_of, over):
    subjects = [subject_of(name) for name in ("llama", "mixtral", "gpt-2")]
    request = SearchRequest(
        pattern=Pattern.parse("0.5", "global" if over == "mean" else "layer"),
        objective=Objective(over=over),
        trials=9,
    )
    bundles = {subject.name: subject.bundle for subject in subjects}
    found = search_job(request, bundles, run=Run(device="cuda"))

    assert set(found.configuration.objective["relative_to_ria"]) == set(bundles)


@pytest.mark.thorough
@pytest.mark.parametrize(("pattern", "preset"), [("0.5", "best"), ("2:4", "crepe-plus")])
def test_a_model_is_pruned_for_good_and_saved_and_what_was_saved_passes_its_check(
    subject, pattern, preset, tmp_path
):
    spoiled = replace(subject)  # it is left pruned
    out = tmp_path / "out"
    done = prune_job(
        spoiled.model,
        subject.bundle,
        configuration_of(subject, pattern, preset),
        out,
        calibration=subject.text.calibration,
    )
    checks = check_folder(out, original=subject.model)

    assert done.sparsity == pytest.approx(0.5, abs=1e-3)
    assert [check.name for check in checks if not check.passed] == []


SMALL = (
    "--samples", 4, "--context-length", 24, "--rows-per-layer", 8, "--projection-rows", 16,
    "--kernel-sizes", "3,5",
)  # fmt: skip


def test_every_verb_that_runs_a_model_as_a_user_calls_it_some_of_them_on_the_second_card(
    subject_of, cards, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    subject = subject_of("llama")
    model, texts = subject.folder, subject.texts
    calibration = ("--text", texts["calibration"], *SMALL)
    report = ("--report-text", texts["report"], "--report-windows", 2)
    study = f"sqlite:///{tmp_path / 'study.db'}"
    confirm = ("--confirm-text", texts["confirmation"], "--confirm-windows", 2)
    second = ("--device", "cuda:1")
    used = cards[1].counts.launches

    def pho(*words):
        result = CliRunner().invoke(main, [*map(str, words), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, (words[0], result.output)
        assert json.loads(result.stdout)

    pho("calibrate", model, *calibration, "--out", "b.safetensors", *second)
    pho("search", model, *calibration, *confirm, "--preset", "score",
        "--pattern", "0.5", "--scope", "global",
        "--trials", 9, "--finalists", 1, "--study", study, *second)  # fmt: skip
    assert cards[1].counts.launches > used
    pho("evaluate", model, "--text", texts["report"], "--context-length", 24, "--max-windows", 2)
    pho("compare", model, *calibration, *report, "--pattern", "0.5", "--config", "config.json",
        "--method", "wanda")  # fmt: skip
    pho("prune", model, "--config", "config.json", *calibration, "--out", "out")
    pho("prune", model, "--check", "out")
    for train, where in (("norms", ()), ("kept", second), ("lora", ("--device-map", "auto"))):
        used = cards[1].counts.launches
        pho("recover", "out", "--teacher", model, "--text", texts["report"], "--tokens", 240,
            "--context-length", 24, "--train", train, "--out", train, *where)  # fmt: skip
        pho("prune", model, "--check", train)
        assert (cards[1].counts.launches > used) is bool(where)


@pytest.mark.thorough
def test_pho_demo_with_another_model_in_the_place_of_the_built_in_one(
    subject_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pho_service.models.builtin.smollm2", lambda: subject_of("llama").folder)
    monkeypatch.setattr("pho_service.cli.demo.CONTEXT_LENGTH", SETTINGS.context_length)
    words = ["demo", "--out", "demo", "--trials", "9"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)

    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ("sparsegpt", "score", "crepe-plus", "best"))
    assert (tmp_path / "demo" / "pruned" / "pruning.json").is_file()
    assert read_configuration("demo/config.json").perplexities is not None
