"""Configurations that were found elsewhere, for a search to begin with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.cli.document import Given
from pho_service.cli.library import best_of_library, is_library, wanted_for
from pho_service.cli.terminal import say
from pho_service.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from pho_service.spec.candidate import Candidate
    from pho_service.spec.job import JobSpec
    from pho_service.spec.pattern import Pattern

COUNT = 3  # configurations of a library, as a job's document has it


def of_files(given: Given, spec: "JobSpec") -> "list[Candidate]":
    """
    What is in the files that ``--warm-start`` names.

    Raises:
        ConfigurationError: One of them is not a configuration.
        InvalidInput: One is of another pattern or scope; a count without a warm start.
    """
    from pho_service.library.files import read_library_file

    if given("warm_start/count") and not given("warm_start/found"):
        name = given.names["warm_start/count"]
        raise InvalidInput(f"{name} is of a warm start: give --warm-start, too.")
    names = [name for name in given("warm_start/found") or () if name and not is_library(name)]
    found = [read_library_file(Path(name)).configuration.candidate() for name in names]
    request = replace(spec.request(0), warm_start=tuple(found))
    request.plan(tuple(spec.calibration.kernel_sizes))  # refuses what is of another pattern
    return found


def of_libraries(given: Given, pattern: "Pattern", model: Mapping[str, Any]) -> "list[Candidate]":
    """The best for a model of this description in the libraries that ``--warm-start`` names."""
    names = [name for name in given("warm_start/found") or () if not name or is_library(name)]
    scope = None if pattern.group else pattern.scope.value
    found = []
    for name in names:
        try:
            wanted = wanted_for(model, str(pattern), scope)
            found += best_of_library(name or None, wanted, given("warm_start/count") or COUNT)
        except ConfigurationError as error:
            say(f"Note: nothing to start from: {error}")
    for each in found:
        say(f"Starting from {each.origin['id']}: {'; '.join(each.origin['reasons'])}.")
    return [each.configuration.candidate() for each in found]


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
