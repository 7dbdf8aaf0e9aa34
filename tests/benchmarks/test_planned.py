"""The plan of a job on a CPU, beside what the job takes."""

import pytest

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("preset", ["crepe-plus", "best"])
def test_each_stage_is_planned(benchmark, model_folder, preset):
    """Within a factor of three in seconds of the process, on a machine that others use, too."""
    table = benchmark(
        "planned", "--model", model_folder, "--preset", preset, "--samples", 64,
        "--context-length", 32, "--windows", 16, "--trials", 100,
    )  # fmt: skip

    for stage in ("calibrate", "search", "confirm by perplexity", "prune"):
        assert 1 / 3 < float(table[stage][-1]) < 3, table
