"""Jobs with zero-shot tasks, as the API, the page and the report show them, and what is refused."""

import uuid

import pytest

from pho_service.api import jobs
from pho_service.api.answers import Job
from pho_service.cli.remote import show_after
from pho_service.host import tasks as task_files
from pho_service.spec.configuration import Configuration, published
from storage.claims import JobResult
from storage.records import NewStage, StageKind

HOW = {"limit": None, "bos": True, "versions": {"lm-eval": "0.4.13"}, "seconds": 1.5}


def score(metric, value):
    return {
        "task": "words", "metric": metric, "value": value, "stderr": 0.125, "examples": 8,
        "shots": 0, "version": "3.0",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def harness(tmp_path, monkeypatch):
    """A harness that has one task, and not 14,000 files."""
    folder = tmp_path / "harness"
    folder.mkdir()
    (folder / "words.yaml").write_text("task: words\n")
    monkeypatch.setattr(task_files, "harness_folder", lambda: folder)
    return folder


def test_once_both_models_are_measured_all_that_shows_a_job_has_the_scores(
    client, submit, hand, capsys
):
    job_id = submit(tasks=["words"])["id"]
    hand.to_confirm(job_id)
    finish = hand.take(job_id, StageKind.FINISH)
    best = published("wanda", "0.5").model_dump(mode="json")
    two = [NewStage(kind=StageKind.TASKS, number=number) for number in range(2)]
    hand.store.complete(finish, {}, job_result=JobResult(best=best, warnings=[]), then=two)
    states = []
    for number, value in enumerate((0.75, 0.5)):
        states.append(client.get(f"/v1/jobs/{job_id}").json())
        scores = [score("acc", value), score("acc_norm", value + 0.125)]
        claim = hand.take(job_id, StageKind.TASKS, number)
        hand.store.complete(claim, {"scores": scores, **HOW}, ended=True)
    job = client.get(f"/v1/jobs/{job_id}").json()
    found = Configuration.model_validate(client.get(f"/v1/jobs/{job_id}/best").json())
    rows = [
        ("words", "acc", "75.00 ± 12.50", "50.00 ± 12.50", "-25.00", "8"),
        ("words", "acc_norm", "87.50 ± 12.50", "62.50 ± 12.50", "-25.00", "8"),
    ]
    show_after(Job.model_validate(job))
    shown = capsys.readouterr().out

    assert [(each["state"], each["tasks"]) for each in states] == [("running", None)] * 2
    assert job["state"] == "succeeded"
    assert job["tasks"]["pruned"] == [score("acc", 0.5), score("acc_norm", 0.625)]
    assert found.tasks is not None
    assert found.tasks.rows() == rows
    assert found.model_copy(update={"tasks": None}).model_dump(mode="json") == best
    (entry,) = client.get("/v1/configurations?pattern=0.5").json()["configurations"]
    assert client.get(f"/v1/configurations/{entry['id']}").json() == best
    for text in (client.get(f"/jobs/{job_id}").text, client.get(f"/v1/jobs/{job_id}/report").text):
        assert all(f">{cell}</t" in text for row in rows for cell in row)
    assert all(cell in shown for row in rows for cell in row)


def test_a_job_says_that_nobody_measures_tasks(client, submit, hand):
    told = "pip install 'lm-eval<0.5,>=0.4.13'"
    job, other = submit(tasks=["words"]), submit()
    hand.store.enter_worker(uuid.uuid4(), name="w", device="cpu", kinds=[StageKind.FINISH])
    page = client.get(f"/jobs/{job['id']}").text
    alone = client.get(f"/v1/jobs/{job['id']}").json()["warnings"]
    hand.store.enter_worker(hand.worker_id, name="v", device="cpu", kinds=[*StageKind])

    assert [told in " ".join(each["warnings"]) for each in (job, other)] == [True, False]
    assert told in " ".join(alone)
    assert "No worker of this service measures tasks" in page
    assert client.get(f"/v1/jobs/{job['id']}").json()["warnings"] == []


def test_what_cannot_be_measured_is_refused_at_its_field_with_the_way_out(client, refusal):
    for changes, pointer, told in (
        ({"tasks": ["word"]}, "/tasks", "'word' is not one of lm-eval"),
        ({"tasks": ["word"]}, "/tasks", "Did you mean words?"),
        ({"tasks_limit": 5}, "/tasks_limit", "none is named: give tasks"),
        ({"tasks": ["words"], "tasks_dir": "x"}, "/tasks_dir", "PHO_TASK_ROOTS"),
        ({"tasks": ["words"], "more_models": ["org/b"]}, "/tasks", "pho evaluate FOLDER --tasks"),
    ):
        answer = client.post("/v1/jobs", json={"model": "org/a", "pattern": "0.5", **changes})
        (error,) = refusal(answer, 422)["errors"]

        assert error["pointer"] == pointer
        assert told in error["detail"]


def test_folder(client_of, tmp_path, monkeypatch):
    """A folder below PHO_TASK_ROOTS may be named, and its tasks with it; none outside of them."""
    (tmp_path / "tasks" / "mine").mkdir(parents=True)
    (tmp_path / "tasks" / "mine" / "a.yaml").write_text("tag: [ours]\ntask: mine\n")
    client = client_of(task_roots=(tmp_path / "tasks",))

    def asked(name, folder):
        document = {"model": "org/a", "pattern": "0.5", "tasks": [name], "tasks_dir": folder}
        answer = client.post("/v1/jobs", json=document)
        return answer.status_code, answer.text

    assert [asked(name, "mine")[0] for name in ("mine", "ours", "words")] == [202] * 3
    status, text = asked("mine", "../harness")
    assert status == 422
    assert "does not lie below the folders of PHO_TASK_ROOTS" in text
    assert str(tmp_path) not in text
    status, text = asked("min", "mine")
    assert status == 422
    assert "Did you mean mine?" in text
    monkeypatch.setattr(task_files, "harness_folder", lambda: None)
    assert asked("min", "mine")[0] == 202


def test_blocks_of_a_deleted_job(client, submit, hand, monkeypatch):
    job_id = submit(tasks=["words"])["id"]
    claim = hand.take(job_id, StageKind.CALIBRATE)
    hand.store.complete(claim, {}, then=[NewStage(kind=StageKind.TASKS, number=1)])
    client.post(f"/v1/jobs/{job_id}:cancel")
    service = client.app.state.service
    removed = []
    monkeypatch.setattr(service.pruned, "remove", removed.append)
    jobs.forget(service, uuid.UUID(job_id))

    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert removed == [uuid.UUID(job_id)]
