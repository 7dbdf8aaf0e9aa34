"""
config.json: a pruning that was found, how good it is, and all that is needed to repeat it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, ValidationError, model_validator

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.errors import shown as shown
from pho_service.host.files import write_json
from pho_service.spec.baselines import baseline
from pho_service.spec.document import Document, broken_rule, number
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.perplexity import Perplexities, Ratio, ReportedPerplexities
from pho_service.spec.steps import Candidate, Steps
from pho_service.spec.structure import Cut
from pho_service.spec.tasks import TaskScores

FORMAT = "pho-configuration"
TRANSFER_FORMAT = "pho-transfer"  # pho_service.library reads it whole
VERSION = 2
MAX_BYTES = 2**20
DEPTH = 100  # of lists and objects in each other; a search writes fewer than ten
MAX_CONTAINERS = 2**20  # lists and objects; each takes many times its two bytes in memory
_SHOWN = 5  # faults of a file that are told


class Rating(Document):
    """What was measured of one candidate of the search."""

    method: str
    trial: int
    proxy: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    # Standard error of the logarithm of its perplexity over the best one's, by paired differences.
    error: float | None = Field(None, exclude_if=lambda error: error is None)


class Confirmation(Document):
    """
    How the winner was chosen: perplexity on a text that the search did not see.

    Attributes:
        divergence_tokens: How many of the tokens all finalists were compared with the dense model
            on before; None where all of them got a perplexity at once.
        any_order: The perplexity of the winner, before any reconstruction, if every linear were
            permuted, also those whose order cannot be folded; None unless that was given up.
        before_reconstruction: The perplexity of the winner before its blocks were trained; None
            where they were not, or where it was the only one, which is measured as trained.
        evaluations: What choosing the winner took, in perplexities of this text: windows that were
            run, over all finalists and the dense model, by the windows of the text.
        errors: Standard errors of the logarithm of the perplexity over ``any_order`` and
            ``before_reconstruction``, by these names, of paired differences.
    """

    perplexity: float
    tokens: int
    context_length: int
    text: dict[str, Any]
    divergence_tokens: int | None = None
    any_order: float | None = Field(None, exclude_if=lambda value: value is None)
    before_reconstruction: float | None = Field(None, exclude_if=lambda value: value is None)
    evaluations: float | None = Field(None, exclude_if=lambda value: value is None)
    errors: dict[str, float] = Field(default_factory=dict, exclude_if=lambda errors: not errors)

    def measured_against(self, name: str, ratio: Ratio) -> Self:
        """With a perplexity, and ``any_order`` or ``before_reconstruction``, which it is over."""
        errors = self.errors if ratio.error is None else {**self.errors, name: ratio.error}
        values = {"perplexity": ratio.perplexity, name: ratio.reference, "errors": errors}
        return self.model_copy(update=values)

    def beside(self, name: str) -> str:
        """``any_order`` or ``before_reconstruction``, and how far the perplexity is from it."""
        value = getattr(self, name)
        return f"{number(value)} ({Ratio(self.perplexity, value, self.errors.get(name))})"


NEW_TOKENS = 40  # that a model writes after a prompt
MOST_CHARACTERS = 2000  # of what it writes
# Results of PHO 0.1 may have more, which a tokenizer made.
_Text = Annotated[
    str,
    BeforeValidator(lambda text: text[:MOST_CHARACTERS] if isinstance(text, str) else text),
    Field(max_length=MOST_CHARACTERS),
]


class Continuation(Document):
    """
    How the dense and the pruned model go on with a prompt, token by token the likeliest; after a
    recovery, also the recovered one.
    """

    prompt: _Text
    dense: _Text
    pruned: _Text
    recovered: _Text | None = Field(None, exclude_if=lambda value: value is None)


class Configuration(Document):
    """
    The whole file.

    Attributes:
        perplexities: How good the result is: of the dense model, of the result, and of Wanda and
            RIA, on the text of the confirmation, which the result was chosen on. None if no
            perplexity was measured.
        report: The same on a report text. None without one.
        method: ``crepe``, or the baseline that nothing found was better than; ``structured`` of a
            cut.
        coefficients: The score; None of a cut.
        cut: What is cut out of the blocks; None where single weights are removed.
        steps: What happens beside the score.
        pattern: A ratio, N:M or ``structured:20%``, as text.
        scope: Where weights compete.
        objective: What the search minimised or maximised, and the winner's value.
        confirmation: None if no perplexity was measured.
        continuations: What the dense and the pruned model write after beginnings of the text of the
            confirmation. Empty without such a text, or if the model is streamed or reads no text.
        finalists: All that was confirmed, baselines included, best first: by perplexity, then what
            was only compared with the dense model, by divergence.
        baselines: The published methods in the same pattern.
        border: Coefficients that lie on the border of the search space.
        search: Sampler, trials, seed, space, study.
        model: Name, revision, hash of the weights, dtype.
        calibration: Text, hash, settings, seeds and versions of the bundle.
        versions: Versions of the packages that searched.
        tasks: What the dense model and the pruned one scored in zero-shot tasks. None where they
            were not measured.
    """

    format: Literal["pho-configuration"] = "pho-configuration"
    version: int = VERSION
    perplexities: Perplexities | None = Field(None, exclude_if=lambda value: value is None)
    report: ReportedPerplexities | None = Field(None, exclude_if=lambda value: value is None)
    method: str
    coefficients: Coefficients | None = Field(None, exclude_if=lambda value: value is None)
    cut: Cut | None = Field(None, exclude_if=lambda value: value is None)
    steps: Steps = Steps()
    pattern: str
    scope: Literal["row", "layer", "global"]
    objective: dict[str, Any] = Field(default_factory=dict)
    confirmation: Confirmation | None = None
    continuations: Annotated[list[Continuation], FailFast()] = Field(
        default_factory=list, exclude_if=lambda value: not value
    )
    finalists: Annotated[list[Rating], FailFast()] = Field(default_factory=list)
    baselines: Annotated[list[Rating], FailFast()] = Field(default_factory=list)
    border: Annotated[list[str], FailFast()] = Field(default_factory=list)
    search: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    tasks: TaskScores | None = Field(None, exclude_if=lambda value: value is None)

    def __repr__(self) -> str:
        good = "" if self.headline is None else f": {self.headline}"
        return f"<Configuration {self.method} at {self.pattern} in scope {self.scope}{good}>"

    __str__ = __repr__

    @model_validator(mode="after")
    def _is_a_pruning(self) -> Self:
        if (self.cut is None) == (self.coefficients is None):
            raise ValueError("either the coefficients of a score or a cut is needed, and not both")
        if self.cut is None:
            self.candidate()
        elif not self.parsed_pattern.structured:
            raise ValueError(f"pattern {self.pattern} is not that of a cut: structured:20%, say")
        return self

    @property
    def headline(self) -> Perplexities | None:
        """How good the result is: on the report text, or else on the one that chose it."""
        return self.report or self.perplexities

    @property
    def parsed_pattern(self) -> Pattern:
        return Pattern.parse(self.pattern, self.scope)

    @classmethod
    def of(cls, candidate: Candidate) -> Self:
        """Make the configuration of a candidate that no search found."""
        return cls(
            method=candidate.method,
            coefficients=candidate.coefficients,
            steps=candidate.steps,
            pattern=str(candidate.pattern),
            scope=candidate.pattern.scope.value,
        )

    @property
    def is_reconstructed(self) -> bool:
        """Whether its blocks were trained after it was chosen."""
        how = self.confirmation
        return how is not None and how.before_reconstruction is not None

    @property
    def is_measured_as_trained(self) -> bool:
        """Whether it was the only one, so that its blocks were trained at once."""
        chosen = self.confirmation is not None and self.steps.reconstruction.wanted
        return chosen and not self.is_reconstructed

    @property
    def beside_the_next(self) -> str:
        """
        ``0.4 ± 0.1% below the runner-up (27.80)``, or that they are statistically tied; empty where
        fewer than two were measured.
        """
        rated = [(c.perplexity, c.error) for c in self.finalists if c.perplexity is not None]
        if len(rated) < 2:
            return ""
        (best, _), (runner_up, error) = rated[:2]
        when = " before reconstruction" if self.is_reconstructed else ""
        return Ratio(best, runner_up, error).beside("the runner-up", when)

    @property
    def warm_start(self) -> str:
        """``27.70 at trial 3, the best of 5``: of what the search began with; empty without any."""
        points = self.search.get("warm_start", [])
        rated = [(point["value"], point["trial"]) for point in points if point["value"] is not None]
        if not rated:
            return ""
        better = min if self.objective["direction"] == "minimize" else max
        value, trial = better(rated, key=lambda pair: pair[0])
        return f"{number(value)} at trial {trial}, the best of {len(points)}"

    def deployable(self) -> Self:
        steps = replace(self.steps, deployable=True)
        if self.steps.permutation == "none" or self.steps.deployable:
            return self
        return self.model_copy(
            update={
                "steps": steps, "perplexities": None, "report": None, "confirmation": None,
                "finalists": [], "continuations": [], "tasks": None,
            }
        )  # fmt: skip

    def for_size(self, parameters: int | None) -> Self:
        """As for a model of so many parameters: on another than its own, no training is shorter."""
        if self.model.get("parameters") in (None, parameters):
            return self
        # Where it got shorter was chosen for the blocks and the time of the model of the search.
        steps = replace(self.steps, reconstruction=replace(self.steps.reconstruction, blocks=()))
        return self.model_copy(update={"steps": steps})

    def candidate(self) -> Candidate:
        """
        Return what to prune with.

        Raises:
            InvalidInput: It cuts blocks instead.
        """
        if self.coefficients is None:
            raise InvalidInput(
                f"the configuration is of pattern {self.pattern}, which cuts neurons, heads and "
                "blocks of its own model: `pho prune MODEL --config` does that, and nothing else "
                "takes it. A search on another model rates all of its splits after the same "
                f"calibration: `pho search MODEL --pattern {self.pattern}`. Or give one that was "
                "found at a share of the weights (0.5) or N:M (2:4)."
            )
        return Candidate(
            method=self.method,
            coefficients=self.coefficients,
            pattern=self.parsed_pattern,
            steps=self.steps,
        )


def published(
    method: str, pattern: str | Pattern, scope: str | None = None, linears: Linears = Linears()
) -> Configuration:
    """The configuration that prunes as a published method does."""
    parsed = pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern, scope)
    candidate = baseline(method, parsed, linears)
    own_scope = candidate.pattern.scope.value
    if scope is not None and own_scope != scope:
        raise InvalidInput(
            f"{method} counts in scope {own_scope}, but scope {scope!r} is given. Leave it out."
        )
    return Configuration.of(candidate)


def write_configuration(configuration: Configuration, path: str | Path) -> None:
    """
    Raises:
        OutputError: The file cannot be written.
    """
    write_json(Path(path), configuration.model_dump(mode="json"))


def read_configuration(path: str | Path) -> Configuration:
    """
    Read and check a configuration file; of a transfer's file, the configuration in it.

    Raises:
        ConfigurationError: Not there, not JSON, another format or version, or
            a value that breaks a rule; names the key.
    """
    document = read_document(Path(path))
    if isinstance(document, dict) and document.get("format") == TRANSFER_FORMAT:
        document = document.get("configuration")
    return parse_configuration(document, str(path))


def read_document(
    path: Path, what: str = "configuration", most: int = MAX_BYTES, way_out: str = ""
) -> Any:
    """Read a JSON file of so many bytes at most."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)  # a pipe or a device does not say how long it is
        if len(content) > most:
            raise ConfigurationError(f"{path} is larger than {most} bytes: no {what}.")
        if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
            raise ConfigurationError(
                f"{path} has more than {MAX_CONTAINERS} lists and objects: no {what}."
            )
        return json.loads(content.decode())
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.{way_out}") from error


