"""
The calibrate stages of a job: one for each model, which large calibrations share out in parts.

Each part gathers the sums of one shard. Parts have numbers of their own, and are told from the
stages that they are parts of by their parameters.
"""

import logging
import time
from typing import Any

from pho_service.models.calibration import CalibrationText, cut, measure_shard
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import SHARDS
from pho_service.spec.job import JobSpec
from storage.jobs import JobStore
from storage.records import Claim, NewStage
from storage.states import StageKind, StageState
from workers.inputs import Inputs
from workers.seal import Seal
from workers.watch import Watch

logger = logging.getLogger(__name__)

PARTS = 1_000_000  # parts have numbers from here, models below


def calibrated(
    store: JobStore, inputs: Inputs, claim: Claim, spec: JobSpec, watch: Watch
) -> tuple[ProxyBundle, Seal] | None:
    """
    Give the bundle of a model, and what it was made from; None if its parts are to be done first.

    Args:
        store: Store of the jobs.
        inputs: Inputs of this worker.
        claim: Claim of the stage.
        spec: The job, with this model alone.
        watch: Watch of the stage.

    Raises:
        PhoError: As :meth:`Inputs.seal` and :meth:`Inputs.calibrate`.
    """
    parts = claim.job.parts(StageKind.CALIBRATE, claim.stage.number)
    if any(part.state is not StageState.DONE for part in parts):
        store.share(claim)
        return None
    before = Seal(**(claim.stage.params or {}).get("inputs", {}))
    seal = inputs.seal(spec, before)
    text = inputs.calibration_text(spec, seal)
    if not parts and not inputs.bundles.has(text.bundle_key):
        shards = len(cut(text, spec.calibration.settings(), stream=spec.stream))
        if shards > 1:
            known = {"inputs": seal.to_dict()}
            store.share(claim, _parts(claim, inputs, text, shards, known), params=known)
            return None
    return inputs.calibrate(spec, seal, watch.progress), seal


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


def calibrate_part(
    store: JobStore, inputs: Inputs, claim: Claim, spec: JobSpec, watch: Watch
) -> None:
    """
    Gather the sums of a shard, if nobody has yet, and keep them for the stage.

    A worker that would give other last digits, since it has another kind of device or other
    versions of packages, leaves the shard to the one that adds up.

    Args:
        store: Store of the jobs.
        inputs: Inputs of this worker.
        claim: Claim of the part.
        spec: The job, with the part's model alone.
        watch: Watch of the part.

    Raises:
        PhoError: As :meth:`Inputs.calibration_text`, :func:`measure_shard` and
            :meth:`LanguageModel.check_unchanged`.
    """
    began = time.monotonic()
    params = claim.stage.params or {}
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
    seconds = round(time.monotonic() - began, 3)
    store.complete_part(claim, {"seconds": seconds, "made": made})
