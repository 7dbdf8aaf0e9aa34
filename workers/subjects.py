"""
What the stages of a job work on: its bundles, and its model with the texts.
"""

from pho_service.pipeline.rating import Subject
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.job import JobSpec
from pho_service.spec.steps import Steps
from storage.records import Job
from workers.inputs import Inputs
from workers.seal import Seal
from workers.stored import provenances
from workers.watch import Watch


def subject_of(
    inputs: Inputs, job: Job, spec: JobSpec, steps: Steps, bundle: ProxyBundle
) -> Subject:
    """The only model of a job, and the texts that a candidate with these steps takes."""
    seal = Seal.of_job(job, 0)
    return Subject(
        model=inputs.model(spec, seal),
        bundle=bundle,
        text=inputs.confirmation_text(spec, seal),
        calibration=(inputs.calibration_text(spec, seal).calibration if steps.needs_text else None),
    )


def bundle_of(inputs: Inputs, job: Job, spec: JobSpec, watch: Watch) -> ProxyBundle:
    """Return the bundle of a job's only model."""
    return bundles_of(inputs, job, spec, watch)[spec.model]


def bundles_of(inputs: Inputs, job: Job, spec: JobSpec, watch: Watch) -> dict[str, ProxyBundle]:
    """Return the bundles of all models of a job, by name."""
    return {
        name: inputs.bundle(
            spec.of_model(i), Seal.of_job(job, i), str(origin["key"]), watch.progress
        )
        for i, (name, origin) in enumerate(zip(spec.models, provenances(job), strict=True))
    }
