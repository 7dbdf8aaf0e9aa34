"""
The only reader of environment variables: everything that starts with ``PHO_``.
"""

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """
    Attributes:
        cache_dir: Where bundles that `pho search MODEL` makes are kept for the next search.
    """

    model_config = SettingsConfigDict(env_prefix="PHO_")

    cache_dir: Path = Path("~/.cache/pho")
