"""Zero-shot tasks whose right answers are known by construction, dense and pruned."""

import json

import pytest
import torch
from click.testing import CliRunner
from pretended_task import QUESTIONS, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

import pho_service as pho
from pho_service.cli import main
from pho_service.errors import InvalidInput, TextError
from pho_service.interface.inputs import opened
from pho_service.models import loading
from pho_service.models import tasks as task_files
from pho_service.models.tasks import load_tasks
from pho_service.pipeline.tasks import TaskModel, measure_tasks
from pho_service.progress import silent
from pho_service.spec.document import number

pytest.importorskip("lm_eval", reason="it is not installed: see extra eval")

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def task_folder(tmp_path):
    """Writes the task beside its data, which are named relatively."""

    def write(answers, **more):
        folder = tmp_path / "tasks"
        write_task(folder / "inner", answers, **more)
        return folder

    return write


def plain(model, tokenizer, bos):
    """The log-likelihood of each answer, token after token, in float64."""
    exact = AutoModelForCausalLM.from_config(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    found = []
    for question, choices in QUESTIONS.items():
        found.append([])
        for choice in choices:
            start = [1] if bos else []
            start += tokenizer(question, add_special_tokens=False).input_ids
            log = 0.0
            for token in tokenizer(choice, add_special_tokens=False).input_ids:
                with torch.no_grad():
                    logits = exact(torch.tensor([start])).logits[0, -1]
                log += float(logits.log_softmax(dim=-1)[token])
                start.append(token)
            found[-1].append(log)
    return found


def best(logs, *, by_length=False):
    """The answers that these likelihoods choose."""
    chosen = []
    for likelihoods, choices in zip(logs, QUESTIONS.values(), strict=True):
        lengths = [len(choice) if by_length else 1 for choice in choices]
        rated = [log / length for log, length in zip(likelihoods, lengths, strict=True)]
        chosen.append(rated.index(max(rated)))
    return chosen


def share(chosen, right):
    """Of right answers."""
    return sum(a == b for a, b in zip(chosen, right, strict=True)) / len(right)


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
def test_dense_and_pruned_score_what_a_plain_loop_over_log_likelihoods_says_bos_where_it_belongs(
    tiny_llama, bos, request, task_folder,
    texts, configuration,
):  # fmt: skip
    folder = request.getfixturevalue("bos_folder" if bos else "model_folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logs = plain(tiny_llama, tokenizer, bos)
    right = best(logs)
    right[-2:] = [1 - min(answer, 1) for answer in right[-2:]]  # the last two it has wrong
    tasks = load_tasks(["words"], task_folder(right))
    requests = [
        type("Request", (), {"args": (question, f" {choice}")})
        for question, choices in QUESTIONS.items()
        for choice in choices
    ]
    model = opened(tiny_llama, tokenizer)
    rated = TaskModel(model, "auto", silent).loglikelihood(requests)
    dense = measure_tasks(model, tasks)
    bundle = pho.calibrate(
        tiny_llama, tokenizer, texts["calibration"], samples=6, context_length=32, kernel_sizes=(3,)
    )
    pho.prune(tiny_llama, configuration, bundle)
    pruned = measure_tasks(opened(tiny_llama, tokenizer), tasks)
    again = plain(tiny_llama, tokenizer, bos)

    flat = [log for likelihoods in logs for log in likelihoods]
    assert [log for log, _ in rated] == pytest.approx(flat, abs=1e-5)
    assert [(each.metric, each.examples, each.version) for each in dense] == [
        ("acc", 8, "3.0"), ("acc_norm", 8, "3.0"),
    ]  # fmt: skip
    assert dense[0].value == 0.75
    assert dense[0].stderr == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    assert dense[1].value == share(best(logs, by_length=True), right)
    assert again != logs
    assert pruned[0].value == share(best(again), right)
    assert pruned[1].value == share(best(again, by_length=True), right)


def test_verb(model_folder, texts, task_folder):
    """`pho evaluate --tasks` prints what the API says; a streamed model scores the same."""
    folder = task_folder([0] * len(QUESTIONS))

    def printed(*words):
        given = ["evaluate", model_folder, "--tasks", "words", "--tasks-dir", folder, *words]
        result = CliRunner().invoke(main, [*map(str, given), "--device", "cpu"])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    found = pho.evaluate(
        model, AutoTokenizer.from_pretrained(model_folder), texts["report"], tasks="words",
        tasks_dir=folder, limit=4, context_length=32, max_windows=2,
    )  # fmt: skip
    document = json.loads(
        printed(
            "--limit", 4, "--text", texts["report"], "--context-length", 32, "--max-windows", 2,
            "--json",
        )
    )  # fmt: skip
    streamed = json.loads(printed("--limit", 4, "--stream", "--json"))

    assert [vars(score) for score in found.tasks] == document["tasks"] == streamed["tasks"]
    assert found.perplexity == document["perplexity"]
    assert "perplexity" not in streamed
    assert document["tasks"][0]["examples"] == document["limit"] == 4
    assert document["versions"].keys() >= {"lm-eval"}
    assert "acc_norm" in repr(found)


def test_compare(model_folder, texts, task_folder):
    """`pho compare --tasks` has what each pruned model scores, as the API says it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    folder = task_folder(best(plain(model, tokenizer, bos=False)))
    found = pho.compare(
        model, tokenizer, "0.5", texts=texts["calibration"], report=texts["report"], samples=6,
        context_length=32, methods=["wanda"], tasks="words", tasks_dir=folder,
    )  # fmt: skip
    words = [
        "compare", model_folder, "--pattern", "0.5", "--text", texts["calibration"], "--samples", 6,
        "--report-text", texts["report"], "--context-length", 32, "--method", "wanda",
        "--device", "cpu", "--tasks", "words", "--tasks-dir", folder,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [*map(str, words)])
    dense, wanda = found.rows

    assert dense.extra["words acc"] == 1
    assert dense.extra["words acc stderr"] == 0
    assert wanda.extra["words acc"] < 1
    assert result.exit_code == 0, result.stderr
    for row in found.rows:
        shown = f"{number(row.extra['words acc'])} ± {number(row.extra['words acc stderr'])}"
        assert shown in result.stdout
        assert shown in repr(found)


def test_a_context_that_is_too_long_loses_its_beginning_a_long_text_is_cut_each_token_rated_once(
    tiny_llama, tokenizer, monkeypatch
):
    monkeypatch.setattr(tiny_llama.config, "max_position_embeddings", 4)
    model = TaskModel(opened(tiny_llama, tokenizer), "auto", silent)

    def asked(*args):
        return [type("Request", (), {"args": args})]

    ((long, _),) = model.loglikelihood(asked("the a model weight row column", " layer score"))
    ((short, _),) = model.loglikelihood(asked("weight row column", " layer score"))
    (whole,) = model.loglikelihood_rolling(asked("the a model weight row column"))
    ((begin, _),) = model.loglikelihood(asked("", "the a model weight"))
    ((end, _),) = model.loglikelihood(asked("a model weight", " row column"))

    assert long == short
    assert whole == pytest.approx(begin + end, abs=1e-5)


def test_what_is_not_there_wants_the_network_or_a_text_that_is_written_in_words_at_once(
    task_folder, monkeypatch, tiny_llama
):
    folder = task_folder([0] * len(QUESTIONS))
    monkeypatch.setattr(
        task_files, "harness_folder", lambda: folder
    )  # the harness has 14,000 files

    def refused(names, **more):
        task_folder([0] * len(QUESTIONS), **more)
        with pytest.raises((InvalidInput, TextError)) as told:
            pho.evaluate(tiny_llama, None, tasks=names, tasks_dir=folder)
        return str(told.value)

    monkeypatch.setattr(loading, "hub_is_away", lambda: True)
    assert "Did you mean words?" in refused("word")
    assert "needs generated text" in refused("words", output_type="generate_until")
    files = {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
    assert "words cannot be read: Unable to find" in refused("words", **files)
    away = refused("words", dataset_path="org/name", dataset_kwargs={})
    assert "cannot be read: Couldn't reach 'org/name'" in away
    assert "with tasks_dir (" in away
    assert "cannot be loaded" in refused("words", doc_to_text="{{ question ")
    assert "words is named twice" in refused("words,words")
    with pytest.raises(InvalidInput, match="nothing to measure"):
        pho.evaluate(tiny_llama, None)
    with pytest.raises(InvalidInput, match=r"folder for tasks .* does not exist"):
        pho.evaluate(tiny_llama, None, tasks="words", tasks_dir="gone")
