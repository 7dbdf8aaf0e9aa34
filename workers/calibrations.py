"""
The calibrate stages of a job: one for each model, which large calibrations share out in parts.

Each part gathers the sums of one shard. Parts have numbers of their own, and are told from the
stages that they are parts of by their parameters.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from pho_service.models.calibration import CalibrationText, cut, measure_shard
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import SHARDS
from pho_service.spec.job import JobSpec
from storage.records import Claim, NewStage
from storage.states import StageKind, StageState
from workers.inputs import Inputs
from workers.seal import Seal
from workers.watch import Watch

logger = logging.getLogger(__name__)

PARTS = 1_000_000  # parts have numbers from here, models below


class Unshared(Exception):
    """The parts of a calibration are to be done first; those that nobody knows of yet are new."""

    def __init__(self, parts: Sequence[NewStage] = (), known: dict[str, Any] | None = None) -> None:
        super().__init__(parts)
        self.parts, self.known = parts, known


def calibrated(inputs: Inputs, claim: Claim, spec: JobSpec, run: Run) -> tuple[ProxyBundle, Seal]:
    """Return the bundle of a model, and what it was made from."""
    parts = claim.job.parts(StageKind.CALIBRATE, claim.stage.number)
    if any(part.state is not StageState.DONE for part in parts):
        raise Unshared
    seal = inputs.seal(spec, Seal(**(claim.stage.params or {}).get("inputs", {})))
    text = inputs.calibration_text(spec, seal)
    if not parts and not inputs.bundles.has(text.bundle_key):
        shards = len(cut(text, spec.calibration.settings(), stream=spec.stream))
        if shards > 1:
            known = {"inputs": seal.to_dict()}
            raise Unshared(_parts(claim, inputs, text, shards, known), known)
    return inputs.calibrate(spec, seal, run.progress), seal


def _parts(
    claim: Claim, inputs: Inputs, text: CalibrationText, shards: int, known: dict[str, Any]
) -> list[NewStage]:
    """One for each shard; a shard that two jobs need is gathered by one part after the other."""
    key, whole = text.bundle_key, claim.stage.number
    return [
        NewStage(
            kind=StageKind.CALIBRATE,
            number=PARTS + whole * SHARDS + shard,
            params={
                "part_of": whole,
                "shard": shard,
                "key": key,
                "device": inputs.device.type,
                **known,
            },
            lock=f"shard {shard} of {key}",
        )
        for shard in range(shards)
    ]


def calibrate_part(inputs: Inputs, claim: Claim, watch: Watch) -> dict[str, Any]:
    """
    Gather the sums of a shard, if nobody has yet, and keep them for the stage.

    A worker that would give other last digits, since it has another kind of device or other
    versions of packages, leaves the shard to the one that adds up.
    """
    began = time.monotonic()
    params = claim.stage.params or {}
    spec = JobSpec.model_validate(claim.job.spec).of_model(int(params["part_of"]))
    key, shard = str(params["key"]), int(params["shard"])
    made = False
    bundles = inputs.bundles
    # In this order: sums are removed as soon as the bundle that they became is there.
    there = bundles.sums(key, shard) is not None or bundles.has(key)
    if not there and params["device"] == inputs.device.type:
        seal = Seal(**params["inputs"])
        text = inputs.calibration_text(spec, seal)
        if text.bundle_key == key:
            settings = spec.calibration.settings()
            model = inputs.model(spec, seal)
            sums = measure_shard(model, text, settings, shard, watch.progress)
            model.check_unchanged()
            bundles.keep_sums(key, shard, sums)
            made = True
    if not there and not made:
        logger.warning("shard %d is left to the worker that adds up", shard)
    return {"seconds": round(time.monotonic() - began, 3), "made": made}
