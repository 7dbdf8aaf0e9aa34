"""
A result with all that is known of it, from a configuration, a job or a study.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pho_service.library import Gain, MeasuredBy, gain_over
from pho_service.spec.configuration import Configuration, Continuation
from pho_service.spec.document import listed
from pho_service.spec.perplexity import Perplexities
from pho_service.spec.recovery import Recovered
from pho_service.spec.structure import ESTIMATE

_DIGITS = 6  # of an error and a sparsity that are kept


@dataclass(frozen=True, kw_only=True)
class LayerCell:
    """
    The linears of one kind (``self_attn.q_proj``) in a block (``model.layers.3``): one, or all
    experts, with the means of the output's error relative to its energy, and of the sparsity.
    """

    block: str
    kind: str
    error: float
    sparsity: float

    def to_list(self) -> list[Any]:
        """Return JSON values; a job keeps hundreds of these."""
        return [self.block, self.kind, self.error, self.sparsity]

    @classmethod
    def of(cls, values: list[Any]) -> Self:
        """Read the values of :meth:`to_list`."""
        block, kind, error, sparsity = values
        return cls(block=block, kind=kind, error=error, sparsity=sparsity)


def layer_cells(errors: Mapping[str, float], sparsities: Mapping[str, float]) -> list[LayerCell]:
    """Sort linears by block and kind, in the order of the model."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in errors:
        members.setdefault(_place(name), []).append(name)
    return [
        LayerCell(
            block=block,
            kind=kind,
            error=_mean([errors[name] for name in names]),
            sparsity=_mean([sparsities[name] for name in names]),
        )
        for (block, kind), names in members.items()
    ]


