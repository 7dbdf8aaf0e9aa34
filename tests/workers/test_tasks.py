"""The stages that measure tasks: what `pho evaluate --tasks` says, whatever happens."""

import json

import pytest
import torch
from click.testing import CliRunner
from pretended_task import QUESTIONS, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from pho_service.cli import main
from pho_service.errors import ChangedInput, InvalidInput
from pho_service.models import tasks as task_files
from pho_service.models.scratch import Memo
from pho_service.pipeline.check import check_folder
from pho_service.shown.tables import tasks_table
from pho_service.spec.configuration import Configuration
from storage.records import JobState, StageKind
from workers.__main__ import chosen_kinds

pytest.importorskip("lm_eval", reason="it is not installed: see extra eval")

pytestmark = pytest.mark.usefixtures("datasets_cache")


def likeliest(folder):
    """The answers that a model finds likeliest, by a plain loop over its log-likelihoods."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question, choices in QUESTIONS.items():
        logs = []
        for choice in choices:
            start = tokenizer(question, add_special_tokens=False).input_ids
            answer = tokenizer(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
            logs.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
        found.append(logs.index(max(logs)))
    return found


def evaluated(folder, tasks):
    """What `pho evaluate --tasks` says of a folder."""
    words = ["evaluate", folder, "--tasks", "words", "--tasks-dir", tasks, "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["tasks"]
    assert isinstance(found, list)
    return found


def _killed(*_, **__):
    raise SystemExit


def test_as_pho_evaluate(hand, small, monkeypatch):
    """
    Both models score what `pho evaluate` says of their folders, the dense one what a plain loop
    says; so do the configuration, the pruned folder and its card. A killed worker's successor
    measures the same, and trains no block again.
    """
    folder = hand.folder / "model"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    answers = likeliest(folder)
    answers[-2:] = [1 - min(answer, 1) for answer in answers[-2:]]  # the last two it has wrong
    write_task(hand.folder / "tasks", answers)
    spec = small(
        tasks=["words"], tasks_dir="./", prune=True, preset="best", confirm=None, pattern="0.9"
    )  # fmt: skip
    job = hand.until(hand.submit(spec), StageKind.TASKS)
    hand.step(job)
    with monkeypatch.context() as killed:
        killed.setattr(hand.store, "complete", _killed)
        with pytest.raises(SystemExit):
            hand.step(job)
    trained = [*hand.bundles.glob(f"pruned/{job.id}/.*.blocks/*.safetensors")]
    hand.inputs = hand.new_inputs()
    monkeypatch.setattr(Memo, "keep", _killed)
    job = hand.until(job, None)
    (pruned,) = (hand.bundles / "pruned" / str(job.id)).iterdir()
    found = Configuration.model_validate(job.with_tasks(job.best))

    assert job.state is JobState.SUCCEEDED
    assert trained
    assert [stage.attempt for stage in job.of_kind(StageKind.TASKS)] == [1, 2]
    assert job.tasks["dense"] == evaluated(folder, hand.folder / "tasks")
    assert job.tasks["pruned"] == evaluated(pruned, hand.folder / "tasks")
    assert found.tasks.dense[0].value == 0.75
    assert found.tasks.dense[0].stderr == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    assert job.tasks["pruned"] != job.tasks["dense"]
    recipe = json.loads((pruned / "pruning.json").read_text())
    assert recipe["configuration"]["tasks"] == job.tasks
    assert tasks_table(found.tasks).markdown() in (pruned / "README.md").read_text()


@pytest.mark.thorough
def test_a_recovered_model_is_what_the_tasks_are_measured_on(hand, small):
    write_task(hand.folder / "tasks", [0] * len(QUESTIONS))
    spec = small(
        tasks=["words"], tasks_dir="./", prune=True, pattern="0.9",
        recovery={"tokens": 640, "rate": 2e-3},
    )  # fmt: skip
    job = hand.until(hand.submit(spec), StageKind.PRUNE)
    (written,) = (p for p in (hand.bundles / "pruned" / str(job.id)).iterdir()
                  if "recovery" in json.loads((p / "pruning.json").read_text()))  # fmt: skip
    before = (written / "model.safetensors").read_bytes()
    job = hand.until(job, None)
    (folder,) = (hand.bundles / "pruned" / str(job.id)).iterdir()
    recipe = json.loads((folder / "pruning.json").read_text())
    found = Configuration.model_validate(job.with_tasks(job.best))

    assert job.pruning.result["recovery"]["kept"]
    assert job.tasks["pruned"] == evaluated(folder, hand.folder / "tasks")
    assert (folder / "model.safetensors").read_bytes() == before
    assert recipe["configuration"]["tasks"] == job.tasks
    assert recipe["recovery"] == json.loads((written / "pruning.json").read_text())["recovery"]
    assert tasks_table(found.tasks).markdown() in (folder / "README.md").read_text()
    assert all(check.passed for check in check_folder(folder, original=None))


def test_target(hand, small):
    """The answer of a target is measured; the examples must be the same for both models."""
    write_task(hand.folder / "tasks", [0] * len(QUESTIONS))
    target = {"perplexity_rise": 9.0, "lowest": 0.5, "highest": 0.51}
    spec = small(pattern=None, target=target, tasks=["words"], tasks_dir="./", tasks_limit=4)
    job = hand.until(hand.submit(spec), StageKind.TASKS)
    hand.step(job)
    write_task(hand.folder / "tasks", [1] * len(QUESTIONS))
    with pytest.raises(ChangedInput, match="examples of words have changed"):
        hand.step(job)
    write_task(hand.folder / "tasks", [0] * len(QUESTIONS))
    hand.store.ask(job.id, "resume")
    job = hand.until(job, None)

    assert job.state is JobState.SUCCEEDED
    assert [score["examples"] for score in job.tasks["pruned"]] == [4, 4]
    assert job.with_tasks(job.best)["tasks"] == job.tasks


def test_gone(hand, small, monkeypatch):
    """A task that is not there fails the job before its search, in words; so does a wrong hub."""
    write_task(hand.folder / "tasks", [0] * len(QUESTIONS))
    monkeypatch.setattr(task_files, "harness_folder", lambda: hand.folder / "tasks")
    job = hand.submit(small(tasks=["word"], tasks_dir="./"))
    with pytest.raises(InvalidInput, match=r"'word' is not one of .* Did you mean words\?"):
        hand.step(job)
    text = (hand.folder / "tasks" / "words.yaml").read_text()
    (hand.folder / "tasks" / "words.yaml").write_text(text.replace(": json", ": org/words"))
    with pytest.raises(InvalidInput, match="data set 'org/words' is not allowed here"):
        hand.step(hand.submit(small(tasks=["words"], tasks_dir="./")))

    assert hand.store.get(job.id).error["message"].startswith("the task 'word'")
    assert hand.store.get(job.id).of_kind(StageKind.SEARCH) == []


def test_without_the_extra(monkeypatch):
    """A worker without the harness takes every other stage, and refuses to be told to take this."""
    assert chosen_kinds(None) == tuple(StageKind)
    monkeypatch.setattr("workers.__main__.harness_folder", lambda: None)

    assert set(StageKind) - {*chosen_kinds(None)} == {StageKind.TASKS}
    assert chosen_kinds("search, prune") == (StageKind.SEARCH, StageKind.PRUNE)
    with pytest.raises(InvalidInput, match=r"pip install .lm-eval"):
        chosen_kinds("tasks")
