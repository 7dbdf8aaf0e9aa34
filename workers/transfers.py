"""
The pieces of a transfer: each measures a configuration on one model.
"""

from collections.abc import Mapping
from typing import Any

from pho_service.errors import ChangedInput, PhoError
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.transfer import own_search, transfer_job
from pho_service.progress import Run
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.request import SearchRequest
from storage.records import Job
from storage.states import StageKind
from workers.inputs import Inputs
from workers.seal import Seal
from workers.watch import Watch


def failed(name: str, error: PhoError) -> dict[str, Any]:
    """The result of a model that nothing was measured on, for a reason that a user can act on."""
    return {
        "target": name,
        "key": "",
        "error": {"type": type(error).__name__, "message": str(error)},
        "warnings": [f"{name}: {error}"],
    }


def check_report(mine: dict[str, Any], job: Job) -> dict[str, Any]:
    """The result of a model; a failed one if others of the job have another report text."""
    report = _report_sha256(mine)
    for stage in job.of_kind(StageKind.TRANSFER):
        other = stage.result or {}
        if report is not None and _report_sha256(other) not in (None, report):
            error = ChangedInput(
                f"the report text has changed since {other['target']} was measured: the numbers "
                "of the two models could not be compared. Transfer to this model again, as a job "
                "of its own, or to all of them."
            )
            return failed(mine["target"], error)
    return mine


def _report_sha256(result: Mapping[str, Any]) -> str | None:
    """Hash of the whole text, whatever a model's tokenizer makes of it."""
    report = result.get("report") or {}
    sha256: str | None = report.get("text", {}).get("sha256")
    return sha256


def transfer_piece(
    spec: TransferSpec, inputs: Inputs, number: int, watch: Watch, run: Run
) -> dict[str, Any]:
    """Measure on the model with this number."""
    target = spec.target(number)
    if spec.search is None:
        target = target.model_copy(update={"confirm": None})  # nothing is confirmed
    seal = inputs.seal(target)
    bundle = inputs.calibrate(target, seal, run.progress)
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
        spec.found(),
        search=_own_search(spec),
        run=Run(device=run.device, progress=run.progress, look=run.look),  # its study is not kept
    )
    inputs.model(target, seal)  # its files were read all the time, also if it was not streamed
    return transfer.to_dict()


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