def _place(name: str) -> tuple[str, str]:
    """The block and the kind of a linear: its name up to the first number, and what follows."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return "", name
    kinds = [part for part in parts[first + 1 :] if not part.isdecimal()]
    return ".".join(parts[: first + 1]), ".".join(kinds)


def _mean(values: list[float]) -> float:
    return float(f"{sum(values) / len(values):.{_DIGITS}g}")


Subject = Literal["search", "transfer", "study"]


@dataclass(frozen=True, kw_only=True)
class ReportTrial:
    """A trial, by its number among all islands; without a value it has failed."""

    number: int
    method: str
    value: float | None
    perplexity: float | None = None
    divergence: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)  # Its coefficients, where they are read

    @property
    def is_baseline(self) -> bool:
        return self.method != "crepe"

    @property
    def in_words(self) -> str:
        """Its coefficients: ``row share 0.2500, kernel size 9``."""
        names = [name for name in self.params if name != "method"]
        return listed([(name.replace("_", " "), self.params[name]) for name in names])


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Duration of a stage; None before it began."""

    kind: str
    done: bool
    seconds: float | None
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known of a job or of a study. What is empty or None is not known."""

    title: str
    subject: Subject  # A search or a transfer of a service, or a study of `pho search`
    made_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: str = ""  # State of the job; empty for a study
    asked: Mapping[str, str] = field(default_factory=dict)  # What was asked, in words
    error: str | None = None
    warnings: Sequence[str] = ()
    configuration: Configuration | None = None  # What was found; of a transfer, what is transferred
    recovery: Recovered | None = None  # What the recovery of the pruned model came to
    speed: str | None = None  # How fast it is, where it was cut for a speed
    objective: str = "objective"  # Its label: ``activation-reconstruction/blend``
    maximised: bool = False
    trials: Sequence[ReportTrial] = ()  # Trials of all islands, by number
    left_out: int = 0  # Trials that are too many to be shown
    chosen: int | None = None  # The trial that a study without a configuration marks as its result
    # Importance of each parameter of the search, the shares adding up to 1.
    importance: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Sequence[LayerCell]] = field(default_factory=dict)  # By model
    # The patterns of a job that has several, as the API shows them.
    points: Sequence[Mapping[str, Any]] | None = None
    curve: Mapping[str, Any] | None = None  # What was measured of them, as curve.json has it
    transfers: Sequence[Mapping[str, Any]] = ()  # The targets of a transfer's file
    stages: Sequence[StageTime] = ()
    # With the time of each, in words; the newest first.
    happened: Sequence[tuple[datetime, str]] = ()
    # When the first and the last trial of a study were written down.
    recorded: tuple[datetime, datetime] | None = None
    document: Mapping[str, Any] | None = None
    commands: Sequence[str] = ()  # That do the same again
    prune_commands: Sequence[str] = ()  # That prune a model with the result
    # The address of the job's page; None where there is none, as in a file.
    job_page: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_cut(self) -> bool:
        """Whether splits of a share were rated, and no coefficients searched."""
        return self.objective == ESTIMATE

    @property
    def continuations(self) -> Sequence[Continuation]:
        """The texts that models write after prompts, with the recovered one where there is one."""
        recovered = [] if self.recovery is None else self.recovery.continuations
        return recovered or (self.configuration.continuations if self.configuration else [])

    @property
    def rated(self) -> list[ReportTrial]:
        """The trials that have a value, best first."""
        sign = -1 if self.maximised else 1
        rated = [trial for trial in self.trials if trial.value is not None]
        return sorted(rated, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def measured(self) -> list[ReportTrial]:
        """The trials that have a perplexity, best first."""
        measured = [trial for trial in self.trials if trial.perplexity is not None]
        return sorted(measured, key=lambda trial: (trial.perplexity or 0.0, trial.number))

    @property
    def winner(self) -> ReportTrial | None:
        """The chosen trial; or, while none is, the one that would be chosen now."""
        if self.configuration is not None and self.configuration.finalists:
            return self._trial(self.configuration.finalists[0].trial)
        if self.chosen is not None:
            return self._trial(self.chosen)
        best = [*self.measured, *self.rated]
        if self.configuration is not None:  # by the objective alone, if it says by how much
            value = self.configuration.objective.get("value")
            best = [*(trial for trial in self.rated if trial.value == value), *best]
        return next(iter(best), None)

    def _trial(self, number: int) -> ReportTrial | None:
        return next((trial for trial in self.trials if trial.number == number), None)

    @property
    def ria(self) -> ReportTrial | None:
        """RIA in the widest scope that was rated: gains are counted from it."""
        trials = [trial for trial in self.trials if trial.method.startswith("ria")]
        return trials[-1] if trials else None

    @property
    def perplexities(self) -> Perplexities | None:
        """The perplexities of the result; None where they were not measured."""
        return None if self.configuration is None else self.configuration.perplexities

    @classmethod
    def of(cls, config: Configuration) -> Self:
        """The report of a configuration alone: what it says of its finalists and baselines."""
        ratings = {rating.trial: rating for rating in (*config.baselines, *config.finalists)}
        return cls(
            title=config.method,
            subject="search",
            configuration=config,
            objective=str(config.objective.get("name", "objective")),
            maximised=config.objective.get("direction") == "maximize",
            trials=[
                ReportTrial(
                    number=number,
                    method=rating.method,
                    value=rating.proxy,
                    perplexity=rating.perplexity,
                    divergence=rating.divergence,
                )
                for number, rating in sorted(ratings.items())
            ],
        )

    def gain(self, trial: ReportTrial, by: MeasuredBy) -> Gain | None:
        """The gain of a trial over RIA by one measure; None where it is not known."""
        ria = self.ria
        if by == "perplexity":
            published = None if self.perplexities is None else self.perplexities.ria
            if published is None and ria is not None:
                published = ria.perplexity
            return gain_over(by, published, trial.perplexity)
        if ria is None or (by == "proxy" and self.maximised):
            return None
        values = [(t.divergence, t.value)[by == "proxy"] for t in (ria, trial)]
        return gain_over(by, *values)
