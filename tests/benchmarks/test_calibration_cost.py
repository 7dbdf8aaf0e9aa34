"""The benchmark of calibrations runs from end to end on a tiny model."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_cost.py"


def test_calibration_cost(model_folder: Path, texts: dict[str, Path]) -> None:
    """It prints the bare passes, whole calibrations with their ranks, and the sums by width."""
    spec = spec_from_file_location("calibration_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(
            module.main,
            [
                str(model_folder), "--text", str(texts["calibration"]), "--samples", "4",
                "--context-length", "24", "--candidates", "8", "--linear", "16x8",
            ],
            catch_exceptions=False,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    lines = [line.strip() for line in done.stdout.splitlines()]
    rows = {line.split("  ")[0]: line.split() for line in lines}

    assert done.exit_code == 0
    assert {
        "bare forward of 3, no head", "bare forward and backward of 1", "calibration",
        "with recomputing", "with mixed precision", "with another seed", "with the Gram matrix",
        "16x8",
    } <= rows.keys()  # fmt: skip
    assert rows["calibration"][-1] == rows["with recomputing"][-1] == "1.0000"
    assert float(rows["with mixed precision"][-1]) > 0.9
    assert len(rows["16x8"]) == 5
