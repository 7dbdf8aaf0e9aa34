"""The public names: what `import pho_service` offers, and what it loads."""

import subprocess
import sys

import pytest

import pho_service as pho

NAMES = {
    "Client", "Configuration", "Pattern", "PhoError", "baseline", "bench", "calibrate", "compare",
    "configuration", "curve", "evaluate", "export", "load_model", "load_packed",
    "load_semi_structured",
    "objective", "pack", "prune", "push", "read_bundle", "read_configuration", "recover", "save",
    "search", "search_within", "unpack", "write_configuration",
}  # fmt: skip


def test_these_names_are_public_each_is_there_and_each_says_what_it_is():
    assert set(pho.__all__) == NAMES
    assert [*pho.__all__] == sorted(pho.__all__)
    assert set(dir(pho)) >= NAMES
    assert all(getattr(pho, name).__doc__ for name in NAMES)


def test_to_import_the_package_loads_nothing_that_takes_time_a_name_loads_what_it_needs():
    code = """
import sys
import pho_service as pho
light = {m.partition(".")[0] for m in sys.modules}
pho.Pattern, pho.Configuration, pho.Client
lighter = {m.partition(".")[0] for m in sys.modules}
print(*(light & {"torch", "transformers", "optuna", "numpy", "pydantic", "httpx"}), "|")
print(*(lighter & {"torch", "transformers", "datasets"}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.split() == ["|"]


def test_a_name_that_is_not_there_is_an_attributeerror_as_of_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'calibrat'"):
        getattr(pho, "calibrat")  # noqa: B009 - a name that is not there
