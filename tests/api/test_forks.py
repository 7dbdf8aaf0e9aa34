"""``:fork``: a job like another one, whose study begins with its trials in another space."""

import uuid

import optuna
import pytest

from pho_service.spec.job import JobSpec
from pho_service.tuning.plan import Outcome
from pho_service.tuning.search import RATINGS, run_search
from storage.records import JobState
from storage.studies import keep_record, open_storage, open_study, study_name

TRIALS = 30


def rated(candidates):
    return [Outcome(value=1 + c.coefficients.activation_exponent) for c in candidates]


@pytest.fixture
def search(hand):
    """Search for a job as a worker does, with some values."""

    def run(job):
        spec = JobSpec.model_validate(job["spec"])
        with open_storage(hand.store.database.studies_url) as storage:
            for island in range(spec.islands):
                study = open_study(storage, study_name(job["name"], island), direction="minimize")
                run_search(study, spec.plan(island), rated)
                keep_record(study, RATINGS, "of the model and the text")

    return run


@pytest.fixture
def parent(submit, search):
    """A job whose search is over; its fields as they are given."""

    def make(**changes):
        job = submit(trials=TRIALS, **changes)
        search(job)
        return job

    return make


@pytest.fixture
def trials_of(hand):
    """The trials of a job's study; it has none if there is no study."""

    def read(name, island=0):
        with open_storage(hand.store.database.studies_url) as storage:
            try:
                return optuna.load_study(
                    study_name=study_name(name, island), storage=storage
                ).get_trials()
            except KeyError:
                return []

    return read


@pytest.fixture
def fork(client):
    def ask(job, headers=None, **changes):
        return client.post(f"/v1/jobs/{job['id']}:fork", json=changes, headers=headers)

    return ask


def inside(trials, low, high):
    """The searched trials with a row share within bounds."""
    return [
        t for t in trials
        if t.user_attrs["method"] == "crepe" and low <= t.params["row_share"] <= high
    ]  # fmt: skip


def test_a_fork_begins_with_the_trials_inside_its_space_as_they_are_and_names_its_parent(
    client, parent, fork, trials_of
):
    job = parent()
    answer = fork(job, search_space={"row_share": [0.4, 0.7]}, trials=12)
    child = client.get(answer.json()["links"]["job"]).json()
    old = inside(trials_of(job["name"]), 0.4, 0.7)
    new = trials_of(child["name"])

    assert 0 < len(old) < TRIALS
    assert [(t.number, t.state, t.value, t.params) for t in new] == [
        (n, t.state, t.value, t.params) for n, t in enumerate(old)
    ]
    assert [t.user_attrs["inherited"] for t in new] == [f"trial {t.number}" for t in old]
    assert [(t.datetime_start, t.datetime_complete) for t in new] == [
        (t.datetime_start, t.datetime_complete) for t in old
    ]
    assert (child["spec"]["fork_of"], child["spec"]["trials"]) == (job["id"], 12)
    assert child["progress"]["pieces"][-1]["done"] == 0
    assert f"{len(old)} of its" in answer.json()["warnings"][0]


def test_a_fork_keeps_the_bounds_that_are_not_given_and_may_take_fewer_kernel_sizes(
    client, parent, fork, trials_of, search
):
    job = parent(search_space={"row_share": [0.2, 0.8]})
    answer = fork(job, search_space={"kernel_sizes": [3, 5]}, sampler="tpe", trials=12)
    child = client.get(answer.json()["links"]["job"]).json()
    count = len(trials_of(child["name"]))
    search(child)
    trials = trials_of(child["name"])

    assert child["spec"]["search_space"]["row_share"] == [0.2, 0.8]
    assert count
    assert len(trials) == count + 12
    assert {t.params["kernel_size"] for t in trials[:count]} <= {3, 5}


def test_each_island_begins_with_all_trials_and_a_fork_of_a_fork_with_its_parents(
    client, parent, fork, trials_of
):
    job = parent(islands=2)
    child = client.get(fork(job, islands=3).json()["links"]["job"]).json()
    grandchild = client.get(fork(child, islands=1).json()["links"]["job"]).json()
    values = [[t.value for t in trials_of(child["name"], island)] for island in range(3)]

    assert values[0] == values[1] == values[2]
    assert len(values[0]) == 2 * len(inside(trials_of(job["name"]), 0, 1))
    assert len(trials_of(grandchild["name"])) == 3 * len(values[0])


def test_a_space_that_excludes_all_trials_is_refused_by_its_bound_and_nothing_is_stored(
    client, parent, fork, hand, refusal
):
    job = parent(search_space={"row_share": [0.2, 0.5]})
    studies = hand.studies()
    problem = refusal(fork(job, search_space={"row_share": [0.9, 1]}), 422)

    assert problem["errors"][0]["pointer"] == "/search_space"
    assert "their row_share is 0.3" in problem["detail"]
    assert "clone the job" in problem["detail"]
    assert hand.studies() == studies
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


