"""What the search of a preset finds on a benchmark's model."""

from dataclasses import replace
from typing import Any

from subject import Subject

from pho_service.cli.terminal import progress
from pho_service.pipeline.search import search_job
from pho_service.progress import Run
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import SearchRequest


def searched(
    subject: Subject,
    name: str,
    pattern: Pattern,
    *,
    seed: int,
    trials: int,
    finalists: int,
    confirm_steps: bool,
) -> tuple[Candidate, dict[str, Any]]:
    """
    Search, and confirm the finalists on the confirmation text.

    Args:
        subject: Calibrated, with a confirmation text.
        name: Of the preset.
        pattern: What is pruned.
        seed, trials, finalists: Of the search.
        confirm_steps: Confirm candidates whose steps need a text, too. That takes the whole
            pipeline as often as there are finalists; else their best by the proxy is taken.

    Returns:
        What was found, and JSON values that say what it is.
    """
    preset = Preset.of(name, pattern)
    request = SearchRequest(
        pattern=pattern,
        steps=preset.steps,
        bounds=preset.bounds,
        trials=trials,
        seed=seed,
        finalists=finalists,
    )
    confirm = confirm_steps or not request.steps.needs_text
    work = subject.work if confirm else replace(subject.work, confirm=None)
    result = search_job(request, work, run=Run(progress=progress))
    found = result.configuration
    return found.candidate(), {
        "found": found.method,
        "coefficients": found.coefficients.to_dict(),
        "steps": found.steps.to_dict(),
        "confirmed": found.confirmation.perplexity if found.confirmation else None,
    }
