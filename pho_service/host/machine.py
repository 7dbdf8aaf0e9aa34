"""
This machine: its name, its package versions, missing packages, and its faults in words.
"""

import ctypes
import gc
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import distributions, requires, version
from pathlib import Path
from typing import Any

from pho_service.errors import DeviceLost, ModelError, OutOfMemory, PhoError, field_name


def machine() -> str:
    return f"{_processor()}, {os.cpu_count()} cores"


def conditions() -> str:
    """The machine, and what else it is doing."""
    return f"{machine()}, load {os.getloadavg()[0]:.1f}"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)", about.read_text() if about.is_file() else "", re.M)
    return match[1].strip() if match else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of PHO and of ``packages``."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("pho-service", *packages)},
    }


# What to install when a package is missing that only some parts of PHO need; what several bring
# is missed first where a model is to be run.
EXTRAS = {"worker": "to run models", "api": "to serve jobs", "eval": "for zero-shot tasks"}


def _requirements(extra: str) -> dict[str, str]:
    """What an extra brings: the requirements by the names of their packages."""
    matched = re.compile(rf"(([\w.-]+)[^;]*?)\s*;.*extra == ['\"]{extra}['\"]").fullmatch
    return {match[2]: match[1] for r in requires("pho-service") or () if (match := matched(r))}


def _module(name: str) -> str:
    return re.sub(r"[.-]", "_", name)


def missing_of(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    installed = {_module(distribution.name).lower() for distribution in distributions()}
    return [name for name in _requirements(extra) if _module(name).lower() not in installed]


# No index has PHO itself yet: whoever took its name there would run code on readers' machines.
def install_command(extra: str, module: str = "") -> str:
    """What installs the packages of an extra that are missing, or all where none is."""
    requirements, missing = _requirements(extra), missing_of(extra)
    needed = [r for name, r in requirements.items() if name in missing or _module(name) == module]
    return shlex.join(["pip", "install", *(needed or requirements.values())])


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Say what to install: ``needs torch: pip install 'torch>=2.7'``."""
    if error.name is None:
        return None
    module = error.name.partition(".")[0]
    for extra in EXTRAS:
        if module in map(_module, _requirements(extra)):
            return f"needs {module}: {install_command(extra, module)}"
    return None


PATIENCE_S = 5.0  # with a hub that does not answer, before it counts as away


def hub_answers() -> bool:
    """Return whether the Hugging Face hub can be reached from here, and may be."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    with suppress(httpx.HTTPError):
        httpx.head(constants.ENDPOINT, timeout=PATIENCE_S)
        return True
    return False


LONGEST = 300  # characters of a library's message

# What allocators say in a RuntimeError: torch's on a CPU, CUDA's outside of torch's own.
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of a GPU or of the machine, was not enough."""
    if isinstance(error, (MemoryError, _torch("OutOfMemoryError"))):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def device_is_lost(error: BaseException) -> bool:
    """Return whether a GPU failed: nothing more can be done on it by this process."""
    # An illegal access or an uncorrectable memory error breaks the CUDA context; a card that fell
    # off its bus looks the same.
    if ran_out_of_memory(error):
        return False
    if isinstance(error, _torch("AcceleratorError")):
        return True
    return isinstance(error, RuntimeError) and "CUDA error:" in str(error)


@contextmanager
def faults_told() -> Iterator[None]:
    """Inside, what goes wrong with the machine is raised as an error that a user can act on."""
    try:
        yield
    except PhoError:
        raise
    except BaseException as error:
        fault = _told(error)
        if fault is None:
            raise
        raise fault from error


def _told(error: BaseException) -> PhoError | None:
    reason = first_words(error)
    if ran_out_of_memory(error):
        return OutOfMemory(
            f"memory ran out{reason}. Use a smaller model, shorter windows "
            f"({field_name('calibration/context_length')}), {field_name('dtype', 'bfloat16')} or "
            f"{field_name('stream', True)}, or give it more memory."
        )
    if device_is_lost(error):
        another = field_name("device") or "GPU"
        return DeviceLost(
            f"the GPU failed{reason}. A new process may work; if this happens again, see what "
            f"nvidia-smi and the kernel's log say of the card, or use another {another}."
        )
    if type(error).__name__ == "PanicException":  # of a library in Rust; it is no Exception here
        return ModelError(
            f"a library stopped inside its own code (a panic){reason}. It was given something that "
            "it cannot work with: if it is the tokenizer, check the model's tokenizer.json, or "
            "give another text."
        )
    return None


def first_words(error: BaseException) -> str:
    """The words of a library up to its advice to programmers: ``: CUDA error ...``."""
    line = " ".join(str(error).split("\n\n")[0].split())
    words = re.split(r" If reserved but| CUDA kernel errors| Search for `", line)[0]
    words = re.sub(r"^\[enforce fail at [^]]*\] *", "", words).rstrip(". ")
    return f": {words[:LONGEST]}" if words else ""


def let_go_of_memory() -> None:
    """Release what is no longer in use: cycles, what the heap has spare, the cache of torch."""
    gc.collect()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # else many small objects leave a heap full of holes
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _torch(name: str) -> Any:
    """One of torch's errors; an empty tuple, which nothing is an instance of, where it has none."""
    return getattr(sys.modules.get("torch"), name, ())
