"""
``/v1/plan``: what a job would take, before it is submitted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query

from pho_service.api.answers import PlanAnswer, Worker
from pho_service.api.jobs import checks, fitted
from pho_service.api.problems import documented
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.planning.costs import Machine, named_machine
from pho_service.planning.shapes import place_at_hand
from pho_service.spec.job import JobSpec

router = APIRouter(prefix="/v1/plan", tags=["jobs"])

Card = Literal["H200", "H100", "A100", "A100-40GB", "L40S", "4090", "cpu"]
Memory = Annotated[int | None, Query(ge=10**9, le=2**50, description="Bytes; by default its own.")]


@router.post("", response_model=PlanAnswer, responses=documented(413, 422))
async def plan(
    spec: JobSpec,
    service: ServiceParam,
    caller: CallerParam,
    card: Annotated[
        Card, Query(description="Card of a worker; cpu: the CPU of this machine.")
    ] = "H100",
    device_memory: Memory = None,
    main_memory: Memory = None,
) -> PlanAnswer:
    """Estimate what a job takes, by the headers of its (first) model's files alone."""
    machine = named_machine(card).resized(device_memory, main_memory)
    return await service.planning.run(_checked, spec, service, caller, machine)


def _checked(spec: JobSpec, service: Service, caller: Caller, machine: Machine) -> PlanAnswer:
    spec = fitted(spec, service.access)
    for check in checks(spec, service, caller):
        check()
    return PlanAnswer.model_validate(service.plan(spec, machine).to_dict())


def likely_card(workers: Sequence[Worker]) -> Card:
    """The card of a worker that is connected; ``cpu`` if none has one."""
    device = next((worker.device for worker in workers if worker.device != "cpu"), "cpu")
    cards: tuple[Card, ...] = get_args(Card)
    return next((card for card in cards if card in device), "A100")  # as a worker takes it


def at_hand(spec: JobSpec, service: Service) -> str | None:
    """Where a plan finds the model on this machine; None if it has to ask the hub."""
    path = service.access.model(spec.model)
    place = place_at_hand(path, spec.revision)
    local = Path(path).is_absolute()
    is_here = place is not None and (local or any(place.glob("model*.safetensors")))
    return str(place) if is_here else None
