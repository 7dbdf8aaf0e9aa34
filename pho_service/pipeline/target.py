"""
The highest sparsity that is still good enough, by bisection on confirmed points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pho_service.errors import TargetMissed
from pho_service.pipeline.curve import CurvePoint, CurvePoints
from pho_service.spec.curve import Target
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import SearchResult

ASSUMED = (
    "Between the measured sparsities the perplexity is assumed to rise with the sparsity: those "
    "that lie between are not measured."
)


@dataclass(frozen=True, kw_only=True)
class TargetFound:
    """
    Attributes:
        target: What was asked.
        points: All that were measured, by sparsity.
        answer: The sparsest of them that is within the target.
        outside: The next sparser one, which is not; None if the answer is the highest sparsity
            that may be tried.
    """

    target: Target
    points: Sequence[CurvePoint]
    answer: CurvePoint
    outside: CurvePoint | None

    @property
    def result(self) -> SearchResult:
        """Of the answer's search, with the target and its points written down."""
        found = self.answer.result
        told = {
            **self.target.model_dump(),
            "dense": self.answer.dense,
            "limit": self.target.limit(self.answer.dense),
            "points": [
                {"sparsity": each.sparsity, "perplexity": each.perplexity} for each in self.points
            ],
        }
        search = {**found.configuration.search, "target": told}
        configuration = found.configuration.model_copy(update={"search": search})
        return replace(
            found, configuration=configuration, warnings=[*found.warnings, *self.warnings]
        )

    @property
    def warnings(self) -> list[str]:
        """Plain sentences that a user must read."""
        told = [ASSUMED]
        if self.outside is None:
            told.append(
                f"{self.answer.pattern} is the highest sparsity that was tried, and it is within "
                f"{self.target}: a sparser model may be, too."
            )
        falls = [b for a, b in pairwise(self.points) if b.perplexity < a.perplexity]
        if falls:
            told.append(
                f"The perplexity at {falls[0].pattern} is below that of a lower sparsity, so it "
                "does not rise everywhere: more --confirm-windows or --trials make it surer."
            )
        return told


def target_job(
    points: CurvePoints, target: Target, request: Callable[[float], SearchRequest]
) -> TargetFound:
    """
    Find the highest sparsity whose confirmed perplexity is within a target.

    The sparsities of the target are bisected, so that about log2 of them are searched. The answer
    was measured, and so was the sparsity one step above it, which is outside.

    Args:
        points: Finds the points.
        target: What is wanted.
        request: Of the search at a sparsity.

    Raises:
        TargetMissed: The lowest sparsity is outside already.
    """
    sparsities = target.sparsities
    found: dict[int, CurvePoint] = {}

    def inside(number: int) -> bool:
        title = f"{sparsities[number]:g}, for {target}"
        found[number] = points.find(request(sparsities[number]), title)
        return found[number].perplexity <= target.limit(found[number].dense)

    best = last_inside(len(sparsities), inside)
    if best is None:
        raise TargetMissed(_missed(target, found))
    return TargetFound(
        target=target,
        points=[found[number] for number in sorted(found)],
        answer=found[best],
        outside=found.get(best + 1),
    )


def last_inside(count: int, inside: Callable[[int], bool]) -> int | None:
    """
    The last of ``count`` numbers from 0 that is inside, where all that follow one outside are, too.

    The answer and the number after it are always asked for; None: the first is outside.
    """
    low, high = -1, count  # inside, outside
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return None if low < 0 else low


def _missed(target: Target, found: dict[int, CurvePoint]) -> str:
    shown = ", ".join(
        f"{found[number].perplexity:.5g} at {found[number].pattern}" for number in sorted(found)
    )
    dense = found[0].dense
    return (
        f"no sparsity is within {target}: the dense model's perplexity is {dense:.5g}, so at most "
        f"{target.limit(dense):.5g} is wanted, and already the lowest sparsity, "
        f"{target.lowest:g}, is above. Measured: {shown}. Allow a higher rise, or search with a "
        "better --preset, such as best."
    )
