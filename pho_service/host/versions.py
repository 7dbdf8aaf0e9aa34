"""
Package versions recorded with a result.
"""

import platform
from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of PHO and of ``packages``."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("pho-service", *packages)},
    }
