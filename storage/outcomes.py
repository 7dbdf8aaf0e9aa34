"""
What workers' stages have given, and what follows: the end of a stage, of its parts, and of a job.

Each method is one transaction; :mod:`storage.jobs` says in which order rows are locked.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
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
        add: Sequence[NewStage] = (),
        then: Sequence[NewStage] = (),
        trials: int | None = None,
        spec: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> bool:
        """
        Store what a stage gave, and make the stages that follow.

        Args:
            claim: Claim of the stage.
            result: What it gave, as JSON values.
            add: Stages that follow at once; those that exist already stay as they are.
            then: Stages that follow if nothing of the job is left to do.
            trials: That a search has brought its study to.
            spec: The job's document from now on, if nothing of the job is left to do.
            configuration: One for the library.

        Returns:
            False, and nothing is stored, if the job was extended beyond ``trials``.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if trials is not None and trials < job.trials:
                return False
            _finish_stage(connection, claim, result)
            if configuration is not None:
                keep(connection, configuration, owner_id=job.owner_id, job_id=job.id)
            add_stages(connection, job, add)
            if not _has_unfinished(connection, job.id):
                add_stages(connection, job, then)
                if spec is not None:
                    connection.execute(
                        update(jobs).where(jobs.c.id == job.id).values(spec=dict(spec))
                    )
            settle(connection, job)
            return True

    def share(
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

    def complete_part(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """
        Store what a part of a stage gave; after the last one, the stage itself is given out.

        Raises:
            LostClaim: The part is another worker's.
        """
        whole = claim.stage.part_of
        assert whole is not None
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            _finish_stage(connection, claim, result)
            settle(connection, job)
            done = _give_out_whole(connection, job.id, claim.stage.kind, whole)
            data = {"stage": claim.stage.kind, "number": whole, "done": done, "best_value": None}
            add_event(connection, job.id, "progress", data)

    def succeed(
        self,
        claim: Claim,
        *,
        best: Mapping[str, Any] | None,
        warnings: Sequence[str],
        result: Mapping[str, Any],
        then: Sequence[NewStage] = (),
    ) -> None:
        """
        Store the configuration that a job was for, in the library too, and what else the stage
        gave. A job that was cancelled meanwhile is cancelled, without a configuration.

        Args:
            claim: Claim of the stage.
            best: The configuration; None of a job that has one for each of its patterns.
            warnings: What must be said of it.
            result: What else the stage gave.
            then: Stages that follow; without any, the job has succeeded.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            _finish_stage(connection, claim, result)
            if job.state is JobState.CANCELLING:
                settle(connection, job)
                return
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id)
                .values(best=best and dict(best), warnings=[*warnings], **found_columns(best))
            )
            if best is not None:
                keep(connection, best, owner_id=job.owner_id, job_id=job.id)
            add_stages(connection, job, then)
            if then:
                settle(connection, job)
            else:
                set_state(connection, job, JobState.SUCCEEDED, told=_good(best))

    def pruned(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """
        Store which files the pruned model of a job has. The job has succeeded; if it was cancelled
        meanwhile, it is cancelled.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            _finish_stage(connection, claim, result)
            _go_on(connection, job, ())

    def scored(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        then: Sequence[NewStage],
        check: Callable[[Job], None],
    ) -> None:
        """
        Store what a model scored in tasks. After the last of a job's models come the stages that
        follow; without any, the job has succeeded, or is cancelled if it was cancelled meanwhile.

        Args:
            claim: Claim of the stage.
            result: What was measured.
            then: Stages that follow.
            check: Called with the job, which nobody else can change meanwhile, before anything is
                stored; may refuse by raising.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            check(job)
            _finish_stage(connection, claim, result)
            _go_on(connection, job, then)

    def transferred(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        configuration: Mapping[str, Any],
        own: Mapping[str, Any] | None,
        check: Callable[[Job], None] = lambda _: None,
    ) -> None:
        """
        Store what a configuration was worth on a model, in the library too; the last one ends
        the job, as cancelled if it was cancelled meanwhile.

        Args:
            claim: Claim of the stage.
            result: What was measured; with an ``error``, nothing was.
            configuration: What was transferred.
            own: The model's own best, if it was searched for.
            check: Called with the job, which nobody else can change meanwhile, before anything is
                stored; may refuse by raising.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            check(job)
            _finish_stage(connection, claim, result)
            data = {"stage": claim.stage.kind, "number": claim.stage.number, "done": 1}
            add_event(connection, job.id, "progress", {**data, "best_value": None})
            if "error" not in result:
                kept = {name: value for name, value in result.items() if name != "own"}
                keep_transfer(connection, configuration, kept, owner_id=job.owner_id)
            if own is not None:
                keep(connection, own, owner_id=job.owner_id, job_id=job.id)
            if job.state is JobState.CANCELLING or _has_unfinished(connection, job.id):
                settle(connection, job)
            else:
                set_state(connection, job, JobState.SUCCEEDED)


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


def _go_on(connection: Connection, job: Job, then: Sequence[NewStage]) -> None:
    """A job that has a result: what follows once none of its stages is left, or its end."""
    if job.state is JobState.CANCELLING or _has_unfinished(connection, job.id):
        settle(connection, job)
        return
    add_stages(connection, job, then)
    if then:
        settle(connection, job)
    else:
        set_state(connection, job, JobState.SUCCEEDED, told=_good(job.best))


def _finish_stage(connection: Connection, claim: Claim, result: Mapping[str, Any]) -> None:
    update_stage(
        connection, claim.stage.id, state=StageState.DONE, result=dict(result), worker_id=None,
        finished_at=func.now(),
    )  # fmt: skip


def _has_unfinished(connection: Connection, job_id: uuid.UUID) -> bool:
    mine = select(stages.c.id).where(stages.c.job_id == job_id)
    return connection.execute(mine.where(stages.c.state != StageState.DONE)).first() is not None
