"""
What the service deletes by itself: jobs and library entries that are older than the settings keep.
"""

import asyncio
import logging
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from pho_service.api.artifacts import remove_files
from pho_service.api.jobs import forget
from pho_service.api.service import Service
from pho_service.errors import OutputError
from storage.pruned import pruned_for
from storage.records import NoSuchJob, StateConflict
from storage.studies import StorageError

logger = logging.getLogger(__name__)

EVERY_S = 3600.0


async def keep_up(service: Service) -> None:
    """Delete what is too old, now and every hour, until this is cancelled."""
    kept = service.settings
    while kept.keep_jobs_days or kept.keep_configurations_days or kept.keep_pruned_days:
        try:
            await run_in_threadpool(sweep, service)
        except (StorageError, OutputError) as error:
            logger.warning("what is too old stays for now: %s", error)
        await asyncio.sleep(EVERY_S)


def sweep(service: Service) -> None:
    """
    Delete what is older than the settings keep. Several at once do no harm.

    Raises:
        StorageError: The database is away.
        OutputError: The artifact store is away.
    """
    pruned_days = service.settings.keep_pruned_days
    removed = 0
    while pruned_days and (old := pruned_for(service.database, pruned_days)):
        for job_id in old:
            with suppress(NoSuchJob):  # deleted since
                remove_files(service, job_id)
                removed += 1
    jobs_days = service.settings.keep_jobs_days
    deleted = 0
    while jobs_days and (found := service.jobs.over_for(jobs_days)):
        for job_id in found:
            try:
                forget(service, job_id)
                deleted += 1
            except (NoSuchJob, StateConflict):  # another process was faster, or it was resumed
                continue
    days = service.settings.keep_configurations_days
    entries = service.configurations.delete_older(days) if days else 0
    if deleted or entries or removed:
        logger.info(
            "deleted %d jobs, %d library entries and %d pruned models of old age",
            deleted, entries, removed,
        )  # fmt: skip
