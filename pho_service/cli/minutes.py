"""
`--minutes` on this machine: the sizes of a search are chosen, told, and kept for the next time.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.cli.options import Terminal, file_source
from pho_service.cli.terminal import say
from pho_service.errors import InvalidInput, ModelError
from pho_service.progress import BlocksTrained, LinearsPruned, Look, Run, Steps, one_bar
from pho_service.spec.minutes import AFTER_CALIBRATION, OF_THE_TEXT, SizeName, put_sizes

if TYPE_CHECKING:
    from optuna import Study

    from pho_service.models.data_sets import TextSource
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import MixedText
    from pho_service.pipeline.minutes import Clock
    from pho_service.pipeline.work import Work
    from pho_service.planning.plan import ComparedWork, Plan
    from pho_service.spec.fields import CalibrationSpec
    from pho_service.spec.job import JobSpec
    from pho_service.spec.recovery import Recovery

# Records of a study: the document of what was asked for, with its sizes; seconds of work; and
# minutes of its recovery.
CHOSEN, SPENT, RESTED = "minutes", "spent_s", "recovery"
_NOTED_S = 5.0  # how often that is written down
# The steps of a plan, by what the titles of their first bars begin with.
_BEGINS = {
    "Calibrating": "calibrate", "Searching": "search", "[": "search", "Rating cuts": "search",
    "Converting": "search",
    "Validating": "confirm", "Comparing": "confirm", "Racing": "confirm", "Confirming": "confirm",
    "Cutting": "write", "Pruning": "write", "Asking the dense model": "recover",
}  # fmt: skip


@dataclass(kw_only=True)
class Budget:
    """The minutes of a search on this machine."""

    spec: "JobSpec"  # With the sizes that were chosen
    model: "LanguageModel | str"  # Loaded, if its rates were measured
    clock: "Clock | None" = None  # None where the time was not asked for
    plan: "Plan | None" = None  # None of several models
    steps: Steps | None = None  # Of the plan, while its bar is shown

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Inside, one bar stands for all that is planned."""
        if self.plan is None:
            yield
            return
        with one_bar(self.plan.steps, say, begins=_BEGINS) as self.steps:
            yield

    def note(self, study: "Study") -> None:
        """Write into a study what was chosen, for whoever goes on with it."""
        from storage.studies import keep_record

        if self.spec.minutes is not None:
            keep_record(study, CHOSEN, self.spec.model_dump(mode="json"))

    def calibrated(self, asked: "JobSpec", work: "Work") -> "JobSpec":
        """Choose again what can be chosen now, tell it, and the options that say the same."""
        if self.clock is None or not asked.free_sizes:
            return self.spec
        again = [path for path in asked.free_sizes if path in AFTER_CALIBRATION]
        if again:
            spec = asked.sized({p: s for p, s in self.spec.sizes.items() if p not in again})
            self.spec = self.clock.calibrated(spec, anew=work.calibration_s is not None)
            for name, seconds in self.clock.plan.steps.items():
                if self.steps is not None and name != "calibrate":
                    self.steps.give(name, seconds)
        options = " ".join(size_options(self.spec))
        left = max(0.0, self.clock.left_s) / 60
        say(f"Chosen, with {left:.0f} minutes left: {options}. They do the same anywhere.")
        return self.spec

    def run(self, inputs: Terminal, work: "Work", study: "Study") -> Run:
        """What the search of a study runs with: it is told what there is time for."""
        run = inputs.run(work.dense)
        if self.clock is None:
            return run
        in_full = _with_notice(self.clock.in_full, "Pruning the best in full", "--in-full")
        trained = "--reconstruction-passes"
        passes = _with_notice(self.clock.passes, "Training the best", trained)
        run = replace(run, look=_noting(study, self.clock), in_full=in_full, passes=passes)
        another, prunes_on = _another(self.clock)
        run = replace(run, another=another, prunes_on=prunes_on)
        return replace(run, trains_on=_trains_on(self.clock))

    def recovery(self, work: "Work", study: "Study") -> "Recovery | None":
        """How what was found is recovered: in what is left, if no time is given for it."""
        from pho_service.cli.recover import recovery_text
        from pho_service.pipeline.minutes import Rest
        from pho_service.pipeline.recover import check_recoverable
        from storage.studies import once

        settings, clock, model = self.spec.recovery_settings(), self.clock, work.dense
        if settings is None or model is None or clock is None or not self.spec.recovers_in_rest:
            return settings

        def check() -> None:
            check_recoverable(model, [*model.linears], recovery_text(self.spec, work), settings)

        rest = Rest(**once(study, RESTED, {}, lambda: asdict(Rest.of(clock, check))))
        if rest.minutes is None:
            say(f"It is not recovered: {rest.left_out}.")
            return None
        say(f"Recovering it in what is left: --recover-minutes {rest.minutes:g}.")
        if self.steps is not None:
            self.steps.give("recover", 60 * rest.minutes)
        return replace(settings, minutes=rest.minutes)


