"""
What a search is asked for in Python: the arguments of its functions, each said once, as the request
that the command line makes of its options.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_type_hints

import optuna
from pydantic.fields import FieldInfo

from pho_service.errors import InvalidInput, StudyError
from pho_service.interface.models import opened_bundle, parsed
from pho_service.pipeline.search import Bundles, by_name, origin_of
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.allocation import Allocation
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.linears import Linears
from pho_service.spec.objective import Objective, ObjectiveName, Over, Weighting
from pho_service.spec.pattern import Pattern
from pho_service.spec.presets import DEFAULT_PRESET, Preset
from pho_service.spec.reconstruction import Reconstruction
from pho_service.spec.samplers import SearchOptions, options_of
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps
from pho_service.tuning.request import SearchRequest
from storage.studies import record_of

if TYPE_CHECKING:
    from pho_service.interface.texts import Texts

_SPACE = tuple(field.name for field in fields(SearchSpace))
_OBJECTIVE = Objective()
_STEPS = tuple(field.name for field in fields(Steps))

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
Patterns = str | Sequence[str]  # of the names of linears
Sparsities = Mapping[str, float | str]
Given = ProxyBundle | str | Path  # a bundle, or its file


def arguments(asked: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """
    Make a function of one dataclass take that dataclass's fields as its arguments.

    Its signature is the dataclass's, for `help`, notebooks and type checkers. Its docstring lists
    each argument with what the ``Attributes`` of the dataclass or of its bases say, or else with
    the description of the field.
    """

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        signature = inspect.signature(asked)
        types = _plain({name: each.annotation for name, each in signature.parameters.items()})
        parameters = [
            each.replace(annotation=types[name]) for name, each in signature.parameters.items()
        ]
        returned = inspect.signature(function).return_annotation

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(asked(*args, **kwargs))

        asked.__init__.__qualname__ = function.__name__  # for TypeErrors
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=returned
        )
        about, _, rest = (inspect.getdoc(function) or "").partition("\nRaises:")
        lines = "".join(f"    {name}: {said}\n" for name, said in _described(asked).items())
        call.__doc__ = f"{about}\nArgs:\n{lines}\nRaises:{rest}"
        return call

    return decorate


def _described(asked: Any) -> dict[str, str]:
    """What each field of a dataclass is, in the order of its arguments."""
    said: dict[str, str] = {}
    for each in reversed(asked.__mro__):
        _, _, listed = (inspect.getdoc(each) or "").partition("\nAttributes:\n")
        said |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
        for field in fields(each) if each is not object else ():
            if field.name not in said:
                infos = (each for each in get_args(field.type) if isinstance(each, FieldInfo))
                for about in (each.description for each in infos if each.description):
                    said[field.name] = "\n        ".join(wrap(about, 76))
    return {name: said[name] for name in inspect.signature(asked).parameters}


def _plain(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Types without what pydantic reads of them; those that are text stay as they are."""
    known = {name: each for name, each in annotations.items() if not isinstance(each, str)}
    return {**annotations, **get_type_hints(type("", (), {"__annotations__": known}))}


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
class LinearArguments:
    """
    Which linears are pruned.

    Attributes:
        targets: Linears to prune, all by default: names, globs (``*.down_proj``), or regular
            expressions after ``re:``.
        ignore: Linears that stay dense, in the same form; they come before ``targets``.
        sparsities: Linears with a sparsity of their own, by the same patterns:
            ``{"*.layers.0.*": 0.3}``; for N:M the N to keep of the same M.
    """

    targets: Patterns = ()
    ignore: Patterns = ()
    sparsities: Sparsities | None = None

    @property
    def linears(self) -> Linears:
        """The same as one value; one pattern may stand for a list of one."""
        targets, ignore = self.targets, self.ignore
        return Linears(
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
            sparsities=dict(self.sparsities or {}),
        )


@dataclass(frozen=True, kw_only=True)
class MethodArguments(LinearArguments):
    """
    What candidates are, and how they are rated.

    Attributes:
        scope: Where weights compete: ``row``, ``layer`` or ``global``; None is ``layer``, and
            ``row`` for N:M.
        preset: ``score``, ``crepe``, ``crepe-plus`` or ``best``.
        objective: What candidates are rated by. With ``gini``, a study of one's own is to be
            created with ``direction="maximize"``.
        weighting: How activation reconstruction adds up the errors of layers and rows.
        space: Bounds of the search by name, ``{"row_share": (0.2, 0.8), "kernel_sizes": (3, 5)}``;
            one number fixes a value.
        steps: What every candidate goes through, where it is not the preset's:
            ``{"allocation": "owl", "permutation": ..., "repruning": ..., "update": ...,
            "shrinkage": 1.0, "reconstruction": "block"}``.
    """

    scope: str | None = None
    preset: str = DEFAULT_PRESET
    objective: ObjectiveName = _OBJECTIVE.name
    weighting: Weighting = _OBJECTIVE.weighting
    space: Mapping[str, Any] | None = None
    steps: Mapping[str, Any] | None = None

    def request(
        self,
        pattern: str | float | Pattern,
        *,
        bundles: int = 1,
        over: Over | None = None,
        **options: Any,
    ) -> SearchRequest:
        """The request for a pattern, with more of its fields as ``options``."""
        parts = parsed(pattern, self.scope)
        preset = Preset.of(self.preset, parts).changed(self._steps(), self._bounds())
        asked = Objective(name=self.objective, weighting=self.weighting, over=over)
        return SearchRequest(
            pattern=parts,
            objective=asked.over_models(bundles),
            bounds=preset.bounds,
            steps=preset.steps,
            **options,
        )

    def _steps(self) -> dict[str, Any]:
        steps = dict(self.steps or {})
        _check_names("steps", steps, _STEPS)
        for name, part in (("allocation", Allocation), ("reconstruction", Reconstruction)):
            if isinstance(steps.get(name), str):
                steps[name] = part(method=steps[name])
            if isinstance(steps.get(name), Mapping):
                steps[name] = part(**steps[name])
        if linears := self.linears:
            if "linears" in steps:
                raise InvalidInput(
                    "steps has linears, and targets, ignore or sparsities are given too. Give one "
                    "of them."
                )
            steps["linears"] = linears
        if isinstance(steps.get("linears"), Mapping):
            steps["linears"] = Linears(**steps["linears"])
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


@dataclass(frozen=True, kw_only=True)
class SearchArguments(SearchOptions, MethodArguments):
    """
    What every search takes besides.

    Attributes:
        tokenizer: The model's own; not needed with a bundle that ``pho.calibrate`` gave.
        confirm: Text for the final perplexities. Without it, windows of the calibration's text
            are used that were held out.
        texts: The calibration's text, for steps that run it through the model; not needed with a
            bundle that ``pho.calibrate`` gave.
        confirm_windows: Windows of the text for the final perplexities.
        progress: Show bars on stderr.
    """

    tokenizer: Any = None
    confirm: "Texts | None" = None
    texts: "Texts | None" = None
    confirm_windows: int = 16
    progress: bool = False

    def request(self, pattern: str | float | Pattern, **more: Any) -> SearchRequest:
        """The request for a pattern, with the options of the search."""
        return super().request(pattern, **options_of(self), **more)


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
