"""
What users ask for as a whole, on a pretended GPU: what it gives is what the CPU gives.

`make test` runs the verbs; tests/pipeline/test_two_gpus.py takes a model on two cards.
"""

import json
import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from pretended_subjects import CONFIGS, SETTINGS, Subject, unchanged
from transformers import AutoModelForCausalLM

from pho_service.cli import main
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.calibration import measure, plan_calibration
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.compare import ComparisonRequest, compare_over_seeds
from pho_service.pipeline.confirmation import validate_job
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import transfer_job
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.spec.configuration import Configuration, read_configuration
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.space import Preset
from pho_service.spec.steps import (
    ALLOCATIONS,
    CHOOSING,
    PERMUTATIONS,
    REPRUNINGS,
    UPDATES,
    Allocation,
    Candidate,
    Steps,
)
from pho_service.tuning.plan import SearchRequest

pytestmark = pytest.mark.thorough  # but for the verbs

CREPE = Coefficients(
    row=0.4, column=1, neighbourhood=0.8, kernel_size=5, activation_exponent=0.7,
    gradient_exponent=0.3,
)  # fmt: skip


@pytest.fixture(params=CONFIGS)
def subject(request, subject_of):
    return subject_of(request.param)


@pytest.mark.parametrize(
    ("settings", "run", "rtol"),
    [
        ({"projection_rows": 0}, {}, 1e-2),  # moments in full
        ({}, {"windows": 1, "recompute": True}, 1e-2),  # as where memory is short
        ({"mixed_precision": True}, {}, 0.5),
    ],
)
def test_calibrated_in_other_ways_the_statistics_stay_the_same(
    subject, monkeypatch, settings, run, rtol
):
    if (subject.model.stream and run) or (subject.dtype != "float32" and rtol == 0.5):
        pytest.skip("a streamed model recomputes anyway; mixed precision is for float32 models")

    def planned(*args, **kwargs):
        plan = plan_calibration(*args, **kwargs)
        return replace(plan, run=replace(plan.run, **run))

    monkeypatch.setattr("pho_service.models.calibration.plan_calibration", planned)
    settings = replace(SETTINGS, **settings)
    found = measure(subject.model, subject.text_for(settings), settings)
    expected = subject.bundle.statistics()

    for mine, theirs in zip(found.inputs, expected.inputs, strict=True):
        torch.testing.assert_close(
            mine.activation_norm, theirs.activation_norm, rtol=rtol, atol=1e-6
        )
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(found.fisher[name], fisher, rtol=rtol, atol=1e-9)


def test_perplexity_and_divergence_are_the_cpus(subject):
    windows = subject.report().windows
    on_cpu = Subject(subject.name, subject.folder, subject.texts, "cpu")
    found, expected = (measure_perplexity(each.model, windows) for each in (subject, on_cpu))

    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    if not subject.model.stream:
        reference = dense_reference(subject.model.model, windows)
        assert rate_divergence(subject.model.model, reference) == pytest.approx(0, abs=1e-5)


def combinations():
    """Each step once, at N:M and by layer, on a Llama; a few on the other kinds of model."""
    steps = [
        {"repruning": repruning, "update": update}
        for repruning, update in product(REPRUNINGS, UPDATES)
        if (update not in CHOOSING or repruning == "none")
        and (repruning, update) != ("admm", "none")
    ]
    steps += [{"allocation": Allocation(method=each, spread=0.25)} for each in ALLOCATIONS[1:]]
    few = [
        {},
        {"repruning": "swaps", "update": "obs"},
        {"repruning": "dsnot", "update": "least-squares"},
    ]
    return [
        (name, pattern, each)
        for name, pattern in product(CONFIGS, ("0.5 layer", "2:4 row"))
        for each in (steps if name == "llama" else few)
    ]


