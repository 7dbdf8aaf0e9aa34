"""
The result of a search, as a configuration and in plain sentences.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from pho_service.errors import field_name
from pho_service.host.machine import versions
from pho_service.spec.configuration import Configuration, Confirmation, ProxyQuality, Rating
from pho_service.spec.document import number
from pho_service.spec.perplexity import Perplexity
from pho_service.tuning.finalists import Divergences
from pho_service.tuning.plan import CHOSEN, RatedCandidate, SearchPlan, SearchRequest
from storage.studies import keep_record, note_trial, record_of

CHANCE = 0.5  # of the vocabulary's size: a dense model's perplexity above it has a warning


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    configuration: Configuration  # The best, and how it was found
    study_name: str  # In the request's database
    trial: int  # The number of the best in it
    warnings: list[str]  # Plain sentences that a user must read
    rated_before: int = 0  # How many ratings were taken from other studies
    measured: Perplexity | None = None  # Of the best, on the text of its confirmation
    # How well each proxy ranks, by name, if that was asked for.
    validation: Mapping[str, ProxyQuality] | None = None


def describe_study(
    study: optuna.Study, request: SearchRequest, plan: SearchPlan, provenance: Mapping[str, Any]
) -> None:
    """Keep in the study what it is a record of, and what its values are called."""
    # What people read is a user attribute; documents, which searches go on with, are records.
    record = record_of(study)
    for key, value in {
        "pattern": str(plan.pattern),
        "scope": plan.pattern.scope.value,
        "objective": request.objective.label,
        "sampler": plan.sampler_name,
        **plan.identity(),
    }.items():
        if key not in record:
            study.set_user_attr(key, value)
    for key, value in {
        "space": plan.space.to_dict(),
        "steps": plan.steps.to_dict(),
        "calibration": dict(provenance),
    }.items():
        if key not in record:
            keep_record(study, key, value)
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([request.objective.label])


def mark_chosen(
    study: optuna.Study, configuration: Configuration, of_study: str, trial: int
) -> None:
    """Mark in a study which trial the result is."""
    # It is the best of those that were measured, and often not the one with the best objective,
    # which is Optuna's ``best_trial``.
    confirmation = configuration.confirmation
    mark = {
        "study": of_study,
        "trial": trial,
        "method": configuration.method,
        "objective": configuration.objective["value"],
        "perplexity": None if confirmation is None else confirmation.perplexity,
    }
    if study.user_attrs.get(CHOSEN) != mark:
        study.set_user_attr(CHOSEN, mark)
    for frozen_trial in study.get_trials(deepcopy=False):
        is_chosen = of_study == study.study_name and frozen_trial.number == trial
        if frozen_trial.user_attrs.get(CHOSEN, False) is not is_chosen:
            note_trial(study, frozen_trial.number, CHOSEN, is_chosen)


def chosen_in(study: optuna.Study) -> int | None:
    """The trial of a study that :func:`mark_chosen` marked; None if it is in another study."""
    mark = study.user_attrs.get(CHOSEN) or {}
    return int(mark["trial"]) if mark.get("study") == study.study_name else None


def search_result(
    request: SearchRequest,
    plan: SearchPlan,
    provenance: Mapping[str, Any],
    name: str,
    rated: list[RatedCandidate],
    measured: list[tuple[Perplexity, RatedCandidate]],
    confirmation: Confirmation | None,
    divergences: Divergences = Divergences(),  # noqa: B008 - frozen
    *,
    ended_after: int | None = None,
) -> SearchResult:
    """Choose the winner and write down how it was found."""
    lowest, best = measured[0] if measured else (None, rated[0])
    by_number = {candidate.number: perplexity for perplexity, candidate in measured}
    border = plan.space.on_border(best.params) if best.candidate.method == "crepe" else []

    def rating(candidate: RatedCandidate) -> Rating:
        perplexity, error = by_number.get(candidate.number), None
        if perplexity is not None and lowest is not None and candidate.number != best.number:
            error = perplexity.against(lowest).error
        return Rating(
            method=candidate.candidate.method,
            trial=candidate.number,
            proxy=candidate.value,
            perplexity=None if perplexity is None else perplexity.perplexity,
            divergence=divergences.by_number.get(candidate.number),
            error=error,
        )

    only_compared = sorted(
        (c for c in rated if c.number in divergences.by_number and c.number not in by_number),
        key=lambda c: divergences.by_number[c.number],
    )
    confirmed = [*(candidate for _, candidate in measured), *only_compared]

    configuration = Configuration(
        method=best.candidate.method,
        coefficients=best.candidate.coefficients,
        steps=best.candidate.steps,
        pattern=str(plan.pattern),
        scope=best.candidate.pattern.scope.value,
        objective={
            "name": request.objective.label,
            "direction": request.objective.direction,
            "value": best.value,
        },
        confirmation=confirmation,
        finalists=[rating(candidate) for candidate in confirmed[:20]],
        baselines=[
            rating(c)
            for c in sorted(rated, key=lambda c: c.number)
            if c.candidate.method != "crepe"
        ],
        border=border,
        search={
            "sampler": plan.sampler_name,
            "trials": plan.trials,
            **plan.identity(),
            "space": plan.space.to_dict(),
            "study": name,
            **({} if ended_after is None else {"finished": ended_after}),
            **({"warm_start": _started(rated, plan)} if plan.warm_start else {}),
        },
        model=provenance.get("model", {}),
        calibration={k: v for k, v in provenance.items() if k != "model"},
        versions=versions("optuna", "cmaes", "torch", "transformers"),
    )
    return SearchResult(
        configuration=configuration,
        study_name=name,
        trial=best.number,
        measured=lowest,
        warnings=_warnings(
            [*_at_chance(provenance)],
            configuration,
            plan,
            ended_after,
            confirmed=bool(measured),
            several=request.objective.over is not None,
        ),
    )


def _started(rated: list[RatedCandidate], plan: SearchPlan) -> list[dict[str, Any]]:
    """The points that a search started from, with their values here."""
    first = len(plan.baselines())
    numbers = range(first, first + len(plan.warm_start))
    values = {r.number: r.value for r in rated if r.number in numbers}
    return [
        {"trial": number, "value": values.get(number), "params": dict(params)}
        for number, params in zip(numbers, plan.warm_start, strict=True)
    ]


def _at_chance(provenance: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each model that predicts no better than chance, as bundles say."""
    several = provenance.get("bundles")
    parts = provenance.get("model", {}).get("models", []) if several else []
    for origin, model in (
        zip(several, parts, strict=True) if several else [(provenance, provenance.get("model", {}))]
    ):
        dense = origin.get("dense")  # bundles that were put together by hand do not say
        if dense and dense["perplexity"] > CHANCE * dense["vocabulary"]:
            yield (
                f"The dense model {Path(model.get('name', 'model')).name} predicts no better than "
                f"chance: its perplexity on {dense['tokens']} tokens is "
                f"{number(dense['perplexity'])}, and its vocabulary has {dense['vocabulary']}. No "
                "pruning of it can be told from another. Check that its weights are trained ones, "
                "that the tokenizer is its own, and the language of the text."
            )


