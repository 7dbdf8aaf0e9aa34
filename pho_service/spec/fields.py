"""
The parts of the documents that jobs are submitted as, each checked field by field.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pho_service.errors import InvalidInput
from pho_service.host.access import Access, check_data_file
from pho_service.host.data_sets import USUAL_TEXTS, check_usual
from pho_service.host.settings import Settings
from pho_service.spec.calibration import (
    C4_DATASET,
    C4_FILE,
    CalibrationSettings,
    windows_of,
    with_shares,
)
from pho_service.spec.document import Document, FieldShown, Name, Number, Seed, part_of
from pho_service.spec.minutes import REST
from pho_service.spec.pattern import Coefficients
from pho_service.spec.recovery import Recovery
from pho_service.spec.steps import Allocation

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec


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
    """The most of one job."""

    trials: int  # Number of trials of all its islands, or of the searches on all its models
    tokens: int  # That models are run over, as the documents count them
    recovery_minutes: float = 1440.0

    @classmethod
    def of(cls, settings: Settings) -> "JobLimits":
        return cls(
            trials=settings.max_trials,
            tokens=settings.max_tokens,
            recovery_minutes=settings.max_recovery_minutes,
        )

    def check_trials(self, pointer: str, count: int, times: int, things: str) -> None:
        """Check ``count`` trials on each of so many islands or models."""
        if count * times > self.trials:
            raise FieldError(
                pointer,
                f"{count} trials on {times} {things} are {count * times}, but one job may have "
                f"{self.trials} here. Ask for fewer, or let the operator raise PHO_MAX_TRIALS.",
                code="job_too_large",
            )

    def check_minutes(self, pointer: str, minutes: float) -> None:
        if minutes > self.recovery_minutes:
            raise FieldError(
                pointer,
                f"{minutes:g} minutes are more than a recovery may take here: "
                f"{self.recovery_minutes:g}. Ask for fewer, or leave the recovery out (null), or "
                "let the operator raise PHO_MAX_RECOVERY_MINUTES.",
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

    text: Annotated[
        Name | None, FieldShown(rank=3, argument="texts", label="Text file", picks="texts")
    ] = Field(None, description="Text file: .txt, .jsonl or .parquet.")
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
    split: Annotated[
        Name | None,
        FieldShown(help="Split of the data set.", default="test, or the only one that there is"),
    ] = Field(None, description="Split of the data set; null: test, or the only one that there is.")
    field: Annotated[Name, FieldShown(argument="")] = Field(
        "text", description="Field or column that holds the text."
    )

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

    def place(self, access: Access) -> str:
        """Where the text lies: a path, or the id of a data set."""
        return (
            access.text(self.text) if self.text is not None else access.dataset(str(self.dataset))
        )

    def placed(self, access: Access) -> Self:
        if self.dataset is None:
            return self
        return self.model_copy(update={"dataset": access.placed_dataset(self.dataset)})


MOST_WINDOWS = 100_000  # of a text


class ReportSpec(TextSpec):
    """What perplexities are measured on. Nothing may have been chosen on it."""

    text: Annotated[
        Name | None,
        FieldShown(
            picks="texts", help="Text file to measure on; nothing may have been chosen on it."
        ),
    ] = Field(None, description="Text file: .txt, .jsonl or .parquet.")
    windows: Annotated[
        int | None, FieldShown(help="Only the first N windows of what is measured on.")
    ] = Field(
        None,
        ge=1,
        le=MOST_WINDOWS,
        description="Number of windows, the first of the text; all of them by default.",
    )

    @model_validator(mode="after")
    def _one_is_given(self) -> Self:
        if self.text is None and self.dataset is None:
            raise ValueError("a text or a dataset is required, to measure on")
        return self


TEXT_FILES = (".txt", ".jsonl", ".parquet")


def named_texts(document: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """The text files that a document of any kind names, each with the pointer to its place."""
    if isinstance(document, Mapping):
        for name, value in document.items():
            pointer = f"{above}/{name}"
            if isinstance(value, str):
                yield from [(pointer, value)] if name == "text" else []
            elif name == "more_texts" and isinstance(value, list):
                texts = ((f"{pointer}/{number}", text) for number, text in enumerate(value))
                yield from (place for place in texts if isinstance(place[1], str))
            else:
                yield from named_texts(value, pointer)


class CalibrationSpec(TextSpec, CalibrationSettings):  # pydantic reads a dataclass's fields
    """
    How a model is calibrated, and on what: a text file, or a data set (C4 if nothing is said), or
    several of them.
    """

    split: Name = Field("train", description="Split of the data set.")
    more_texts: Annotated[
        list[Name], FieldShown(option="--text", label="More texts", picks="texts")
    ] = Field(
        [],
        max_length=15,
        exclude_if=lambda texts: not texts,
        description="Other texts that windows are taken from, too: text files, or data sets by "
        "their names.",
    )
    shares: Annotated[
        list[Annotated[Number, Field(ge=0, le=1e6)]], FieldShown(label="Shares of the texts")
    ] = Field(
        [],
        validate_default=True,
        max_length=16,
        exclude_if=lambda shares: not shares,
        description="Share of the windows that each text gets, in the order of the texts; 3,1 is "
        "three of four. By default all get as many.",
    )

    @field_validator("more_texts")
    @classmethod
    def _each_text_once(cls, value: list[str], info: ValidationInfo) -> list[str]:
        first = info.data.get("text") or info.data.get("dataset")
        if value and first is None:
            raise ValueError("there is no first text that these are beside: give text or dataset")
        for number, name in enumerate(value):
            if name in (first, *value[:number]):
                raise ValueError(f"{name} is given twice")
        return value

    @field_validator("shares")
    @classmethod
    def _windows_for_each(cls, value: list[float], info: ValidationInfo) -> list[float]:
        if not {"samples", "more_texts"} <= info.data.keys():
            return value
        first = info.data.get("text") or info.data.get("dataset") or C4_DATASET
        names = [first, *info.data["more_texts"]]
        if value and len(value) != len(names):
            raise ValueError(f"give one share for each of several texts, here {', '.join(names)}")
        if 0 in value:
            name = names[value.index(0)]
            raise ValueError(f"the share of {name} is 0: give it a larger one, or leave it out")
        samples = info.data["samples"]
        counts = windows_of(value or [1.0] * len(names), samples)
        if 0 in counts:
            raise ValueError(
                f"{names[counts.index(0)]} gets none of {samples} windows: give it a larger "
                "share, take more samples, or leave it out"
            )
        return value

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

    @property
    def parts(self) -> dict[str, TextSpec]:
        """The texts by the fields that name them; a file among the further ones by its ending."""
        texts: dict[str, TextSpec] = {"text" if self.dataset is None else "dataset": self}
        for number, name in enumerate(self.more_texts):
            if name.endswith(TEXT_FILES):
                part = TextSpec(text=name, field=self.field)
            else:
                split = None if name in USUAL_TEXTS else "train"
                part = TextSpec(dataset=name, split=split, field=self.field)
            texts[f"more_texts/{number}"] = part
        return texts

    @property
    def names(self) -> list[str]:
        return [self.text or str(self.dataset), *self.more_texts]

    @property
    def named(self) -> str:
        """The texts, for a message."""
        names = self.names
        return with_shares(names, self.shares or [1.0] * len(names)) if names[1:] else names[0]

    def check_text(self, field: str, access: Access) -> None:
        super().check_text(field, access)
        seen: dict[str, str] = {}
        for pointer, part in self.parts.items():

            def once(name: str, part: TextSpec = part) -> None:
                place = part.place(access)
                if place in seen:
                    raise InvalidInput(f"{name} is the same text as {seen[place]}. Give each once.")
                seen[place] = name

            check_field(f"{field}/{pointer}", once, part.text or str(part.dataset))

    def placed(self, access: Access) -> Self:
        names = [
            name if name.endswith(TEXT_FILES) else access.placed_dataset(name)
            for name in self.more_texts
        ]
        return super().placed(access).model_copy(update={"more_texts": names})

    def fitted(self, longest: int | None) -> Self:
        """With windows that a model reads, if no length was given; None is any length."""
        if "context_length" in self.model_fields_set or longest is None:
            return self
        shorter = min(self.context_length, longest)
        return self.model_copy(update={"context_length": shorter})

    def settings(self) -> CalibrationSettings:
        """In the form that a calibration takes."""
        return part_of(self, CalibrationSettings)

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return self.samples * self.context_length


class ConfirmSpec(Document):
    """How the finalists are confirmed by perplexity."""

    text: Annotated[
        Name | None, FieldShown(option="--confirm-text", argument="confirm", picks="texts")
    ] = Field(None, description="A text file; by default windows that the calibration did not use.")
    finalists: Annotated[int, FieldShown(option="--finalists")] = Field(
        5,
        ge=1,
        le=100,
        description="Number of finalists: the best found, measured beside the baselines.",
    )
    windows: Annotated[int, FieldShown(option="--confirm-windows")] = Field(
        16, ge=1, le=100_000, description="Most windows of that text that are measured on."
    )


class SearchReportSpec(ReportSpec):
    """What the result of a search is reported on: nothing is calibrated or chosen on it."""

    text: Annotated[Name | None, FieldShown(argument="report", picks="texts")] = Field(
        None,
        description="A text file that nothing was chosen on: the result, the dense model, Wanda "
        "and RIA are measured on it in the end.",
    )
    dataset: Annotated[Name | None, FieldShown(argument="", label="Report data set")] = Field(
        None, description="Data set instead of a file: hub id or folder; or c4 or wikitext2."
    )
    windows: Annotated[int, FieldShown(argument="report_windows")] = Field(
        16,
        ge=1,
        le=MOST_WINDOWS,
        description="Most windows of that text that are measured on. Those that the calibration or "
        "the confirmation has a part of are left out.",
    )

    def __str__(self) -> str:
        return f"{self.windows} windows of {self.text or self.dataset}"


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

    @property
    def is_open(self) -> bool:
        """Whether neither a time nor a number of tokens is given."""
        return self.minutes is None and self.tokens is None

    def settings(self, job_minutes: float | None = None, share: float = REST) -> Recovery:
        """In the form that a recovery takes; if it is open, with a share of a job's minutes."""
        settings = part_of(self, Recovery)
        if job_minutes is None or not self.is_open:
            return settings
        return replace(settings, minutes=share * job_minutes)


