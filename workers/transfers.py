"""
The stages of a transfer: each measures a configuration on one model.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from pho_service.errors import ChangedInput, DeviceLost, PhoError
from pho_service.host.faults import faults_told
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.transfer import Transfer, own_search, transfer_job
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.request import SearchRequest
from storage.jobs import JobStore
from storage.records import Claim, Job
from storage.states import StageKind
from workers.inputs import Inputs
from workers.seal import Seal
from workers.watch import Watch

logger = logging.getLogger(__name__)


def transfer_stage(store: JobStore, inputs: Inputs, claim: Claim, watch: Watch) -> None:
    """
    Measure, and store it. What a user can act on is the result of this model, and ends no other.

    Raises:
        HandBack: It was put down; its own search begins again.
        LostClaim: Another worker has it.
        DeviceLost: The GPU failed; another process may do it.
        Exception: Anything unexpected; another attempt may help.
    """
    spec = TransferSpec.model_validate(claim.job.spec)
    name = spec.models[claim.stage.number]
    try:
        with faults_told():
            result = _transfer(spec, inputs, claim.stage.number, watch).to_dict()
        store.transferred(
            claim,
            result,
            configuration=spec.configuration,
            own=result["own"],
            check=partial(_check_report, result),
        )
    except DeviceLost:
        raise  # no fault of this model
    except PhoError as error:
        logger.warning("%s of job %s failed: %s", name, claim.job.id, error)
        result = {
            "target": name,
            "key": "",
            "error": {"type": type(error).__name__, "message": str(error)},
            "warnings": [f"{name}: {error}"],
        }
        store.transferred(claim, result, configuration=spec.configuration, own=None)


def _check_report(mine: Mapping[str, Any], job: Job) -> None:
    """
    Raises:
        ChangedInput: Another model of the job was measured on another report text.
    """
    for stage in job.of_kind(StageKind.TRANSFER):
        other = stage.result or {}
        if _report_sha256(other) not in (None, _report_sha256(mine)):
            raise ChangedInput(
                f"the report text has changed since {other['target']} was measured: the numbers "
                "of the two models could not be compared. Transfer to this model again, as a job "
                "of its own, or to all of them."
            )


def _report_sha256(result: Mapping[str, Any]) -> str | None:
    """Hash of the whole text, whatever a model's tokenizer makes of it."""
    report = result.get("report") or {}
    sha256: str | None = report.get("text", {}).get("sha256")
    return sha256


def _transfer(spec: TransferSpec, inputs: Inputs, number: int, watch: Watch) -> Transfer:
    target = spec.target(number)
    if spec.search is None:
        target = target.model_copy(update={"confirm": None})  # nothing is confirmed
    found = spec.found()
    seal = inputs.seal(target)
    bundle = inputs.calibrate(target, seal, watch.progress)
    watch.look(now=True)
    transfer = transfer_job(
        Calibrated(
            name=target.model,
            bundle=bundle,
            model=inputs.model(target, seal),
            calibration=inputs.calibration_text(target, seal).calibration,
            confirm=inputs.confirmation_text(target, seal) if spec.search else None,
            report=_report(spec, inputs, number, seal),
        ),
        found,
        search=_own_search(spec),
        run=watch.run(inputs.device),
    )
    inputs.model(target, seal)  # its files were read all the time, also if it was not streamed
    return transfer


def _report(spec: TransferSpec, inputs: Inputs, number: int, seal: Seal) -> ReportText | None:
    if spec.report is None:
        return None
    return inputs.report_text(spec.target(number), spec.report, seal)


def _own_search(spec: TransferSpec) -> SearchRequest | None:
    """How the model's own best is searched for; its study is not kept."""
    if spec.search is None:
        return None
    return own_search(
        spec.found(),
        spec.search,
        finalists=spec.search.confirm.candidates,
    )