def _warnings(
    warnings: list[str],
    configuration: Configuration,
    plan: SearchPlan,
    ended_after: int | None,
    *,
    confirmed: bool,
    several: bool,
) -> list[str]:
    if ended_after is not None and plan.sampler_name != "hill-climb":
        warnings.append(
            f"The search was stopped after {ended_after} of {plan.trials} trials: its result is "
            "the best of these. Searched again on the same study, it goes on."
        )
    elif ended_after is not None:
        warnings.append(
            f"The search ended by itself after {ended_after} of {plan.trials} trials: the sampler "
            f"{plan.sampler_name} knows no step that improves its best. More trials change "
            "nothing; another sampler or another search space may."
        )
    if not confirmed:
        warnings.append(
            "Not confirmed: no perplexity was measured, so this is the best by the proxy alone. "
            + (
                "Nor were the dense models, Wanda and RIA: each model has its own tokens, and one "
                "after the other is in memory. `pho transfer` measures all of them on each model."
                if several
                else f"Search from the model with {field_name('confirm/text')} to confirm it."
            )
        )
    if configuration.method != "crepe":
        warnings.append(
            f"No candidate of the search was better than the baseline {configuration.method}, "
            "which is the result. More trials or a wider search space may change that."
        )
    for name in configuration.border:
        values = getattr(plan.space, "kernel_sizes" if name == "kernel_size" else name)
        warnings.append(
            f"The best {name.replace('_', ' ')} lies on the border of its range "
            f"({values[0]:g} to {values[-1]:g}); a wider one may hold a better value."
        )
    return warnings
