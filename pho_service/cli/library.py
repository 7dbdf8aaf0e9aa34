"""
Where the verbs take configurations from, a folder of files or a service, and warm starts by them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.cli.document import Given
from pho_service.cli.terminal import say
from pho_service.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from pho_service.library import Wanted
    from pho_service.spec.configuration import Configuration
    from pho_service.spec.job import JobSpec
    from pho_service.spec.pattern import Pattern
    from pho_service.spec.steps import Candidate


# Help of an option.
LIBRARY = (
    "A folder of configurations, or the URL of a service.  [default: PHO_API_URL, or "
    "http://127.0.0.1:8000]"
)


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    configuration: "Configuration"  # It
    origin: dict[str, Any]  # Library, id and reasons, for those who want to know where it came from


def is_library(name: str) -> bool:
    """Whether a name is that of a library, and not of a file."""
    return _is_url(name) or Path(name).is_dir()


def matches(
    library: str | None, wanted: "Wanted", limit: int, note: Callable[[str], None] = say
) -> list[dict[str, Any]]:
    """The most promising configurations of a library, as the API describes them."""
    # ``note`` is told of the files that are none.
    if library is None or _is_url(library):
        return _of_service(library, wanted, limit)
    from pho_service.library import Entry, gains_by, rank, read_folder

    files, others = read_folder(Path(library))
    for other in others:
        note(f"Note: left out: {other}")
    entries = [Entry.of(name, file) for name, file in files.items()]
    return [
        {
            "id": match.entry.id,
            **match.entry.to_dict(),
            "fits": match.fits,
            "expected_gains": gains_by(match.expected, match.expected_by),
            "reasons": [*match.reasons],
        }
        for match in rank(entries, wanted)[:limit]
    ]


def best_of_library(library: str | None, wanted: "Wanted", count: int) -> list[LibraryEntry]:
    """The most promising configurations of the asked pattern, at most ``count``."""
    return [
        LibraryEntry(
            configuration=_configuration(library, match["id"]),
            origin={
                "library": library or "service",
                **{key: match[key] for key in ("id", "models", "gains", "measured", "reasons")},
            },
        )
        for match in _fitting(library, wanted)[:count]
    ]


def check_library(library: str | None, pattern: str, scope: str | None) -> None:
    """See that a library has something for a pattern, before a model is read."""
    _fitting(library, wanted_for({}, pattern, scope), note=lambda _: None)


def _fitting(
    library: str | None, wanted: "Wanted", note: Callable[[str], None] = say
) -> list[dict[str, Any]]:
    entries = matches(library, wanted, 200, note)
    fitting = [match for match in entries if match["fits"]]
    where = f"the library {library}" if library else "the library of the service"
    pattern_text = f"{wanted.pattern}"
    if wanted.scope_matters and wanted.pattern is not None:
        pattern_text += f" in scope {wanted.pattern.scope.value}"
    if not entries:
        raise ConfigurationError(
            f"{where} is empty. Search on any model (`pho search`, `pho submit`), or import "
            "configurations with `pho configurations import`."
        )
    if not fitting:
        there = sorted({f"{match['pattern']} in scope {match['scope']}" for match in entries})
        raise ConfigurationError(
            f"{where} has nothing for {pattern_text}, and the best coefficients differ from "
            f"pattern to pattern. It has {', '.join(there)}. Ask for one of these, or search: "
            f"`pho search MODEL --pattern {wanted.pattern}`."
        )
    return fitting


def wanted_for(model: Mapping[str, Any], pattern: str, scope: str | None) -> "Wanted":
    """What to look for, for a model that says its family and size of itself."""
    from pho_service.library import ModelFacts, Wanted

    facts = ModelFacts.of(model)
    return Wanted.parse(pattern, scope, facts.family, facts.parameters)


def _of_service(url: str | None, wanted: "Wanted", limit: int) -> list[dict[str, Any]]:
    from pho_service.client import Client

    scope = wanted.pattern.scope.value if wanted.pattern and wanted.scope_matters else None
    with Client(url) as client:
        entries = client.configurations(
            pattern=None if wanted.pattern is None else str(wanted.pattern),
            scope=scope,
            family=wanted.family,
            parameters=wanted.parameters,
            limit=limit,
        )
    return [match.model_dump(mode="json") for match in entries]


def _configuration(library: str | None, entry_id: str) -> "Configuration":
    from pho_service.library import read_library_file

    if library is not None and not _is_url(library):
        return read_library_file(Path(library) / entry_id).configuration
    from pho_service.client import Client

    with Client(library) as client:
        return client.export_configuration(entry_id).configuration


def _is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


# Configurations that were found elsewhere, for a search to begin with.
COUNT = 3  # configurations of a library, as a job's document has it


def of_files(given: Given, spec: "JobSpec") -> "list[Candidate]":
    """What is in the files that ``--warm-start`` names."""
    from pho_service.library import read_library_file

    if given("warm_start/count") and not given("warm_start/found"):
        name = given.names["warm_start/count"]
        raise InvalidInput(f"{name} is of a warm start: give --warm-start, too.")
    names = [name for name in given("warm_start/found") or () if name and not is_library(name)]
    if not names:
        return []
    candidates = [read_library_file(Path(name)).configuration.candidate() for name in names]
    request = replace(spec.request(0), warm_start=tuple(candidates))
    request.plan(tuple(spec.calibration.kernel_sizes))  # refuses what is of another pattern
    return candidates


def of_libraries(given: Given, pattern: "Pattern", model: Mapping[str, Any]) -> "list[Candidate]":
    """The best for a model of this description in the libraries that ``--warm-start`` names."""
    names = [name for name in given("warm_start/found") or () if not name or is_library(name)]
    scope = None if pattern.group else pattern.scope.value
    entries = []
    for name in names:
        try:
            wanted = wanted_for(model, str(pattern), scope)
            entries += best_of_library(name or None, wanted, given("warm_start/count") or COUNT)
        except ConfigurationError as error:
            say(f"Note: nothing to start from: {error}")
    for entry in entries:
        say(f"Starting from {entry.origin['id']}: {'; '.join(entry.origin['reasons'])}.")
    return [entry.configuration.candidate() for entry in entries]


def points(candidates: "list[Candidate]") -> list[dict[str, Any]]:
    """Candidates in the form that a job's document has; baselines are in every search anyway."""
    return [
        {
            "coefficients": candidate.coefficients.to_dict(),
            "allocation": candidate.steps.to_dict()["allocation"],
        }
        for candidate in candidates
        if candidate.method == "crepe"
    ]