def check_format(
    document: Any, name: str, what: str, kind: tuple[str, int], way_out: str, again: str
) -> None:
    """See that a document is of a format, and of the version of it that this PHO reads."""
    wanted, version = kind
    if not isinstance(document, dict) or document.get("format") != wanted:
        raise ConfigurationError(f"{name} is not a {what}: its format is not {wanted!r}.{way_out}")
    if document.get("version") != version:
        raise ConfigurationError(
            f"{name} has format version {shown(document.get('version'))}, but this PHO reads "
            f"version {version}. Install the PHO that wrote it, or {again} again."
        )


def parse_configuration(document: Any, name: str) -> Configuration:
    """Check a configuration."""
    way_out = " `pho search --out` writes one."
    check_format(document, name, "configuration of PHO", (FORMAT, VERSION), way_out, "search")
    try:
        configuration = Configuration.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(f"{name} breaks the format: {reasons(error)}.") from error
    except InvalidInput as error:
        raise ConfigurationError(f"{name} breaks the format: {error}") from error
    check_values(document, name)
    return configuration


def reasons(error: ValidationError) -> str:
    """The first faults of a document, each with its place and the value."""

    def told(fault: Mapping[str, Any]) -> str:
        place = ".".join(map(str, fault["loc"])) or "file"
        return f"{shown(place)}: {broken_rule(fault).rstrip('.')}"

    return first_of(error.errors(include_url=False), told)


