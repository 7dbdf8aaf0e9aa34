"""
The library: configurations that were found before, and which is likely to be good on a model.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from pho_service.errors import ConfigurationError
from pho_service.spec.configuration import (
    TRANSFER_FORMAT,
    Configuration,
    Rating,
    check_format,
    check_values,
    parse_configuration,
    read_document,
    reasons,
)
from pho_service.spec.pattern import Pattern, Scope

TRANSFER_VERSION = 1  # of the format of a transfer's file


class TransferTarget(BaseModel):
    """The parts of a measured transfer that count here; the rest is kept, and not looked at."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    target: str
    model: dict[str, Any] = {}
    perplexities: dict[str, float] = {}
    proxies: dict[str, float | None] = {}


class TransferFile(BaseModel):
    """``transfer.json`` of `pho transfer`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["pho-transfer"] = "pho-transfer"
    version: int = TRANSFER_VERSION
    source: str
    configuration: dict[str, Any]
    targets: Annotated[list[TransferTarget], FailFast()] = Field(max_length=1000)


@dataclass(frozen=True, kw_only=True)
class LibraryFile:
    """A configuration, and what it was worth elsewhere."""

    configuration: Configuration
    targets: tuple[TransferTarget, ...] = ()

    def to_dict(self, source: str) -> dict[str, Any]:
        """A configuration's file; that of a transfer if there are any."""
        # The targets' own bests are left out: each is a configuration of its own.
        document = self.configuration.model_dump(mode="json")
        if not self.targets:
            return document
        file = TransferFile(source=source, configuration=document, targets=[*self.targets])
        return file.model_dump(mode="json", exclude={"targets": {"__all__": {"own"}}})


def parse_library_file(document: Any, name: str) -> LibraryFile:
    """Check a configuration or a transfer."""
    check_values(document, name)
    if not isinstance(document, dict) or document.get("format") != TRANSFER_FORMAT:
        return LibraryFile(configuration=parse_configuration(document, name))
    kind = (TRANSFER_FORMAT, TRANSFER_VERSION)
    check_format(document, name, "transfer", kind, "", "transfer the configuration")
    try:
        transfer = TransferFile.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(f"{name} breaks the format: {reasons(error)}.") from error
    return LibraryFile(
        configuration=parse_configuration(transfer.configuration, f"{name}: configuration"),
        targets=tuple(transfer.targets),
    )


def check_for_others(configuration: Configuration, name: str) -> None:
    """See that a configuration is one for other models, too."""
    if configuration.cut is not None:
        raise ConfigurationError(
            f"{name} has the pattern {configuration.pattern}: what it cuts is of the blocks of its "
            "own model, and a library has what is for others. Give a configuration with "
            "coefficients."
        )


def read_library_file(path: Path) -> LibraryFile:
    return parse_library_file(read_document(path), str(path))


def read_folder(folder: Path) -> tuple[dict[str, LibraryFile], list[str]]:
    """All configurations below a folder, and what else there is."""
    if not folder.is_dir():
        raise ConfigurationError(
            f"the library {folder} is no folder. Give a folder of configurations, or the URL of a "
            "service."
        )
    files, problems = {}, []
    for path in sorted(folder.rglob("*.json")):
        try:
            file = read_library_file(path)
            check_for_others(file.configuration, str(path))
            files[str(path.relative_to(folder))] = file
        except ConfigurationError as error:
            problems.append(str(error))
    return files, problems


