"""
What the pieces of a job give, as it is stored and shown: JSON values with names.
"""

from dataclasses import dataclass, field
from typing import Any

from pho_service.spec.configuration import ProxyQuality


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """
    Result of the calibration of a model.

    Attributes:
        provenance: Provenance of the bundle.
        inputs: Hashes of everything that was read, which later pieces compare.
        seconds: What it took.
    """

    provenance: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Result of the search of an island: how many trials it has, and whether its time was up."""

    trials: int = 0
    out_of_time: bool = False
    rated_before: int = 0  # ratings that were taken from other studies


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A perplexity to be measured: of a candidate, or of the dense model; which may be a trial."""

    number: int
    candidate: dict[str, Any] | None
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """
    The finalists that are left, and what choosing them took.

    Attributes:
        finalists: Numbers of the trials that get a perplexity on the whole text.
        wanted: The perplexities to be measured: of these, and of what the result is judged by.
        divergences: From the dense model in nats, of all trials that were compared with it.
        divergence_tokens: Predictions that these are the mean of; None if nothing was compared.
        evaluations: What choosing and these perplexities take, in perplexities of the whole text.
        correction: What corrections of the best came to, if there were any.
        validation: How well each proxy ranks, by name, if that was asked for.
        doubt: What to know of a proxy that does not rank.
    """

    finalists: list[int] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    divergences: dict[int, float] = field(default_factory=dict)
    divergence_tokens: int | None = None
    evaluations: float = 0.0
    correction: dict[str, Any] | None = None
    validation: dict[str, ProxyQuality] | None = None
    doubt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    What was measured of a candidate.

    Attributes:
        perplexity: Perplexity of the pruned model; None if it has none, see ``failure``.
        sparsity: The share removed of all prunable weights.
        seconds: What pruning and measuring took.
        measured_on: The fields of a confirmation that say what on.
        text_sha256: Hash of the windows.
        failure: Why a published method has no perplexity.
        weights_sha256: Hash of the dense model's weights, in a service.
    """

    perplexity: float | None
    sparsity: float | None = None
    seconds: float = 0.0
    measured_on: dict[str, Any] = field(default_factory=dict)
    text_sha256: str | None = None
    failure: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """
    What is shown of a job beside its configuration.

    Attributes:
        layers: What the result does to each linear, by model.
        validation: How well each proxy ranks, by name, if that was asked for.
    """

    layers: dict[str, list[list[Any]]] = field(default_factory=dict)
    validation: dict[str, ProxyQuality] | None = None
