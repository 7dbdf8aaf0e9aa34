"""
What to install when a package is missing that only some parts of PHO need.
"""

import re
from importlib.metadata import requires

_EXTRAS = ("worker", "api", "eval")  # what both bring is missed first where a model is to be run


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """
    What is needed, and how to install it: ``needs torch: pip install 'pho-service[worker]'``.

    Returns:
        None if no extra brings the module: the fault is not the installation's.
    """
    if error.name is None:
        return None
    module = error.name.partition(".")[0]
    for extra in _EXTRAS:
        for requirement in requires("pho-service") or ():
            found = re.fullmatch(rf"([\w.-]+).*extra == ['\"]{extra}['\"]", requirement)
            if found is not None and re.sub(r"[.-]", "_", found[1]) == module:
                return f"needs {module}: pip install 'pho-service[{extra}]'"
    return None
