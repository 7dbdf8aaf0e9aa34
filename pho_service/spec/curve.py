"""
Several sparsities in one question, and jobs that have several patterns.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from pho_service.errors import InvalidInput
from pho_service.spec.document import Document, FieldShown, broken_rule
from pho_service.spec.pattern import Pattern
from pho_service.spec.structure import MOST_OF_THE_BLOCKS, structured_pattern

MOST_PATTERNS = 32
FEW_FINALISTS = 2  # of each of several patterns, or of a cut: most of what takes time
STEP, LOWEST, HIGHEST = 0.025, 0.05, 0.95  # of a target's sparsities


def curve_patterns(values: Sequence[str | float | Pattern], scope: str | None) -> list[Pattern]:
    """Read the patterns of a curve, in the order of their sparsity."""
    patterns = [
        value
        if isinstance(value, Pattern)
        else Pattern.parse(str(value).strip(), None if ":" in str(value) else scope)
        for value in values
    ]
    if not 1 <= len(patterns) <= MOST_PATTERNS:
        raise InvalidInput(
            f"{len(patterns)} patterns are given, but a curve has 1 to {MOST_PATTERNS}. Give some, "
            "such as 0.3,0.5,0.7,2:4."
        )
    for pattern in patterns:
        if pattern.goal is not None:
            raise InvalidInput(
                f"{pattern} is what one cut is for, and a curve compares shares. Ask for it by "
                "itself. `pho curve MODEL --bytes 80MB,95MB` tells what several sizes cost."
            )
    cuts = [pattern for pattern in patterns if pattern.structured]
    if 0 < len(cuts) < len(patterns):
        raise InvalidInput(
            f"{cuts[0]} cuts neurons, heads and blocks, and other patterns of the curve remove "
            "single weights: shares of the two do not compare. Ask for two curves."
        )
    if 0 < sum(cut.of_file for cut in cuts) < len(cuts):
        of_file = next(cut for cut in cuts if cut.of_file)
        raise InvalidInput(
            f"{of_file} is a share of the file, and other patterns of the curve are shares of the "
            "blocks. Give all in one way."
        )
    names = [str(pattern) for pattern in patterns]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidInput(f"the pattern {twice[0]} is given twice. Leave one of them out.")
    return sorted(patterns, key=lambda pattern: (pattern.sparsity, pattern.group))


class Target(Document):
    """The highest sparsity is wanted whose perplexity is still within so much of dense."""

    perplexity_rise: Annotated[
        float,
        FieldShown(
            option="--within",
            label="The most that the perplexity may rise",
            help="Instead of --pattern: find the highest sparsity whose perplexity is at most so "
            "much above the dense model's, such as 5%. Several sparsities are searched.",
            kind="rise",
        ),
    ] = Field(
        gt=0,
        le=10,
        description="Most that the perplexity may rise, as a share of the dense model's: 0.05 is "
        "5 %.",
    )
    step: Annotated[
        float, FieldShown(help="With --within: distance between possible answers, as a sparsity.")
    ] = Field(
        STEP, ge=0.005, le=0.25, description="Distance of the sparsities that may be the answer."
    )
    lowest: Annotated[
        float, FieldShown(help="With --within: the lowest sparsity that may be the answer.")
    ] = Field(LOWEST, gt=0, lt=1, description="The lowest sparsity that is tried.")
    highest: Annotated[
        float, FieldShown(help="With --within: the highest sparsity that may be the answer.")
    ] = Field(
        HIGHEST,
        gt=0,
        lt=1,
        description=f"The highest sparsity that is tried; {MOST_OF_THE_BLOCKS:g} if structured.",
    )
    structured: Annotated[
        bool,
        FieldShown(help="With --within: cut neurons, heads and blocks instead of single weights."),
    ] = Field(
        False,
        exclude_if=lambda structured: not structured,
        description="Whether neurons, heads and blocks are cut, and sparsities are shares of the "
        "blocks' weights.",
    )

    @model_validator(mode="before")
    @classmethod
    def _leaves_blocks(cls, values: Any) -> Any:
        """A share that leaves hardly any block is tried only if it is asked for."""
        if isinstance(values, dict) and values.get("structured") is True:
            return {"highest": MOST_OF_THE_BLOCKS, **values}
        return values

    @model_validator(mode="after")
    def _has_sparsities(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(
                f"lowest={self.lowest:g} is not below highest={self.highest:g}: between them the "
                "answer is searched for"
            )
        return self

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A target of these fields."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc'])) or 'the range'}: {broken_rule(fault)}"
                for fault in error.errors()
            ]
            raise InvalidInput(f"the target breaks a rule: {'; '.join(faults)}.") from error

    @property
    def sparsities(self) -> list[float]:
        """All that may be the answer, lowest first."""
        count = int((self.highest - self.lowest) / self.step + 1e-9) + 1
        return [round(self.lowest + i * self.step, 6) for i in range(count)]

    def patterns(self, scope: str | None) -> list[Pattern]:
        """Return the pattern of each sparsity that may be the answer, lowest first."""
        names = [structured_pattern(s) if self.structured else str(s) for s in self.sparsities]
        return [Pattern.parse(name, scope) for name in names]

    @property
    def most_points(self) -> int:
        """The most of them that a bisection measures."""
        return len(self.sparsities).bit_length()

    def limit(self, dense: float) -> float:
        """The highest perplexity that is within the target."""
        return dense * (1 + self.perplexity_rise)

    def __str__(self) -> str:
        return f"{self.perplexity_rise * 100:g} % of dense{' by cuts' * self.structured}"


def parse_rise(text: str, name: str) -> float:
    """Read ``"5%"`` or ``"0.05"``."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = float("nan")
    if rest.strip() or not 0 < value <= 10:
        raise InvalidInput(
            f"{name} {text!r} is not a rise of the perplexity above 0 % and up to 1000 %. Write "
            f"{name} 5% for a perplexity that is at most 5 % above the dense model's."
        )
    if not percent and value >= 1:
        raise InvalidInput(
            f"{name} {text} would be {value * 100:g} %. Write {name} {text}% or {name} "
            f"{value * 100:g}%, as it is meant."
        )
    return value


def one_of(pattern: str | None, patterns: Sequence[str] | None, target: Target | None) -> None:
    given = {"pattern": pattern, "patterns": patterns, "target": target}
    said = [name for name, value in given.items() if value is not None]
    if not said:
        raise ValueError(
            "say how sparse the model is to be: give a pattern, such as 0.5 or 2:4; several "
            "patterns; or a target, for the highest sparsity that is still good enough"
        )
    if len(said) > 1:
        raise ValueError(
            f"{' and '.join(said)} are given, and each says how sparse the model is to be: give "
            "one of them"
        )


def asked_patterns(fields: Mapping[str, Any]) -> list[Pattern]:
    """The patterns that a job may prune in, by sparsity."""
    target: Target | None = fields["target"]
    if target is not None:
        return target.patterns(fields["scope"])
    if fields["patterns"] is not None:
        return curve_patterns(fields["patterns"], fields["scope"])
    return [Pattern.parse(fields["pattern"], fields["scope"])]


def first_of_kinds(patterns: Sequence[Pattern]) -> list[Pattern]:
    """The first share and the first N:M: what a preset means differs between these two alone."""
    kinds: dict[bool, Pattern] = {}
    for pattern in patterns:
        kinds.setdefault(bool(pattern.group), pattern)
    return [*kinds.values()]
