"""
One try at a calibration, and another one in smaller pieces where memory runs out.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, OutOfMemory
from pho_service.host.faults import first_words, let_go_of_memory, ran_out_of_memory
from pho_service.models.architecture import decoder_blocks
from pho_service.models.calibration_memory import plan_calibration, would_fit
from pho_service.models.loading import LanguageModel
from pho_service.planning.stage_memory import CalibrationRun
from pho_service.progress import Advance, Progress
from pho_service.pruning.statistics import Collector, gather
from pho_service.spec.calibration import CalibrationSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """
    Some of a calibration's windows, whose sums are gathered together.

    Attributes:
        windows: (windows, context_length), int64; those that are run backward too come first.
        fisher_windows: How many of them are.
        seed: Seed of the random projection.
    """

    windows: Tensor
    fisher_windows: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One try at a calibration."""

    model: LanguageModel
    settings: CalibrationSettings
    plan: CalibrationRun
    fisher_windows: int
    progress: Progress

    def products(self) -> AbstractContextManager[None]:
        """Inside, matrix products are in the precision that is asked for."""
        return torch.autocast(
            self.model.device.type, dtype=torch.bfloat16, enabled=self.settings.mixed_precision
        )

    def gather(self, shard: Shard, advance: Advance) -> Collector:
        """The sums of a shard."""
        blocks = [block for _, block in decoder_blocks(self.model.model)]
        with self.products():
            return gather(
                self.model.model,
                self.model.linears,
                shard.windows,
                fisher_windows=shard.fisher_windows,
                projection_rows=self.settings.projection_rows,
                seed=shard.seed,
                batch_windows=self.plan.windows,
                forward_windows=self.plan.forward_windows,
                recompute=blocks if self.plan.recompute else (),
                advance=advance,
            )


def within_memory(
    model: LanguageModel,
    windows: int,
    fisher_windows: int,
    settings: CalibrationSettings,
    progress: Progress,
    run: Callable[[Run], T],
) -> T:
    """
    What a run gives, planned to fit; if it does not, tried once more in smaller pieces.

    Args:
        model: Dense.
        windows: Windows of the calibration.
        fisher_windows: How many of them are run backward.
        settings: Settings of the calibration.
        progress: Progress of the run.
        run: Does it.

    Raises:
        InvalidInput, OutOfMemory: As :func:`~pho_service.models.calibration.measure`.
    """
    if settings.mixed_precision and model.dtype != torch.float32:
        raise InvalidInput(
            f"mixed precision is for float32 models, but {model.name} is loaded as "
            f"{str(model.dtype).removeprefix('torch.')}, which is as fast. Leave --mixed-precision "
            "out."
        )
    plan = plan_calibration(model, settings, windows=windows, fisher_windows=fisher_windows)
    logger.info("calibration planned", extra={**asdict(plan.run), **asdict(plan.peak)})
    how, smaller = plan.run, plan.run.halved()
    while True:
        try:
            return run(
                Run(
                    model=model, settings=settings, plan=how, fisher_windows=fisher_windows,
                    progress=progress,
                )
            )  # fmt: skip
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            if smaller is None:
                ways = would_fit(model, settings, fisher_windows=fisher_windows)
                raise OutOfMemory(
                    f"the calibration of {model.name} on windows of {settings.context_length} "
                    f"tokens ran out of memory{first_words(error)}. {ways}"
                ) from error
        # After the error, which holds on to what was computed.
        logger.warning("memory ran out: calibrating in smaller pieces", extra=asdict(smaller))
        how, smaller = smaller, None
        let_go_of_memory()