def first_of(faults: Sequence[Any], in_words: Callable[[Any], str] = str) -> str:
    """The first faults in full, and how many more there are: of thousands, few are put in words."""
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "; ".join([*map(in_words, faults[:_SHOWN]), *more])


def check_values(document: Any, name: str) -> None:
    _check_value(document, name, DEPTH)
    try:
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise ConfigurationError(
            f"{name} contains a value that JSON cannot represent: {shown(str(error))}. Write "
            "finite numbers and whole characters."
        ) from error


def _check_value(value: Any, name: str, depth: int) -> None:
    if isinstance(value, str) and "\x00" in value:
        raise ConfigurationError(f"{name} holds the character U+0000 in a text. Take it out.")
    if not isinstance(value, (dict, list)):
        return
    if depth == 0:
        raise ConfigurationError(f"{name} is more than {DEPTH} lists and objects deep.")
    for item in [*value, *value.values()] if isinstance(value, dict) else value:
        _check_value(item, name, depth - 1)


WIDER = 4  # times as many finalists are confirmed where the proxy does not rank

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ProxyQuality:
    """How well a proxy ranks, against perplexity; intervals are 95 %, bootstrap over candidates."""

    spearman: Annotated[
        float,
        Field(
            description="Rank correlation with perplexity, -1 to 1; 1 is perfect for a proxy to be "
            "minimised, -1 for Gini."
        ),
    ]
    spearman_interval: Interval
    spearman_better_half: Annotated[
        float, Field(description="The same among the half with the lower perplexity.")
    ]
    kendall: Annotated[float, Field(description="Kendall's tau-b.")]
    kendall_interval: Interval
    regret: Annotated[
        float,
        Field(
            description="Relative excess of the best perplexity among the proxy's top k over the "
            "best of all; 0 if the best candidate is in the top k."
        ),
    ]
    regret_interval: Interval
    top_k: Annotated[int, Field(description="k of the regret.")]
