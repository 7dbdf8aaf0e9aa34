"""
Minutes in Python: the sizes of a calibration, and of a search, that fit into them.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.interface.inputs import calibration_text_of, length_of, settings_of
from pho_service.pipeline.minutes import Clock, machine_of
from pho_service.pipeline.work import Work
from pho_service.planning.shapes import Header, ModelShapes, TensorHeader, model_shapes
from pho_service.spec.configuration import reasons
from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import MOST_MINUTES, OF_THE_TEXT, SizeName

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts
    from pho_service.models.loading import LanguageModel
    from pho_service.planning.plan import Plan
    from pho_service.tuning.plan import SearchRequest


def as_job(document: Mapping[str, Any]) -> JobSpec:
    """The job that a call in Python would be, for its plan; InvalidInput if it can be none."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise InvalidInput(reasons(error)) from None


def clock_of(
    model: "LanguageModel",
    minutes: float,
    free: Collection[SizeName],
    took: Callable[["Plan"], float] | None = None,
    **document: Any,
) -> Clock:
    """
    The minutes of a search on a model in memory, or of what ``took`` says; they begin now.

    Raises:
        InvalidInput: They are not a number above 0, or the model cannot be planned.
    """
    if not 0 < minutes <= MOST_MINUTES:
        raise InvalidInput(
            f"minutes={minutes} is not a number above 0 and up to {MOST_MINUTES:,.0f}. Give "
            "minutes=20, say, or None for the sizes that are given."
        )
    began = time.monotonic()
    spec = as_job({"model": model.name, "minutes": minutes, "free_sizes": [*free], **document})
    shapes = _shapes_of(model)
    machine = machine_of(model, shapes, spec)
    return Clock(spec, shapes, machine, lambda: time.monotonic() - began, took)


def calibration_sizes(
    model: "LanguageModel",
    texts: "MixedTexts",
    minutes: float,
    samples: int | None,
    length: int | None,
    pattern: str = "0.5",
    took: Callable[["Plan"], float] | None = None,
) -> tuple[int, int]:
    """Windows and their length with which a search by its defaults, or ``took``, takes so long."""
    length = texts.shape[-1] if isinstance(texts, Tensor) else length
    values = {"context_length": length_of(model, texts, length)}
    values |= {} if samples is None else {"samples": samples}
    given = dict(zip(OF_THE_TEXT, (samples, length), strict=True))
    free = [path for path in OF_THE_TEXT if given[path] is None]
    clock = clock_of(model, minutes, free, took, pattern=pattern, calibration=values)
    clock.fit_text(model, calibration_text_of(texts), [], free)
    calibration = clock.plan.spec.calibration
    return calibration.samples, calibration.context_length


def search_clock(ask: Any, request: "SearchRequest", work: Work, **asked: Any) -> Clock:
    """The minutes of a search on a bundle, of what is asked; they begin now."""
    if work.dense is None:
        raise InvalidInput(
            "minutes are given without the model, and a search on a bundle alone takes seconds "
            "and confirms nothing. Give model=, too, or leave minutes out."
        )
    document: dict[str, Any] = {"calibration": settings_of(work.bundle).to_dict(), **asked}
    if not request.pattern.structured:
        steps = request.steps.to_dict()
        if "reconstruction" not in (ask.steps or {}):  # in as many passes as there is time for
            steps.pop("reconstruction", None)
        document |= {
            "preset": ask.preset, "steps": steps, "trials": request.trials,
            "in_full": request.in_full,
        }  # fmt: skip
    free: list[SizeName] = ["confirm/finalists"] if ask.finalists == type(ask).finalists else []
    free += ["in_full"] if ask.in_full is None else []
    confirm = {"windows": ask.confirm_windows, "finalists": request.finalists}
    return clock_of(work.dense, ask.minutes, free, **document, confirm=confirm)


def sized(request: "SearchRequest", clock: Clock) -> "SearchRequest":
    """A search with as many finalists, and as many in full, as its minutes have time for."""
    spec = clock.plan.spec
    assert spec.confirm is not None  # it is one with a model
    return replace(request, finalists=spec.confirm.finalists, in_full=spec.in_full)


def _shapes_of(model: "LanguageModel") -> ModelShapes:
    """The shapes of a model in memory, by what its parameters are called."""
    tensors = {
        name: TensorHeader(tuple(parameter.shape), "F32")
        for name, parameter in model.model.named_parameters()
    }
    config = {**model.model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    return model_shapes(model.name, Header(config=config, tensors=tensors))
