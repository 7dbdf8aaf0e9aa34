"""
What is attacked: a service, with what attacks need to ask it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from chaos import Service

ENDED = ("succeeded", "failed", "cancelled")


@dataclass(kw_only=True)
class Target:
    """
    A service that runs, and the folder that its models and texts lie below.

    Attributes:
        spec: The fields of a job that takes no time.
        secret: A folder outside of the roots.
        log: Where the log ended when the attack began.
    """

    service: Service
    folder: Path
    spec: dict[str, Any]
    seed: int
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the API."""
        return self.service.url

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **more: Any) -> httpx.Response:
        """Ask for something."""
        return httpx.get(f"{self.url}{path}", timeout=60, **more)

    def submit(self, **fields: Any) -> httpx.Response:
        """Send a job's document."""
        return httpx.post(f"{self.url}/v1/jobs", json={**self.spec, **fields}, timeout=60)

    def job(self, **fields: Any) -> str:
        """Send a job that is accepted; its id."""
        answer = self.submit(**fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait(self, job_id: str, *, seconds: float = 120) -> dict[str, Any]:
        """How a job ended, or as far as it came in this time."""
        deadline = time.monotonic() + seconds
        job: dict[str, Any] = {}
        while time.monotonic() < deadline:
            answer = self.get(f"/v1/jobs/{job_id}")
            if answer.status_code == 200:
                job = answer.json()
                if job["state"] in ENDED:
                    return job
            time.sleep(0.2)
        return job

    def until(self, holds: Callable[[], bool], *, seconds: float = 60) -> bool:
        """Whether something comes to hold in this time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if holds():
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        return False

    def reached(
        self, path: str, step: str, headers: dict[str, str] | None = None, *, seconds: float
    ) -> dict[str, Any]:
        """What a job looks like once it is at a step, or has ended."""
        job: dict[str, Any] = {}

        def there() -> bool:
            job.update(httpx.get(path, headers=headers, timeout=60).json())
            return step in json.dumps(job["progress"]) or job["state"] in ENDED

        self.until(there, seconds=seconds)
        return job

    def small_job_s(self, headers: dict[str, str]) -> float:
        """How long a job of a key that takes no time waits until it begins."""
        started = time.monotonic()
        answer = httpx.post(f"{self.url}/v1/jobs", json=self.spec, headers=headers, timeout=60)
        path = f"{self.url}/v1/jobs/{answer.json()['id']}"

        def begun() -> bool:
            return bool(httpx.get(path, headers=headers, timeout=60).json()["state"] != "queued")

        self.until(begun, seconds=120)
        return time.monotonic() - started

    def log(self) -> str:
        """All that the service and its workers have logged."""
        return (self.folder / "serve.log").read_text(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """
    Attributes:
        name: For the table, and for ``--only``.
        about: What is tried.
        run: Tries it; gives what did not hold, or nothing.
        health: Whether health checks must be answered meanwhile as soon as without it, nearly.
    """

    name: str
    about: str
    run: Callable[[Target], str | None]
    health: bool = True
