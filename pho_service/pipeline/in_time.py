"""
What there is time for: how many finalists in full, and how long a winner is trained.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import optuna

from pho_service.progress import Advance, BlocksTrained, LinearsPruned, Run
from pho_service.spec.steps import Candidate, Reconstruction
from storage.studies import keep_record, kept, once, record_of

NO_TIME = "There was no time left to prune it."

_TIME = "time:"  # begins the names of records: whether there was time for a finalist in full
_SHORTENED = "blocks"  # record of a study: where the training of its winner gets shorter
_BLOCKS = 2  # blocks whose time says how long the next one takes
_PART = 8  # a part of so many of a finalist's linears says how long the others take


def in_time(
    study: optuna.Study, name: str, asked: int, fit: Callable[[int], int] | None, run: Run,
    of: Mapping[str, Any] = MappingProxyType({}),
) -> int:  # fmt: skip
    """How many there is time for instead; the study keeps it for whoever goes on."""
    if fit is None:
        return asked
    about = {"asked": asked, **of}
    stored = once(study, name, about, lambda: {name: fit(asked)}, fence=run.fence)
    return int(stored[name])


class OutOfTime(Exception):
    """A finalist is given up."""


class FinalistInTime:
    """Whether there is time to prune a finalist in full, and to go on; the study keeps it."""

    def __init__(self, study: optuna.Study, trial: int, text_sha256: str, run: Run) -> None:
        self._study, self._run, self._name = study, run, f"{_TIME}{trial}"
        self._about = {"text_sha256": text_sha256}
        self._before = 0  # finalists that were begun before it; the first one is never given up

    def begins(self) -> bool:
        """Tell whether there is time to begin it."""
        another = self._run.another
        if another is None:
            return True
        records = [value for key, value in record_of(self._study).items() if key.startswith(_TIME)]
        before = sum(record["left"] for record in records if self._about.items() <= record.items())

        def make() -> dict[str, Any]:
            return {"left": another(before), "before": before}

        stored = once(self._study, self._name, self._about, make, fence=self._run.fence)
        self._before = stored["before"]
        return bool(stored["left"])

    def watched(self, advance: Advance, linears: int) -> Advance:
        """As ``advance``, which each linear that is pruned calls; raises :class:`OutOfTime`."""
        prunes_on, pruned = self._run.prunes_on, [time.monotonic()]
        if not self._before or prunes_on is None:
            return advance
        few = max(1, linears // _PART)

        def look(steps: float) -> None:
            advance(steps)
            pruned.append(time.monotonic())
            done = len(pruned) - 1
            if not few < done < linears:  # before the first linear not only it was pruned
                return
            linear_s = (pruned[-1] - pruned[-1 - few]) / few
            so_far = LinearsPruned(
                before=self._before, done=done, linears=linears, linear_s=linear_s
            )
            if not prunes_on(so_far):
                record = {"left": False, "before": self._before, **self._about}
                with self._run.fence():
                    keep_record(self._study, self._name, record)
                raise OutOfTime

        return look


def trained(
    winner: Candidate, settings: Reconstruction, study: optuna.Study, run: Run
) -> Candidate:
    """A winner with a reconstruction in as many passes as there is time for, in as many blocks."""
    of = _of(winner)
    passes = in_time(study, "passes", settings.passes, run.passes, run, of)
    shortened = kept(study, _SHORTENED, {"passes": passes, **of})
    blocks = shortened.get("blocks", settings.blocks)
    how = replace(settings, passes=passes, blocks=blocks)
    return replace(winner, steps=replace(winner.steps, reconstruction=how))


def _of(winner: Candidate) -> dict[str, Any]:
    """What the time of a training is kept beside: a longer search may have another winner."""
    steps = winner.steps.before_reconstruction
    return {"winner": replace(winner, steps=steps).to_dict()}


class Shortening:
    """Makes the training of a winner shorter where its blocks take too long; the study keeps it."""

    def __init__(self, winner: Candidate, study: optuna.Study, run: Run, blocks: int) -> None:
        self._of, self._study, self._run, self._blocks = _of(winner), study, run, blocks
        self._begun: list[float] = []  # when each block was begun, since it is trained so long

    def __call__(self, number: int, how: Reconstruction) -> Reconstruction:
        self._begun.append(time.monotonic())
        passes = how.passes_of(number)
        if number == 0 or not passes:
            return how
        shorter = how.shorter(number)
        took = (after - before for before, after in pairwise(self._begun[-1 - _BLOCKS :]))
        so_far = BlocksTrained(
            done=number, blocks=self._blocks, passes=passes, shorter=shorter.blocks,
            block_s=max(took, default=None),
        )  # fmt: skip
        assert self._run.trains_on is not None
        if self._run.trains_on(so_far):
            return how
        with self._run.fence():
            record = {"passes": shorter.passes, "blocks": [*shorter.blocks], **self._of}
            keep_record(self._study, _SHORTENED, record)
        self._begun = self._begun[-1:]
        return shorter
