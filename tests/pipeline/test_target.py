"""The highest sparsity within a target: bisected, and both sides of the answer measured."""

from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pho_service.errors import InvalidInput, TargetMissed
from pho_service.pipeline.curve import CurvePoint, find_points, next_asked, target_found
from pho_service.spec.configuration import Configuration
from pho_service.spec.curve import Target, curve_patterns, parse_rise
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest


@dataclass
class Formula:
    """Points of a model whose perplexity is a formula of the sparsity; dense it is 10."""

    bend: float = 0.0
    error: float | None = None
    asked: list[float] = field(default_factory=list)

    def find(self, request, title):
        del title
        sparsity = request.pattern.sparsity
        self.asked.append(sparsity)
        perplexity = 10 * (1 + sparsity**2 + (self.bend if 0.2 < sparsity < 0.3 else 0))
        return CurvePoint(
            pattern=str(request.pattern), scope="layer", sparsity=sparsity, perplexity=perplexity,
            rise=perplexity / 10 - 1, rise_error=self.error, dense=10.0,
            wanda=perplexity + 1, ria=perplexity + 1, proxy=0.0, trials=1, seconds=0.0, study="s",
            trial=0, configuration=cast(Configuration, None), warnings=[],
        )  # fmt: skip


def run(formula, **target):
    asked = Target(**target)
    requests = [SearchRequest(pattern=Pattern(sparsity=each)) for each in asked.sparsities]
    return target_found(asked, find_points(formula.find, requests, asked))


def test_answer():
    """At 10 * (1 + s^2) a rise of 25 % is reached at 0.5, and the step above was measured."""
    formula = Formula()
    found = run(formula, perplexity_rise=0.25)

    assert found.answer.sparsity == 0.5
    assert found.outside.sparsity == 0.525
    assert found.outside.perplexity > 12.5 >= found.answer.perplexity
    assert [each.sparsity for each in found.points] == sorted(formula.asked)
    assert len(formula.asked) <= 6
    assert len(found.warnings) == 1
    highest = run(Formula(), perplexity_rise=0.9, highest=0.8)
    assert (highest.answer.sparsity, highest.outside) == (0.8, None)
    assert "0.8 is the highest sparsity that was tried" in highest.warnings[1]


@pytest.mark.parametrize(
    ("error", "patterns"), [(0.001, []), (0.006, ["0.5"]), (0.01, ["0.5", "0.525"])]
)
def test_a_point_that_chance_may_have_put_on_its_side_is_told(error, patterns):
    """Of a rise of 26 %, 0.5 is 1 % away and 0.525 is 1.6 %."""
    found = run(Formula(error=error), perplexity_rise=0.26)

    assert [warning.split()[3] for warning in found.warnings[1:]] == patterns
    assert all("statistically tied with the target, 26 %" in each for each in found.warnings[1:])


def test_outside_at_the_lowest_sparsity_refused_with_the_limit_and_all_that_was_measured():
    with pytest.raises(TargetMissed, match=r"at most 10\.01 is wanted.* 0\.1, is above") as refused:
        run(Formula(), perplexity_rise=0.001, lowest=0.1)

    assert "10.10 at 0.1" in str(refused.value)


def test_a_perplexity_that_falls_with_the_sparsity_is_told():
    found = run(Formula(bend=0.3), perplexity_rise=0.02)

    assert any("does not rise everywhere" in warning for warning in found.warnings)


@settings(settings.get_profile("suite"))
@given(st.integers(1, 60), st.data())
def test_bisection(count, data):
    """As a plain loop; the answer and the one after it were asked, and few others."""
    last = data.draw(st.integers(-1, count - 1))
    asked = {}
    while (number := next_asked(count, asked)) is not None:
        assert number not in asked
        asked[number] = number <= last

    assert max((number for number, is_inside in asked.items() if is_inside), default=-1) == last
    assert {max(last, 0), min(last + 1, count - 1)} <= {*asked}
    assert len(asked) <= count.bit_length() + 1


def test_sparsities():
    """Those of a target begin at the lowest, go up by the step, and stay below the highest."""
    target = Target(perplexity_rise=0.05, step=0.1, lowest=0.3, highest=0.65)

    assert target.sparsities == [0.3, 0.4, 0.5, 0.6]
    assert Target(perplexity_rise=0.05).sparsities[::36] == [0.05, 0.95]


def test_a_rise_is_a_percentage_or_a_share():
    assert [parse_rise(text, "--within") for text in ("5%", "0.05", " 120 % ")] == [0.05, 0.05, 1.2]


def test_patterns():
    """Patterns stand by sparsity, N:M after the same ratio, in the scope that is theirs."""
    found = curve_patterns(["2:4", 0.5, "0.3", Pattern.parse("6:8")], "global")

    assert [str(each) for each in found] == ["6:8", "0.3", "0.5", "2:4"]
    assert [each.scope for each in found] == ["row", "global", "global", "row"]
    with pytest.raises(InvalidInput, match="0 patterns are given"):
        curve_patterns([], None)


@given(st.floats(0.005, 0.25), st.floats(0.01, 0.3))
@settings(max_examples=50, deadline=None)
def test_the_shares_of_a_target_of_cuts_are_those_of_their_patterns(step, lowest):
    target = Target(perplexity_rise=0.1, step=step, lowest=lowest, structured=True)
    patterns = target.patterns(None)

    assert [pattern.sparsity for pattern in patterns] == target.sparsities
    assert all(pattern.structured for pattern in patterns)
    assert target.sparsities[-1] <= 0.5
