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
from storage.studies import keep_record, record_of


def reconstruct_winner(
    result: SearchResult,
    settings: Reconstruction,
    study: optuna.Study,
    subject: Subject | None,
    run: Run = Run(),
) -> SearchResult:
    """
    Add a reconstruction to what a search found, if it makes it better.

    Args:
        result: Found without one.
        settings: Settings of the reconstruction.
        study: The record; what it holds is not measured again.
        subject: What was confirmed, with a calibration text. None: nothing can be measured, and
            the reconstruction is added as it was asked for.
        run: Who watches it.

    Returns:
        The result with the reconstruction among its steps; its perplexity is that of the
        reconstructed model, beside the one before. Where that is no better, the result as it was,
        with a warning.
    """
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
    """
    The perplexity that the study holds; measured and kept at once if it is not there.

    Args:
        study, subject, run: As of :func:`reconstruct_winner`.
        candidate: What to prune with.
        kept: Record of the study that the last that was measured is in.
        title: What is being done, for who is told of it.
    """
    about = {"candidate": candidate.to_dict(), "text_sha256": subject.text.key}
    stored = record_of(study).get(kept, {})
    if {key: stored.get(key) for key in about} == about:
        return float(stored["perplexity"])
    perplexity = _measure(subject, candidate, run, title)
    with run.fence():
        keep_record(study, kept, {**about, "perplexity": perplexity})
    return perplexity


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
