"""
How a stage ends: with a result, and what follows from it; or put down until its parts are done.

Each method is one transaction; :mod:`storage.jobs` says in which order rows are locked.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select, update

from storage.claims import ClaimStore
from storage.configurations import keep, keep_transfer
from storage.listing import found_columns
from storage.records import Claim, Job, NewStage
from storage.rows import (
    add_event,
    add_stages,
    claimed_job,
    enqueue_again,
    find_job,
    put_down,
    set_state,
    settle,
    update_stage,
)
from storage.states import JobState, StageKind, StageState
from storage.tables import jobs, stages


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    The result of a job.

    Attributes:
        best: The configuration; None of a job that has one for each of its patterns.
        warnings: What must be said of it.
    """

    best: Mapping[str, Any] | None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Entry:
    """A configuration for the library; or, with ``transfer``, what it was worth on a model."""

    configuration: Mapping[str, Any]
    transfer: Mapping[str, Any] | None = None


class OutcomeStore(ClaimStore):
    """
    The stages of a database, as a worker ends them.

    Args:
        database: Migrated.
    """

    def complete(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        then: Sequence[NewStage] = (),
        ended: bool = False,
        found: Found | None = None,
        library: Sequence[Entry] = (),
        spec: Mapping[str, Any] | None = None,
        seen: Job | None = None,
    ) -> bool:
        """
        Store what a stage gave, and what follows from it.

        Args:
            claim: Claim of the stage.
            result: What it gave, as JSON values.
            then: Stages that follow once nothing of the job is left to do; those that exist
                already stay as they are.
            ended: Whether nothing follows: the job has succeeded.
            found: What the job was for, if this is it. A job that was cancelled meanwhile is
                cancelled, without it.
            library: What the library gets.
            spec: The job's document from now on.
            seen: The job as it was when all of this was decided.

        Returns:
            False, and nothing is stored, if the job was extended or another of its stages was done
            since it was ``seen``.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if seen is not None and _moved(seen, job):
                return False
            cancelled = job.state is JobState.CANCELLING
            update_stage(
                connection, claim.stage.id, state=StageState.DONE, result=dict(result),
                worker_id=None, finished_at=func.now(),
            )  # fmt: skip
            for entry in library:
                if entry.transfer is None:
                    keep(connection, entry.configuration, owner_id=job.owner_id, job_id=job.id)
                else:
                    keep_transfer(
                        connection, entry.configuration, entry.transfer, owner_id=job.owner_id
                    )
            if found is not None and not cancelled:
                _keep_found(connection, job, found)
            _tell(connection, job, claim)
            left = _has_unfinished(connection, job.id)
            if not left:
                add_stages(connection, job, then)
                if spec is not None:
                    connection.execute(
                        update(jobs).where(jobs.c.id == job.id).values(spec=dict(spec))
                    )
            if ended and not left and not cancelled:
                best = job.best if found is None else found.best
                set_state(connection, job, JobState.SUCCEEDED, told=_good(best))
            else:
                settle(connection, job)
            return True

    def wait(
        self,
        claim: Claim,
        parts: Sequence[NewStage] = (),
        *,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Put a stage down until its parts are done; then it is given out again.

        Args:
            claim: Claim of the stage.
            parts: Stages of its kind, with its number as ``part_of`` in their ``params``; those
                that exist already stay as they are.
            params: What to keep with the stage itself, besides.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if params is not None:
                kept = {**(claim.stage.params or {}), **params}
                update_stage(connection, claim.stage.id, params=kept)
            add_stages(connection, job, parts)
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            _give_out_whole(connection, job.id, claim.stage.kind, claim.stage.number)


def _moved(seen: Job, job: Job) -> bool:
    """Whether a job has more to do, or has done more, than when it was seen."""
    done, now = (
        {stage.id for stage in each.stages if stage.state is StageState.DONE}
        for each in (seen, job)
    )
    return seen.trials != job.trials or done != now


def _keep_found(connection: Connection, job: Job, found: Found) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            best=found.best and dict(found.best),
            warnings=[*found.warnings],
            **found_columns(found.best),
        )
    )
    if found.best is not None:
        keep(connection, found.best, owner_id=job.owner_id, job_id=job.id)


def _tell(connection: Connection, job: Job, claim: Claim) -> None:
    """Say that a model of a transfer, or a part of a stage, is done; its whole may be given out."""
    stage = claim.stage
    done, number = 1, stage.number
    if stage.part_of is not None:
        number = stage.part_of
        done = _give_out_whole(connection, job.id, stage.kind, number)
    elif stage.kind is not StageKind.TRANSFER:
        return
    data = {"stage": stage.kind, "number": number, "done": done, "best_value": None}
    add_event(connection, job.id, "progress", data)


def _good(best: Mapping[str, Any] | None) -> dict[str, Any]:
    """How good a result is, where that was measured, for those who follow the job."""
    measured = (best or {}).get("perplexities")
    return {} if measured is None else {"perplexities": measured}


def _give_out_whole(connection: Connection, job_id: uuid.UUID, kind: StageKind, number: int) -> int:
    """Put a stage into the queue whose parts are all done; how many are."""
    job = find_job(connection, job_id)
    parts = job.parts(kind, number)
    done = sum(part.state is StageState.DONE for part in parts)
    (whole,) = (s for s in job.of_kind(kind) if s.number == number)
    if done == len(parts) and whole.state is StageState.WAITING and job.state.may_work:
        enqueue_again(connection, job, whole)
    return done


def _has_unfinished(connection: Connection, job_id: uuid.UUID) -> bool:
    mine = select(stages.c.id).where(stages.c.job_id == job_id)
    return connection.execute(mine.where(stages.c.state != StageState.DONE)).first() is not None
