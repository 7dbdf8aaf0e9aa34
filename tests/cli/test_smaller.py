"""`pho prune --pattern structured:20%`: an ordinary, smaller model, which may be recovered."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pretended_user import answer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pho_service.pipeline import faster
from pho_service.pipeline.bench import Bench, Side
from pho_service.pipeline.minutes import Clock

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


@pytest.fixture
def cut(pho, made_model, texts):
    """The folder ``cut`` and what the verb said of it."""
    words = ("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"])
    return answer(pho(*words, *SMALL, "--out", "cut", "--json"))


def checks(result):
    """Whether each check passed, by name."""
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


def test_the_best_of_all_cuts_is_a_model_that_transformers_loads(pho, cut, made_model, texts):
    configuration = cut["configuration"]
    good, finalists = configuration["perplexities"], configuration["finalists"]
    kept = configuration["cut"]["structure"]["neurons"]
    whole, smaller = (AutoModelForCausalLM.from_pretrained(f) for f in (made_model, "cut"))
    evaluated = answer(pho("evaluate", "cut", "--text", texts["report"], "--context-length", 32,
                           "--json"))  # fmt: skip

    assert len(finalists) == 2  # with all query heads, and with fewer
    assert [f["perplexity"] for f in finalists] == sorted(f["perplexity"] for f in finalists)
    assert finalists[0]["perplexity"] == good["pruned"]
    assert 0.1 < configuration["cut"]["removed"] < 0.3
    assert smaller.num_parameters() < whole.num_parameters()
    assert smaller.config.intermediate_size == (kept or whole.config.intermediate_size)
    assert evaluated["perplexity"] < 2 * good["dense"]
    assert not [*Path().glob(".cut*")]  # what an interrupted run would go on with
    card = Path("cut/README.md").read_text()
    assert "as a smaller model" in card
    assert "structured-pruning" in card


def test_the_check_slices_the_dense_model(pho, cut, made_model):
    good = pho("prune", made_model, "--check", "cut", "--json")
    structure = cut["structure"]
    block = next(iter(structure["neurons"] or structure["query_heads"]))
    weights = load_file("cut/model.safetensors")
    name = next(n for n in weights if n.startswith(f"{block}.") and n.endswith("up_proj.weight"))
    weights[name][0] += 1
    shutil.copytree("cut", "changed")
    save_file(weights, "changed/model.safetensors", metadata={"format": "pt"})
    changed = pho("prune", made_model, "--check", "changed", "--json")
    recipe = json.loads(Path("cut/pruning.json").read_text())
    recipe["structure"]["layers"][0] = 1
    Path("cut/pruning.json").write_text(json.dumps(recipe))
    edited = pho("prune", "--check", "cut", "--json")

    assert good.exit_code == 0
    assert all(checks(good).values())
    assert "structure" in checks(good)
    assert changed.exit_code == edited.exit_code == 1
    assert not checks(changed)["weight hashes"]
    assert not checks(changed)["structure"]
    assert not checks(edited)["structure"]


def test_it_is_recovered_towards_the_dense_model_and_stays_cut(pho, cut, made_model, texts):
    words = ("recover", "cut", "--teacher", made_model, "--text", texts["report"])
    recovered = answer(
        pho(*words, "--context-length", 32, "--tokens", 640, "--rate", 2e-3, "--out", "out",
            "--json")
    )  # fmt: skip
    recipe = json.loads(Path("out/pruning.json").read_text())
    checked = pho("prune", made_model, "--check", "out", "--json")

    assert recovered["after"] < recovered["before"]
    assert recipe["structure"] == cut["structure"]
    assert checked.exit_code == 0
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("cut", "out"))
    assert {n: w.shape for n, w in before.items()} == {n: w.shape for n, w in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_search_gives_a_configuration_that_prunes_with_the_same_bytes(
    pho, cut, made_model, texts
):
    """`pho search`, then `pho prune --config`: the folder that `pho prune --pattern` writes."""
    text = ("--text", texts["calibration"])
    words = ("--pattern", "structured:20%", *text, *SMALL, "--finalists", 3, "--confirm-windows", 8)
    found = pho("search", made_model, *words, "--out", "config.json")
    pruned = pho("prune", made_model, "--config", "config.json", *text, *SMALL, "--out", "again")
    configuration = json.loads(Path("config.json").read_text())
    shown = pho("report", configuration["search"]["study"], "--study", "sqlite:///study.db",
                "--config", "config.json", "--out", "report.html")  # fmt: skip

    assert (found.exit_code, pruned.exit_code) == (0, 0), (found.output, pruned.output)
    assert "of their weights are gone" in pruned.stdout
    folders = [Path(folder, "model.safetensors").read_bytes() for folder in ("cut", "again")]
    assert folders[0] == folders[1]
    assert configuration["cut"] == cut["configuration"]["cut"]
    assert shown.exit_code == 0, shown.output
    assert "Splits of the share" in Path("report.html").read_text()
    report = ("--report-text", texts["report"])
    for words in (
        ("transfer", "config.json", made_model, *report),
        ("compare", made_model, "--pattern", 0.5, "--config", "config.json", *text, *report),
    ):
        refused = pho(*words, *SMALL)
        assert "`pho prune MODEL --config` does that" in " ".join(refused.stderr.split())


@pytest.mark.thorough
def test_an_interrupted_run_goes_on(pho, cut, made_model, texts, monkeypatch):
    """It was stopped while the second of two cuts was measured: the first is not made again."""
    from pho_service.pipeline import cuts

    made, cut_copy = [], cuts.cut_copy

    def stopping(work, structure, **more):
        made.append(structure)
        if len(made) == 2:
            raise KeyboardInterrupt
        return cut_copy(work, structure, **more)

    monkeypatch.setattr(cuts, "cut_copy", stopping)
    words = ("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"],
             *SMALL, "--out", "again")  # fmt: skip
    stopped = pho(*words)
    ended = pho(*words)

    assert stopped.exit_code != 0
    assert ended.exit_code == 0
    assert len(made) == 3
    assert made[2] == made[1] != made[0]
    folders = [Path(folder, "model.safetensors").read_bytes() for folder in (cut["out"], "again")]
    assert folders[0] == folders[1]


def test_a_person_sees_each_cut_in_a_row_and_what_to_do_next(pho, made_model, texts):
    ran = pho("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"],
              *SMALL, "--out", "cut")  # fmt: skip

    assert "neurons" in ran.stdout
    assert "Structure(" not in ran.stdout + ran.stderr
    assert f"`pho recover cut --teacher {made_model}`" in " ".join(ran.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pattern", "structured:0"), "is not a share of the blocks' weights"),
        (("--pattern", "structured:99.9%"), "comes near a share of 0.999"),
        (("--pattern", "structured:20%", "--method", "wanda"), "--method says nothing"),
        (("--pattern", "structured:20%", "--scope", "row"), "--scope says nothing"),
        (("--pattern", "structured:20%", "--samples", 10_000), "has no windows left to confirm on"),
    ],
)
def test_refused_and_nothing_is_written(pho, made_model, texts, words, message):
    small = ("--context-length", 32, "--kernel-sizes", "3,5", "--samples", 2)
    ran = pho("prune", made_model, "--text", texts["calibration"], *small, *words, "--out", "cut")

    assert ran.exit_code in (1, 2)
    assert message in " ".join(ran.stderr.split())
    assert not Path("cut").exists()


def test_a_share_of_the_file_cuts_so_much_of_it(pho, made_model, texts):
    words = ("prune", made_model, "--smaller", "10%", "--text", texts["calibration"], *SMALL)
    result = pho(*words, "--out", "cut")
    whole, smaller = (
        AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        for folder in (made_model, "cut")
    )

    assert result.exit_code == 0, result.output
    assert "smaller:10% cuts " in result.stderr
    assert "% of the weights of its blocks" in result.stderr
    assert 0.05 < 1 - smaller / whole < 0.15


def test_a_share_of_the_file_is_not_given_beside_a_pattern(pho, made_model):
    result = pho("prune", made_model, "--smaller", "10%", "--pattern", "2:4", "--out", "cut")

    assert result.exit_code != 0
    assert "--pattern 2:4 and --smaller 10% each say what is cut. Give one." in result.stderr


@pytest.fixture
def machine(monkeypatch):
    """
    A machine on which a third of the time goes into the embedding and the rest into the blocks'
    weights, as evenly as ``noise`` lets it; it remembers what it has measured.
    """
    seen = []

    def bench(models, settings, **_):
        whole, smaller = (
            sum(
                p.numel()
                for n, p in AutoModelForCausalLM.from_pretrained(name).named_parameters()
                if p.dim() == 2 and "layers" in n
            )
            for name in models
        )
        seen.append(1 - smaller / whole)
        sides = [Side(name=name, bytes=1) for name in models]
        for turn in range(settings.rounds):
            for side, share in zip(sides, (0, seen[-1]), strict=True):
                seconds = 1 - share * 2 / 3
                side.decode_s.append(seconds * bench.noise ** (turn % 3 - 1 if share else 0))
                side.prefill_s.append(seconds)
        return Bench(sides=sides, settings=settings, conditions=["a machine of this test"])

    bench.noise, bench.seen = 1.01, seen
    monkeypatch.setattr(faster, "bench", bench)
    return bench


def test_a_speed_cuts_so_much_that_it_is_reached(pho, made_model, texts, machine):
    words = ("prune", made_model, "--faster", "1.15x", "--text", texts["calibration"], *SMALL)
    result = pho(*words, "--out", "cut")
    told = " ".join(result.stderr.split())
    share = 1 - 1 / 1.15  # of the time, two thirds of which the blocks take

    assert result.exit_code == 0, result.output
    assert "of its blocks' weights, the model writes 1." in told
    assert "so structured:" in told
    assert len(machine.seen) == 2  # a trial and the result
    assert 1.5 * share <= machine.seen[1] < 1.5 * share + 0.05
    assert "In torch it writes 1.1" in told
    assert "was asked for" not in told


def test_what_was_measured_for_a_speed_outlives_an_interruption(
    pho, made_model, texts, machine, monkeypatch
):
    words = ("prune", made_model, "--faster", "1.15x", "--text", texts["calibration"], *SMALL,
             "--out", "cut")  # fmt: skip
    with monkeypatch.context() as interrupted:
        interrupted.setattr("pho_service.pipeline.search.search_job", _interrupt)
        first = pho(*words)
    again = pho(*words)

    assert first.exit_code != 0
    assert again.exit_code == 0, again.output
    assert "so structured:" in again.stderr
    assert len(machine.seen) == 2


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_speed_is_not_invented_on_a_busy_machine(pho, made_model, texts, machine):
    machine.noise = 1.3
    result = pho("prune", made_model, "--faster", "1.15x", "--text", texts["calibration"], *SMALL,
                 "--out", "cut")  # fmt: skip
    told = " ".join(result.stderr.split())

    assert result.exit_code != 0
    assert "what faster:1.15x takes cannot be told on this machine now" in told
    assert "in 9 rounds says too little" in told
    assert not Path("cut").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--faster", "3x"), "faster:3x takes more than half of the blocks' weights"),
        (("--faster", "0.9x"), "pattern 'faster:0.9x' is no number of times above 1"),
        (("--faster", "quick"), "pattern 'faster:quick' is no number of times above 1"),
        (("--faster", "1.2x", "--smaller", "10%"), "--smaller 10% and --faster 1.2x each say"),
        (("--faster", "1.2x", "--type", "q8_0"), "--type q8_0: only for --runtime llama.cpp"),
        (("--smaller", "10%", "--runtime", "torch"), "--runtime: where --faster 1.2x is measured"),
        (("--faster", "1.2x", "--method", "wanda"), "--faster 1.2x cuts neurons and heads"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_speed_that_cannot_be_had_is_refused(pho, made_model, texts, words, message):
    result = pho("prune", made_model, *words, "--text", texts["calibration"], *SMALL,
                 "--out", "cut")  # fmt: skip

    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
    assert not Path("cut").exists()


@pytest.mark.thorough
def test_what_the_minutes_leave_recovers_a_cut(pho, made_model, texts, monkeypatch):
    words = ("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"],
             "--kernel-sizes", "3,5", "--minutes", "0.3", "--json")  # fmt: skip
    monkeypatch.setattr(Clock, "recovery_s", lambda _: 3.0)
    recovered = answer(pho(*words, "--out", "recovered"))["recovery"]
    plain = answer(pho(*words, "--out", "plain", "--no-recovery"))

    assert recovered["tokens"] > 0
    assert {"dense", "pruned", "recovered"} == recovered["perplexities"].keys()
    assert json.loads(Path("recovered/pruning.json").read_text())["recovery"]["tokens"] > 0
    assert "recovery" not in plain
    assert not [path for path in Path().glob(".*") if path.suffix in (".search", ".recovery")]


@pytest.mark.thorough
def test_an_interrupted_recovery_of_a_cut_goes_on_with_its_minutes(resumed, made_model, texts):
    words = ("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"],
             "--kernel-sizes", "3,5", "--minutes", "0.3", "--out", "again", "--json")  # fmt: skip
    again = resumed(*words)

    assert "--recover-minutes 0.05" in again.stderr
    assert json.loads(again.stdout)["recovery"]["tokens"] > 0
