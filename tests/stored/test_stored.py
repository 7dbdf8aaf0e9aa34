"""What each release stored is read back: README.md says how it is written."""

import json
from pathlib import Path

import pytest

from pho_service.models.bundle_file import read_bundle
from pho_service.models.saving import read_recipe
from pho_service.spec.configuration import read_configuration, write_configuration
from pho_service.spec.job import JobSpec

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
