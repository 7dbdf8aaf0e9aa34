"""
What the studies of a search say: trials, and how much each parameter mattered.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.shown.report import ReportTrial
from pho_service.spec.configuration import Configuration
from pho_service.tuning.plan import CORRECTS
from storage.studies import quiet_optuna, record_of

ENOUGH = 50  # candidates for importances: optuna wants five in the best tenth


def trials_of(islands: Sequence[Sequence[FrozenTrial]], count: int) -> list[ReportTrial]:
    """The trials of so many islands by number; baselines, which all share, only once."""
    found = [
        ReportTrial(
            number=trial.number * count + island,
            method=str(trial.user_attrs.get("method", "crepe")),
            value=trial.value if trial.state is TrialState.COMPLETE else None,
        )
        for island, trials in enumerate(islands)
        for trial in trials
        if trial.state.is_finished()
        and (island == 0 or trial.user_attrs.get("method", "crepe") == "crepe")
    ]
    return sorted(found, key=lambda trial: trial.number)


@dataclass(frozen=True, kw_only=True)
class MeasuredTrials:
    """What was measured of trials, by their numbers."""

    perplexities: Mapping[int, float] = field(default_factory=dict)
    divergences: Mapping[int, float] = field(default_factory=dict)


def with_measurements(
    trials: Sequence[ReportTrial],
    measured: MeasuredTrials,
    configuration: Configuration | None,
) -> list[ReportTrial]:
    """Trials with what was measured of them; what a configuration says goes before."""
    perplexities, divergences = {**measured.perplexities}, {**measured.divergences}
    if configuration is not None:
        for rating in (*configuration.baselines, *configuration.candidates):
            if rating.perplexity is not None:
                perplexities[rating.trial] = rating.perplexity
            if rating.divergence is not None:
                divergences[rating.trial] = rating.divergence
    return [
        replace(
            trial,
            perplexity=perplexities.get(trial.number),
            divergence=divergences.get(trial.number),
        )
        for trial in trials
    ]


def measured_in(study: optuna.Study) -> MeasuredTrials:
    """
    The perplexities and divergences that a study keeps, by number of the trial.

    Nothing where they are of several texts: which of them a search chose by is not known.
    """
    found: dict[str, dict[int, float]] = {"perplexity": {}, "divergence": {}}
    for what, values in found.items():
        texts = set()
        for key, kept in record_of(study).items():
            name, _, number = key.partition(":")
            if name == what and number.isdecimal():
                values[int(number)] = float(kept[what])
                texts.add(kept.get("text_sha256"))
        if len(texts) > 1:
            values.clear()
    return MeasuredTrials(perplexities=found["perplexity"], divergences=found["divergence"])


def importances(islands: Sequence[Sequence[FrozenTrial]], *, maximised: bool) -> dict[str, float]:
    """
    How much each parameter of a search mattered for the best tenth of its candidates.

    By PED-ANOVA, Optuna's own choice, which takes a third of a second for 10,000 trials.
    Gives shares that add up to 1, the largest first; of what was searched alone. Empty where there
    are fewer than :data:`ENOUGH` candidates, or nothing mattered.
    """
    # It loads scikit-learn, which takes longer than all that the API needs to start.
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    found = [
        create_trial(value=trial.value, params=trial.params, distributions=trial.distributions)
        for trials in islands
        for trial in trials
        if trial.state is TrialState.COMPLETE and trial.user_attrs.get("method") == "crepe"
        if CORRECTS not in trial.user_attrs  # whose offsets are no parameters
    ]
    if len(found) < ENOUGH:
        return {}
    searched = [
        name
        for name in found[0].params
        if name != "method" and len({trial.params.get(name) for trial in found}) > 1
    ]
    if not searched:
        return {}
    with quiet_optuna():
        study = optuna.create_study(direction="maximize" if maximised else "minimize")
    study.add_trials(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        shares = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(), params=searched
        )
    return {name: float(share) for name, share in shares.items()}
