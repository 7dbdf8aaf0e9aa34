"""
The minutes of a job as it runs: the rates of its machine, what they leave, what fits into that.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pho_service.errors import InvalidInput, OutOfMemory, TextError
from pho_service.planning.costs import CARDS, Costs, Machine, PlannedWork, named_machine
from pho_service.planning.minutes import behind, fitted, least_in_rest
from pho_service.planning.plan import Plan, plan_job
from pho_service.planning.shapes import ModelShapes, read_shapes
from pho_service.progress import BlocksTrained, LinearsPruned, Run
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import AFTER_CALIBRATION, OF_THE_TEXT, SizeName

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import MixedText, Text

_TIMED = 512  # tokens that rates are measured on
_SHORTEST, _LEAST_WINDOWS = 32, 16  # windows, where a text has few tokens
_LEAST, _MOST = 0.25, 8.0  # times what was planned; what is outside is no rate
_CREDIT = 0.85  # the least after a calibration, whose speed says little of what follows
_NO_TIME = "the search has left too few of the minutes. Give more"
RATES = 1.25  # times less or more that a stage takes by rates that were measured


class Clock:
    """The minutes of one job on the machine at hand."""

    def __init__(
        self,
        spec: JobSpec,
        shapes: ModelShapes,
        machine: Machine,
        spent: Callable[[], float],
        took: Callable[[Plan], float] | None = None,
    ) -> None:
        """
        ``spent`` gives the seconds that the job has worked, also those before a restart; ``took``
        how long what has a plan's sizes takes, if that is not the job itself.
        """
        self._shapes, self._machine, self.spent, self._took = shapes, machine, spent, took
        self._asked, self.plan = spec, self._planned(spec)
        self._begun_at = spent()
        self._ahead_s = 0.0  # until the winner is known, as planned after the race

    @classmethod
    def of(
        cls, model: "LanguageModel", spec: JobSpec, spent: Callable[[], float],
        path: str | None = None, took: Callable[[Plan], float] | None = None,
    ) -> "Clock":  # fmt: skip
        """By the rates of a loaded model, whose files lie at a path if not where its name says."""
        shapes = read_shapes(spec.model, revision=spec.revision, path=path)
        return cls(spec, shapes, machine_of(model, shapes, spec), spent, took)

    @property
    def left_s(self) -> float:
        """Seconds that are left of the minutes; below 0 if they are over."""
        return 60 * (self.plan.spec.minutes or 0) - self.spent()

    @property
    def _search_left_s(self) -> float:
        """The same without what is for the recovery and the files of the pruned model."""
        if not self.plan.spec.prune:
            return self.left_s
        costs, recovery = self._costs(self.plan.work), self.plan.work.recovery
        after_s = costs.saving() + costs.exported()
        return self.left_s - after_s - (costs.recovery(recovery) if recovery else 0)

    def recovery_s(self) -> float:
        """Seconds that are left for a recovery; 0 where they are too few for it to be any good."""
        costs = self._costs(self.plan.work)
        left_s = self.left_s - costs.reading() - 2 * costs.saving()  # before it, and after it
        left_s -= costs.exported()
        return left_s if left_s >= costs.recovered(least_in_rest(self.plan)) else 0.0

    def _planned(self, spec: JobSpec) -> Plan:
        if not spec.free_sizes:
            return self._plan_of(spec)
        left_s = 60 * (spec.minutes or 0) - self.spent()
        return fitted(spec, self._shapes.context, self._plan_of, left_s, self._took)

    def _plan_of(self, spec: JobSpec) -> Plan:
        return plan_job(spec, self._shapes, self._machine)

    def fit_text(
        self,
        model: "LanguageModel",
        source: "Text | MixedText",
        measured: Sequence["Text"],
        free: Collection[SizeName],
    ) -> bool:
        """
        Take what the texts have, if that is less than there is time for: fewer windows, or shorter
        ones where so few were left, also of the texts to measure on. A confirmation and a recovery
        without a text of their own are left some.
        """
        if not {*free} & {*OF_THE_TEXT}:
            return False
        spec, chosen = self.plan.spec, self.plan.spec.calibration
        confirmed = 0 if spec.confirm is None or spec.confirm.text else spec.confirm.windows
        recovery = spec.recovery if self.plan.work.recovery else None
        recovered = 0 if recovery is None or recovery.text else chosen.samples
        beside = confirmed + recovered
        asked = max(chosen.samples + beside, _LEAST_WINDOWS) * chosen.context_length
        there = _tokens(model, source, chosen.settings(), asked)
        length = chosen.context_length
        if "calibration/context_length" in free:
            others = (_tokens(model, text, chosen.settings(), asked) for text in measured)
            least = min([there, *others])
            while length > _SHORTEST and least < _LEAST_WINDOWS * length:
                length = max(_SHORTEST, length // 2)
        windows = max(1, there // length)
        sizes: dict[SizeName, int | None] = {
            "calibration/samples": chosen.samples, "calibration/context_length": length,
        }  # fmt: skip
        if "calibration/samples" in free and windows < chosen.samples + beside:
            kept = min(confirmed, windows // 4)
            if kept and recovered and "confirm/windows" in free:  # or it would take those, too
                sizes["confirm/windows"] = kept
            kept += min(recovered, windows // 4)
            sizes["calibration/samples"] = max(1, min(chosen.samples, windows - kept))
        if all(spec.sizes[path] == size for path, size in sizes.items()):
            return False
        self.plan = self._planned(spec.sized(sizes))
        later = {*free} & {*AFTER_CALIBRATION} - {*sizes}
        if later:  # are chosen again, for so much text
            fixed = {path: size for path, size in self.plan.spec.sizes.items() if path not in later}
            again, context = self._asked.sized(fixed), self._shapes.context
            self.plan = behind(self.plan, again, context, self._plan_of, self.left_s)
        return True

    def calibrated(self, spec: JobSpec, *, anew: bool) -> JobSpec:
        """
        Choose again what is free yet in a job whose calibration lies behind, by what that took if
        it was made ``anew``.
        """
        planned = self.plan.own_seconds() - self.plan.own_seconds(calibrated=True)
        self._take_note(planned if anew else 0, least=_CREDIT)
        self.plan = self._planned(spec)
        return self.plan.spec

    def in_full(self, asked: int) -> int:
        """How many finalists there is time to prune in full, after their race; at least one."""
        training_s = self._training_s(self.plan.work.steps.reconstruction.passes)
        full_s = self.plan.costs.measured_in_full(self.plan.work.in_full)
        self._take_note(self.plan.own_seconds(calibrated=True) - full_s - training_s, least=1.0)
        count = self.in_full_left(asked)
        self._ahead_s = self._costs(self.plan.work).measured_in_full(count)
        return count

    def in_full_left(self, asked: int) -> int:
        """As :meth:`in_full`, of somebody who has not seen what was done before."""
        measured_s = self._costs(self.plan.work).measured()
        # More passes of the winner's training lower a perplexity by more than more finalists do.
        passes = self._most_passes(self.plan.work.steps.reconstruction.passes)
        left_s = self._search_left_s - self._training_s(passes)
        return max(1, min(asked, int(left_s / measured_s)))

    def another(self, before: int) -> bool:
        """Whether there is time to prune one more finalist in full: by what others took."""
        if before:
            self._take_note(self._ahead_s, least=1.0)
        else:
            self._begun_at = self.spent()
        fits = self.another_left(before)
        self._ahead_s = self._costs(self.plan.work).measured() if fits else 0.0
        return fits

    def another_left(self, before: int) -> bool:
        """As :meth:`another`, of somebody who has not seen what was done before."""
        measured_s = self._costs(self.plan.work).measured()
        return not before or self._search_left_s - self._training_s(1) >= measured_s

    def prunes_on(self, pruned: LinearsPruned) -> bool:
        """Whether there is time to go on with a finalist that is being pruned in full."""
        fits = self.prunes_on_left(pruned)
        if not fits:
            self._take_note(self._ahead_s * pruned.done / pruned.linears, least=1.0)
            self._ahead_s = 0.0
        return fits

    def prunes_on_left(self, pruned: LinearsPruned) -> bool:
        """As :meth:`prunes_on`, of somebody who has not seen what was done before."""
        measured_s = self._costs(self.plan.work).measured()
        times = max(1.0, pruned.linear_s * pruned.linears / measured_s)  # as long as planned
        rest_s = measured_s * (1 - pruned.done / pruned.linears)
        return self._search_left_s >= times * (rest_s + self._training_s(1))

    def watched(self, run: Run) -> Run:
        """What a search runs with that is told what there is time for."""
        run = replace(run, in_full=self.in_full, passes=self.passes, another=self.another)
        return replace(run, prunes_on=self.prunes_on, trains_on=self.trains_on)

    def passes(self, asked: int) -> int:
        """
        How many passes of the winner's training there is time for; at least one, and more than
        the preset's number where nothing else can use the time.
        """
        whole_s = self.plan.own_seconds(calibrated=True) - self._training_s(asked)
        # Whoever goes on with a search has not seen all of it, so that it looks quick.
        least = _LEAST if self._ahead_s else 1.0
        self._take_note(self._ahead_s or whole_s, least=least)
        return self.passes_left(asked)

    def passes_left(self, asked: int) -> int:
        """As :meth:`passes`, of somebody who has not seen what was done before."""
        left_s, most = self._search_left_s, self._most_passes(asked)
        fit = (count for count in range(most, 1, -1) if self._training_s(count) <= left_s)
        return next(fit, 1)

    def trains_on(self, trained: BlocksTrained) -> bool:
        """Whether the next block can have its passes if those behind it have fewer."""
        costs, once = (self._costs(self._trained_work(n)) for n in (trained.passes, 1))
        planned_s, fewer_s = costs.training(), once.training()
        if trained.passes == 1:
            fewer_s = once.pruning(self.plan.work.steps.before_reconstruction)
        block_s = trained.block_s or planned_s / trained.blocks
        behind_s = (trained.blocks - trained.done - 1) * block_s * fewer_s / planned_s
        left_s = self._search_left_s - costs.perplexity() - costs.reported()
        return block_s + behind_s <= left_s

    def _most_passes(self, asked: int) -> int:
        spec = self.plan.spec
        if self.plan.work.recovery is None:  # they have its time
            spec = spec.model_copy(update={"recovery": None})
        return max(asked, spec.most_passes)

    def _training_s(self, passes: int) -> float:
        """Seconds until the winner is pruned, trained and reported, by the rates known now."""
        costs = self._costs(self._trained_work(passes))
        return costs.training() + costs.perplexity() + costs.reported()  # which comes after it

    def _trained_work(self, passes: int) -> PlannedWork:
        work = self.plan.work
        trained = replace(work.steps.reconstruction, passes=passes)
        return replace(work, steps=replace(work.steps, reconstruction=trained))

    def _costs(self, work: PlannedWork) -> Costs:
        """By the rates that are known now, not those of the plan."""
        return Costs(self._shapes, work, self._machine)

    def _take_note(self, planned_s: float, *, least: float) -> None:
        """Learn from what took so long, and was planned to take so long."""
        took = self.spent() - self._begun_at
        self._begun_at = self.spent()
        if planned_s > 0 and took > 0:
            self._machine = slower(self._machine, max(least, took / planned_s))


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a job's minutes leave for a recovery that nobody has asked for."""

    minutes: float | None = None  # None: there is none
    left_out: str | None = None  # Why

    @classmethod
    def of(cls, clock: Clock, check: Callable[[], None]) -> "Rest":
        """What is left, if the check does not find that the recovery lacks text or memory."""
        minutes = round(clock.recovery_s() / 60, 2)
        if not minutes:
            return cls(left_out=_NO_TIME)
        try:
            check()
        except (InvalidInput, TextError, OutOfMemory) as error:
            return cls(left_out=str(error).removesuffix("."))
        return cls(minutes=minutes)


