"""
Structured pruning as a search: the splits of a share over neurons, heads and blocks are rated by
what they would cost, the best of them are cut, and perplexity chooses.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import create_trial

from pho_service.errors import InvalidInput, field_name
from pho_service.host.machine import let_go_of_memory, versions
from pho_service.models.gguf_file import check_room, converter_for
from pho_service.models.loading import LanguageModel
from pho_service.models.structure import Anatomy, as_cut, block_shapes
from pho_service.models.texts import ReportText
from pho_service.pipeline.bits import bits_and_cuts
from pho_service.pipeline.confirmation import with_report
from pho_service.pipeline.faster import check_runtime, share_for
from pho_service.pipeline.rating import perplexity_on
from pho_service.pipeline.search import Journal, Piece, conduct_pieces, origin, reference_record
from pho_service.pipeline.structured import CutCosts, CutModel, cut_costs, cut_model
from pho_service.pipeline.work import Work
from pho_service.pipeline.writing import side_by_side, written_by
from pho_service.progress import Progress, Run
from pho_service.spec.configuration import Configuration, Confirmation, Rating
from pho_service.spec.pattern import Pattern
from pho_service.spec.perplexity import Perplexities, Perplexity
from pho_service.spec.results import Chosen, Measured, PerplexityRequest, Searched
from pho_service.spec.structure import (
    ESTIMATE,
    BlockShapes,
    Cut,
    Structure,
    structured_pattern,
)
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult, mark_chosen
from storage.records import REFERENCE_NUMBERS
from storage.studies import keep_record, once, record_of

METHOD = "structured"
_RATED = "rated_splits"  # record of a study: how many, once all are
_GOAL = "goal"  # another: what the goal of its pattern takes
_NOT_OF_CUTS = (  # fields of a request
    "objective", "steps", "bounds", "sampler", "warm_start", "validation", "trials", "in_full",
)  # fmt: skip


def search_cut(
    request: SearchRequest, work: Work, study: optuna.Study, run: Run = Run()
) -> SearchResult:
    """
    Find the split of a share with the best perplexity; goes on with what the study holds.

    Raises:
        InvalidInput: There is no model or text, nothing comes near the share, or an option is given
            that cuts have none of.
        ModelError: The model's blocks cannot be cut.
    """
    check_request(request)
    if not work.measures or work.calibration is None:
        raise InvalidInput(
            f"pattern {request.pattern} needs the model, the text that it was calibrated on, and "
            "windows to compare cuts on: a bundle alone says nothing of them. Give a model with a "
            f"text, or {field_name('confirm/text') or 'confirm'}."
        )
    work.bundle.check_model(work.model.linears)
    check_goal(request.pattern, work.model)
    steps = CutPieces(request, work, study, origin(work))
    return conduct_pieces(steps, 1, Journal(run), lambda result: result, SearchResult)


def check_request(request: SearchRequest) -> None:
    """See that nothing is asked that is of scores alone."""
    usual = SearchRequest(pattern=request.pattern)
    given = [name for name in _NOT_OF_CUTS if getattr(request, name) != getattr(usual, name)]
    if given:
        raise InvalidInput(
            f"pattern {request.pattern} rates every split of its share by an estimate of its own, "
            f"so {', '.join(given)} says nothing. Leave it out."
        )


def check_goal(pattern: Pattern, model: LanguageModel) -> None:
    """
    See before any long work that what a cut is for can be told and reached here.

    Raises:
        InvalidInput: The runtime or the converter is not here, or the bytes are too few.
        ModelError: The model's blocks cannot be cut.
    """
    goal = pattern.goal
    if goal is None:
        return
    block_shapes(Anatomy(model))
    if goal.bytes is None:
        check_runtime(goal)
        return
    converter_for(["q8_0"])
    check_room(model, goal.bytes)


class CutPieces:
    """The pieces of a search for a cut."""

    def __init__(
        self, request: SearchRequest, work: Work, study: optuna.Study, origin: Any
    ) -> None:
        self._request, self._work, self._study, self._origin = request, work, study, origin

    @cached_property
    def _opened(self) -> Work:
        return self._work.opened()

    @cached_property
    def _shapes(self) -> BlockShapes:
        return block_shapes(Anatomy(self._opened.model))

    def search(self, piece: Piece, run: Run) -> Searched:
        """Rate the splits of the share, each as a trial, but for those with too few blocks."""
        del piece
        study, shapes = self._study, self._shapes
        if _RATED not in record_of(study):
            run.look()
            share = float(self._goal(run).get("share", 0.0))
            structures = self._request.pattern.splits(shapes, share)
            costs = self._costs(structures, run.progress)
            self._work.check()
            self._describe()
            rated = [structure for structure in structures if costs.knows(structure)]
            for structure in rated[len(study.get_trials(deepcopy=False)) :]:
                with run.fence():
                    study.add_trial(_trial(structure, costs, shapes, structures))
            with run.fence():
                keep_record(study, _RATED, len(rated))
        return Searched(trials=len(study.get_trials(deepcopy=False)))

    def _goal(self, run: Run) -> Mapping[str, Any]:
        """What the goal of the pattern takes, told once for all; nothing where it is a share."""
        pattern = self._request.pattern

        def make() -> Mapping[str, Any]:
            told = _told(pattern, self._opened, self._shapes, run.progress)
            self._work.check()
            return told

        if pattern.goal is None:
            return {}
        return once(self._study, _GOAL, {"pattern": str(pattern)}, make, fence=run.fence)

    def _costs(self, structures: Sequence[Structure], progress: Progress) -> CutCosts:
        work = self._opened
        assert work.calibration is not None
        if structures == [Structure()]:
            return CutCosts.of_nothing(self._shapes)
        return cut_costs(
            work.model, work.calibration, self._shapes, work.bundle.statistics().fisher,
            structures, wanted=self._request.finalists, memo=work.blocks(Structure()),
            progress=progress,
        )  # fmt: skip

    def _describe(self) -> None:
        """Keep in the study what it is a record of."""
        record = record_of(self._study)
        for key, value in (
            ("pattern", str(self._request.pattern)), ("objective", ESTIMATE),
            ("sampler", "every split"),
        ):  # fmt: skip
            if key not in record:
                self._study.set_user_attr(key, value)
        if "calibration" not in record:
            keep_record(self._study, "calibration", dict(self._origin))

    def validation(self) -> list[Piece]:
        return []

    def choose(self, validated: Sequence[Measured], run: Run) -> Chosen:
        """The splits with the lowest estimates are cut and measured, and so is the dense model."""
        del validated, run
        rated = self._rated()[: self._request.finalists]
        finalists = [
            PerplexityRequest(number=t.number, candidate=t.user_attrs["structure"], trial=t.number)
            for t in rated
        ]
        dense = PerplexityRequest(number=REFERENCE_NUMBERS, candidate=None)
        return Chosen(
            finalists=[request.number for request in finalists],
            wanted=[*finalists, dense],
            evaluations=float(len(finalists) + 1),
        )

    def _rated(self) -> list[optuna.trial.FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return sorted(trials, key=lambda trial: (trial.value or 0.0, trial.number))

    def measure(self, piece: Piece, run: Run) -> Measured:
        """Cut a copy of the model, and measure its perplexity; the study keeps it at once."""
        number, given = piece.number, piece.about["candidate"]
        structure = None if given is None else Structure.from_dict(given)
        key = reference_record("dense") if structure is None else f"perplexity:{number}"
        note = None if structure is None else (number, "perplexity")
        return self._measured(structure, self._opened.text, key, run, note)

    def _measured(
        self,
        structure: Structure | None,
        text: ReportText,
        key: str,
        run: Run,
        note: tuple[int, str] | None = None,
    ) -> Measured:
        work = self._opened

        def make() -> dict[str, Any]:
            run.look()
            began, model = time.monotonic(), work.model
            if structure is not None:
                model = cut_copy(work, structure, progress=run.progress).model
            rating = perplexity_on(text, model, run.progress)
            written = written_by(model, text.windows).get("written", [])
            work.check()  # before it is kept
            del model
            let_go_of_memory()
            return {
                "perplexity": rating.perplexity,
                "sparsity": 0.0 if structure is None else self._shapes.removed_share(structure),
                "seconds": time.monotonic() - began,
                "losses": [*rating.losses],
                "written": written,
            }

        kept = once(self._study, key, {"text_sha256": text.key}, make, fence=run.fence, note=note)
        return Measured(**kept, measured_on=text.measured_on(), weights_sha256=self._work.check())

    def finish(
        self, done: Sequence[Searched], chosen: Chosen, measured: Sequence[Measured], run: Run
    ) -> SearchResult:
        """Take the cut with the best perplexity."""
        results = {
            wanted.number: value for wanted, value in zip(chosen.wanted, measured, strict=True)
        }
        dense = results.pop(REFERENCE_NUMBERS)
        ratings = {number: _rating(result) for number, result in results.items()}
        order = sorted(ratings, key=lambda number: ratings[number].perplexity)
        number, best = order[0], ratings[order[0]]
        trials = self._study.get_trials(deepcopy=False)
        structure = Structure.from_dict(trials[number].user_attrs["structure"])
        work, provenance, goal = self._opened, dict(self._origin), self._goal(run)
        written = {
            name: {"written": result.written}
            for name, result in (("dense", dense), ("pruned", results[number]))
        }
        configuration = Configuration(
            method=METHOD,
            cut=Cut.of(structure, self._shapes),
            pattern=str(self._request.pattern),
            scope=self._request.pattern.scope.value,
            perplexities=Perplexities.of(best, {"dense": _rating(dense)}),
            objective={
                "name": ESTIMATE, "direction": "minimize", "value": trials[number].value,
            },
            confirmation=Confirmation(
                perplexity=best.perplexity,
                evaluations=chosen.evaluations,
                **results[number].measured_on,
            ),
            continuations=side_by_side(work.model, work.text.windows, **written),
            finalists=[
                Rating(
                    method=trials[n].user_attrs["method"],
                    trial=n,
                    proxy=trials[n].value,
                    perplexity=ratings[n].perplexity,
                    error=None if n == number else ratings[n].against(best).error,
                )
                for n in order
            ],
            search={
                "sampler": "every split", "trials": done[0].trials,
                "study": self._study.study_name, **({"goal": goal} if goal else {}),
            },
            model=provenance.get("model", {}),
            calibration={k: v for k, v in provenance.items() if k != "model"},
            versions=versions("optuna", "torch", "transformers"),
        )  # fmt: skip
        for other in order[1:]:  # what was worked out of the others is not needed any more
            memo = work.blocks(Structure.from_dict(trials[other].user_attrs["structure"]))
            if memo is not None:
                memo.remove()
        with run.fence():
            mark_chosen(self._study, configuration, self._study.study_name, number)
        result = SearchResult(
            configuration=configuration,
            study_name=self._study.study_name,
            trial=number,
            warnings=[],
            measured=best,
        )
        return self._reported(result, structure, run)

    def _reported(self, result: SearchResult, structure: Structure, run: Run) -> SearchResult:
        """With what was measured on the report text, if there is one."""
        text = self._opened.report
        if text is None:
            return result
        ratings = {
            name: _rating(self._measured(cut, text, f"report:{name}", run))
            for name, cut in (("dense", None), ("pruned", structure))
        }
        return with_report(result, ratings, self._opened)


def _told(pattern: Pattern, work: Work, shapes: BlockShapes, progress: Progress) -> dict[str, Any]:
    """The share of the blocks that a goal takes, and what that was told by."""
    goal = pattern.goal
    assert goal is not None  # or the pattern says the share
    if goal.bytes is None:
        share, saving = share_for(work.model, goal, shapes, progress=progress)
        says = f"{saving.sentence(goal)}, so {structured_pattern(share)} for {goal.times:g} times."
        return {"share": share, "says": says}
    ways = bits_and_cuts(work, converter_for(["q8_0"]), progress).ways_to(goal.bytes)
    says = "the whole model loses least: nothing is cut."
    if ways[0].pattern is not None:
        says = f"a cut and its bits lose least together: {ways[0].pattern}."
    says = f"In {goal.bytes / 1e6:.4g} MB {says}"
    return {"share": ways[0].share, "says": says, "ways": [way.to_dict() for way in ways]}


def _rating(result: Measured) -> Perplexity:
    rating = result.rating
    assert rating is not None  # cuts that give NaN fail
    return rating


def _trial(
    structure: Structure, costs: CutCosts, shapes: BlockShapes, structures: Sequence[Structure]
) -> optuna.trial.FrozenTrial:
    """A split as a trial that has ended: it says which blocks stay, not only how many."""
    placed = structure
    if structure.dropped:
        placed = replace(structure, dropped=0, layers=costs.kept(structure.dropped))
    neurons = shapes.width if structure.neurons is None else structure.neurons
    heads = structure.query_heads or shapes.query_heads[0]
    return create_trial(
        value=costs.of(structure, shapes),
        params={"query_heads": heads, "dropped": structure.dropped, "neurons": neurons},
        distributions={
            "query_heads": CategoricalDistribution(shapes.query_heads),
            "dropped": IntDistribution(0, max(s.dropped for s in structures)),
            "neurons": IntDistribution(0, max(shapes.width, 1)),
        },
        user_attrs={
            "method": str(placed), "scope": "layer", "coefficients": {},
            "structure": placed.to_dict(), "removed": shapes.removed_share(structure),
        },
    )  # fmt: skip


def cut_copy(work: Work, structure: Structure, *, progress: Progress) -> CutModel:
    """Cut a copy of the model of some work, which stays dense."""
    assert work.calibration is not None
    copied = as_cut(replace(work.model, model=copy.deepcopy(work.model.model)))
    return cut_model(
        copied, work.calibration, structure, fisher=work.bundle.statistics().fisher,
        memo=work.blocks(structure), progress=progress,
    )  # fmt: skip