def stored_file(document: Mapping[str, Any], transfers: Sequence[Mapping[str, Any]]) -> LibraryFile:
    """An entry of a service's store, which was checked when it was stored."""
    return LibraryFile(
        configuration=Configuration.model_validate(document),
        targets=tuple(TransferTarget.model_validate(target) for target in transfers),
    )


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
    """A model, as far as a library knows it."""

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
        """Return JSON values, with long ones cut."""
        family = None if self.family is None else self.family[:_LONGEST]
        return {"name": self.name[:_LONGEST], "family": family, "parameters": self.parameters}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A gain over RIA in the widest scope of the pattern."""

    # By perplexity or divergence: nats a token below RIA, that is, the logarithm of how many times
    # RIA's perplexity is as high. By a proxy: the share of RIA's that is saved.
    value: float
    by: MeasuredBy

    def __str__(self) -> str:
        share = abs(self.share)
        direction = "below" if self.value > 0 else "above"
        measure = {
            "perplexity": "perplexity",
            "divergence": "perplexity, as its divergence from the dense model tells",
            "proxy": "proxy; RIA's perplexity was not measured",
        }[self.by]
        return f"{share:.1%} {direction} RIA's {measure}" if share else f"RIA's {measure}"

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
class GainElsewhere:
    """The gain of a configuration on a model that it was not found on."""

    model: ModelFacts
    gain: Gain


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration of a library."""

    id: str  # In its library: a file's name, or a number of the service
    method: str
    pattern: Pattern
    models: tuple[ModelFacts, ...]  # That it was found on; several if they were searched jointly
    gain: Gain | None  # On them; None where RIA was not measured beside it
    measured: tuple[GainElsewhere, ...] = ()  # On other models

    @classmethod
    def of(cls, entry_id: str, file: LibraryFile) -> Self:
        """Read an entry from a configuration and its transfers."""
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
                GainElsewhere(model=ModelFacts.of(model), gain=gain)
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
        """Read what :meth:`facts` gave."""
        return cls(
            id=entry_id,
            method=facts["method"],
            pattern=Pattern.parse(facts["pattern"], facts["scope"]),
            models=tuple(ModelFacts(**model) for model in facts["models"]),
            gain=None if facts["gain"] is None else Gain(**facts["gain"]),
            measured=tuple(
                GainElsewhere(model=ModelFacts(**m["model"]), gain=Gain(**m["gain"]))
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
    """The gain of a configuration over RIA where it was found."""
    baselines = [b for b in configuration.baselines if b.method.startswith("ria")]
    relative = configuration.objective.get("relative_to_ria")
    if isinstance(relative, Mapping) and relative:
        values = [v for v in map(_number, relative.values()) if v is not None]
        mean = sum(v / len(values) for v in values)
        return Gain(value=1 - mean, by="proxy") if values else None
    good = configuration.headline
    if good is not None and good.ria is not None:  # RIA as published
        return gain_over("perplexity", good.ria, good.pruned)
    if not baselines:
        return None
    ria = baselines[-1]  # of the widest scope
    rating = _own_rating(configuration)
    measured = configuration.confirmation or rating
    minimised = configuration.objective.get("direction", "minimize") == "minimize"
    return (
        gain_over("perplexity", ria.perplexity, measured.perplexity)
        or gain_over("divergence", ria.divergence, rating.divergence)
        or gain_over("proxy", ria.proxy, rating.proxy if minimised else None)
    )


def transferred_gain(target: TransferTarget) -> Gain | None:
    """The gain of a configuration over RIA on a model that it was taken to."""
    by_perplexity, by_proxy = (
        (values.get("ria"), values.get("transferred"))
        for values in (target.perplexities, target.proxies)
    )
    return gain_over("perplexity", *by_perplexity) or gain_over("proxy", *by_proxy)


def _own_rating(configuration: Configuration) -> Rating:
    """The rating of the configuration itself: it is the first that was confirmed."""
    if configuration.finalists and configuration.confirmation is not None:
        return configuration.finalists[0]
    proxy = _number(configuration.objective.get("value"))
    return Rating(method=configuration.method, trial=0, proxy=proxy)


def _number(value: Any) -> float | None:
    """A JSON value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= _LARGEST else None


def gain_over(by: MeasuredBy, ria: float | None, value: float | None) -> Gain | None:
    """The gain over RIA of what was measured; low values are good."""
    if ria is None or value is None:
        return None
    if by == "divergence":
        return Gain(value=ria - value, by=by)
    if not (ria > 0 and value > 0):
        return None
    if by == "proxy":
        return Gain(value=1 - min(value / ria, _LARGEST), by=by)
    return Gain(value=math.log(ria) - math.log(value), by=by)


# Share of a gain that is expected to be left on a model of another kind. Judgement, not measured:
# they only order what was not measured on the asked family.
RELATED_FAMILY = 0.95  # gemma2 and gemma3_text
OTHER_FAMILY = 0.85
UNKNOWN = 0.85
PER_DOUBLING = 0.98  # of the number of parameters, up or down


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The pattern, scope and model that a configuration is looked for; None is any."""

    pattern: Pattern | None = None  # With its scope, if ``scope_matters`` and ``scope`` is None
    # Where weights compete, of any pattern; one that the pattern never has fits nothing.
    scope: Scope | None = None
    scope_matters: bool = False  # Whether another scope is another thing
    family: str | None = None  # A ``model_type``, or the beginning of one: gemma
    parameters: int | None = None  # Number of parameters of the model

    @classmethod
    def parse(
        cls,
        pattern: str | None = None,
        scope: str | None = None,
        family: str | None = None,
        parameters: int | None = None,
    ) -> Self:
        """Return the target that a user describes."""
        scope_value = None if scope is None else Pattern.parse("0.5", scope).scope
        return cls(
            pattern=None if pattern is None else Pattern.parse(pattern, scope),
            scope=scope_value,
            scope_matters=scope is not None,
            family=family,
            parameters=parameters,
        )


@dataclass(frozen=True, kw_only=True)
class Match:
    """An entry, and why it stands where it stands."""

    entry: Entry
    fits: bool  # It is of the asked pattern and scope, so that it can be used as it is
    # Gain over RIA on the asked model, as a share; None where nothing is known.
    expected: float | None
    expected_by: MeasuredBy | None  # What it is a share of, as of the gain that it comes from
    reasons: tuple[str, ...]  # Sentences without a full stop


def rank(entries: Sequence[Entry], wanted: Wanted) -> list[Match]:
    """Entries in the order in which they are worth trying."""
    # First comes the pattern, and the scope if it is asked for: coefficients of another one are of
    # little use. Then what is better than RIA by perplexity (or by divergence, which is in the same
    # unit), then by the proxy alone, then what nothing is known of, then what is no better. Within
    # each, by the gain that is expected on the asked model: what was measured on its family, or
    # else what was measured where it was found, less something for each difference.
    matches = [(_order(entry, wanted), _match(entry, wanted)) for entry in entries]
    return [match for _, match in sorted(matches, key=lambda pair: pair[0])]


def _order(entry: Entry, wanted: Wanted) -> tuple[float, bool, int, float, str]:
    gain, share = _expected(entry, wanted)
    if gain is None:
        group = 2
    elif gain.value <= 0:
        group = 3
    else:
        group = 1 if gain.by == "proxy" else 0
    other_scope = wanted.scope_matters and not _same_scope(entry, wanted)
    return _distance(entry, wanted), other_scope, group, -(share or 0.0), entry.id


def _match(entry: Entry, wanted: Wanted) -> Match:
    gain, share = _expected(entry, wanted)
    fits = _distance(entry, wanted) == 0 and (
        not wanted.scope_matters or _same_scope(entry, wanted)
    )
    return Match(
        entry=entry,
        fits=fits,
        expected=share,
        expected_by=None if gain is None else gain.by,
        reasons=tuple(_reasons(entry, wanted)),
    )


def _distance(entry: Entry, wanted: Wanted) -> float:
    """0 for the asked pattern; ratios and N:M are further from each other than any of a kind."""
    if wanted.pattern is None or str(entry.pattern) == str(wanted.pattern):
        return 0.0
    other_kind = bool(entry.pattern.group) != bool(wanted.pattern.group)
    return 1e-6 + other_kind + abs(entry.pattern.sparsity - wanted.pattern.sparsity)


def _same_scope(entry: Entry, wanted: Wanted) -> bool:
    wanted_scope = _asked_scope(wanted)
    return wanted_scope is None or entry.pattern.scope is wanted_scope


def _asked_scope(wanted: Wanted) -> Scope | None:
    return wanted.scope or (wanted.pattern.scope if wanted.pattern else None)


def _expected(entry: Entry, wanted: Wanted) -> tuple[Gain | None, float | None]:
    """The measurement that counts for the asked model, and the gain that it makes likely there."""
    relatives = [m.gain for m in entry.measured if _kinship(m.model.family, wanted.family) == 1]
    if wanted.family is not None and relatives:
        worst = min(relatives, key=lambda gain: (gain.by == "proxy", gain.share))
        return worst, worst.share
    if entry.gain is None:
        return None, None
    share_left = max((_left(model, wanted) for model in entry.models), default=UNKNOWN)
    share = entry.gain.share
    return entry.gain, share * share_left if share > 0 else share


def _left(model: ModelFacts, wanted: Wanted) -> float:
    """The share of a gain on ``model`` that is expected to be left on the asked one."""
    kinship = 1.0 if wanted.family is None else _kinship(model.family, wanted.family)
    if wanted.parameters is None:
        return kinship
    if model.parameters is None:
        return kinship * UNKNOWN
    doublings = abs(math.log2(model.parameters) - math.log2(wanted.parameters))
    return float(kinship * PER_DOUBLING**doublings)


def _kinship(family: str | None, wanted: str | None) -> float:
    if wanted is None or family is None:
        return UNKNOWN
    if family.startswith(wanted) or family == wanted.removesuffix("_text"):
        return 1.0
    return RELATED_FAMILY if _stem(family) == _stem(wanted) else OTHER_FAMILY


def _stem(family: str) -> str:
    """The letters that a family's name begins with: gemma of gemma3_text."""
    match = re.match(r"[a-z]+", family.lower())
    return match.group() if match else family


def _reasons(entry: Entry, wanted: Wanted) -> Iterable[str]:
    kind = f"pattern {entry.pattern}, scope {entry.pattern.scope.value}"
    if wanted.pattern is not None and _distance(entry, wanted) > 0:
        yield f"{kind}, but {wanted.pattern} is asked for: search again, beginning with it or not"
    elif wanted.scope_matters and not _same_scope(entry, wanted):
        yield f"{kind}, but scope {_asked_scope(wanted)} is asked"
    else:
        yield kind
    for model in entry.models:
        yield _model_reason(model, wanted)
    models = " + ".join(model.name for model in entry.models)
    yield f"where it was found, {entry.gain or 'RIA was not measured beside it'} ({models})"
    for measured in entry.measured:
        yield f"on {measured.model.name}, {measured.gain}"
    if entry.method != "crepe":
        yield f"it is the baseline {entry.method}: the search found nothing better"


def _size(parameters: int) -> str:
    if parameters < 1_000_000:
        return f"{parameters:,} parameters"
    return f"{parameters / 1e6:.0f} M parameters"


def _model_reason(model: ModelFacts, wanted: Wanted) -> str:
    size = _size(model.parameters) if model.parameters else "unknown size"
    origin = f"found on {model.name}, {model.family or 'unknown family'}, {size}"
    if wanted.family is None:
        return origin
    if model.family is None:
        return f"{origin}; asked for is {wanted.family}"
    kin = {1.0: "the family", RELATED_FAMILY: "a family related to the one"}
    return f"{origin}: {kin.get(_kinship(model.family, wanted.family), 'not the family')} asked for"