FIXED = {
    "/model": {"model": "org/other"},
    "/pattern": {"pattern": "0.6"},
    "/preset": {"preset": "score"},
    "/steps/repruning": {"steps": {"repruning": "none"}},
    "/calibration/seed": {"calibration": {"seed": 1}},
    "/objective/weighting": {"objective": {"weighting": "fisher"}},
    "/warm_start": {"warm_start": {}},
    "/trials": {"trials": "many"},
    "/trails": {"trails": 12},
}


def test_what_the_values_of_trials_depend_on_cannot_change_and_is_named(
    client, parent, fork, refusal
):
    job = parent()

    for pointer, changes in FIXED.items():
        problem = refusal(fork(job, **changes), 422)
        assert problem["errors"][0]["pointer"] == pointer
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_of_a_search_by_perplexity_the_text_that_it_was_rated_on_cannot_change_either(
    parent, fork, refusal
):
    job = parent(objective={"name": "perplexity"})

    assert fork(job, confirm={"finalists": 3}).status_code == 202
    problem = refusal(fork(job, confirm={"windows": 8}), 422)
    assert problem["errors"][0]["pointer"] == "/confirm/windows"


def test_without_a_change_all_trials_are_taken_and_the_same_key_makes_one_job(
    parent, fork, trials_of
):
    job = parent()
    first, second = (fork(job, headers={"Idempotency-Key": "once"}).json() for _ in range(2))

    assert first["id"] == second["id"]
    assert len(trials_of(first["name"])) == len(inside(trials_of(job["name"]), 0, 1))


def test_a_job_that_is_not_there_or_has_no_trials_to_begin_with_is_refused_and_says_why(
    client, submit, parent, fork, hand, refusal
):
    fresh, deleted = submit(), parent()
    hand.bring(deleted["id"], JobState.CANCELLED)
    assert client.delete(f"/v1/jobs/{deleted['id']}").status_code == 204
    several = submit(pattern=None, patterns=["0.3", "0.5"])
    cut = submit(pattern="structured:20%")

    refusal(fork({"id": str(uuid.uuid4())}), 404, "no_such_job")
    refusal(fork(deleted), 404, "no_such_job")
    problem = refusal(
        client.post("/v1/jobs", json={**fresh["spec"], "fork_of": deleted["id"]}), 422
    )
    assert problem["errors"][0]["pointer"] == "/fork_of"
    assert "queued and has no trial" in refusal(fork(fresh), 422)["detail"]
    assert "several patterns" in refusal(fork(several), 422)["detail"]
    assert "structured" in refusal(fork(cut), 422)["detail"]


def test_a_job_in_any_state_can_be_forked_with_the_trials_that_it_has(parent, fork, hand):
    job = parent()

    assert fork(job).status_code == 202
    for state in (JobState.RUNNING, JobState.CANCELLING):
        hand.bring(job["id"], state) if state is JobState.RUNNING else hand.store.ask(
            uuid.UUID(job["id"]), "cancel"
        )
        assert fork(job).status_code == 202


def test_the_parent_can_be_deleted_and_the_child_keeps_its_trials(
    client, parent, fork, hand, trials_of
):
    job = parent()
    name = fork(job).json()["name"]
    before = [(t.number, t.value, t.params) for t in trials_of(name)]
    hand.bring(job["id"], JobState.CANCELLED)
    client.delete(f"/v1/jobs/{job['id']}")

    assert before
    assert [(t.number, t.value, t.params) for t in trials_of(name)] == before


def test_a_key_forks_the_jobs_that_it_sees_alone(client_of, bearer_of, search, hand, refusal):
    client, (ada, bob) = client_of(keys_needed=True), (bearer_of("ada"), bearer_of("bob"))
    document = {"model": "org/name", "pattern": "0.5", "minutes": None, "trials": TRIALS}
    job = client.post("/v1/jobs", json=document, headers=ada).json()
    search(client.get(f"/v1/jobs/{job['id']}", headers=ada).json())
    spec = {**document, "fork_of": job["id"]}

    refusal(client.post(f"/v1/jobs/{job['id']}:fork", json={}, headers=bob), 404, "no_such_job")
    refusal(client.post("/v1/jobs", json=spec, headers=bob), 422, "no_such_job")
    assert client.get(f"/new?fork={job['id']}", headers=bob).status_code == 404
    assert client.post("/v1/jobs", json=spec, headers=ada).status_code == 202
    assert len(hand.studies()) == 2


def test_the_button_opens_the_form_as_a_fork_and_the_form_says_what_is_wrong(client, parent, hand):
    job = parent()
    hand.succeed(job["id"])
    page = client.get(f"/new?fork={job['id']}").text
    typed = {"model": "org/name", "pattern": "0.6", "minutes": "none", "fork_of": job["id"]}
    answer = client.post("/new", data=typed)

    assert f'href="/new?fork={job["id"]}"' in client.get(f"/jobs/{job['id']}").text
    assert f'value="{job["id"]}"' in page
    assert f'A fork of <a href="/jobs/{job["id"]}">' in page
    assert answer.status_code == 422
    assert "clone the job" in answer.text
    assert "A fork of" not in client.get(f"/new?job={job['id']}").text
