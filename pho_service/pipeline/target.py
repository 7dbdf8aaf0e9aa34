"""
The highest sparsity that is still good enough, by bisection on confirmed points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pho_service.errors import TargetMissed
from pho_service.pipeline.curve import CurvePoint, CurvePoints
from pho_service.spec.curve import Target
from pho_service.spec.numbers import number
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
        """Result of the answer's search, with the target and its points in it."""
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
        request: Request of the search at a sparsity.

    Raises:
        TargetMissed: The lowest sparsity is outside already.
    """
    found: dict[float, CurvePoint] = {}
    while (sparsity := next_sparsity(target, [*found.values()])) is not None:
        found[sparsity] = points.find(request(sparsity), f"{sparsity:g}, for {target}")
    return target_found(target, [*found.values()])


def next_sparsity(target: Target, points: Sequence[CurvePoint]) -> float | None:
    """The sparsity that the bisection asks for next; None if the points say the answer."""
    sparsities = target.sparsities
    inside = {sparsities.index(each.sparsity): _is_inside(target, each) for each in points}
    number = next_asked(len(sparsities), inside)
    return None if number is None else sparsities[number]


def target_found(target: Target, points: Sequence[CurvePoint]) -> TargetFound:
    """
    The answer that the points say, after the last one that :func:`next_sparsity` asks for.

    Raises:
        TargetMissed: The lowest sparsity is outside already.
    """
    ordered = sorted(points, key=lambda each: each.sparsity)
    inside = [each for each in ordered if _is_inside(target, each)]
    if not inside:
        raise TargetMissed(_missed(target, ordered))
    sparser = (each for each in ordered if each.sparsity > inside[-1].sparsity)
    return TargetFound(
        target=target, points=ordered, answer=inside[-1], outside=next(sparser, None)
    )


def next_asked(count: int, inside: Mapping[int, bool]) -> int | None:
    """
    Return the number that a bisection of ``count`` numbers from 0 asks for next.

    It looks for the last number inside; all that follow one outside are outside, too. None at the
    end, when both that number and the one after it were asked for.

    Args:
        count: How many there are.
        inside: What is known of those that were asked for.
    """
    low, high = -1, count  # inside, outside
    while high - low > 1:
        middle = (low + high) // 2
        if middle not in inside:
            return middle
        low, high = (middle, high) if inside[middle] else (low, middle)
    return None


def _is_inside(target: Target, point: CurvePoint) -> bool:
    return point.perplexity <= target.limit(point.dense)


def _missed(target: Target, points: Sequence[CurvePoint]) -> str:
    shown = ", ".join(f"{number(each.perplexity)} at {each.pattern}" for each in points)
    dense = points[0].dense
    return (
        f"no sparsity is within {target}: the dense model's perplexity is {number(dense)}, so at "
        f"most {number(target.limit(dense))} is wanted, and already the lowest sparsity, "
        f"{target.lowest:g}, is above. Measured: {shown}. Allow a higher rise, or search with a "
        "better --preset, such as best."
    )
