"""
The stages of a transfer: each measures a configuration on one model.
"""

import logging
import tempfile
from pathlib import Path

from pho_service.errors import DeviceLost, PhoError
from pho_service.faults import faults_told
from pho_service.jobs.rating import ReportText
from pho_service.jobs.transfer import Target, Transfer, own_search, transfer_job
from pho_service.search.request import SearchRequest
from pho_service.transfer_spec import TransferSpec
from storage.jobs import Claim, JobStore
from workers.inputs import Inputs
from workers.watch import Watch

logger = logging.getLogger(__name__)


def transfer_stage(store: JobStore, inputs: Inputs, claim: Claim, watch: Watch) -> None:
    """
    Measure, and store it. What a user can act on is the result of this model, and ends no other.

    Raises:
        HandBack: It was put down; its own search begins anew.
        LostClaim: Another worker has it.
        DeviceLost: The GPU failed; another process may do it.
        Exception: Anything unexpected; another attempt may help.
    """
    spec = TransferSpec.model_validate(claim.job.spec)
    name = spec.models[claim.stage.number]
    own = None
    try:
        with faults_told(), tempfile.TemporaryDirectory(prefix="pho-") as folder:
            transfer = _transfer(spec, inputs, claim.stage.number, watch, Path(folder))
        result = transfer.to_dict()
        own = result["own"]
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
    store.transferred(claim, result, configuration=spec.configuration, own=own)


def _transfer(
    spec: TransferSpec, inputs: Inputs, number: int, watch: Watch, folder: Path
) -> Transfer:
    target = spec.target(number)
    found = spec.found()
    bundle = inputs.calibrate(target, watch.progress)
    watch.look(now=True)
    return transfer_job(
        Target(
            name=target.model,
            bundle=bundle,
            model=inputs.model(target),
            calibration=inputs.calibration_text(target).calibration,
            confirm=inputs.confirmation_text(target) if spec.search else None,
            report=_report(spec, inputs, number),
        ),
        found,
        search=_own_search(spec, folder),
        device=str(inputs.device),
        progress=watch.progress,
    )


def _report(spec: TransferSpec, inputs: Inputs, number: int) -> ReportText | None:
    reading = spec.report_of(number)
    return None if reading is None else inputs.confirmation_text(reading)


def _own_search(spec: TransferSpec, folder: Path) -> SearchRequest | None:
    """How the model's own best is searched for; its study is not kept."""
    if spec.search is None:
        return None
    return own_search(
        spec.found(),
        trials=spec.search.trials,
        seed=spec.search.seed,
        finalists=spec.search.confirm.candidates,
        study_url=f"sqlite:///{folder / 'study.db'}",
    )
