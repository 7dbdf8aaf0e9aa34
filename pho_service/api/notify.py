"""
Who tells those who asked that their jobs have ended: some tasks of each front end, in turns.
"""

import asyncio
import json
import logging

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from pho_service.api.service import Service
from pho_service.errors import InvalidInput
from pho_service.host.webhooks import NotDelivered, send
from storage.notifications import end, put_off, take
from storage.studies import StorageError

logger = logging.getLogger(__name__)

EVERY_S = 2.0  # how often a task looks when there is nothing to send
AT_ONCE = 4  # of one front end: a receiver that is slow holds up one of them


async def keep_telling(service: Service) -> None:
    """Send what is due, until this is cancelled; what is cut off then is sent again later."""
    limiter = CapacityLimiter(1)
    while service.webhooks.secret is not None and service.webhooks.hosts:
        try:
            told = await run_sync(tell_next, service, abandon_on_cancel=True, limiter=limiter)
        except StorageError as error:
            logger.warning("who asked to be told must wait: %s", error)
            told = False
        if not told:
            await asyncio.sleep(EVERY_S)


def tell_next(service: Service) -> bool:
    """
    Send the message that is due for longest, and note what came of it.

    Returns:
        True if there was one.

    Raises:
        StorageError: The database is away.
    """
    due = take(service.database)
    if due is None:
        return False
    body = json.dumps({"id": str(due.id), **due.document}).encode()
    fields = {"job": due.document["job_id"], "notification": str(due.id)}
    try:
        send(service.webhooks, due.url, str(due.id), body)
    except InvalidInput as error:  # the rules have changed since, or its name's address
        logger.warning("a webhook may not be sent: %s", error, extra=fields)
        end(service.database, due, error=str(error))
    except NotDelivered as error:
        again = put_off(service.database, due, error=str(error))
        logger.warning(
            "a webhook was not delivered, and is %s: %s",
            "tried again" if again else "given up", error, extra=fields,
        )  # fmt: skip
    else:
        logger.info("a webhook was delivered", extra=fields)
        end(service.database, due)
    return True