def _tokens(
    model: "LanguageModel", source: "Text | MixedText", how: CalibrationSettings, asked: int
) -> int:
    """How many of so many tokens a text has, in short windows."""
    from pho_service.models.texts import sample_windows  # slow to import

    count = -(-asked // _SHORTEST)
    windows, _ = sample_windows(
        model, source, count=count, context_length=_SHORTEST, bos=how.bos, seed=how.seed
    )
    return windows.numel()


def slower(machine: Machine, times: float) -> Machine:
    """A machine that takes so many times as long."""
    times = min(_MOST, max(_LEAST, times))
    return replace(
        machine,
        products=machine.products / times,
        float_products=machine.float_products / times,
        bandwidth=machine.bandwidth / times,
        launch_s=machine.launch_s * times,
    )


def machine_at_hand(device: str = "cuda") -> Machine:
    """Describe a GPU that torch sees, with the rates of a similar card, or the CPU."""
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        return named_machine("cpu")
    about = torch.cuda.get_device_properties(device)
    like = next((card for name, card in CARDS.items() if name in about.name), CARDS["A100"])
    return like.resized(about.total_memory)


def machine_of(model: "LanguageModel", shapes: ModelShapes, spec: JobSpec) -> Machine:
    """The machine with the rates that a window of the model runs at; a streamed one has none."""
    machine = machine_at_hand(str(model.device))
    if model.stream:
        return machine
    tokens = min(_TIMED, shapes.context or _TIMED)
    window = torch.arange(tokens, device=model.device)[None] % model.vocabulary
    took = []
    with torch.inference_mode():
        for _ in range(3):  # the first one is slower
            began = time.perf_counter()
            model.model(window).logits.sum().item()
            took.append(time.perf_counter() - began)
    costs = plan_job(spec.sized(spec.sizes), shapes, machine).costs
    rate = costs.forward(tokens, tokens, head=True) / min(took)
    return replace(
        machine,
        products=machine.products * rate,
        float_products=machine.float_products * rate,
        uncertainty=RATES,
    )
