"""
The only reader of environment variables: everything that starts with ``PHO_``.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pho_service.errors import InvalidInput
from pho_service.host.logs import LogFormat

Paths = Annotated[tuple[Path, ...], NoDecode]  # in the environment: with ":" between
Seconds = Annotated[float, Field(allow_inf_nan=False, le=1e6)]
Days = Annotated[float, Field(allow_inf_nan=False, le=36_500)]
Patterns = Annotated[tuple[str, ...], NoDecode]  # in the environment: with "," between


class Settings(BaseSettings):
    """All settings, by the environment variable ``PHO_`` and their name in capitals."""

    model_config = SettingsConfigDict(env_prefix="PHO_", validate_default=True)

    # Where bundles are kept for the next search, and copies of remote ones; what streamed models
    # write for a while.
    cache_dir: Path = Path("~/.cache/pho")
    # Data folder of `pho serve`: the embedded PostgreSQL and, by default, the bundles.
    data_dir: Path = Path("~/.local/share/pho")
    database_password_file: Path | None = None  # before the URL, which it completes
    database_url: SecretStr | None = None  # A PostgreSQL to use instead of the embedded one
    # Folder or fsspec URL (s3://, gs://) that all workers and the API share: of the bundles, and of
    # pruned models. host, port: Where `pho serve` listens.
    artifacts: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0 takes a free one
    workers: int = Field(default=1, ge=0, le=256)  # How many local workers `pho serve` starts
    model_roots: Paths = (Path(),)  # Folders that model folders and files of jobs must lie under
    text_roots: Paths = (Path(),)  # The same for texts
    # The same for folders of task files, whose Python functions are run; none without any.
    task_roots: Paths = ()
    # Program that converts models to GGUF, `convert_hf_to_gguf.py`; the package's by default.
    converter: str | None = None
    hub_models: Patterns = ("*",)  # Shell patterns of the hub's models that jobs may name
    hub_datasets: Patterns = ("*",)  # The same for data sets
    max_unfinished_jobs: int = Field(default=1000, ge=1)  # Limit of one key's unfinished jobs
    max_urgent_jobs: int = Field(default=10, ge=0)  # Limit of those with a priority above 0
    max_finished_jobs: int = Field(default=10_000, ge=1)  # Limit of one key's finished jobs
    # In the library, of one key that imports more.
    max_configurations: int = Field(default=10_000, ge=1)
    # Jobs that have been over for longer are deleted; 0 keeps them.
    keep_jobs_days: Days = Field(default=0.0, ge=0)
    # The files of pruned models that are older are deleted, and uploaded texts that no job has
    # named for so long; 0 keeps the former as long as their job, the latter until they are deleted.
    keep_pruned_days: Days = Field(default=0.0, ge=0)
    # The same for entries of the library, by their age.
    keep_configurations_days: Days = Field(default=0.0, ge=0)
    max_body_bytes: int = Field(default=64 * 1024, ge=1024)  # Largest size of a request
    max_upload_bytes: int = Field(default=64 * 2**20, ge=1024)  # Largest text that is uploaded
    max_uploaded_bytes: int = Field(default=2**30, ge=1024)  # Of all texts of one key
    # Limit for one job, on all its islands or all its models.
    max_trials: int = Field(default=100_000, ge=1)
    max_tokens: int = Field(default=10**9, ge=1)  # That one job may ask to run models over
    # Limit of the minutes of a recovery.
    max_recovery_minutes: float = Field(default=1440.0, gt=0, allow_inf_nan=False)
    # Largest size of a document or line of a text, and of a whole text.
    max_document_bytes: int = Field(default=64 * 2**20, ge=1024)
    max_text_bytes: int = Field(default=2**30, ge=1024)  # That are read of a text, unpacked
    # Limit for one key, or for one host without a key; 0 means no limit.
    max_requests_per_minute: int = Field(default=12_000, ge=0)
    max_wrong_keys_per_minute: int = Field(default=60, ge=0)  # Limit for one host; 0 means no limit
    # How long a browser stays logged in with a key.
    login_hours: float = Field(default=168.0, gt=0, le=8760, allow_inf_nan=False)
    trusted_proxies: Patterns = ()  # Addresses and networks whose ``X-Forwarded-For`` is believed
    # Shell patterns of the hosts that webhooks of jobs may go to; none without any.
    notify_hosts: Patterns = ()
    # Key that webhooks are signed with; without it none are sent.
    notify_secret: SecretStr | None = None
    notify_private: bool = False  # Whether webhooks may go to addresses that are not public
    heartbeat_s: Seconds = Field(default=10.0, gt=0)  # How often a worker reports
    # A file that a worker touches every two seconds, for probes of containers.
    liveness_file: Path | None = None
    # Without a report for so long, a worker's stage is given to another.
    stalled_after_s: Seconds = Field(default=30.0, gt=0)
    # How long `pho serve` waits for workers when it stops.
    stop_after_s: Seconds = Field(default=60.0, gt=0)
    retry_after_s: Seconds = Field(default=5.0, ge=0)  # Before a failed stage is tried again
    # How long a key or a job keeps a worker while another waits; 0 means until its stages end.
    turn_s: Seconds = Field(default=60.0, ge=0)
    # ``text`` for people, ``json`` for programs; for the service and its workers.
    log_format: LogFormat = "text"
    # Whether requests and stages are told to OpenTelemetry. api_url, api_key: For `pho submit` and
    # the other verbs that talk to a service.
    traces: bool = False
    api_url: str = "http://127.0.0.1:8000"
    api_key: SecretStr | None = None

    @field_validator("stalled_after_s")
    @classmethod
    def _after_some_heartbeats(cls, value: float, info: ValidationInfo) -> float:
        heartbeat_s = info.data.get("heartbeat_s", 0.0)
        if value < 2 * heartbeat_s:
            raise ValueError(
                f"a worker would be taken for dead between two heartbeats: it must be at least "
                f"twice PHO_HEARTBEAT_S, which is {heartbeat_s:g}"
            )
        return value

    @field_validator("database_password_file")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not _read_secret(value):
            raise ValueError("the file is empty")
        return value

    @field_validator("database_url")
    @classmethod
    def _with_password(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        file = info.data.get("database_password_file")
        if file is None:
            return value
        if value is None:
            raise ValueError("PHO_DATABASE_PASSWORD_FILE holds its password, so it must be set")
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(value.get_secret_value()).set(password=_read_secret(file))
        except (ArgumentError, ValueError):
            return value  # who opens it says what is wrong
        return SecretStr(url.render_as_string(hide_password=False))

    @field_validator("model_roots", "text_roots", "task_roots", mode="before")
    @classmethod
    def _split_paths(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "" and info.field_name == "task_roots":
            return ()  # and not the present folder, whose code would be run
        return value.split(os.pathsep) if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            ipaddress.ip_network(name)  # raises with the rule
        return value

    @field_validator("hub_models", "hub_datasets", "trusted_proxies", "notify_hosts", mode="before")
    @classmethod
    def _split_patterns(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [pattern.strip() for pattern in value.split(",") if pattern.strip()]


def _read_secret(file: Path) -> str:
    """Without the line's end that editors and `echo` write."""
    try:
        return file.expanduser().read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file cannot be read: {error}") from error


def read_settings(**given: Any) -> Settings:
    """The settings, those ``given`` (but not None) before those of the environment."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"][:1])
        raise InvalidInput(
            f"PHO_{name.upper()}={first['input']!r} is not allowed: {first['msg']}."
        ) from error
