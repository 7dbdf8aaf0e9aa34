"""
What a library knows of each of its configurations: the models, and how much better than RIA it was.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from pho_service.library.files import LibraryFile, TransferTarget
from pho_service.spec.configuration import Configuration, Rating
from pho_service.spec.pattern import Pattern

# Files come from others: what is beyond these is no measurement, and must not stop a ranking.
MOST_PARAMETERS = 10**15
_LARGEST = sys.float_info.max
_MOST_NATS = 700.0  # e to this is still a number

FACTS_VERSION = 1  # of what is remembered of an entry; another one is read again
_LONGEST = 200  # letters of a name in it
_MOST_MODELS = 64

MeasuredBy = Literal["perplexity", "divergence", "proxy"]
MEASURED_BY: tuple[MeasuredBy, ...] = get_args(MeasuredBy)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """
    A model, as far as a library knows it.
    """

    name: str
    family: Annotated[
        str | None,
        Field(description="model_type; null if it is not known."),
    ] = None
    parameters: Annotated[int | None, Field(description="Number of parameters.")] = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read the key ``model`` of a configuration; a wrong value counts as unknown."""
        family, parameters = document.get("family"), document.get("parameters")
        if not isinstance(parameters, int) or isinstance(parameters, bool):
            parameters = None
        return cls(
            name=Path(str(document.get("name") or "unknown")).name or "unknown",
            family=family if isinstance(family, str) and family else None,
            parameters=parameters if 0 < (parameters or 0) <= MOST_PARAMETERS else None,
        )

    def shortened(self) -> dict[str, Any]:
        """As JSON values, with the beginning of what is long."""
        family = None if self.family is None else self.family[:_LONGEST]
        return {"name": self.name[:_LONGEST], "family": family, "parameters": self.parameters}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """
    How much better than RIA, in the widest scope of the pattern.

    Attributes:
        value: By perplexity or divergence: nats a token below RIA, that is, the logarithm of how
            many times RIA's perplexity is as high. By a proxy: the share of RIA's that is saved.
        by: What was measured.
    """

    value: float
    by: MeasuredBy

    def __str__(self) -> str:
        share = abs(self.share)
        direction = "below" if self.value > 0 else "above"
        what = {
            "perplexity": "perplexity",
            "divergence": "perplexity, as its divergence from the dense model tells",
            "proxy": "proxy; RIA's perplexity was not measured",
        }[self.by]
        return f"{share:.1%} {direction} RIA's {what}" if share else f"RIA's {what}"

    @property
    def share(self) -> float:
        """Share of RIA's perplexity, or proxy, that is saved."""
        return self.value if self.by == "proxy" else 1 - math.exp(min(-self.value, _MOST_NATS))


def gains_by(share: float | None, by: MeasuredBy | None) -> dict[MeasuredBy, float | None]:
    """A share that is saved under the name of what it was measured by; None under the others."""
    return {name: share if name == by else None for name in MEASURED_BY}