def budget_of(
    asked: "JobSpec",
    source: "TextSource | MixedText",
    study: str,
    inputs: Terminal,
    began: float,
) -> Budget:
    """Choose the sizes that are free; those of an interrupted search are taken from its study."""
    from pho_service.pipeline.cuts import check_goal
    from pho_service.pipeline.minutes import Clock
    from pho_service.planning.minutes import sentence

    model = inputs.model(asked.model)
    check_goal(asked.pruning(), model)
    if asked.minutes is None:
        plan = None
        with suppress(InvalidInput, ModelError):  # whoever needs none can do without
            plan = Clock.of(model, asked, float).plan
            say(sentence(plan))
        return Budget(spec=asked, model=model, plan=plan)
    earlier = _earlier(study, asked)
    before_s = 0.0 if earlier is None else float(earlier[SPENT])

    def spent() -> float:
        return before_s + time.monotonic() - began

    spec = asked if earlier is None else asked.sized(earlier["sizes"])
    clock = Clock.of(model, spec, spent)
    if earlier is not None:
        say(f"Going on with what was chosen for it: {' '.join(size_options(spec))}.")
        return Budget(spec=spec, model=model, clock=clock, plan=clock.plan)
    if not asked.free_sizes:
        say(f"All sizes are given, so --minutes {asked.minutes:g} chooses none.")
    measured = [file_source(text) for text in asked.texts_measured_on]
    fit_text(clock, model, source, measured, asked.free_sizes)
    say(sentence(clock.plan))
    return Budget(spec=clock.plan.spec, model=model, clock=clock, plan=clock.plan)


def fit_text(
    clock: "Clock",
    model: "LanguageModel",
    source: "TextSource | MixedText",
    measured: Sequence["TextSource"],
    free: Collection[SizeName],
) -> None:
    """Take what the texts have, and say so if that is less than there is time for."""
    if clock.fit_text(model, source, measured, free):
        say("The text is shorter than there is time for: all of it is used.")


def calibrated_in_minutes(
    spec: "JobSpec",
    model: "LanguageModel",
    source: "TextSource | MixedText",
    work: "ComparedWork",
    rows: str,
) -> "CalibrationSpec":
    """What is calibrated on where nothing is searched for, if the minutes choose it."""
    from pho_service.pipeline.minutes import Clock
    from pho_service.planning.minutes import about

    free = [path for path in OF_THE_TEXT if path in spec.free_sizes]
    if not free:
        return spec.calibration
    began = time.monotonic()
    spec = spec.model_copy(update={"free_sizes": free})
    clock = Clock.of(model, spec, lambda: time.monotonic() - began, took=work.seconds)
    fit_text(clock, model, source, [], free)
    calibration = clock.plan.spec.calibration
    sizes = f"{calibration.samples} windows of {calibration.context_length} tokens"
    say(f"{sizes}, {rows}: {about(work.seconds(clock.plan))}.")
    options = " ".join(size_options(clock.plan.spec))
    say(f"Chosen: {options}. They do the same anywhere.")
    return calibration


def size_options(spec: "JobSpec") -> Iterator[str]:
    """The options that say the sizes of a search."""
    from pho_service.spec.job_options import document_fields

    fields = document_fields()
    for path, size in spec.sizes.items():
        if size is not None and not (spec.is_cut and path == "in_full"):
            yield from fields[path].words(size)


def _earlier(url: str, asked: "JobSpec") -> dict[str, Any] | None:
    """What was chosen for the same search when it was begun, and how long it has worked."""
    from sqlalchemy.engine import make_url

    from pho_service.pipeline.search import opened_studies
    from pho_service.spec.job_options import value_at
    from storage.studies import all_records

    database = make_url(url)
    if database.get_backend_name() == "sqlite" and not Path(str(database.database)).is_file():
        return None

    def unsized(document: Mapping[str, Any]) -> dict[str, Any]:
        """The document without what the minutes have chosen."""
        same = put_sizes(document, dict.fromkeys(asked.free_sizes))
        return {name: value for name, value in same.items() if name != "free_sizes"}

    wanted = unsized(asked.model_dump(mode="json"))
    with opened_studies(url) as storage:
        assert storage is not None
        for records in all_records(storage):
            document = records.get(CHOSEN) or {}
            if document and unsized(document) == wanted:
                sizes = {path: value_at(document, path) for path in asked.free_sizes}
                return {"sizes": sizes, SPENT: records.get(SPENT, 0.0)}
    return None


def _with_notice(number: Callable[[int], int], does: str, option: str) -> Callable[[int], int]:
    """A choice by the time that is left that says what it has chosen, as an option."""

    def choice(usual: int) -> int:
        count = number(usual)
        if count != usual:
            say(f"{does} in the time that is left: {option} {count}.")
        return count

    return choice


def _another(
    clock: "Clock",
) -> tuple[Callable[[int], bool], Callable[[LinearsPruned], bool]]:
    """Whether there is time for one more finalist, and to go on with it; says once that not."""
    over, work = False, clock.plan.work
    option = "--in-full" if work.in_full < work.finalists else "--finalists"

    def choice(fits: bool, count: int) -> bool:
        nonlocal over
        if not (fits or over):
            over = True
            say(f"Pruning no more finalists in the time that is left: {option} {count}.")
        return not over

    return (
        lambda before: choice(clock.another(before), before),
        lambda pruned: choice(clock.prunes_on(pruned), pruned.before),
    )


def _trains_on(clock: "Clock") -> Callable[[BlocksTrained], bool]:
    """Whether the next block is trained in as many passes; says that it is not."""

    def choice(trained: BlocksTrained) -> bool:
        fits = clock.trains_on(trained)
        if not fits:
            does = "Not training" if trained.passes == 1 else "In one pass, training"
            option = f"--reconstruction-blocks {','.join(map(str, trained.shorter))}"
            say(f"{does} the other blocks in the time that is left: {option}.")
        return fits

    return choice


def _noting(study: "Study", clock: "Clock") -> Look:
    """Write into a study, now and then, how long its job has worked."""
    from storage.studies import keep_record

    noted = 0.0

    def look() -> None:
        nonlocal noted
        if (now := clock.spent()) - noted >= _NOTED_S:
            noted = now
            keep_record(study, SPENT, round(now, 1))

    return look
