"""
A job that begins with what the library has for similar models.
"""

import logging
from collections.abc import Mapping
from typing import Any

from pho_service.library.entries import Entry, ModelFacts
from pho_service.library.files import stored_file
from pho_service.library.ranking import Wanted, rank
from pho_service.spec.configuration import Configuration
from pho_service.spec.fields import WarmPoint
from pho_service.spec.job import JobSpec
from pho_service.spec.numbers import number
from storage.configurations import ConfigurationStore
from storage.database import Database
from storage.records import Job

logger = logging.getLogger(__name__)


def warmed(
    database: Database, job: Job, spec: JobSpec, model: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The document with what the library has to begin with; None if it is not asked."""
    if spec.warm_start is None or spec.warm_start.found is not None:
        return None
    facts = ModelFacts.of({} if spec.more_models else model)
    pattern = spec.pruning()
    wanted = Wanted(
        pattern=pattern,
        scope_matters=True,
        family=facts.family,
        parameters=facts.parameters,
    )
    stored = ConfigurationStore(database).all(pattern=str(pattern), visible_to=job.owner_id)
    files = {str(each.id): stored_file(each.document, each.transfers) for each in stored}
    matches = rank([Entry.of(name, file) for name, file in files.items()], wanted)
    room = spec.trials - len(spec.plan(0).baselines())
    chosen = [m for m in matches if m.fits and m.entry.method == "crepe"]
    found = [
        WarmPoint(
            id=match.entry.id,
            coefficients=files[match.entry.id].configuration.coefficients,
            allocation=files[match.entry.id].configuration.steps.allocation,
            reasons=[*match.reasons],
        )
        for match in chosen[: min(spec.warm_start.count, room)]
    ]
    logger.info("warm start", extra={"job": str(job.id), "found": len(found)})
    warm = spec.warm_start.model_copy(update={"found": found})
    return spec.model_copy(update={"warm_start": warm}).model_dump(mode="json")


def started(spec: JobSpec, configuration: Configuration) -> list[str]:
    """What a warm start was worth, in a sentence; none if it was not asked."""
    if spec.warm_start is not None and not spec.warm_start.found:
        return [
            f"Warm start: the library had nothing for {spec.pattern} in this scope; the search "
            "began cold."
        ]
    points = configuration.search.get("warm_start", [])
    known = [point for point in points if point["value"] is not None]
    if not known:
        return []
    better = min if configuration.objective["direction"] == "minimize" else max
    best = better(known, key=lambda point: point["value"])
    return [
        f"Warm start: {number(best['value'])} at trial {best['trial']}, the best of {len(points)}."
    ]
