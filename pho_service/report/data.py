"""
What a report is made of: plain values, whoever has collected them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pho_service.library.ranking import Gain
from pho_service.report.layers import LayerCell
from pho_service.spec.configuration import Configuration

Subject = Literal["search", "transfer", "study"]


@dataclass(frozen=True, kw_only=True)
class ReportTrial:
    """
    A trial of a search.

    Attributes:
        number: Its own among all islands.
        method: ``crepe``, or the baseline that it is.
        value: Of the objective; None if the trial failed.
        params: The point of the search space.
        perplexity: If it was measured.
        divergence: From the dense model, if it was compared with that.
    """

    number: int
    method: str
    value: float | None
    params: Mapping[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    divergence: float | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it is a published method."""
        return self.method != "crepe"


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """
    How long a stage took.

    Attributes:
        kind: As the service calls it.
        done: Whether it is over.
        seconds: Of work; None before it began.
        attempts: How often it was begun.
    """

    kind: str
    done: bool
    seconds: float | None
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """
    All that is known of a job or of a study. What is empty or None is not known.

    Attributes:
        title: Its name.
        subject: A search or a transfer of a service, or a study of `pho search`.
        state: Of the job; empty for a study.
        made_at: When all this was collected.
        asked: What was asked, in words.
        error: Why the job failed.
        warnings: What must be said of the result.
        configuration: What was found; of a transfer, what is transferred.
        objective: Its label: ``activation-reconstruction/blend``.
        maximised: Whether high values of it are good.
        trials: Of all islands, by number.
        left_out: Trials that are too many to be shown.
        chosen: The trial that a study without a configuration marks as its result.
        importance: Of each parameter of the search, the shares adding up to 1.
        layers: By model.
        transfers: The targets of a transfer's file.
        stages: Of the job.
        recorded: When the first and the last trial of a study were written down.
        document: As it was submitted.
        commands: That do the same again.
        versions: Of the packages that searched and calibrated.
    """

    title: str
    subject: Subject
    made_at: datetime
    state: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    warnings: Sequence[str] = ()
    configuration: Configuration | None = None
    objective: str = "objective"
    maximised: bool = False
    trials: Sequence[ReportTrial] = ()
    left_out: int = 0
    chosen: int | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Sequence[LayerCell]] = field(default_factory=dict)
    transfers: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[StageTime] = ()
    recorded: tuple[datetime, datetime] | None = None
    document: Mapping[str, Any] | None = None
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def rated(self) -> list[ReportTrial]:
        """The trials that have a value, best first."""
        sign = -1 if self.maximised else 1
        known = [trial for trial in self.trials if trial.value is not None]
        return sorted(known, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def measured(self) -> list[ReportTrial]:
        """The trials that have a perplexity, best first."""
        known = [trial for trial in self.trials if trial.perplexity is not None]
        return sorted(known, key=lambda trial: (trial.perplexity or 0.0, trial.number))

    @property
    def winner(self) -> ReportTrial | None:
        """What was chosen; or what would be now, while nothing is."""
        if self.configuration is not None and self.configuration.candidates:
            return self._trial(self.configuration.candidates[0].trial)
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
        """What gains are counted from: RIA in the widest scope that was rated."""
        known = [trial for trial in self.trials if trial.method.startswith("ria")]
        return known[-1] if known else None

    def gain(self, trial: ReportTrial) -> Gain | None:
        """How much better than RIA a trial is, by the surest that is known of both."""
        ria = self.ria
        if ria is None or trial.number == ria.number:
            return None
        return gain_over(
            {"perplexity": ria.perplexity, "divergence": ria.divergence, "proxy": ria.value},
            {"perplexity": trial.perplexity, "divergence": trial.divergence, "proxy": trial.value},
            maximised=self.maximised,
        )


def gain_over(
    ria: Mapping[str, float | None], mine: Mapping[str, float | None], *, maximised: bool = False
) -> Gain | None:
    """
    How much better than RIA something is, by perplexity, else by divergence, else by the proxy.

    Args:
        ria: What was measured of RIA: ``perplexity``, ``divergence``, ``proxy``.
        mine: The same of the other.
        maximised: The proxy is a share of nothing then.
    """
    first, second = ria.get("perplexity") or 0.0, mine.get("perplexity") or 0.0
    if first > 0 and second > 0:
        return Gain(value=math.log(first / second), by="perplexity")
    near, far = mine.get("divergence"), ria.get("divergence")
    if near is not None and far is not None:
        return Gain(value=far - near, by="divergence")
    first, second = ria.get("proxy") or 0.0, mine.get("proxy") or 0.0
    if first > 0 and second > 0 and not maximised:
        return Gain(value=1 - second / first, by="proxy")
    return None
