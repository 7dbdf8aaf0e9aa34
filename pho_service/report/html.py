"""
What all pages share: how templates are read, and how a policy names what it lets run.
"""

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined


def template_environment(package: str, folder: str) -> Environment:
    """
    Jinja for the templates in a folder of a package: everything is escaped, nothing may be missing.

    A template is read once: a policy names what is in it by its hash, and both must be of one time.
    """
    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def policy_hash(source: str) -> str:
    """The source of a script or a style as a content security policy names it."""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"
