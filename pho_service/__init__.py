"""
PHO: finds pruning coefficients for large language models by a fast proxy.

The names here are the Python API; each is loaded when it is first used, so that
`import pho_service` loads neither torch nor transformers.
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

# Before torch is loaded. By default OpenMP's threads wait for each other at full speed for
# milliseconds, so that beside other work everything takes several times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from pho_service.client import Client as Client
    from pho_service.errors import PhoError as PhoError
    from pho_service.interface.curve import curve as curve
    from pho_service.interface.curve import search_within as search_within
    from pho_service.interface.measured import bench as bench
    from pho_service.interface.measured import compare as compare
    from pho_service.interface.measured import evaluate as evaluate
    from pho_service.interface.objective import baseline as baseline
    from pho_service.interface.objective import configuration as configuration
    from pho_service.interface.objective import objective as objective
    from pho_service.interface.pruned import export as export
    from pho_service.interface.pruned import load_semi_structured as load_semi_structured
    from pho_service.interface.pruned import prune as prune
    from pho_service.interface.pruned import save as save
    from pho_service.interface.recovered import recover as recover
    from pho_service.interface.search import calibrate as calibrate
    from pho_service.interface.search import search as search
    from pho_service.models.bundle_file import read_bundle as read_bundle
    from pho_service.models.loading import load_model as load_model
    from pho_service.models.loading import load_packed as load_packed
    from pho_service.models.packed import pack as pack
    from pho_service.models.packed import unpack as unpack
    from pho_service.models.saving import push as push
    from pho_service.spec.configuration import Configuration as Configuration
    from pho_service.spec.configuration import read_configuration as read_configuration
    from pho_service.spec.configuration import write_configuration as write_configuration
    from pho_service.spec.pattern import Pattern as Pattern

_HOME = {
    "Client": "client",
    "Configuration": "spec.configuration",
    "Pattern": "spec.pattern",
    "PhoError": "errors",
    "baseline": "interface.objective",
    "bench": "interface.measured",
    "calibrate": "interface.search",
    "compare": "interface.measured",
    "configuration": "interface.objective",
    "curve": "interface.curve",
    "evaluate": "interface.measured",
    "export": "interface.pruned",
    "load_model": "models.loading",
    "load_packed": "models.loading",
    "load_semi_structured": "interface.pruned",
    "objective": "interface.objective",
    "pack": "models.packed",
    "prune": "interface.pruned",
    "push": "models.saving",
    "read_bundle": "models.bundle_file",
    "read_configuration": "spec.configuration",
    "recover": "interface.recovered",
    "save": "interface.pruned",
    "search": "interface.search",
    "search_within": "interface.curve",
    "unpack": "models.packed",
    "write_configuration": "spec.configuration",
}

__all__ = [*_HOME]


def _in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose messages name arguments."""
    from pho_service.errors import told_to
    from pho_service.spec.job_options import argument

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with told_to(argument):
            return function(*args, **kwargs)

    call.__module__, call.__qualname__ = __name__, function.__name__  # as it is pickled
    return call


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        near = "".join(f" Did you mean {near}?" for near in get_close_matches(name, _HOME, 1))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{near}", name=name)
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    value = _in_python(value) if isfunction(value) else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
