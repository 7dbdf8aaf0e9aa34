"""What a client of the load test does: mostly looks, sometimes submits."""

import uuid

from locust import HttpUser, between, task

SPEC = {
    "model": "tiny",
    "pattern": "0.5",
    "preset": "score",
    "calibration": {"text": "text.txt", "samples": 6, "context_length": 32},
    "confirm": None,
    "trials": 40,
}


class Person(HttpUser):
    """Waits about a second between two requests."""

    wait_time = between(0.5, 1.5)
    job = None

    @task(3)
    def list_jobs(self) -> None:
        """A page of 20 jobs."""
        self.client.get("/v1/jobs?page_size=20", name="list")

    @task(3)
    def show(self) -> None:
        """The job that this client submitted last."""
        if self.job:
            self.client.get(f"/v1/jobs/{self.job}", name="show")

    @task(1)
    def health(self) -> None:
        """As an orchestrator asks."""
        self.client.get("/healthz", name="healthz")

    @task(2)
    def submit(self) -> None:
        """A job of its own."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self.client.post("/v1/jobs", json=SPEC, headers=headers, name="submit")
        if answer.ok:
            self.job = answer.json()["id"]