class ValidationSpec(Document):
    """Random candidates rated by every proxy and by perplexity: does the proxy rank here?"""

    candidates: Annotated[int, FieldShown(option="--validate", argument="validate", default="")] = (
        Field(40, ge=8, le=1000, description="Number of random candidates.")
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


def check_cut(spec: "JobSpec") -> None:
    """See that a job that cuts blocks asks for nothing that is of scores alone."""
    pattern = spec.pruning()
    for name in (
        "more_models", "scope", "preset", "steps", "stream", "validation", "objective",
        "warm_start", "fork_of", "sampler", "search_space", "trials", "islands", "in_full",
        "timeout_s",
    ):  # fmt: skip
        field = type(spec).model_fields[name]
        if getattr(spec, name) != field.get_default(call_default_factory=True):
            raise ValueError(
                f"{name} cannot be asked for with {pattern}: a cut has no score, and every "
                "split of its share is rated. Leave it out"
            )
    if spec.confirm is None:
        raise ValueError(
            f"confirm: null cannot be asked for with {pattern}: cuts are compared by "
            "perplexity. Leave it out"
        )


def check_several(spec: "JobSpec") -> None:
    """See that a job with several patterns asks for nothing that is of one."""
    what = "a target" if spec.patterns is None else "several patterns"
    refused = {
        "more_models": (bool(spec.more_models), "each pattern is confirmed on one model's text"),
        "confirm: null": (spec.confirm is None, "they are compared by perplexity"),
        "islands": (spec.islands > 1, "each pattern has one study"),
        "warm_start": (spec.warm_start is not None, "what was found elsewhere is of one pattern"),
        "fork_of": (spec.fork_of is not None, "trials are of one pattern: clone the job instead"),
        "timeout_s": (spec.timeout_s is not None, "each pattern is searched to its end"),
        "prune": (
            spec.prune and spec.patterns is not None,
            "it must be said which is pruned, when they are measured: :prune with its pattern",
        ),
        "tasks": (
            spec.tasks is not None and spec.patterns is not None,
            "one pruned model is measured on them: submit the chosen pattern alone, or measure "
            "its folder with `pho evaluate --tasks`",
        ),
    }
    for field, (wrong, why) in refused.items():
        if wrong:
            raise ValueError(f"{field} cannot be asked for with {what}: {why}. Leave it out")
