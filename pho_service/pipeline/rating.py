"""
Rate candidates by what the pruned model predicts: slow, and the truth.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, NumericalError, PhoError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.calibration import drawn_windows
from pho_service.models.loading import LanguageModel
from pho_service.models.saving import recipe_document
from pho_service.models.texts import ReportText, Text, shared
from pho_service.pipeline.pipeline import pruned_model, rate_streamed, whole_masks
from pho_service.pipeline.work import Work
from pho_service.pipeline.writing import written_by
from pho_service.progress import Advance, Progress
from pho_service.pruning.masks import model_sparsity, pack, pruned, unpack
from pho_service.pruning.perplexity import (
    DenseReference,
    block_losses,
    dense_reference,
    perplexity_of,
    require_finite_loss,
    window_divergence,
    window_logits,
)
from pho_service.pruning.statistics import Statistics
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.perplexity import Perplexity
from pho_service.spec.results import Measured
from pho_service.spec.steps import Candidate
from pho_service.tuning.finalists import Losses
from pho_service.tuning.plan import Evaluate, Outcome

COMPARED_TOKENS = 512  # of the text that finalists are compared with the dense model on


def perplexity_on(text: ReportText, model: LanguageModel, progress: Progress) -> Perplexity:
    with progress("Measuring perplexity", len(text.windows)) as advance:
        return measure_perplexity(model, text.windows, advance=advance)


def evaluated(text: ReportText, result: Perplexity) -> dict[str, Any]:
    """The perplexity of a model on a text, with all of the text that it depends on."""
    return {
        "perplexity": result.perplexity,
        "error": result.error,
        "tokens": result.tokens,
        "windows": result.windows,
        "context_length": text.windows.shape[1],
        "text": text.record.source,
        "text_sha256": text.record.sha256,
    }


def favoured(
    text: ReportText, calibration: Tensor | None, chosen_on: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A sentence for each way in which what is measured knows the text."""
    notes, count = [], len(text.windows)
    known = 0 if calibration is None else shared(text.windows, calibration)
    if known:
        notes.append(
            f"Note: {known} of {count} windows were calibrated on: what is pruned is favoured, "
            "most of all where weights are updated."
        )
    for name, other in chosen_on.items():
        if other.get("sha256") == text.record.sha256:
            chose = min(count, other.get("windows") or count)
            notes.append(f"Note: {chose} of {count} windows chose {name}, which is favoured.")
    return notes


def favoured_folder(name: str, model: LanguageModel, source: Text, text: ReportText) -> list[str]:
    """The same of a pruned folder, if its recipe says what it was calibrated and chosen on."""
    try:
        recipe = recipe_document(Path(name))
        about, found = recipe["calibration"], recipe["configuration"]
        chosen_on, windows = (found.get("confirmation") or {}).get("text") or {}, None
        if PurePath(about["text"]["source"]).name == PurePath(str(source)).name:
            sizes = tuple(about["settings"]["kernel_sizes"])
            settings = CalibrationSettings(**{**about["settings"], "kernel_sizes": sizes})
            drawn, record = drawn_windows(model, source, settings)
            same = record.sha256 == about["text"]["sha256"]
            windows = drawn[: settings.samples] if same else None
        return favoured(text, windows, {Path(name).name: chosen_on})
    except (PhoError, AttributeError, KeyError, TypeError):
        return []  # there is no recipe, or it is of another tool or version


def beside(
    rating: Perplexity,
    text: ReportText,
    other: LanguageModel,
    other_text: ReportText,
    progress: Progress,
) -> dict[str, Any]:
    """What another model gives on the same windows, and how far the first one is above it."""
    if other_text.key != text.key:
        raise InvalidInput(
            f"{other.name} cuts {other_text.record.source} into other tokens than the model that "
            "it stands beside, so that their perplexities do not compare. Give a model with the "
            "same tokenizer."
        )
    other_rating = perplexity_on(text, other, progress)
    ratio = rating.against(other_rating)
    return {
        "model": other.to_dict(),
        "perplexity": other_rating.perplexity,
        "error": other_rating.error,
        "rise": ratio.rise,
        "rise_error": ratio.rise_error,
    }


def rate_pruned(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    windows: Tensor,
    advance: Advance = lambda _: None,
    *,
    calibration: Tensor | None = None,
    then: Callable[[], None] = lambda: None,
) -> tuple[Perplexity, float]:
    """Prune a model, measure its perplexity, do what comes ``then``, and put the weights back."""
    if model.stream and not candidate.steps.needs_text:
        result, shares = rate_streamed(model, statistics, candidate, windows, advance)
        return result, model_sparsity(model.linears, shares)
    with pruned_model(
        model, statistics, candidate, calibration, advance=lambda _: advance(0)
    ) as sparsity:
        result = measure_perplexity(model, windows, advance=advance)
        then()
    return result, model_sparsity(model.linears, sparsity)


