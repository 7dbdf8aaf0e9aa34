"""What the presets of the last version meant is what jobs of that time mean in the next ones."""

import uuid
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import insert

import storage
from pho_service.spec.job import JobSpec
from pho_service.spec.presets import Preset
from storage.database import Database
from storage.jobs import JobStore
from storage.states import JobState
from storage.tables import jobs

UNIFORM = ("uniform", [0.2, 0.2])
FISHER = ("fisher", [0.05, 0.4])
# preset, pattern, scope: gradient exponent, allocation, permutation, re-pruning, update
MEANT: dict[tuple[str, str, str | None], tuple[Any, ...]] = {
    ("score", "0.5", None): (1.0, *UNIFORM, "none", "none", "none"),
    ("crepe", "0.60", None): (0.0, *UNIFORM, "none", "none", "none"),
    ("crepe-plus", "0.5", "row"): (0.0, *FISHER, "none", "swaps", "none"),
    ("crepe-plus", "2:4", None): (0.0, *UNIFORM, "score", "swaps", "none"),
    ("best", "0.7", None): (1.0, *FISHER, "none", "swaps", "least-squares"),
    ("best", "0.5", "global"): (1.0, *UNIFORM, "none", "swaps", "least-squares"),
    ("best", "4:8", None): (0.0, *UNIFORM, "score", "swaps", "least-squares"),
}


@pytest.fixture
def older(empty_database: Database) -> Database:
    """A database of the last version, with a job of each kind."""
    config = Config()
    folder = Path(storage.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    with empty_database.transaction() as connection:
        for schema in ("pho", "procrastinate", "optuna"):
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        for preset, pattern, scope in MEANT:
            spec = JobSpec(model="m", pattern=pattern, scope=scope, preset=preset)  # type: ignore[arg-type]
            connection.execute(
                insert(jobs).values(
                    id=uuid.uuid4(), name=f"{preset} {pattern} {scope}", state=JobState.QUEUED,
                    spec=spec.model_dump(mode="json"), priority=0, trials=200, max_attempts=3,
                    fingerprint=b"",
                )
            )  # fmt: skip
        transfer = {"kind": "transfer", "source": "x", "configuration": {}}
        connection.execute(
            insert(jobs).values(
                id=uuid.uuid4(), name="transfer", state=JobState.SUCCEEDED, spec=transfer,
                priority=0, trials=0, max_attempts=3, fingerprint=b"",
            )
        )  # fmt: skip
    return empty_database


def test_older_jobs(older: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job has the steps and the space that its preset had, whatever it means now."""
    older.migrate()
    monkeypatch.setattr(Preset, "of", None)
    found = {job.name: job.spec for job in JobStore(older).page()}

    assert found.pop("transfer").keys() == {"kind", "source", "configuration"}
    for (preset, pattern, scope), meant in MEANT.items():
        spec = JobSpec.model_validate(found.pop(f"{preset} {pattern} {scope}"))
        plan = spec.plan(0)
        (method,) = plan.space.allocations

        assert spec.preset == preset
        assert (
            plan.space.gradient_exponent[1], method, [*plan.space.allocation_spread],
            plan.steps.permutation, plan.steps.repruning, plan.steps.update,
        ) == meant  # fmt: skip
    assert not found
