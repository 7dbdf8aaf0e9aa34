"""
What a job has found, on other models: ``:transfer`` asks for it, ``/transfer`` shows it.
"""

import json
from uuid import UUID

from fastapi import APIRouter, Response

from pho_service.api.answers import Job
from pho_service.api.describe import configuration_of, describe, is_transfer
from pho_service.api.jobs import IdempotencyKey, OnePattern
from pho_service.api.problems import Conflict, documented
from pho_service.api.service import CallerParam, ServiceParam
from pho_service.api.submission import enter
from pho_service.library.files import TransferFile, TransferTarget
from pho_service.spec.fields import check_field
from pho_service.spec.transfer import TransferRequest, TransferSpec
from storage.states import StageKind

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "/{job_id:uuid}:transfer",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 413, 422),
)
def transfer(
    job_id: UUID,
    request: TransferRequest,
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    pattern: OnePattern = None,
) -> Job:
    """Measure a job's configuration on other models, in a job with a stage for each model."""
    source = service.jobs.get(job_id, visible_to=caller.visible_to)
    found = configuration_of(source, pattern)
    request.check_access(service.access)
    asked = TransferSpec.of(request, str(source.id), found, source.spec)
    asked.check_size(service.limits)
    if request.notify is not None:
        check_field("notify", service.webhooks.check, request.notify)
    placed = request.placed(service.access)
    job = enter(
        service.jobs,
        TransferSpec.of(placed, str(source.id), found, source.spec),
        asked=asked,
        owner_id=caller.key_id,
        idempotency_key=idempotency_key,
        settings=service.settings,
    )
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return describe(job)


@router.get(
    "/{job_id:uuid}/transfer",
    responses={
        200: {"description": "transfer.json", "content": {"application/json": {"schema": {
            "type": "object"}}}},
        **documented(404, 409, 422),
    },
    response_class=Response,
)  # fmt: skip
def measured(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Get what a transfer has measured so far: the transfer.json that `pho transfer` writes."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    if not is_transfer(job):
        raise Conflict(
            "not_a_transfer",
            "The job is a search. POST :transfer measures its configuration on other models, as a "
            "job of its own.",
            job.state,
        )
    results = [stage.result for stage in job.of_kind(StageKind.TRANSFER)]
    document = TransferFile(
        source=job.spec["source"],
        configuration=job.spec["configuration"],
        targets=[TransferTarget.model_validate(result) for result in results if result],
    )
    text = json.dumps(document.model_dump(mode="json"), indent=2) + "\n"
    return Response(text, media_type="application/json")