@pytest.mark.parametrize(("name", "pattern", "steps"), combinations())
def test_every_combination_of_steps_prunes_to_the_pattern_and_the_model_is_dense_again(
    subject_of, name, pattern, steps
):
    subject, parsed = subject_of(name), Pattern.parse(*pattern.split())
    exact = not parsed.group or "allocation" not in steps
    for permutation in PERMUTATIONS if parsed.group else PERMUTATIONS[:1]:
        candidate = Candidate(
            method="x", coefficients=CREPE, pattern=parsed,
            steps=Steps(permutation=permutation, **steps),
        )  # fmt: skip
        with unchanged(subject.model):
            result, sparsity = rate_pruned(
                subject.model, subject.bundle.statistics(), candidate, subject.report().windows,
                calibration=subject.text.calibration,
            )  # fmt: skip
        assert sparsity == pytest.approx(0.5, abs=1e-3 if exact else 0.05)
        assert math.isfinite(result.perplexity)


SEARCHES = [
    ("llama", "0.5", "row", {}),
    ("llama-streamed", "0.5", "layer", {}),
    ("mixtral", "0.5", "global", {}),
    ("gpt-2", "2:4", "row", {}),
    ("gpt-2", "0.5", "layer", {"objective": Objective(name="gini")}),
    ("llama-bfloat16", "0.5", "layer", {"objective": Objective(name="perplexity")}),
    ("gpt-2", "0.5", "layer", {"preset": "crepe-plus"}),
    ("llama-bfloat16", "0.5", "layer", {"preset": "best"}),
    ("mixtral", "2:4", "row", {"preset": "best"}),
]


@pytest.mark.parametrize(("name", "pattern", "scope", "changes"), SEARCHES)
def test_every_scope_pattern_and_objective_is_searched_and_confirmed(
    subject_of, name, pattern, scope, changes
):
    subject, parsed = subject_of(name), Pattern.parse(pattern, scope)
    preset = Preset.of(changes.get("preset", "score"), parsed)
    request = SearchRequest(
        pattern=parsed, steps=preset.steps, bounds=preset.bounds, trials=9, finalists=1,
        objective=changes.get("objective", Objective()),
    )  # fmt: skip
    with unchanged(subject.model):
        work = Work.of(
            subject.bundle, subject.model, subject.report("confirmation"), subject.text.calibration
        )
        run = Run(device=subject.device)
        configuration = search_job(request, work, run=run).configuration

    assert configuration.confirmation.perplexity > 1


def configuration_of(pattern, preset):
    """A configuration with a preset's steps, as a file has it."""
    parsed = Pattern.parse(pattern)
    steps = Preset.of(preset, parsed).steps
    return Configuration(
        method="crepe", coefficients=CREPE, pattern=pattern, scope="row", steps=steps
    )


def test_baselines_beside_a_configuration_random_candidates_and_another_models_configuration(
    subject,
):
    pattern = "0.5" if "bfloat16" in subject.name else "2:4"
    parsed, run = Pattern.parse(pattern), Run(device=subject.device)
    own = "wanda-permuted" if parsed.group else "owl-wanda"
    methods = ["wanda", "wanda-sequential", "ria-layer", own, "sparsegpt"]
    mine, report = configuration_of(pattern, "crepe-plus"), subject.report()
    given = Work.of(subject.bundle, calibration=subject.text.calibration)
    work = Work.of(subject.bundle, subject.model, report, subject.text.calibration)
    plan = SearchRequest(pattern=Pattern.parse("0.5", "global")).plan(subject.bundle.kernel_sizes)
    target = replace(work, report=report, confirm=subject.report("confirmation"))
    search = SearchRequest(pattern=Pattern.parse("0.5"), trials=8, finalists=1)
    request = ComparisonRequest(pattern=parsed, configurations=[("mine", mine)], methods=methods)
    with unchanged(subject.model):
        rows = compare_over_seeds(subject.model, report, request, {0: lambda: given}, run=run).rows
        validation = validate_job(work, plan, ValidationSpec(candidates=8), run=run)
        found = configuration_of("0.5", "score")
        done = transfer_job(subject.name, target, found, search=search, run=run)

    assert [row.method for row in rows] == ["dense", *methods, "mine"]
    assert all(row.memory_bytes for row in rows)
    assert len(validation.perplexity) == 8
    assert set(done.perplexities) == {"dense", "wanda", "ria", "transferred", "own"}


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_one_search_over_three_families(subject_of, over):
    subjects = [subject_of(name) for name in ("llama", "mixtral", "gpt-2")]
    request = SearchRequest(
        pattern=Pattern.parse("0.5", "global" if over == "mean" else "layer"),
        objective=Objective(over=over),
        trials=9,
    )
    bundles = {subject.name: subject.bundle for subject in subjects}
    found = search_job(request, Work(bundles=bundles), run=Run(device="cuda"))

    assert set(found.configuration.objective["relative_to_ria"]) == set(bundles)


