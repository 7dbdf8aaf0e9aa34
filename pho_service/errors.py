"""
Everything that a user can do wrong, or that the world can do to a user.

    PhoError                  exit code 1
    ├── InvalidInput          a value breaks a rule (also a ValueError); exit code 2
    ├── ModelError            a model cannot be found, read or supported
    ├── TextError             a text cannot be read, or is too short
    ├── NumericalError        NaN or infinity where a number is needed
    ├── BundleError           a proxy bundle is broken, or belongs to another model
    ├── ConfigurationError    a configuration file is broken, or of another format version
    ├── StudyError            a stored study contradicts the search that wants to go on with it
    ├── TargetMissed          no sparsity is as good as was asked for
    ├── ChangedInput          a model, a text or a bundle changed while a job was working on it
    ├── OutputError           a result cannot be written
    ├── OutOfMemory           a GPU's memory, or the machine's, was not enough
    ├── DeviceLost            a GPU failed, and this process can use it no more
    └── ServiceError          the service says no
        └── ServiceUnavailable    the service, or its database, cannot be reached

Each message says the thing, the value, the rule and the way out. Wrong use by
a programmer stays ``TypeError`` or ``ValueError``.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Texts that others wrote, as they may be shown: in logs, on terminals, in messages.
MOST_CHARACTERS = 4000  # of a message: some dozen lines


def plain(text: str) -> str:
    """The text without control characters, which terminals obey; only its lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plain_line(text: str) -> str:
    """The same as one line."""
    return plain(text).replace("\n", "\\n")


def bounded(text: str) -> str:
    """The text without control characters, and without its middle if it is very long."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
    return plain(text)


def shown(value: object, most: int = 100) -> str:
    """A value of a document for a message: not long, and with nothing that cannot be printed."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    text = value if len(value) <= most else f"{value[:most]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


# What may be asked for has another name for each reader of a message: an option, an argument, a
# field of a job's document, a label of the form. Each face says which, and messages are made so.
Wording = Callable[[str, object], str]


def _last_part(path: str, value: object) -> str:
    name = path.rpartition("/")[2]
    return name if value is None else f"{name}={value}"


_wording: ContextVar[Wording] = ContextVar("wording", default=_last_part)


def field_name(path: str, value: object = None) -> str:
    """
    What the reader of a message calls a field of a job's document, or what else may be asked for.

    Args:
        path: Where the field is in the document, or the name of an argument in Python.
        value: Said with the name: ``--dtype bfloat16``. True is that of a flag.

    Returns:
        The name; "" if it is something that this reader cannot ask for.
    """
    return _wording.get()(path, value)


@contextmanager
def told_to(wording: Wording) -> Iterator[None]:
    """Inside, messages have the names that one kind of reader knows."""
    before = _wording.set(wording)
    try:
        yield
    finally:
        _wording.reset(before)


class PhoError(Exception):
    """
    Base of all errors that a user can act on.

    Args:
        message: What files and others say in it is shown without control characters, and no
            message is longer than :data:`~pho_service.errors.MOST_CHARACTERS`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class InvalidInput(PhoError, ValueError):
    """A value that a user gave breaks a rule."""


class ModelError(PhoError):
    """A model cannot be found, read or supported."""


class TextError(PhoError):
    """A text cannot be read, is empty, or is shorter than one window."""


class NumericalError(PhoError):
    """
    A weight, an activation or a score is NaN or infinite.

    Attributes:
        layer: Where, if it is known.
        candidate: With which method, coefficients and steps, if the job has not said so already.
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.layer = layer
        self.candidate = candidate


class BundleError(PhoError):
    """A proxy bundle is unreadable, of another format version, or of another model."""


class TargetMissed(PhoError):
    """No sparsity that may be tried is within the target of a search."""


class ChangedInput(PhoError):
    """A model, a text or a bundle is not the one that a job began with."""


class ConfigurationError(PhoError):
    """A configuration file is unreadable, contradicts itself, or has another format version."""


class StudyError(PhoError):
    """A stored study contradicts the search that wants to go on with it."""


class OutputError(PhoError):
    """A result cannot be written: no space, no permission, or something is there already."""


class OutOfMemory(PhoError):
    """The memory of a GPU, or of the machine, was not enough; the same again does not help."""


class DeviceLost(PhoError):
    """A GPU failed, or is gone; this process can use it no more, another may."""


class ServiceError(PhoError):
    """
    The service says no.

    Attributes:
        status: HTTP status.
        code: Stable, for programs; see the problem's ``code``.
        retry_after_s: When to ask again, if the service has said so.
        pointers: Places in the document that it is about.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        retry_after_s: float | None = None,
        pointers: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.pointers = pointers


class ServiceUnavailable(ServiceError):
    """The service, or its database, cannot be reached; trying again may help."""
