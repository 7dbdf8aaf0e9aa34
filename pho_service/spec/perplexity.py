"""
Perplexities: how good a model is on a text, how sure that is, and how two compare.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pho_service.spec.document import Document, number, percent

REFERENCES = ("dense", "wanda", "ria")  # what a result is judged by, in this order
_RATIOS = (  # whose errors are kept
    *(("pruned", name) for name in REFERENCES),
    *(("wanda", "dense"), ("ria", "dense"), ("wanda", "ria")),
)
TITLES = {"wanda": "Wanda", "ria": "RIA"}
BLOCK = 64  # tokens whose losses are added up before they are looked at


@dataclass(frozen=True)
class Ratio:
    """
    A perplexity over another one on the same text.

    Attributes:
        error: Standard error of the ratio's logarithm, of paired differences, in nats a token;
            None where it is not known.
    """

    perplexity: float
    reference: float
    error: float | None = None

    @classmethod
    def of_rise(cls, perplexity: float, reference: float, rise_error: float | None) -> Self:
        """Take the standard error of the rise, as the rows of a comparison have it."""
        error = None if rise_error is None else rise_error * reference / perplexity
        return cls(perplexity, reference, error)

    @property
    def rise(self) -> float:
        """The share by which the perplexity is above the reference."""
        return self.perplexity / self.reference - 1

    @property
    def rise_error(self) -> float | None:
        return None if self.error is None else self.error * self.perplexity / self.reference

    @property
    def saved(self) -> str:
        """The share of the reference that is saved: ``32.8 ± 0.7%``."""
        return percent(1 - self.perplexity / self.reference, error=self.rise_error)

    def __str__(self) -> str:
        """The rise: ``+22.6 ± 0.4%``."""
        return percent(self.rise, signed=True, error=self.rise_error)

    @property
    def is_tie(self) -> bool:
        """Whether chance may explain the difference: it is within two standard errors."""
        distance = abs(math.log(self.perplexity / self.reference))
        return self.error is not None and distance < 2 * self.error

    def beside(self, title: str, when: str = "") -> str:
        """``22.6 ± 0.4% above dense (22.60)``, or a tie within two standard errors."""
        if self.perplexity == self.reference:
            return f"the same as {title}"
        named = f"{title} ({number(self.reference)}{when})"
        if self.is_tie:
            return f"statistically tied with {named}"
        side = "above" if self.rise > 0 else "below"
        return f"{percent(abs(self.rise), error=self.rise_error)} {side} {named}"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """
    What was measured of a model on a text.

    Attributes:
        perplexity: exp of the mean loss over predicted tokens.
        tokens: Predicted tokens: every window predicts all but its first.
        windows: Windows rated.
        text_sha256: Hash of these windows.
        losses: The loss of each window, or where there are fewer than 16 of each run of 64
            tokens, summed over its tokens, in nats: what chance is judged by.
    """

    perplexity: float
    tokens: int
    windows: int
    text_sha256: str
    losses: Sequence[float] = ()

    @property
    def error(self) -> float | None:
        """
        Standard error of the perplexity, as of texts of this kind of which these losses are a
        sample. None of fewer than two losses. A difference of two models on the same text is far
        surer than either: see :meth:`against`.
        """
        count = len(self.losses)
        if count < 2:
            return None
        predicted = self.tokens // self.windows
        sizes = [predicted] * count
        if count != self.windows:  # runs, of which the last one of a window may be shorter
            sizes = [min(BLOCK, predicted - at) for at in range(0, predicted, BLOCK)] * self.windows
        mean = sum(self.losses) / self.tokens
        squares = ((x - mean * n) ** 2 for x, n in zip(self.losses, sizes, strict=True))
        return self.perplexity * math.sqrt(sum(squares) * count / (count - 1)) / self.tokens

    def against(self, reference: "Perplexity") -> Ratio:
        """
        Compare with another model on the same windows.

        The standard error of the ratio's logarithm is that of the difference of the mean losses. It
        is None where the losses of one are not known, or there is only one.

        Raises:
            ValueError: They are of different texts.
        """
        if self.text_sha256 != reference.text_sha256:
            raise ValueError("perplexities of different texts do not compare.")
        error, count = None, len(self.losses)
        if count == len(reference.losses) > 1:
            import numpy as np

            differences = np.subtract(self.losses, reference.losses)
            error = float(differences.std(ddof=1)) * math.sqrt(count) / self.tokens
        return Ratio(self.perplexity, reference.perplexity, error)


def ratio_errors(
    measured: Mapping[str, Perplexity], pairs: Iterable[tuple[str, str]]
) -> dict[str, float]:
    """The errors of ratios by their names, such as ``ria/dense``, as far as they are known."""
    errors = {
        f"{name}/{other}": measured[name].against(measured[other]).error
        for name, other in pairs
        if name in measured and other in measured
    }
    return {name: error for name, error in errors.items() if error is not None}


class Perplexities(Document):
    """
    Perplexities on the same windows of one text, which the search did not see.

    Attributes:
        dense: Perplexity of the model before it is pruned.
        pruned: Perplexity of the result.
        wanda: Perplexity of Wanda in the pattern of the search, as published: without the
            search's steps and, at N:M, in the model's own channel order. None if it has none:
            its model gives NaN.
        ria: The same of RIA, in the widest scope of the pattern that is not global, or in that of
            its rows where that was measured, too, and is better.
        errors: Standard errors of the logarithm of ``pruned / dense``, ``pruned / wanda`` and
            ``pruned / ria``, by the names of the latter: of paired differences of windows, or where
            there are fewer than 16 of runs of 64 tokens. Also of ``wanda/dense``, ``ria/dense`` and
            ``wanda/ria``, by these names. Those that are not known are missing.
        ria_scope: Where RIA's weights competed, as ``ria-row`` and ``ria-layer`` say it; None in
            results that do not tell.
    """

    dense: float
    pruned: float
    wanda: float | None = None
    ria: float | None = None
    errors: dict[str, float] = Field(default_factory=dict, exclude_if=lambda errors: not errors)
    ria_scope: Literal["row", "layer"] | None = Field(None, exclude_if=lambda scope: scope is None)
    label: ClassVar[str] = "chosen on this text"  # which text it is, in lists

    @classmethod
    def of(
        cls, pruned: Perplexity, references: Mapping[str, Perplexity], **more: Any
    ) -> Self | None:
        """The perplexities of a result; None where the dense model was not measured."""
        if "dense" not in references:
            return None
        measured = {**references, "pruned": pruned}
        errors = ratio_errors(measured, _RATIOS)
        return cls(
            errors={name.removeprefix("pruned/"): error for name, error in errors.items()},
            **{name: measurement.perplexity for name, measurement in measured.items()} | more,
        )

    @property
    def choice(self) -> str:
        """Tell whether the result was chosen on the text."""
        return self.label

    @property
    def titles(self) -> dict[str, str]:
        """What the published methods are called; which RIA it is, where that is known."""
        return {**TITLES, **({"ria": f"ria-{self.ria_scope}"} if self.ria_scope else {})}

    @property
    def rise(self) -> float:
        """Share by which pruning raises the perplexity."""
        return self.pruned / self.dense - 1

    def ratio(self, reference: str, measured: str = "pruned") -> Ratio | None:
        """The perplexity of the result, or of a method, over another one; None without both."""
        perplexity, base = getattr(self, measured), getattr(self, reference)
        name = reference if measured == "pruned" else f"{measured}/{reference}"
        return Ratio(perplexity, base, self.errors.get(name)) if perplexity and base else None

    @property
    def point(self) -> dict[str, Any]:
        """The fields of a point of a curve that say how good it is."""
        rise = self.ratio("dense")
        return {
            "rise": self.rise,
            "rise_error": rise and rise.rise_error,
            "errors": self.errors,
            "measured_on": self.label,
            **{name: getattr(self, name) for name in REFERENCES},
        }

    @property
    def better_baseline(self) -> str | None:
        """Which of the published methods has the lower perplexity; None where neither has one."""
        values = {name: getattr(self, name) for name in TITLES if getattr(self, name)}
        return min(values, key=values.__getitem__, default=None)

    @property
    def sentence(self) -> str:
        """
        ``Perplexity 27.70: 22.6 ± 0.4% above dense (22.60), 30.6 ± 0.3% below Wanda (39.90);
        chosen on this text``.
        """
        ratios, titles = {name: self.ratio(name) for name in REFERENCES}, self.titles
        parts = [ratio.beside(titles.get(name, name)) for name, ratio in ratios.items() if ratio]
        return f"Perplexity {number(self.pruned)}: {', '.join(parts)}; {self.choice}"

    def __str__(self) -> str:
        """In one line: ``22.60 dense, 27.70 pruned (+22.6 ± 0.4%), Wanda 39.90, RIA 41.20``."""
        methods = {self.titles[name]: getattr(self, name) for name in TITLES}
        pruned = Ratio(self.pruned, self.dense, self.errors.get("dense"))
        return f"{in_words(self.dense, {'pruned': pruned}, methods)}; {self.choice}"


REPORT_TEXT = "report text"


class ReportedPerplexities(Perplexities):
    """
    The same on a report text: in windows that nothing was calibrated or chosen on.

    Attributes:
        tokens: Predicted tokens.
        text: The text with its hash, and how many windows of it.
    """

    tokens: int
    context_length: int
    text: dict[str, Any]
    label: ClassVar[str] = REPORT_TEXT

    @property
    def choice(self) -> str:
        return "nothing was chosen on this text"


def beside_in_words(perplexity: float, beside: Mapping[str, Any]) -> str:
    """The comparison of :func:`pho_service.pipeline.rating.beside` in words."""
    ratio = Ratio.of_rise(perplexity, beside["perplexity"], beside["rise_error"])
    return ratio.beside(Path(beside["model"]["name"]).name)


def in_words(
    dense: float, results: Mapping[str, Ratio], methods: Mapping[str, float | None]
) -> str:
    """
    Perplexities of one text in a line: of results, with their rise over dense and its standard
    error, and of ``wanda``, ``ria`` or others, where they have one.
    """
    return ", ".join(
        [
            f"{number(dense)} dense",
            *(f"{number(ratio.perplexity)} {name} ({ratio})" for name, ratio in results.items()),
            *(f"{TITLES.get(n, n)} {number(value)}" for n, value in methods.items() if value),
        ]
    )