@pytest.mark.parametrize(("pattern", "preset"), [("0.5", "best"), ("2:4", "crepe-plus")])
def test_a_model_is_pruned_for_good_and_saved_and_what_was_saved_passes_its_check(
    subject, pattern, preset, tmp_path
):
    spoiled, calibration = replace(subject), subject.text.calibration  # it is left pruned
    configuration = configuration_of(pattern, preset)
    done = prune_job(
        Work.of(subject.bundle, spoiled.model, calibration=calibration),
        configuration,
        tmp_path / "out",
    )
    checks = check_folder(tmp_path / "out", original=subject.model)

    assert done.sparsity == pytest.approx(0.5, abs=1e-3)
    assert [check.name for check in checks if not check.passed] == []


SMALL = (
    "--samples", 4, "--context-length", 24, "--rows-per-layer", 8, "--projection-rows", 16,
    "--kernel-sizes", "3,5",
)  # fmt: skip


def pho(*words):
    result = CliRunner().invoke(main, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, (words[0], result.output)
    assert json.loads(result.stdout)


@pytest.mark.thorough(False)
def test_every_verb_that_runs_a_model_as_a_user_calls_it_some_of_them_on_the_second_card(
    subject_of, cards, tmp_path, monkeypatch, request
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

    pho("calibrate", model, *calibration, "--out", "b.safetensors", *second)
    pho("search", model, *calibration, *confirm, "--preset", "score",
        "--pattern", "0.5", "--scope", "global",
        "--trials", 7, "--finalists", 1, "--study", study, *second)  # fmt: skip
    assert cards[1].counts.launches > used
    pho("evaluate", model, "--text", texts["report"], "--context-length", 24, "--max-windows", 2)
    pho("compare", model, *calibration, *report, "--pattern", "0.5", "--config", "config.json",
        "--method", "wanda")  # fmt: skip
    pho("prune", model, "--config", "config.json", *calibration, "--out", "out")
    pho("prune", model, "--check", "out")
    trains = [("kept", second), ("norms", ()), ("lora", ("--device-map", "auto"))]
    for train, where in trains[: 3 if request.config.getoption("--thorough") else 1]:
        used = cards[1].counts.launches
        pho("recover", "out", "--teacher", model, "--text", texts["report"], "--tokens", 240,
            "--context-length", 24, "--train", train, "--out", train, *where)  # fmt: skip
        pho("prune", model, "--check", train)
        assert (cards[1].counts.launches > used) is bool(where)


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
    headings = re.findall(r"^Step (\d) of 6: (.*) \((.*)\)$", result.stderr, re.MULTILINE)
    assert [number for number, _, _ in headings] == [*"123456"]
    assert headings[2][1] == "search with crepe-plus"
    assert re.search(
        r"^Half of the weights are removed\. Perplexity: \S+ dense, \S+ with best \(.* ± .*%\), "
        r"\S+ with Wanda by the norms of the dense model \(.* ± .*%\)\.$",
        result.stdout, re.MULTILINE,
    )  # fmt: skip
    (line,) = re.findall(r"AutoModelForCausalLM\.from_pretrained\('(.*)'\)", result.stdout)
    assert len(AutoModelForCausalLM.from_pretrained(line).model.layers) == 2
    assert "Sample output, dense and pruned" in result.stdout
    assert (tmp_path / "demo" / "pruned" / "pruning.json").is_file()
    assert read_configuration("demo/config.json").perplexities is not None
