"""
The search: candidates in, the best configuration out.

It knows Optuna and a function that rates candidates; it never sees a model.

The package can be called: `pho_service.search(...)` is the function of the Python API, which has
the same name.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that stands for the function of its name, too; that is loaded when it is called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def _function(self) -> Any:
        return import_module("pho_service.interface.found").search

    @property
    def __wrapped__(self) -> Any:
        """What help() and editors show the parameters of."""
        return self._function


sys.modules[__name__].__class__ = _Callable
