"""
Files of a library: configurations, and transfers, which hold one and what it was worth elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from pho_service.errors import ConfigurationError
from pho_service.spec.configuration import (
    TRANSFER_FORMAT,
    Configuration,
    check_values,
    parse_configuration,
    read_document,
    reasons,
    shown,
)

TRANSFER_VERSION = 1


class TransferTarget(BaseModel):
    """What of a measured transfer counts here; the rest is kept, and not looked at."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    target: str
    model: dict[str, Any] = {}
    perplexities: dict[str, float] = {}
    proxies: dict[str, float | None] = {}


class TransferFile(BaseModel):
    """``transfer.json`` of `pho transfer`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["pho-transfer"] = "pho-transfer"
    version: int = TRANSFER_VERSION
    source: str
    configuration: dict[str, Any]
    targets: Annotated[list[TransferTarget], FailFast()] = Field(max_length=1000)


@dataclass(frozen=True, kw_only=True)
class LibraryFile:
    """A configuration, and what it was worth elsewhere."""

    configuration: Configuration
    targets: tuple[TransferTarget, ...] = ()

    def to_dict(self, source: str) -> dict[str, Any]:
        """
        A configuration's file; that of a transfer if there are any.

        The targets' own bests are left out: each is a configuration of its own.
        """
        written = self.configuration.model_dump(mode="json")
        if not self.targets:
            return written
        file = TransferFile(source=source, configuration=written, targets=[*self.targets])
        return file.model_dump(mode="json", exclude={"targets": {"__all__": {"own"}}})


def parse_library_file(document: Any, name: str) -> LibraryFile:
    """
    Check a configuration or a transfer.

    Args:
        document: JSON values.
        name: For messages.

    Raises:
        ConfigurationError: It is neither, of another version, or breaks a rule; names the key.
    """
    check_values(document, name)
    if not isinstance(document, dict) or document.get("format") != TRANSFER_FORMAT:
        return LibraryFile(configuration=parse_configuration(document, name))
    if document.get("version") != TRANSFER_VERSION:
        raise ConfigurationError(
            f"{name} is a transfer of format version {shown(document.get('version'))}, but this "
            f"PHO reads version {TRANSFER_VERSION}. Install the PHO that wrote it."
        )
    try:
        found = TransferFile.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(f"{name} breaks the format: {reasons(error)}.") from error
    return LibraryFile(
        configuration=parse_configuration(found.configuration, f"{name}: configuration"),
        targets=tuple(found.targets),
    )


def read_library_file(path: Path) -> LibraryFile:
    """
    A configuration or a transfer from a file.

    Raises:
        ConfigurationError: As :func:`parse_library_file`, or it cannot be read.
    """
    return parse_library_file(read_document(path), str(path))


def read_folder(folder: Path) -> tuple[dict[str, LibraryFile], list[str]]:
    """
    All configurations below a folder, and what else there is.

    Returns:
        By the path in the folder; and a sentence for each .json file that is none.

    Raises:
        ConfigurationError: It is no folder.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"the library {folder} is no folder. Give a folder of configurations, or the URL of a "
            "service."
        )
    found, others = {}, []
    for path in sorted(folder.rglob("*.json")):
        try:
            found[str(path.relative_to(folder))] = read_library_file(path)
        except ConfigurationError as error:
            others.append(str(error))
    return found, others


def stored_file(document: Mapping[str, Any], transfers: Sequence[Mapping[str, Any]]) -> LibraryFile:
    """An entry of a service's store, which was checked when it was stored."""
    return LibraryFile(
        configuration=Configuration.model_validate(document),
        targets=tuple(TransferTarget.model_validate(each) for each in transfers),
    )
