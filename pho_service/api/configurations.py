"""
``/v1/configurations``: the library of what was found, for other models.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Body, Query, Response
from pydantic import Field

from pho_service.api.answers import ConfigurationMatch, ConfigurationMatches, Gains
from pho_service.api.problems import (
    TooManyConfigurations,
    documented,
    documented_file,
    json_file,
    wrong_parameter,
)
from pho_service.api.schema import PATTERN, library_document
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.library import (
    FACTS_VERSION,
    Entry,
    LibraryFile,
    Match,
    Wanted,
    check_for_others,
    gains_by,
    parse_library_file,
    rank,
    stored_file,
)
from pho_service.spec.fields import FieldError
from pho_service.spec.pattern import Scope
from storage.configurations import NoSuchConfiguration, StoredConfiguration, StoredFacts

router = APIRouter(prefix="/v1/configurations", tags=["configurations"])


@router.get("", response_model=ConfigurationMatches, responses=documented(422))
async def find(
    service: ServiceParam,
    caller: CallerParam,
    pattern: Annotated[
        Annotated[str, Field(max_length=64)] | None,
        Query(description="0.5 or 2:4.", json_schema_extra={"pattern": PATTERN}),
    ] = None,
    scope: Annotated[
        Literal["row", "layer", "global"] | None,
        Query(description="Any by default."),
    ] = None,
    family: Annotated[
        Annotated[str, Field(min_length=1, max_length=100)] | None,
        Query(description="model_type of the model: llama."),
    ] = None,
    parameters: Annotated[
        Annotated[int, Field(ge=1, le=10**15)] | None,
        Query(description="Number of parameters of the model."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="At most so many.")] = 10,
) -> ConfigurationMatches:
    """Find the configurations that are likely to be good, best first, with reasons."""
    try:
        wanted = Wanted.parse(pattern, None, family, parameters)
    except InvalidInput as error:
        raise wrong_parameter("pattern", str(error)) from error
    if scope is not None:  # one that the pattern never has fits nothing
        wanted = replace(wanted, scope=Scope(scope), scope_matters=True)
    return await service.heavy.run(_ranked, service, caller, wanted, limit)


def _ranked(service: Service, caller: Caller, wanted: Wanted, limit: int) -> ConfigurationMatches:
    pattern = None if wanted.pattern is None else str(wanted.pattern)
    entries = {}
    for row in service.configurations.facts(pattern=pattern, visible_to=caller.visible_to):
        facts = row.facts
        if facts is None or facts.get("version") != FACTS_VERSION:
            try:
                stored = service.configurations.get(row.id)
            except NoSuchConfiguration:  # deleted meanwhile
                continue
            facts = Entry.of(str(row.id), _file(stored)).facts()
            service.configurations.remember(stored, facts)
        entries[str(row.id)] = row, Entry.of_facts(str(row.id), facts)
    matches = rank([entry for _, entry in entries.values()], wanted)
    return ConfigurationMatches(
        configurations=[describe(m, entries[m.entry.id][0]) for m in matches[:limit]],
        considered=len(entries),
    )


@router.post(
    "",
    status_code=201,
    response_model=ConfigurationMatch,
    responses={200: {"description": "It was there already."}, **documented(413, 422)},
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": library_document()}}}
    },
)
def add(
    document: Annotated[
        dict[str, Any], Body(description="config.json of a search, or a transfer.json.")
    ],
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
) -> ConfigurationMatch:
    """Add a configuration that was found elsewhere to the library."""
    try:
        file = parse_library_file(document, "the document")
        check_for_others(file.configuration, "the document")
    except ConfigurationError as error:
        raise FieldError("", str(error)) from error
    most = service.settings.max_configurations
    if service.configurations.count(caller.key_id) >= most:
        raise TooManyConfigurations(most)
    stored, new = service.configurations.add(
        file.configuration.model_dump(mode="json"),
        transfers=[target.model_dump(mode="json", exclude={"own"}) for target in file.targets],
        owner_id=caller.key_id,
    )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/configurations/{stored.id}"
    (match,) = rank([Entry.of(str(stored.id), _file(stored))], Wanted())
    return describe(match, stored)


@router.get(
    "/{configuration_id:uuid}",
    responses=documented_file(
        "config.json, or transfer.json if it was measured on other models", 404, 422
    ),
    response_class=Response,
)
def export(configuration_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Export a configuration as a file that `pho` reads, and other services import."""
    stored = service.configurations.get(configuration_id, visible_to=caller.visible_to)
    return json_file(_file(stored).to_dict(str(stored.id)))


@router.delete(
    "/{configuration_id:uuid}",
    status_code=204,
    response_class=Response,
    responses=documented(404, 422),
)
def delete(configuration_id: UUID, service: ServiceParam, caller: CallerParam) -> None:
    """Remove a configuration from the library. The job that found it stays."""
    service.configurations.delete(configuration_id, visible_to=caller.visible_to)


def describe(match: Match, stored: StoredConfiguration | StoredFacts) -> ConfigurationMatch:
    """An entry as the API shows it."""
    return ConfigurationMatch(
        id=stored.id,
        job_id=stored.job_id,
        created_at=stored.created_at,
        fits=match.fits,
        expected_gains=Gains(**gains_by(match.expected, match.expected_by)),
        reasons=[*match.reasons],
        **match.entry.to_dict(),
    )


def _file(stored: StoredConfiguration) -> LibraryFile:
    return stored_file(stored.document, stored.transfers)
