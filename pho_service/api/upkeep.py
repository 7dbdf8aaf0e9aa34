"""
What the service deletes by itself: jobs and library entries that are older than the settings keep.
"""

import asyncio
import logging

from starlette.concurrency import run_in_threadpool

from pho_service.api.jobs import forget
from pho_service.api.service import Service
from storage.records import NoSuchJob, StateConflict
from storage.studies import StorageError

logger = logging.getLogger(__name__)

EVERY_S = 3600.0


async def keep_up(service: Service) -> None:
    """Delete what is too old, now and every hour, until this is cancelled."""
    while service.settings.keep_jobs_days or service.settings.keep_configurations_days:
        try:
            await run_in_threadpool(sweep, service)
        except StorageError as error:
            logger.warning("what is too old stays for now: %s", error)
        await asyncio.sleep(EVERY_S)


def sweep(service: Service) -> None:
    """
    Delete what is older than the settings keep. Several at once do no harm.

    Raises:
        StorageError: The database is away.
    """
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
    if deleted or entries:
        logger.info("deleted %d jobs and %d library entries of old age", deleted, entries)