def measure(
    work: Work,
    candidate: Candidate | None,
    advance: Advance = lambda _: None,
    *,
    raced_losses: Losses = MappingProxyType({}),
    writes: bool = False,
) -> Measured:
    """Prune with a candidate, measure the perplexity, let it write, and put the weights back."""
    started = time.monotonic()
    windows = work.text.windows
    said: dict[str, Any] = {}
    if candidate is None:
        rating, sparsity = measure_perplexity(work.model, windows, advance=advance), 0.0
    elif raced_losses:
        rest = [number for number in range(len(windows)) if number not in raced_losses]
        glance = Glances(work, advance)(candidate, rest)
        losses = {**raced_losses, **glance.losses}
        ordered = [losses[number] for number in range(len(windows))]
        rating, sparsity = perplexity_of(ordered, windows), glance.sparsity
    else:
        rating, sparsity = rate_pruned(
            work.model,
            work.bundle.statistics(),
            candidate,
            windows,
            advance,
            calibration=work.calibration,
            then=lambda: said.update(written_by(work.model, windows) if writes else {}),
        )
    return Measured(
        perplexity=rating.perplexity,
        sparsity=sparsity,
        seconds=round(time.monotonic() - started, 3),
        measured_on=work.text.measured_on(),
        losses=[*rating.losses],
        text_sha256=rating.text_sha256,
        **said,
    )


def compared_count(windows: Tensor) -> int:
    """How many windows of a text finalists are compared with the dense model on."""
    # About 512 tokens, at most a quarter of the windows, at least one.
    wanted = COMPARED_TOKENS // windows.shape[1]
    return max(1, min(wanted, len(windows) // 4))


@dataclass(frozen=True, kw_only=True)
class Glance:
    """Measurements of a candidate on some windows of a text."""

    # Losses of each window, by its number; see
    # :func:`~pho_service.pruning.perplexity.block_losses`.
    losses: dict[int, list[float]]
    # From the dense model on these windows, in nats a token; None if it was not asked for.
    divergence: float | None
    sparsity: float  # The share removed of all prunable weights


class Glances:
    """Prunes with candidates and measures them on some windows of a text at a time."""

    # What the dense model predicts on the windows that candidates are compared with it on is
    # measured before the first of them, once.

    def __init__(
        self, work: Work, advance: Advance = lambda _: None, compared: Sequence[int] = ()
    ) -> None:
        self._work = work
        self._advance = advance
        self._compared = list(compared)
        self._glances: Counter[str] = Counter()  # by candidate
        self._packed: dict[str, dict[str, Tensor]] = {}  # masks of those that come again and again

    @cached_property
    def _reference(self) -> DenseReference:
        windows = self._work.text.windows[self._compared]
        return dense_reference(self._work.model.model, windows)

    def __call__(self, candidate: Candidate, numbers: Sequence[int]) -> Glance:
        """Prune with a candidate, measure, and put the weights back."""
        if candidate.steps.needs_text:
            raise InvalidInput("a candidate whose steps need a text is measured as a whole.")
        compares = bool(self._compared) and list(numbers[: len(self._compared)]) == self._compared
        reference = self._reference if compares else None  # of the dense model: first
        work, losses, divergence = self._work, {}, 0.0
        with (
            pruned(work.model.linears, self._masks(candidate)) as shares,
            torch.inference_mode(),
        ):
            self._advance(0)
            windows = work.text.windows[list(numbers)]
            for place, logits in enumerate(window_logits(work.model.model, windows)):
                losses[numbers[place]] = block_losses(logits, windows[place])
                require_finite_loss(sum(losses[numbers[place]]))
                if reference is not None and place < len(self._compared):
                    divergence += window_divergence(logits, reference, place)
                self._advance(1)
        return Glance(
            losses=losses,
            divergence=None
            if reference is None
            else require_finite_loss(divergence / reference.predictions),
            sparsity=model_sparsity(work.model.linears, shares),
        )

    def _masks(self, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
        """The masks of a candidate; from the third glance on unpacked, not computed again."""
        # Most candidates are dropped before, so few masks are kept: a bit a weight, in main memory.
        key = json.dumps(candidate.to_dict(), sort_keys=True)
        self._glances[key] += 1
        linears, packed = self._work.model.linears, self._packed.get(key)
        if packed is not None:
            for name, bits in packed.items():
                weight = linears[name].weight
                yield name, unpack(bits, tuple(weight.shape)).to(weight.device)
            return
        packed = {}
        work = self._work
        for name, mask in whole_masks(work.model, work.bundle.statistics(), candidate):
            if self._glances[key] > 1:
                packed[name] = pack(mask.keep)
            yield name, mask.keep
        if packed:
            self._packed[key] = packed


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
        attributes = {"perplexity": result.perplexity, "seconds": seconds}
        return Outcome(value=result.perplexity, attributes=attributes)

    def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
        return [rate(candidate) for candidate in candidates]

    return evaluate
