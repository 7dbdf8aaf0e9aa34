"""What each release stored is read back: README.md says how it is written."""

import json
from pathlib import Path

import pytest

from pho_service.api.view import JobView
from pho_service.models.bundle_file import read_bundle
from pho_service.models.saving import read_recipe
from pho_service.spec.configuration import read_configuration, write_configuration
from pho_service.spec.job import JobSpec
from storage.backup import restore
from storage.configurations import ConfigurationStore
from storage.jobs import JobStore, NewJob
from storage.records import NewStage, StageKind
from storage.studies import read_trials, study_name

RELEASES = [
    path for path in sorted(Path(__file__).parent.iterdir()) if (path / "job.json").is_file()
]


@pytest.mark.parametrize("stored", RELEASES, ids=lambda path: path.name)
def test_read_back(stored, tmp_path):
    """The document of a job, a configuration, a recipe and a bundle are what they were."""
    job = json.loads((stored / "job.json").read_text())
    spec = JobSpec.model_validate(job)
    configuration = read_configuration(stored / "config.json")
    write_configuration(configuration, tmp_path / "config.json")
    bundle = read_bundle(stored / "bundle.safetensors")

    assert {**spec.model_dump(mode="json"), **job} == spec.model_dump(mode="json")
    assert read_configuration(tmp_path / "config.json") == configuration
    assert configuration.calibration["key"] == bundle.key
    assert read_recipe(stored).model.weights_sha256 == bundle.provenance["model"]["weights_sha256"]


@pytest.mark.parametrize("stored", RELEASES, ids=lambda path: path.name)
def test_a_cut_is_read_back(stored):
    cut = read_configuration(stored / "cut" / "config.json").cut
    recipe = read_recipe(stored / "cut")

    assert cut is not None
    assert recipe.structure is not None
    kept = {len(neurons) for neurons in recipe.structure.neurons.values()}
    assert kept == {cut.structure.neurons} - {None}


@pytest.mark.parametrize("stored", RELEASES, ids=lambda path: path.name)
def test_a_backup_of_a_service_is_restored_and_its_job_is_read(stored, empty_database):
    """With its result, its study and the library's entry; and it takes new jobs."""
    restore(empty_database, stored / "service.dump")
    store = JobStore(empty_database)
    (listed,) = store.page(limit=2)
    job = store.get(listed.id)  # with its result
    with empty_database.transaction() as connection:
        trials = read_trials(connection, study_name(job.name, 0))
    (entry,) = ConfigurationStore(empty_database).all()
    stage = NewStage(kind=StageKind.CALIBRATE, lock="bundle")
    again = NewJob(spec=job.spec, name="again", stages=[stage], trials=1, max_attempts=3)

    assert job.state == "succeeded"
    assert JobView(job).answer.best.objective == job.best["objective"]["value"]
    assert entry.document == job.best
    assert len(trials) == job.spec["trials"]
    assert store.submit(again)[0].state == "queued"
