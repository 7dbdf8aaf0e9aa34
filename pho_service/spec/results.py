"""
Results of a job's pieces, as they are stored and shown: JSON values with names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from pho_service.spec.configuration import ProxyQuality
from pho_service.spec.document import number
from pho_service.spec.perplexity import Perplexity
from pho_service.spec.recovery import Recovered
from pho_service.spec.tasks import TaskScore


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Result of the calibration of a model."""

    provenance: dict[str, Any] = field(default_factory=dict)  # Provenance of the bundle
    # Hashes of everything that was read, which later pieces compare
    inputs: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    # In how many parts it is to be done, if it is large; the parts are added up then
    shards: int = 0
    key: str | None = None  # Key of the bundle that the parts become
    device: str | None = None  # Type of the device that gives the same last digits


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Whether a part of a calibration was made, since it was not there, and what it took."""

    made: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Result of the search of an island: how many trials it has, and whether its time was up."""

    trials: int = 0
    out_of_time: bool = False
    rated_before: int = 0  # ratings that were taken from other studies


@dataclass(frozen=True, kw_only=True)
class PerplexityRequest:
    """A perplexity to be measured: of a candidate, or of the dense model; which may be a trial."""

    number: int
    candidate: dict[str, Any] | None
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The finalists that are left, and what choosing them took."""

    # Numbers of the trials that get a perplexity on the whole text
    finalists: list[int] = field(default_factory=list)
    # The perplexities to be measured: of these, and of what the result is judged by
    wanted: list[PerplexityRequest] = field(default_factory=list)
    # From the dense model in nats, of all trials that were compared with it
    divergences: dict[int, float] = field(default_factory=dict)
    # Predictions that these are the mean of; None if nothing was compared
    divergence_tokens: int | None = None
    # What choosing and these perplexities take, in perplexities of the whole text
    evaluations: float = 0.0
    # How well each proxy ranks, by name, if that was asked for
    validation: dict[str, ProxyQuality] | None = None
    doubt: str | None = None  # What to know of a proxy that does not rank


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a candidate."""

    perplexity: float | None  # Perplexity of the pruned model; None if it has none, see ``failure``
    sparsity: float | None = None  # The share removed of all prunable weights
    seconds: float = 0.0  # What pruning and measuring took
    # The fields of a confirmation that say what on
    measured_on: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # As of :class:`Perplexity`
    text_sha256: str | None = None  # Hash of the windows
    # How it goes on with prompts of the text, if pruning it once more to write would take long
    written: list[str] = field(default_factory=list)
    failure: str | None = None  # Why a published method or a finalist has no perplexity
    weights_sha256: str | None = None  # Hash of the dense model's weights, in a service

    @property
    def rating(self) -> Perplexity | None:
        """The perplexity as one that can be compared; None if it has none."""
        if self.perplexity is None:
            return None
        return Perplexity(
            perplexity=self.perplexity,
            tokens=self.measured_on["tokens"],
            windows=self.measured_on["text"]["windows"],
            text_sha256=self.text_sha256 or "",
            losses=self.losses,
        )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is shown of a job beside its configuration."""

    # What the result does to each linear, by model
    layers: dict[str, list[list[Any]]] = field(default_factory=dict)
    # How well each proxy ranks, by name, if that was asked for
    validation: dict[str, ProxyQuality] | None = None


@dataclass(frozen=True, kw_only=True)
class TasksMeasured:
    """What one of a job's two models scored in tasks."""

    scores: list[TaskScore]  # By task and metric
    limit: int | None  # Most examples of a task
    bos: bool  # Whether a token stands before each text
    versions: dict[str, str | None]  # Versions of the packages that measured it
    questions_sha256: str  # Hash of the examples; both models have the same
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A pruned model in the artifact store."""

    key: str  # Names the configuration that it was pruned with
    files: list[dict[str, Any]]  # Name, size in bytes and SHA-256 of each
    recovery: Recovered | None = None  # What its recovery came to, if there was one
    speed: str | None = None  # How fast it is beside the dense model, where it was cut for that
    seconds: float = 0.0


MUCH = 0.5  # of the own best's gain: if more of it is lost, the transfer has a warning


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """
    Result of a configuration on a target.

    Attributes:
        target: Its name.
        key: Names everything that the numbers depend on; empty if nothing was measured.
        model: Name, revision, hash of the weights, dtype.
        perplexities: On the report text, by method: ``dense``, ``wanda``, ``ria``,
            ``transferred``, and ``own``, if it was searched for; empty without a model.
        errors: Standard errors of how far these are above dense, as shares, by method; and of the
            logarithm of ``transferred/ria``.
        proxies: By the same methods but ``dense``, lower is better; None where no proxy knows what
            happens to the mask.
        gain: By how much RIA's perplexity is above the transferred configuration's.
        regret: The share of the own best's gain over RIA that the transferred one loses; see
            :func:`regret`.
        proxy_regret: That of the proxies.
        own: The target's own best.
        report: The text, if perplexities were measured.
        warnings: Plain sentences where the configuration does not hold on the target.
        error: Type and message of what a user can act on, if nothing was measured for it.
    """

    target: str
    key: str
    model: dict[str, Any] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    errors: Annotated[dict[str, float], Field(exclude_if=lambda errors: not errors)] = field(
        default_factory=dict
    )
    proxies: dict[str, float | None] = field(default_factory=dict)
    gain: float | None = None
    regret: float | None = None
    proxy_regret: float | None = None
    own: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    error: Annotated[dict[str, str] | None, Field(exclude_if=lambda error: error is None)] = None

    def judged(self) -> "Transfer":
        """With what follows from what was measured."""
        return replace(
            self,
            gain=_difference(self.perplexities, "ria", "transferred"),
            regret=regret(self.perplexities),
            proxy_regret=regret(self.proxies),
            warnings=_warnings(self.target, self.perplexities, self.proxies),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, the error only if there is one."""
        values: dict[str, Any] = TypeAdapter(Transfer).dump_python(self, mode="json")
        return values


def _warnings(
    target: str, perplexities: Mapping[str, float], proxies: Mapping[str, float | None]
) -> list[str]:
    warnings = []
    way_out = f"Search there: pho search {target}"
    for measure, values in (("perplexity", perplexities), ("proxy", proxies)):
        if no_better_than_ria(values):
            warnings.append(
                f"{target}: the {measure} of the transferred configuration, "
                f"{number(values['transferred'])}, is no better than RIA's, "
                f"{number(values['ria'])}: it does not transfer. {way_out}"
            )
    lost = regret(perplexities) if perplexities else regret(proxies)
    if not warnings and lost is not None and lost > MUCH:
        warnings.append(
            f"{target}: {lost:.0%} of what the model's own best gains over RIA is lost. "
            "Use its own."
        )
    return warnings


def regret(values: Mapping[str, float | None]) -> float | None:
    """The share of the own best's gain over RIA that the transferred configuration loses."""
    # 0: as good as the own best. 1: as good as RIA. Below 0: better than the own best. None where
    # the own best is not known, or gains nothing.
    possible = _difference(values, "ria", "own")
    lost = _difference(values, "transferred", "own")
    return None if possible is None or lost is None or possible <= 0 else lost / possible


def no_better_than_ria(values: Mapping[str, float | None]) -> bool:
    """Judge a transferred configuration; False where one of the two is not known."""
    ria, transferred = values.get("ria"), values.get("transferred")
    return ria is not None and transferred is not None and transferred >= ria


def _difference(values: Mapping[str, float | None], above: str, below: str) -> float | None:
    high, low = values.get(above), values.get(below)
    return None if high is None or low is None else high - low
