"""
Rate candidates by what the pruned model predicts: slow, and the truth.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextRecord, record_to_dict
from pho_service.pipeline.pipeline import pruned_model, rate_streamed
from pho_service.progress import Advance
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.divergence import DenseReference, dense_reference, rate_divergence
from pho_service.pruning.masks import model_sparsity
from pho_service.pruning.perplexity import Perplexity
from pho_service.pruning.statistics import Statistics
from pho_service.spec.candidate import Candidate
from pho_service.tuning.plan import Evaluate, Outcome

COMPARED_TOKENS = 512  # of the text that finalists are compared with the dense model on


def windows_key(windows: Tensor) -> str:
    """Hash of tokenised windows: text, tokenizer and the way it is cut."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """
    A text to measure perplexity on, cut for one model.

    Attributes:
        windows: (windows, context_length), int64.
        record: Where it is from.
    """

    windows: Tensor
    record: TextRecord

    @property
    def key(self) -> str:
        """Hash of exactly these windows."""
        return windows_key(self.windows)

    def measured_on(self, divergence_tokens: int | None = None) -> dict[str, Any]:
        """The fields of a confirmation that say what was measured on."""
        return {
            "divergence_tokens": divergence_tokens,
            "tokens": self.windows.shape[0] * (self.windows.shape[1] - 1),
            "context_length": self.windows.shape[1],
            "text": self.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """What is stored with every perplexity."""
        return record_to_dict(self.record, windows=len(self.windows))


def rate_pruned(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    windows: Tensor,
    advance: Advance = lambda _: None,
    *,
    calibration: Tensor | None = None,
) -> tuple[Perplexity, float]:
    """
    Prune a model with a candidate, measure its perplexity, and put the weights back.

    Args:
        model: Dense.
        statistics: Of it.
        candidate: What to prune with.
        windows: (windows, context_length), int64, to measure on.
        advance: Called with 1 after each of them, and with 0 while the model is pruned.
        calibration: Windows for candidates whose steps need a text.

    Raises:
        InvalidInput: They need one, and there is none.

    Returns:
        The perplexity, and the achieved sparsity over the linears that are pruned.
    """
    if model.stream and not candidate.steps.needs_text:
        result, shares = rate_streamed(model, statistics, candidate, windows, advance)
        return result, model_sparsity(model.linears, shares)
    with pruned_model(
        model, statistics, candidate, calibration, advance=lambda _: advance(0)
    ) as sparsity:
        result = measure_perplexity(model, windows, advance=advance)
    return result, model_sparsity(model.linears, sparsity)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    A dense model with all that it takes to prune it with a candidate and to measure the result.

    Attributes:
        model: Dense; it is given back dense.
        bundle: Of the model.
        text: To measure on.
        calibration: Windows for candidates whose steps need a text.
    """

    model: LanguageModel
    bundle: ProxyBundle
    text: ReportText
    calibration: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    What was measured of a candidate.

    Attributes:
        perplexity: Of the pruned model.
        sparsity: The share removed of all prunable weights.
        seconds: What pruning and measuring took.
        measured_on: The fields of a confirmation that say what on.
        text_sha256: Hash of the windows.
    """

    perplexity: float
    sparsity: float
    seconds: float
    measured_on: dict[str, Any]
    text_sha256: str


def measure(subject: Subject, candidate: Candidate, advance: Advance = lambda _: None) -> Measured:
    """
    Prune with a candidate, measure the perplexity, and put the weights back.

    Args:
        subject: What is pruned, and measured on.
        candidate: What to prune with.
        advance: Called with 1 after each window, and with 0 while the model is pruned.

    Raises:
        InvalidInput: The candidate's steps need a text, and the subject has none.
        NumericalError: A score or a logit is NaN or infinite.
    """
    started = time.monotonic()
    rating, sparsity = rate_pruned(
        subject.model,
        subject.bundle.statistics(),
        candidate,
        subject.text.windows,
        advance,
        calibration=subject.calibration,
    )
    return Measured(
        perplexity=rating.perplexity,
        sparsity=sparsity,
        seconds=round(time.monotonic() - started, 3),
        measured_on=subject.text.measured_on(),
        text_sha256=subject.text.key,
    )


def comparing_pays(candidates: Sequence[Candidate], *, stream: bool) -> bool:
    """
    Whether finalists are compared with the dense model before a few of them get a perplexity.

    Not where pruning is what costs, because a text runs through the model for each candidate; nor
    with a streamed model, which is read anew for each, whatever is measured.
    """
    return not stream and not any(candidate.steps.needs_text for candidate in candidates)


def compared_windows(windows: Tensor) -> Tensor:
    """
    The windows of a text that finalists are compared with the dense model on.

    Its beginning: about 512 tokens, at most a quarter of the windows, at least one.
    """
    wanted = COMPARED_TOKENS // windows.shape[1]
    return windows[: max(1, min(wanted, len(windows) // 4))]


class Comparison:
    """
    Compares candidates with the dense model; called with one, it gives its divergence in nats.

    What the dense model predicts is measured before the first candidate, once.

    Args:
        model: Dense, not streamed; it is given back dense each time.
        statistics: Of it.
        text: For the perplexities; the windows are :func:`compared_windows` of it.
        advance: Called with 0 after each window, and when the model is pruned.
    """

    def __init__(
        self,
        model: LanguageModel,
        statistics: Statistics,
        text: ReportText,
        advance: Advance = lambda _: None,
    ) -> None:
        self._model = model
        self._statistics = statistics
        self._windows = compared_windows(text.windows)
        self._advance = advance

    @property
    def key(self) -> str:
        """Hash of the windows."""
        return windows_key(self._windows)

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    @cached_property
    def _reference(self) -> DenseReference:
        return dense_reference(self._model.model, self._windows)

    def __call__(self, candidate: Candidate) -> float:
        """
        Prune with a candidate whose steps need no text, compare, and put the weights back.

        Raises:
            NumericalError: A score or a logit is NaN or infinite.
        """
        reference = self._reference

        def advance(_: int) -> None:
            self._advance(0)

        with pruned_model(self._model, self._statistics, candidate, None, advance=advance):
            return rate_divergence(self._model.model, reference, advance=advance)


def rate_by_perplexity(
    model: LanguageModel, statistics: Statistics, windows: Tensor, calibration: Tensor | None
) -> Evaluate:
    """A function for the search that rates candidates by perplexity: slow, and the truth."""

    def rate(candidate: Candidate) -> Outcome:
        started = time.perf_counter()
        try:
            result, _ = rate_pruned(model, statistics, candidate, windows, calibration=calibration)
        except NumericalError as error:
            return Outcome(value=None, failure=str(error))
        seconds = round(time.perf_counter() - started, 4)
        found = {"perplexity": result.perplexity, "seconds": seconds}
        return Outcome(value=result.perplexity, attributes=found)

    def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
        return [rate(candidate) for candidate in candidates]

    return evaluate
