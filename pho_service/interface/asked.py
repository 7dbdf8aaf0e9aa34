"""
What a search is asked for in Python, as the request that the command line makes of its options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from pho_service.errors import InvalidInput, StudyError
from pho_service.interface.models import Choice, chosen, opened_bundle, parsed
from pho_service.pipeline.search import Bundles, by_name, origin_of
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.allocation import Allocation
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.linears import Linears
from pho_service.spec.objective import Objective, ObjectiveName, Over, Weighting
from pho_service.spec.pattern import Pattern
from pho_service.spec.presets import Preset
from pho_service.spec.reconstruction import Reconstruction
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps
from pho_service.tuning.request import SearchRequest
from storage.studies import record_of

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_SPACE = tuple(field.name for field in fields(SearchSpace))
_OBJECTIVE = Objective()
_STEPS = tuple(field.name for field in fields(Steps))

Patterns = str | Sequence[str]  # of the names of linears
Sparsities = Mapping[str, float | str]
Given = ProxyBundle | str | Path  # a bundle, or its file


def given_linears(targets: Patterns, ignore: Patterns, sparsities: Sparsities | None) -> Linears:
    """Which linears are pruned; one pattern may stand for a list of one."""
    return Linears(
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        sparsities=dict(sparsities or {}),
    )


def validation_of(candidates: int | None) -> ValidationSpec | None:
    """How a search's proxy is validated, on so many random candidates; None leaves it out."""
    if candidates is None:
        return None
    if not 8 <= candidates <= 1000:
        raise InvalidInput(
            f"validate={candidates} is not in 8..1000: so many random candidates get a perplexity. "
            "Give 40, say, or leave it out."
        )
    return ValidationSpec(candidates=candidates)


def given_bundles(bundle: Given | Mapping[str, Given]) -> Bundles:
    """One bundle, or several by the names of their models, each in memory or from its file."""
    if isinstance(bundle, Mapping):
        return {name: opened_bundle(each) for name, each in bundle.items()}
    return opened_bundle(bundle)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The fields of a search that are the same for `pho.search` and `pho.objective`."""

    pattern: str | float | Pattern
    scope: str | None
    preset: str
    objective: ObjectiveName
    weighting: Weighting
    over: Over | None
    space: Mapping[str, Any] | None
    steps: Mapping[str, Any] | None
    linears: Linears

    def request(
        self,
        *,
        bundles: int = 1,
        sampler: "str | BaseSampler" = "cmaes",
        trials: int = 200,
        seed: int = 0,
        finalists: int = 5,
        warm_start: Sequence[Choice] = (),
        corrections: int = 0,
        validate: int | None = None,
    ) -> SearchRequest:
        """
        The request, complete.

        Raises:
            InvalidInput: A name that is not known, or a value that breaks a rule.
        """
        pattern = parsed(self.pattern, self.scope)
        preset = Preset.of(self.preset, pattern).changed(self._steps(), self._bounds())
        asked = Objective(name=self.objective, weighting=self.weighting, over=self.over)
        return SearchRequest(
            pattern=pattern,
            objective=asked.over_models(bundles),
            bounds=preset.bounds,
            steps=preset.steps,
            sampler=sampler,
            trials=trials,
            seed=seed,
            finalists=finalists,
            warm_start=tuple(chosen(each).candidate() for each in warm_start),
            corrections=corrections,
            validation=validation_of(validate),
        )

    def _steps(self) -> dict[str, Any]:
        steps = dict(self.steps or {})
        _check_names("steps", steps, _STEPS)
        if isinstance(steps.get("allocation"), str):
            steps["allocation"] = Allocation(method=steps["allocation"])
        if isinstance(steps.get("allocation"), Mapping):
            steps["allocation"] = Allocation(**steps["allocation"])
        if isinstance(steps.get("reconstruction"), str):
            steps["reconstruction"] = Reconstruction(method=steps["reconstruction"])
        if isinstance(steps.get("reconstruction"), Mapping):
            steps["reconstruction"] = Reconstruction(**steps["reconstruction"])
        if self.linears:
            if "linears" in steps:
                raise InvalidInput(
                    "steps has linears, and targets, ignore or sparsities are given too. Give one "
                    "of them."
                )
            steps["linears"] = self.linears
        if isinstance(steps.get("linears"), Mapping):
            steps["linears"] = Linears.from_dict(steps["linears"])
        return steps

    def _bounds(self) -> dict[str, Any]:
        space = dict(self.space or {})
        _check_names("space", space, _SPACE)
        return {
            name: (float(value), float(value))
            if isinstance(value, (int, float))
            else tuple(sorted(value))
            if name == "kernel_sizes"
            else tuple(value)
            for name, value in space.items()
        }


def preset_request(
    preset: str,
    pattern: Pattern,
    linears: Linears,
    *,
    trials: int,
    finalists: int,
    corrections: int,
) -> SearchRequest:
    """
    The request of a preset's search, with the defaults for all else.

    Raises:
        InvalidInput: The preset is not known, or a number breaks a rule.
    """
    asked = Asked(
        pattern=pattern, scope=None, preset=preset, objective=_OBJECTIVE.name,
        weighting=_OBJECTIVE.weighting, over=None, space=None, steps=None, linears=linears,
    )  # fmt: skip
    return asked.request(trials=trials, finalists=finalists, corrections=corrections)


def _check_names(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InvalidInput(f"{what}: {name!r} is not one of {', '.join(known)}.")


def check_study_is_of(study: optuna.Study, bundles: Bundles, request: SearchRequest) -> None:
    """
    See before anything is written that a study is new, or of this search on these bundles.

    Raises:
        StudyError: It is of something else.
    """
    known = record_of(study)
    if "pattern" not in known:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name!r} holds trials that were not made by PHO. Give a new "
                "study."
            )
        return
    for what, mine in (
        ("pattern", str(request.pattern)),
        ("scope", request.pattern.scope.value),
        ("objective", request.objective.label),
    ):
        if known.get(what) != mine:
            raise StudyError(
                f"study {study.study_name!r} is of another search: its {what} is "
                f"{known.get(what)}, and this is {mine}. Give another study."
            )
    theirs, ours = known.get("steps", {}).get("linears"), request.steps.to_dict().get("linears")
    if theirs != ours:
        raise StudyError(
            f"study {study.study_name!r} is of another search: its linears are "
            f"{theirs or 'all'}, and these are {ours or 'all'}. Give another study."
        )
    check_bundle_of(study, bundles)


def check_bundle_of(study: optuna.Study, bundles: Bundles) -> None:
    """
    Raises:
        StudyError: A study says that it is of another bundle.
    """
    named = by_name(bundles)
    key = origin_of([bundle.origin for bundle in named.values()]).get("key")
    known = record_of(study).get("calibration", {}).get("key")
    if known is not None and known != key:
        raise StudyError(
            f"study {study.study_name!r} is of another bundle, {known[:12]}, and this one is "
            f"{str(key)[:12]}: another model, or calibrated on another text or with other "
            "settings. Give the bundle of the study, or another study."
        )


def plain_bundle(bundle: ProxyBundle) -> ProxyBundle:
    """The bundle alone, without what is kept beside it in memory."""
    return ProxyBundle(layers=bundle.layers, inputs=bundle.inputs, provenance=bundle.provenance)