def _by(gain: Gain | None) -> dict[MeasuredBy, float | None]:
    return gains_by(None, None) if gain is None else gains_by(gain.share, gain.by)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a configuration was worth on a model that it was not found on."""

    model: ModelFacts
    gain: Gain


@dataclass(frozen=True, kw_only=True)
class Entry:
    """
    A configuration of a library.

    Attributes:
        id: In its library: a file's name, or a number of the service.
        models: That it was found on; several if they were searched jointly.
        gain: On them; None where RIA was not measured beside it.
        measured: On other models.
    """

    id: str
    method: str
    pattern: Pattern
    models: tuple[ModelFacts, ...]
    gain: Gain | None
    measured: tuple[Measured, ...] = ()

    @classmethod
    def of(cls, entry_id: str, file: LibraryFile) -> Self:
        """What a configuration and its transfers say of themselves."""
        configuration = file.configuration
        several = configuration.model.get("models")
        models = [m for m in several if isinstance(m, Mapping)] if isinstance(several, list) else []
        measured = ((target.model, transferred_gain(target)) for target in file.targets)
        return cls(
            id=entry_id,
            method=configuration.method,
            pattern=configuration.candidate().pattern,
            models=tuple(ModelFacts.of(model) for model in models or [configuration.model]),
            gain=measured_gain(configuration),
            measured=tuple(
                Measured(model=ModelFacts.of(model), gain=gain)
                for model, gain in measured
                if gain is not None
            ),
        )

    def facts(self) -> dict[str, Any]:
        """
        The fields but the id as JSON values that :meth:`of_facts` reads, and no more of each than
        a ranking shows: what others wrote may be long.
        """
        return {
            "version": FACTS_VERSION,
            "method": self.method[:_LONGEST],
            "pattern": str(self.pattern),
            "scope": self.pattern.scope.value,
            "models": [model.shortened() for model in self.models[:_MOST_MODELS]],
            "gain": None if self.gain is None else asdict(self.gain),
            "measured": [
                {"model": m.model.shortened(), "gain": asdict(m.gain)}
                for m in self.measured[:_MOST_MODELS]
            ],
        }

    @classmethod
    def of_facts(cls, entry_id: str, facts: Mapping[str, Any]) -> Self:
        """What :meth:`facts` has given."""
        return cls(
            id=entry_id,
            method=facts["method"],
            pattern=Pattern.parse(facts["pattern"], facts["scope"]),
            models=tuple(ModelFacts(**model) for model in facts["models"]),
            gain=None if facts["gain"] is None else Gain(**facts["gain"]),
            measured=tuple(
                Measured(model=ModelFacts(**m["model"]), gain=Gain(**m["gain"]))
                for m in facts["measured"]
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields but the id as JSON values."""
        return {
            "method": self.method,
            "pattern": str(self.pattern),
            "scope": self.pattern.scope.value,
            "models": [asdict(model) for model in self.models],
            "gains": _by(self.gain),
            "measured": [{"model": asdict(m.model), "gains": _by(m.gain)} for m in self.measured],
        }


def measured_gain(configuration: Configuration) -> Gain | None:
    """How much better than RIA a configuration was where it was found."""
    baselines = [b for b in configuration.baselines if b.method.startswith("ria")]
    relative = configuration.objective.get("relative_to_ria")
    if isinstance(relative, Mapping) and relative:
        values = [v for v in map(_number, relative.values()) if v is not None]
        mean = sum(v / len(values) for v in values)
        return Gain(value=1 - mean, by="proxy") if values else None
    good = configuration.perplexities
    if good is not None and good.ria is not None:  # RIA as published
        return _gain({"ria": good.ria, "transferred": good.pruned}, "perplexity")
    if not baselines:
        return None
    ria = baselines[-1]  # of the widest scope
    mine = _own_rating(configuration)
    perplexities = {"ria": ria.perplexity, "transferred": mine.perplexity}
    if configuration.confirmation is not None:
        perplexities["transferred"] = configuration.confirmation.perplexity
    by_perplexity = _gain(perplexities, "perplexity")
    if by_perplexity is not None:
        return by_perplexity
    if ria.divergence is not None and mine.divergence is not None:
        return Gain(value=ria.divergence - mine.divergence, by="divergence")
    minimised = configuration.objective.get("direction", "minimize") == "minimize"
    return _gain({"ria": ria.proxy, "transferred": mine.proxy}, "proxy") if minimised else None


def transferred_gain(target: TransferTarget) -> Gain | None:
    """How much better than RIA a configuration was on a model that it was taken to."""
    return _gain(target.perplexities, "perplexity") or _gain(target.proxies, "proxy")


def _own_rating(configuration: Configuration) -> Rating:
    """What was measured of the configuration itself: it is the first that was confirmed."""
    if configuration.candidates and configuration.confirmation is not None:
        return configuration.candidates[0]
    proxy = _number(configuration.objective.get("value"))
    return Rating(method=configuration.method, trial=0, proxy=proxy)


def _number(value: Any) -> float | None:
    """A JSON value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= _LARGEST else None


def _gain(values: Mapping[str, float | None], by: MeasuredBy) -> Gain | None:
    ria, mine = values.get("ria"), values.get("transferred")
    if ria is None or mine is None or ria <= 0 or mine <= 0:
        return None
    if by == "proxy":
        return Gain(value=1 - min(mine / ria, _LARGEST), by=by)
    return Gain(value=math.log(ria) - math.log(mine), by=by)
