"""
The request to transfer a job's configuration to other models, checked field by field.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pho_service.host.access import Access
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import (
    JOB,
    MODEL,
    REPORT,
    SEARCH,
    TEXT,
    Document,
    FieldShown,
    Labels,
    Name,
    Title,
)
from pho_service.spec.fields import (
    CalibrationSpec,
    ConfirmSpec,
    JobLimits,
    ReportSpec,
    check_field,
    check_models,
)
from pho_service.spec.job import Dtype, JobSpec
from pho_service.spec.objective import SearchOptions


class OwnSearchSpec(Document, SearchOptions):
    """The search for each target's own best, in the configuration's space and steps."""

    confirm: ConfirmSpec = ConfirmSpec()


class TransferRequest(Document):
    """The body of ``:transfer``. All but ``models`` have defaults."""

    models: Annotated[list[Name], FieldShown(option="")] = Field(
        min_length=1,
        max_length=64,
        description="Models to measure on: hub ids, model folders or .gguf files.",
    )
    report: Annotated[ReportSpec | None, FieldShown(section=REPORT, prefix="report-")] = Field(
        None,
        description="What perplexities are measured on; null compares proxies alone. Models are "
        "calibrated in any case.",
    )
    search: Annotated[
        OwnSearchSpec | None,
        FieldShown(section=SEARCH, option="--search", help="Find the own best of each model, too."),
    ] = Field(
        None,
        description="How the own best of each model is searched for, too; {} is enough.",
    )
    calibration: Annotated[CalibrationSpec | None, FieldShown(section=TEXT)] = Field(
        None, description="How the models are calibrated; null: like the model of the job."
    )
    name: Annotated[Title | None, FieldShown(section=JOB)] = Field(
        None, description="Name of the job; the configuration's model and pattern by default."
    )
    labels: Labels = Field({})
    dtype: Annotated[Dtype, FieldShown(section=MODEL)] = Field(
        "auto", description="Data type that the weights are loaded in."
    )
    stream: Annotated[bool, FieldShown(section=MODEL)] = Field(
        False,
        description="Whether to leave the weights on disk, one block at a time on the device.",
    )
    notify: Annotated[Name | None, FieldShown(section=JOB)] = Field(
        None,
        exclude_if=lambda url: url is None,
        description="URL of a webhook that is called when the transfer has ended; the service "
        "must allow its host.",
    )
    priority: Annotated[int, FieldShown(section=JOB)] = Field(
        0, ge=-100, le=100, description="Place in the queue: higher goes first."
    )
    max_attempts: Annotated[int, FieldShown(section=JOB)] = Field(
        3, ge=1, le=20, description="Number of attempts at each model before the job fails."
    )

    @field_validator("models")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = [name for name in value if value.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        return value

    def check_access(self, access: Access) -> None:
        check_models({f"models/{i}": name for i, name in enumerate(self.models)}, access)
        if self.calibration is not None:
            self.calibration.check_text("calibration", access)
        if self.report is not None:
            self.report.check_text("report", access)
        if self.search is not None and self.search.confirm.text is not None:
            check_field("search/confirm/text", access.text, self.search.confirm.text)

    def placed(self, access: Access) -> "TransferRequest":
        changes = {
            "models": [access.placed_model(name) for name in self.models],
            "calibration": self.calibration and self.calibration.placed(access),
            "report": self.report and self.report.placed(access),
        }
        return self.model_copy(update=changes)


class TransferSpec(TransferRequest):
    """
    A transfer as it is stored: the same, with everything that it depends on.

    Attributes:
        kind: Tells it from a search.
        source: Source of the configuration: the job that found it.
        configuration: What is taken elsewhere.
        calibration: Calibration of the targets.
    """

    kind: Literal["transfer"] = "transfer"
    source: str
    configuration: dict[str, Any]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.calibration is None:
            raise ValueError("a stored transfer has its calibration")
        self.found()
        return self

    @classmethod
    def of(
        cls, request: TransferRequest, source: str, config: dict[str, Any], spec: dict[str, Any]
    ) -> Self:
        """Put together what is asked and what it is asked of."""
        calibration = request.calibration or CalibrationSpec.model_validate(spec["calibration"])
        size = int(config["coefficients"]["kernel_size"])
        sizes = sorted({*calibration.kernel_sizes, size})
        return cls(
            **{
                **request.model_dump(),
                "calibration": {**calibration.model_dump(), "kernel_sizes": sizes},
                "source": source,
                "configuration": config,
            }
        )

    def check_size(self, limits: JobLimits) -> int:
        """
        Count what the transfer asks for, as :meth:`JobSpec.check_size` does. A report on a whole
        text is not counted: how long that is, the workers see.
        """
        calibration = self.calibration
        assert calibration is not None  # the document says so
        model_tokens, measured = calibration.tokens, 1
        if self.search is not None:
            limits.check_trials("/search/trials", self.search.trials, len(self.models), "models")
            confirm = self.search.confirm
            model_tokens += confirm.finalists * confirm.windows * calibration.context_length
            measured += 1
        if self.report is not None and self.report.windows is not None:
            model_tokens += measured * self.report.windows * calibration.context_length
        limits.check_tokens("/models", model_tokens * len(self.models))
        return model_tokens * len(self.models)

    def found(self) -> Configuration:
        """Configuration that is measured on other models."""
        return Configuration.model_validate(self.configuration)

    @property
    def title(self) -> str:
        """The name of the job before its id."""
        model = str(self.configuration["model"].get("name", "a model")).rpartition("/")[2]
        pattern = self.configuration["pattern"]
        return self.name or f"transfer of {model[:180]} {pattern} {self.configuration['scope']}"

    def target(self, number: int) -> JobSpec:
        """How a model and its texts are read, as those of a search."""
        search = self.search or OwnSearchSpec()
        calibration = self.calibration
        assert calibration is not None  # the document says so
        return JobSpec(
            model=self.models[number],
            pattern=self.found().pattern,
            dtype=self.dtype,
            stream=self.stream,
            calibration=calibration,
            confirm=search.confirm,
        )
