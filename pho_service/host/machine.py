"""
The machine that something was measured on, to be told with the figures.
"""

import os
import platform
import re
from pathlib import Path


def machine() -> str:
    """The processor and its cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def conditions() -> str:
    """The machine, and what else it is doing."""
    return f"{machine()}, load {os.getloadavg()[0]:.1f}"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)", about.read_text() if about.is_file() else "", re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()
