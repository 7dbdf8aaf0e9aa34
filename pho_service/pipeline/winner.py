"""
The winner of a search, reconstructed: it takes minutes, so no other finalist is.
"""

from dataclasses import replace

import optuna

from pho_service.models.blockwise import measure_perplexity
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.rating import Subject
from pho_service.progress import Run
from pho_service.spec.candidate import Candidate
from pho_service.spec.numbers import number
from pho_service.spec.reconstruction import Reconstruction
from pho_service.tuning.result import SearchResult
from storage.studies import once


def reconstruct_winner(
    result: SearchResult,
    settings: Reconstruction,
    study: optuna.Study,
    subject: Subject | None,
    run: Run = Run(),
) -> SearchResult:
    """Add a reconstruction to what a search found, if it makes it better."""
    configuration = result.configuration
    steps = replace(configuration.steps, reconstruction=settings)
    rebuilt = configuration.model_copy(update={"steps": steps})
    confirmation = configuration.confirmation
    if subject is None or confirmation is None:
        return replace(result, configuration=rebuilt)
    before = confirmation.perplexity
    after = measured_once(
        study,
        subject,
        rebuilt.candidate(),
        run,
        kept="reconstructed",
        title="Reconstructing the best",
    )
    if not after < before:
        warning = (
            f"The reconstruction was left out: with it the perplexity is {number(after)}, without "
            f"it {number(before)}. A lower --reconstruction-rate or more --samples may change that."
        )
        return replace(result, warnings=[*result.warnings, warning])
    told = confirmation.model_copy(update={"perplexity": after, "before_reconstruction": before})
    return replace(result, configuration=rebuilt.model_copy(update={"confirmation": told}))


def measured_once(
    study: optuna.Study,
    subject: Subject,
    candidate: Candidate,
    run: Run,
    *,
    kept: str,
    title: str,
) -> float:
    """The perplexity that the study holds; measured and kept at once if it is not there."""
    about = {"candidate": candidate.to_dict(), "text_sha256": subject.text.key}

    def make() -> dict[str, float]:
        return {"perplexity": _measure(subject, candidate, run, title)}

    return float(once(study, kept, about, make, fence=run.fence)["perplexity"])


def _measure(subject: Subject, candidate: Candidate, run: Run, title: str) -> float:
    chosen = subject.bundle.choose(candidate.steps.linears, candidate.pattern)
    with (
        run.progress(title, len(chosen.names)) as advance,
        pruned_model(
            subject.model, subject.bundle.statistics(), candidate, subject.calibration, advance
        ),
    ):
        measured = measure_perplexity(
            subject.model, subject.text.windows, advance=lambda _: advance(0)
        )
    return measured.perplexity
