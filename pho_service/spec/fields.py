"""
The parts of the documents that jobs are submitted as, each checked field by field.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pho_service.errors import InvalidInput
from pho_service.host.access import Access, check_data_file
from pho_service.host.data_sets import check_usual
from pho_service.host.settings import Settings
from pho_service.spec.calibration import C4_DATASET, C4_FILE, CalibrationSettings
from pho_service.spec.document import Document, FieldShown, Name, Seed
from pho_service.spec.pattern import Coefficients
from pho_service.spec.recovery import Recovery
from pho_service.spec.steps import Allocation


class FieldError(ValueError):
    """
    A field breaks a rule that only this machine knows.

    Attributes:
        pointer: JSON pointer of the field.
        code: Code of the problem, for programs.
    """

    def __init__(self, pointer: str, message: str, *, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.pointer = pointer
        self.code = code


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """
    The most of one job.

    Attributes:
        trials: Number of trials of all its islands, or of the searches on all its models.
        tokens: That models are run over, as the documents count them.
    """

    trials: int
    tokens: int

    @classmethod
    def of(cls, settings: Settings) -> "JobLimits":
        """Read the settings."""
        return cls(trials=settings.max_trials, tokens=settings.max_tokens)

    def check_trials(self, pointer: str, count: int, times: int, things: str) -> None:
        """Check ``count`` trials on each of so many islands or models."""
        if count * times > self.trials:
            raise FieldError(
                pointer,
                f"{count} trials on {times} {things} are {count * times}, but one job may have "
                f"{self.trials} here. Ask for fewer, or let the operator raise PHO_MAX_TRIALS.",
                code="job_too_large",
            )

    def check_tokens(self, pointer: str, count: int) -> None:
        if count > self.tokens:
            raise FieldError(
                pointer,
                f"the job asks for {count} tokens to run models over, but one job may have "
                f"{self.tokens} here. Ask for fewer or shorter windows, or let the operator raise "
                "PHO_MAX_TOKENS.",
                code="job_too_large",
            )


def check_field(field: str, check: Callable[[str], object], value: str) -> None:
    """Raise FieldError if ``check`` raises ValueError for the value of a field."""
    try:
        check(value)
    except ValueError as error:
        raise FieldError(f"/{field}", str(error)) from error


def check_models(names: Mapping[str, str], access: Access) -> None:
    """Check the models of a document, each of them once."""
    seen: dict[str, str] = {}

    def once(name: str) -> None:
        model = access.model(name)
        if model in seen:
            raise InvalidInput(f"{name!r} is the same model as {seen[model]!r}. Give each once.")
        seen[model] = name

    for field, name in names.items():
        check_field(field, once, name)


class TextSpec(Document):
    """Where a text is: in a file, or in a data set of the hub or in a folder."""

    text: Annotated[Name | None, FieldShown(rank=3, label="Text file", picks="texts")] = Field(
        None, description="Text file: .txt, .jsonl or .parquet."
    )
    dataset: Annotated[Name | None, FieldShown(label="Data set")] = Field(
        None,
        description="Data set instead of a file: hub id or folder; or c4 or wikitext2, for what "
        "papers take.",
    )
    dataset_config: Name | None = Field(
        None,
        exclude_if=lambda config: config is None,
        description="Configuration of the data set, where it has several: wikitext-2-raw-v1.",
    )
    data_file: Name | None = Field(None, description="One file of the data set.")
    split: Name | None = Field(
        None,
        description="Split of the data set; null: test, or the only one that there is.",
    )
    field: Name = Field("text", description="Field or column that holds the text.")

    @field_validator("dataset")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("text") is not None:
            raise ValueError("text and dataset are both given; give one of them")
        return value

    @field_validator("data_file", "dataset_config")
    @classmethod
    def _of_a_dataset(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("dataset") is None:
            what = {"data_file": "file", "dataset_config": "configuration"}[str(info.field_name)]
            raise ValueError(f"{info.field_name} is a {what} of a dataset, but no dataset is given")
        return value

    @model_validator(mode="after")
    def _usual_text_alone(self) -> Self:
        plain = type(self).model_fields["split"].default
        check_usual(
            self.dataset,
            dataset_config=self.dataset_config,
            data_file=self.data_file,
            split=None if self.split == plain else self.split,
        )
        return self

    def check_text(self, field: str, access: Access) -> None:
        if self.text is not None:
            check_field(f"{field}/text", access.text, self.text)
        if self.dataset is not None:
            check_field(f"{field}/dataset", access.dataset, self.dataset)
        if self.data_file is not None:
            check_field(f"{field}/data_file", check_data_file, self.data_file)

    def placed(self, access: Access) -> Self:
        if self.dataset is None:
            return self
        return self.model_copy(update={"dataset": access.placed_dataset(self.dataset)})


class CalibrationSpec(TextSpec, CalibrationSettings):  # pydantic reads a dataclass's fields
    """
    How a model is calibrated, and on what: a text file, or a data set (C4 if nothing is said).
    """

    split: Name = Field("train", description="Split of the data set.")

    @field_validator("fisher_samples")
    @classmethod
    def _some_of_the_samples(cls, value: int | None, info: ValidationInfo) -> int | None:
        samples = info.data.get("samples")
        if value is not None and samples is not None and value > samples:
            raise ValueError(f"fisher_samples must not be above samples, which is {samples}")
        return value

    @model_validator(mode="after")
    def _c4_by_default(self) -> Self:
        if self.text is None and self.dataset is None:
            self.dataset, self.data_file = C4_DATASET, C4_FILE
        return self

    def fitted(self, longest: int | None) -> Self:
        """With windows that a model reads, if no length was given; None is any length."""
        if "context_length" in self.model_fields_set or longest is None:
            return self
        shorter = min(self.context_length, longest)
        return self.model_copy(update={"context_length": shorter})

    def settings(self) -> CalibrationSettings:
        """In the form that a calibration takes."""
        return CalibrationSettings(
            **{each.name: getattr(self, each.name) for each in fields(CalibrationSettings)}
        )

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return self.samples * self.context_length


class ConfirmSpec(Document):
    """How the best candidates are confirmed by perplexity."""

    text: Annotated[Name | None, FieldShown(option="--confirm-text", picks="texts")] = Field(
        None, description="A text file; by default windows that the calibration did not use."
    )
    candidates: Annotated[int, FieldShown(option="--finalists")] = Field(
        5, ge=1, le=100, description="Number of candidates that are confirmed beside the baselines."
    )
    windows: Annotated[int, FieldShown(option="--confirm-windows")] = Field(
        16, ge=1, le=100_000, description="Most windows of that text that are measured on."
    )


class RecoverySpec(Document, Recovery):
    """How the pruned model is recovered, and on what text."""

    text: Annotated[
        Name | None, FieldShown(option="--recover-text", picks="texts", service=True)
    ] = Field(
        None,
        description="A text file; by default windows that neither the calibration nor the "
        "confirmation used.",
    )

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        self.settings()
        return self

    def settings(self) -> Recovery:
        """In the form that a recovery takes."""
        return Recovery(**{each.name: getattr(self, each.name) for each in fields(Recovery)})


class ValidationSpec(Document):
    """Random candidates rated by every proxy and by perplexity: does the proxy rank here?"""

    candidates: Annotated[int, FieldShown(option="--validate", default="")] = Field(
        40, ge=8, le=1000, description="Number of random candidates."
    )
    seed: Annotated[Seed, FieldShown(option="--validation-seed")] = Field(
        0, description="Seed of the random candidates."
    )


class WarmPoint(Document):
    """A score that was found elsewhere."""

    id: Name | None = Field(None, description="Id of the library's entry.")
    coefficients: Coefficients
    allocation: Allocation = Allocation()
    reasons: list[str] = Field([], max_length=100, description="Why it was chosen.")


class WarmStartSpec(Document):
    """A search that begins with what was found for similar models."""

    count: Annotated[int, FieldShown(option="--warm-start-count")] = Field(
        3, ge=1, le=20, description="Most configurations of the library to begin with."
    )
    found: Annotated[
        list[WarmPoint] | None,
        FieldShown(
            option="--warm-start",
            help="A configuration that was found elsewhere, in the same pattern and scope; or a "
            "library, that is, a folder of them or the URL of a service, for the most promising; "
            "without a value, that of the service. They are rated first, and the sampler begins "
            "around the best; may be given several times.",
            kind="points",
        ),
    ] = Field(
        None,
        max_length=20,
        description="What to begin with; null: the library is asked when the search begins, and "
        "its answer is written here.",
    )
