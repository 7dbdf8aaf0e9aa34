"""
config.json: a pruning that was found, with everything that is needed to trust or repeat it.

Format version 2; version 1, which had no ``steps``, is read too.
``docs/configuration.md`` describes every key. The file has
no times in it, so that the same search writes the same bytes.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.files import new_file
from pho_service.spec import (
    Allocation,
    AllocationMethod,
    AllocationUnit,
    Candidate,
    Coefficients,
    Pattern,
    Permutation,
    Repruning,
    Steps,
    Update,
)

FORMAT = "pho-configuration"
VERSION = 2
READABLE = (1, 2)
MAX_BYTES = 2**20


class _Strict(BaseModel):
    """No unknown keys, no infinities, no coercion of text to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CoefficientsDocument(_Strict):
    """The score; the same names as :class:`pho_service.spec.Coefficients`."""

    row: float
    column: float
    neighbourhood: float
    kernel_size: int
    activation_exponent: float
    gradient_exponent: float = 0.0
    normalisation: Literal["mean", "sum", "none"] = "mean"


class AllocationDocument(_Strict):
    """How much each linear loses; the same names as :class:`pho_service.spec.Allocation`."""

    method: AllocationMethod = "uniform"
    unit: AllocationUnit = "linear"
    spread: float = Field(0.2, ge=0, le=1)
    outlier_ratio: float = Field(5.0, ge=1, le=1e6)


class StepsDocument(_Strict):
    """What happens beside the score; the same names as :class:`pho_service.spec.Steps`."""

    allocation: AllocationDocument = AllocationDocument()
    permutation: Permutation = "none"
    repruning: Repruning = "none"
    update: Update = "none"

    def steps(self) -> Steps:
        """
        In the form that a pruning takes.

        Raises:
            InvalidInput: Two steps contradict each other.
        """
        values = self.model_dump()
        return Steps(**{**values, "allocation": Allocation(**values["allocation"])})


class Rating(_Strict):
    """What was measured of one candidate of the search."""

    method: str
    trial: int
    proxy: float | None = None
    perplexity: float | None = None
    divergence: float | None = None


class Confirmation(_Strict):
    """
    How the winner was chosen: perplexity on a text that the search did not see.

    Attributes:
        divergence_tokens: How many of the tokens all finalists were compared with the dense model
            on before; None where all of them got a perplexity at once.
    """

    perplexity: float
    tokens: int
    context_length: int
    text: dict[str, Any]
    divergence_tokens: int | None = None


class Configuration(_Strict):
    """
    The whole file.

    Attributes:
        method: ``crepe``, or the baseline that nothing found was better than.
        coefficients: The score.
        steps: What happens beside the score.
        pattern: A ratio or N:M, as text.
        scope: Where weights compete.
        objective: What the search minimised or maximised, and the winner's value.
        confirmation: None if no perplexity was measured.
        candidates: Everything that was confirmed, best first: by perplexity, then what was only
            compared with the dense model, by divergence.
        baselines: The published methods in the same pattern.
        border: Coefficients that lie on the border of the search space.
        search: Sampler, trials, seed, space, study.
        model: Name, revision, hash of the weights, dtype.
        calibration: Text, hash, settings, seeds and versions of the bundle.
        versions: Of the packages that searched.
    """

    format: Literal["pho-configuration"] = "pho-configuration"
    version: int = VERSION
    method: str
    coefficients: CoefficientsDocument
    steps: StepsDocument = StepsDocument()
    pattern: str
    scope: Literal["row", "layer", "global"]
    objective: dict[str, Any] = Field(default_factory=dict)
    confirmation: Confirmation | None = None
    candidates: list[Rating] = Field(default_factory=list)
    baselines: list[Rating] = Field(default_factory=list)
    border: list[str] = Field(default_factory=list)
    search: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_pruning(self) -> Self:
        self.candidate()
        return self

    def candidate(self) -> Candidate:
        """
        What to prune with.

        Raises:
            InvalidInput: A coefficient or the pattern breaks a rule.
        """
        return Candidate(
            method=self.method,
            coefficients=Coefficients(**self.coefficients.model_dump()),
            pattern=Pattern.parse(self.pattern, None if ":" in self.pattern else self.scope),
            steps=self.steps.steps(),
        )


def write_configuration(configuration: Configuration, path: Path) -> None:
    """
    Raises:
        OutputError: The file cannot be written.
    """
    with new_file(path) as partial:
        text = json.dumps(configuration.model_dump(mode="json"), indent=2)
        partial.write_text(text + "\n", encoding="utf-8")


def read_configuration(path: Path) -> Configuration:
    """
    Read and check a configuration file.

    Raises:
        ConfigurationError: Not there, not JSON, another format or version, or
            a value that breaks a rule; names the key.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_BYTES} bytes: no configuration.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"the configuration {path} cannot be read: {error.strerror}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigurationError(
            f"{path} is no configuration of PHO: its format is not {FORMAT!r}. "
            "`pho search` writes one with --out."
        )
    if document.get("version") not in READABLE:
        raise ConfigurationError(
            f"{path} has format version {document.get('version')}, but this PHO reads versions "
            f"{READABLE[0]} to {VERSION}. Install the PHO that wrote it, or search again."
        )
    try:
        return Configuration.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigurationError(f"{path} breaks the format: {problems.rstrip('.')}.") from error
    except InvalidInput as error:
        raise ConfigurationError(f"{path} breaks the format: {error}") from error
