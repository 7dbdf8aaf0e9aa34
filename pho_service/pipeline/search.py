"""
The main job: search one or several bundles, confirm the winner, give a configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from torch import Tensor

from pho_service.errors import BundleError, InvalidInput, StudyError
from pho_service.pipeline.joint_search import joint_provenance, with_each_model
from pho_service.pipeline.known_ratings import KnownRatings
from pho_service.pipeline.objectives import objective_function, only_one, rated_on
from pho_service.pipeline.studies import check_study, study_name
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.configuration import Confirmation
from pho_service.tuning.correction import Correction
from pho_service.tuning.finalists import Measurements
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import RatedCandidate, SearchPlan
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import SearchResult, describe_study, mark_chosen, search_result
from pho_service.tuning.search import Callback, run_search
from storage.studies import StorageError, open_storage, open_study, quiet_optuna

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.pipeline.rating import ReportText

Bundles = ProxyBundle | Mapping[str, ProxyBundle]  # of one model; or of several, by their names


def search_job(
    request: SearchRequest,
    bundles: Bundles,
    *,
    study: optuna.Study | None = None,
    model: "LanguageModel | None" = None,
    confirm_text: "ReportText | None" = None,
    calibration: Tensor | None = None,
    callbacks: Sequence[Callback] = (),
    run: Run = Run(),
) -> SearchResult:
    """
    Search, confirm, and say what was found and how good it is. Goes on with a search that the
    study holds a part of.

    On several bundles, a candidate's value is the mean, or the worst, over the models of its
    proxy relative to RIA's on the same model: below 1 it is better. Nothing is confirmed then.

    Args:
        request: What is asked; for several bundles its objective says how they count.
        bundles: One to search on, or several by a name for messages.
        study: The record: :func:`opened_study` opens one in a database. None: a new one in memory.
        model: The bundle's model; needed for perplexities.
        confirm_text: For perplexities; not the calibration windows. Without
            it, or without the model, the best by the objective is not confirmed.
        calibration: Windows that the bundle was made of, for steps that need a text.
        callbacks: As Optuna's: called with the study and a frozen trial after each new trial.
        run: Where it runs, and who watches it.

    Raises:
        InvalidInput: The request breaks a rule, asks for perplexity without a model, or N:M does
            not divide a width; a model is given beside several bundles.
        BundleError: The bundle is of another model; several have no kernel size in common.
        NumericalError: RIA has no value on one of several bundles.
        StudyError: The study holds the trials of another search or of another bundle.
    """
    named = by_name(bundles)
    plan = search_plan(request, named)
    if request.validation is not None and (model is None or confirm_text is None):
        raise InvalidInput(
            "the proxy is validated by perplexities, which need the model and a text: give a model "
            "instead of a bundle, and --confirm-text; or leave --validate out."
        )
    if model is not None:
        only_one(named, "a model").check_model(model.linears)
    if plan.corrections and (model is None or calibration is None):
        raise InvalidInput(
            f"corrections={plan.corrections} compares pruned models with the dense one on "
            "calibration windows: give the model instead of a bundle, and its text."
        )
    evaluate = objective_function(
        request.objective, plan, named, model, confirm_text, run.device, calibration
    )
    origin = origin_of([bundle.origin for bundle in named.values()])
    if study is None:
        study = memory_study(request, bundles, confirm_text)
    check_study(study, named.values())
    describe_study(study, request, plan, origin)
    keys = [str(origin.get("key", "")), *(bundle.rows_sha256 for bundle in named.values())]
    known = KnownRatings(study, request, plan, keys)
    evaluate = known.before(evaluate)
    with run.progress(f"Searching ({request.objective.label})", plan.trials) as advance:
        rated = run_search(study, plan, evaluate, advance, fence=run.fence, callbacks=callbacks)
    islands = Islands([study], [plan])
    correction = None
    if plan.corrections and model is not None and calibration is not None:
        from pho_service.pipeline.correction import correct_best  # loads transformers

        correction = correct_best(
            islands,
            rated,
            request.objective,
            model,
            only_one(named, "a model"),
            calibration,
            run=run,
        )
    measurements = Measurements()
    subject = doubt = qualities = None
    if model is not None and confirm_text is not None:
        from pho_service.pipeline.rating import Subject  # loads transformers

        bundle = only_one(named, "a model")
        subject = Subject(model=model, bundle=bundle, text=confirm_text, calibration=calibration)
    if request.objective.name == "perplexity" and confirm_text is not None:
        measurements = of_objective(rated, confirm_text.measured_on())
    elif subject is not None:
        from pho_service.pipeline.confirmation import confirm_finalists

        count = request.finalists
        if request.validation is not None:
            from pho_service.pipeline.validate import doubted

            qualities, count, doubt = doubted(request, plan, study, subject, run)
        measurements = confirm_finalists(
            islands, rated, count, subject, islands.corrected(correction), run
        )
    result = finish(request, islands, origin, rated, measurements, correction=correction)
    if subject is not None:
        from pho_service.pipeline.deployable import priced

        result = priced(result, study, subject, run)
    if request.steps.reconstruction.wanted:
        from pho_service.pipeline.winner import reconstruct_winner

        settings = request.steps.reconstruction
        result = reconstruct_winner(result, settings, study, subject, run)
    if subject is not None:
        from pho_service.pipeline.references import measure_references, with_perplexities

        good = measure_references(islands, rated, measurements, subject, run)
        result = with_perplexities(result, good)
    mark_chosen(study, result.configuration, result.study_name, result.trial)
    return replace(
        result,
        rated_before=known.taken,
        validation=qualities,
        warnings=[*result.warnings, *([doubt] if doubt else [])],
    )


def of_objective(rated: Sequence[RatedCandidate], measured_on: Mapping[str, Any]) -> Measurements:
    """Return the measurements of a search by perplexity, which are its values."""
    return Measurements(perplexities={r.number: r.value for r in rated}, measured_on=measured_on)


def finish(
    request: SearchRequest,
    islands: Islands,
    origin: Mapping[str, Any],
    rated: Sequence[RatedCandidate],
    measurements: Measurements,
    *,
    correction: Correction | None = None,
    out_of_time: bool = False,
) -> SearchResult:
    """
    Choose the best of all that was found, and write down how.

    Args:
        request: What was asked, of the first island.
        islands: The studies.
        origin: Where what was searched comes from, see :func:`origin_of`.
        rated: Every finished trial, best first by the objective.
        measurements: Measurements of the finalists.
        correction: What corrections of the best came to, if there were any. Without perplexities
            the nearest to the dense model is the result.
        out_of_time: Whether the search ended because its time was used up.

    Returns:
        The result, with the study that the best is in, and its number there.
    """
    rated = [*islands.corrected(correction), *rated]
    measured = measurements.best_first(rated)
    divergences = measurements.divergences
    confirmation = None
    if measured:
        on = {
            **(measurements.measured_on or {}),
            "divergence_tokens": divergences.tokens,
            "evaluations": measurements.evaluations,
        }
        confirmation = Confirmation(perplexity=measured[0][0], **on)
    best = measured[0][1] if measured else rated[0]
    study, number = islands.place(best.number)
    finished = islands.finished
    result = search_result(
        request,
        islands.plan,
        origin,
        study.study_name,
        [*rated],
        measured,
        confirmation,
        divergences,
        ended_after=finished if finished < islands.asked and not out_of_time else None,
        correction=correction,
    )
    if request.objective.over is not None:
        result = with_each_model(result, islands.attributes(rated[0].number)["relative_to_ria"])
    if len(islands.studies) > 1:
        of = {"islands": len(islands.studies), "island": islands.of_island(best.number)}
        search = {**result.configuration.search, **of}
        result = replace(
            result, configuration=result.configuration.model_copy(update={"search": search})
        )
    return replace(result, trial=number)


@contextmanager
def opened_study(
    url: str,
    request: SearchRequest,
    bundles: Bundles,
    confirm_text: "ReportText | None" = None,
) -> Iterator[optuna.Study]:
    """
    Open the study of a search in a database, with what the storage says turned into ours.

    Its name says what is searched: the same request on the same bundles finds it again.

    Args:
        url: URL of the database: ``sqlite:///study.db``.
        request: As for :func:`search_job`.
        bundles: The same.
        confirm_text: The same.

    Raises:
        InvalidInput, BundleError: As for :func:`search_job`.
        StudyError: It cannot be opened, or fails in the ``with`` block.
    """
    name = name_of_study(request, bundles, confirm_text)
    try:
        with open_storage(url) as storage:
            yield open_study(storage, name, direction=request.objective.direction)
    except StorageError as error:
        raise StudyError(f"--study {url}: {error}") from error


def memory_study(
    request: SearchRequest, bundles: Bundles, confirm_text: "ReportText | None" = None
) -> optuna.Study:
    """
    Make a new study in memory, with the name that :func:`opened_study` would give it.

    Raises:
        InvalidInput, BundleError: As for :func:`search_job`.
    """
    name = name_of_study(request, bundles, confirm_text)
    with quiet_optuna():
        return optuna.create_study(study_name=name, direction=request.objective.direction)


def name_of_study(
    request: SearchRequest, bundles: Bundles, confirm_text: "ReportText | None"
) -> str:
    """What a study of a search is called; for the arguments see :func:`search_job`."""
    named = by_name(bundles)
    origin = origin_of([bundle.origin for bundle in named.values()])
    plan = search_plan(request, named)
    return study_name(request, plan, origin, rated_on(request, confirm_text))


def by_name(bundles: Bundles) -> Mapping[str, ProxyBundle]:
    """The bundles by the names of their models."""
    if isinstance(bundles, Mapping):
        return bundles
    return {str(bundles.provenance.get("model", {}).get("name", "model")): bundles}


def search_plan(request: SearchRequest, bundles: Mapping[str, ProxyBundle]) -> SearchPlan:
    """
    The plan of a search on bundles, in the kernel sizes that all of them have.

    Raises:
        InvalidInput: The request breaks a rule, does not say how several bundles count, or N:M or
            what is said of linears does not fit a model.
        BundleError: The bundles have no kernel size in common.
    """
    first, *others = (set(bundle.kernel_sizes) for bundle in bundles.values())
    common = tuple(sorted(first.intersection(*others)))
    if not common:
        raise BundleError(
            f"the bundles {', '.join(bundles)} have no kernel size in common. Calibrate them with "
            "the same --kernel-sizes."
        )
    if len(bundles) > 1 and request.objective.over is None:
        raise InvalidInput("a search over several models needs to be told how they count: over.")
    plan = request.plan(common)
    for bundle in bundles.values():
        bundle.choose(plan.steps.linears, plan.pattern)
    return plan


def origin_of(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where what is searched comes from: the provenance of one bundle, or of all together."""
    return dict(provenances[0]) if len(provenances) == 1 else joint_provenance(provenances)
