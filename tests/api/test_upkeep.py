"""What the service deletes by itself, and what it never does."""

from sqlalchemy import text

from pho_service.api.operations import sweep
from storage.records import JobState

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}


def age(database, table, column, days):
    with database.transaction() as connection:
        older = f"UPDATE pho.{table} SET {column} = {column} - make_interval(days => :days)"  # noqa: S608 - ours
        connection.execute(text(older), {"days": days})


def test_what_is_too_old_goes_the_rest_stays(client_of, hand, database):
    client = client_of(keep_jobs_days=30.0, keep_configurations_days=40.0)
    service = client.app.state.service  # type: ignore[attr-defined]
    jobs = {}
    for state in (JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUEUED, JobState.PAUSED):
        job = client.post("/v1/jobs", json=DOCUMENT).json()
        hand.record(job, 2)
        hand.bring(job["id"], state)
        jobs[state] = job
    age(database, "jobs", "finished_at", 29)
    age(database, "jobs", "created_at", 400)
    sweep(service)
    assert len(client.get("/v1/jobs").json()["jobs"]) == 4
    age(database, "jobs", "finished_at", 2)
    sweep(service)

    left = {job["state"] for job in client.get("/v1/jobs").json()["jobs"]}
    assert left == {"queued", "paused"}
    assert hand.studies() == sorted(jobs[s]["name"] for s in (JobState.QUEUED, JobState.PAUSED))
    assert client.get("/v1/configurations").json()["considered"] == 1  # it outlives its job
    age(database, "configurations", "created_at", 41)
    sweep(service)
    assert client.get("/v1/configurations").json()["considered"] == 0


def test_entries_of_the_queue_that_have_been_over_for_a_week_are_removed(client_of, database):
    service = client_of().app.state.service
    with database.transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO procrastinate_jobs (id, queue_name, task_name, status) VALUES"
            " (1, 'q', 't', 'todo'), (2, 'q', 't', 'doing'), (3, 'q', 't', 'todo'),"
            " (4, 'q', 't', 'doing'), (5, 'q', 't', 'doing')"
        )
        # What happened to them is noted by triggers.
        connection.exec_driver_sql(
            "UPDATE procrastinate_jobs SET status = 'cancelled' WHERE id = 3"
        )
        connection.exec_driver_sql("UPDATE procrastinate_jobs SET status = 'failed' WHERE id > 3")
        connection.exec_driver_sql(
            "UPDATE procrastinate_events SET at = now() - interval '8 days' WHERE job_id <> 5"
        )
    sweep(service)
    with database.transaction() as connection:
        left = connection.exec_driver_sql("SELECT id FROM procrastinate_jobs ORDER BY id")

        assert [*left.scalars()] == [1, 2, 5]


def test_a_service_that_starts_looks_at_once(client_of, hand, database):
    client = client_of()
    job = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    hand.bring(job, JobState.CANCELLED)
    age(database, "jobs", "finished_at", 100)
    client_of(keep_jobs_days=1.0)
    while client.get(f"/v1/jobs/{job}").status_code != 404:
        pass
