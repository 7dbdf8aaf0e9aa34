"""
The steps of a recovery within its time, and the learning rate of each.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pho_service.pipeline.workplace import Workplace
from pho_service.spec.recovery import CHECKS, Recovery

_WARM = 8  # steps until the rate is at its highest
_ASKED = 0.45  # share of the time after which the dense model is asked no more
_LATE = 0.9  # of the steps that are left must fit, or fewer are done


class Pace:
    """
    The steps of a training, and what its rate is at each: it rises at first, and falls to 0 with
    the last one. Where it was given a time and takes longer than was planned, its last step comes
    sooner, and its rate falls faster from where it is then.
    """

    def __init__(self, settings: Recovery, place: Workplace, began: float) -> None:
        self.place = place
        self.planned = self.steps = 0
        self.shortened: list[str] = [*settings.shortened]
        self._time_s = None if settings.tokens is not None else settings.time_s
        self._began, self._again_s = began, 0.0  # what is done once more after the training
        self._seen: tuple[int, float] = (0, began)

    def resume(self) -> None:
        """Go on with the time that attempts before have spent, and how they have shortened it."""
        kept = self.place.values("pace")
        if self._time_s is not None:
            self.shortened = [*kept.get("shortened", ())]
            self._began -= kept.get("spent_s", 0.0)
            self._again_s = kept.get("again_s", 0.0)

    def begin(self, steps: int) -> int:
        """Take note of how many steps are planned; tell how many windows they have now."""
        self.planned = steps
        self.steps = min([steps, *(last for _, last in self._cuts())])
        first = [last for after, last in self._cuts() if after == 0]
        return min([steps, *first])

    def _cuts(self) -> list[tuple[int, int]]:
        words = [word.split(":") for word in self.shortened]
        return [(int(after), int(last)) for after, last in words]

    @contextmanager
    def comes_again(self) -> Iterator[None]:
        """Inside is what will be done once more after the training."""
        began = time.monotonic()
        yield
        self._again_s += time.monotonic() - began

    def asked_enough(self, windows: int) -> bool:
        """Whether the dense model has been asked for too long to be asked about more windows."""
        spent_s = time.monotonic() - self._began
        return self._time_s is not None and spent_s > _ASKED * self._time_s and windows >= CHECKS

    def shorten(self, after: int, last: int) -> None:
        """End sooner, from a step on."""
        self.shortened.append(f"{after}:{last}")
        self.steps = last
        self.keep()

    def keep(self) -> None:
        """Write down what another attempt goes on with: waiting for it takes none of the time."""
        spent_s = time.monotonic() - self._began
        values = {"shortened": self.shortened, "spent_s": spent_s, "again_s": self._again_s}
        self.place.keep_values("pace", values)

    def train_from(self, step: int) -> None:
        """The training begins, or goes on, after a step."""
        self._seen = (step, time.monotonic())

    def look(self, step: int) -> None:
        """See at a check whether the steps that are left fit into the time that is left."""
        before, then = self._seen
        self._seen = step, time.monotonic()
        if self._time_s is None or step >= self.steps or step == before:
            return
        each_s = (time.monotonic() - then) / (step - before)
        left_s = self._time_s - (time.monotonic() - self._began) - self._again_s
        fits = self.place.processes.agreed(max(1, int(left_s / each_s)))
        if fits < _LATE * (self.steps - step):
            self.shorten(step, step + fits)
        self.keep()

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        cuts = self._cuts()
        end = min([self.planned, *(last for after, last in cuts if after == 0)])
        warm = min(_WARM, end // 8)
        if step < warm:
            return step / max(1, warm)
        begin, height = warm, 1.0
        for after, last in cuts:
            if 0 < after <= step:
                height *= max(0.0, (end - after) / max(1, end - begin))
                begin, end = after, last
        return height * max(0.0, (end - step) / max(1, end - begin))
