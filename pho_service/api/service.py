"""
What all operations of the API work with.
"""

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request

from pho_service.access import Access
from pho_service.settings import Settings
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import KeyStore


@dataclass(frozen=True, kw_only=True)
class Caller:
    """
    Who asks.

    Attributes:
        key_id: The key; None where none is needed.
        sees_all: Whether other keys' jobs are visible.
    """

    key_id: UUID | None
    sees_all: bool

    @property
    def visible_to(self) -> UUID | None:
        """In the sense of :class:`JobStore`: None sees all."""
        return None if self.sees_all else self.key_id


class Service:
    """
    Args:
        database: Migrated.
        settings: Of this process.
        keys_needed: Whether a key is needed even if none was ever made.
    """

    def __init__(self, database: Database, settings: Settings, *, keys_needed: bool) -> None:
        self.database = database
        self.settings = settings
        self.keys_needed = keys_needed
        self.jobs = JobStore(database)
        self.keys = KeyStore(database)
        self.access = Access.of(settings)


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _caller(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


ServiceParam = Annotated[Service, Depends(_service)]
CallerParam = Annotated[Caller, Depends(_caller)]
