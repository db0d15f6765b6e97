"""Which machine this is, as a person who compares two of them would say it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The processor by its market name, its cores and memory, and the operating system."""

    processor: str
    cores: int
    memory_bytes: int
    system: str


def process_age() -> float:
    """Return seconds since this process was started; on Linux by a clock that nobody can set."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        import psutil

        return max(0.0, datetime.now(UTC).timestamp() - psutil.Process().create_time())


def this_machine() -> Machine:
    """Return the facts of the machine this runs on."""
    import psutil  # not at the top: `--help` has no use for it

    return Machine(
        processor=processor_name(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=system_name(),
    )


def processor_name() -> str:
    """Return the processor's market name where the system tells it, else its architecture."""
    if sys.platform == "darwin":
        found = ask("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        found = name_in(read(Path("/proc/cpuinfo")))
    return " ".join((found or platform.machine()).split())


def name_in(cpuinfo: str) -> str | None:
    """Return the name in a text of the form of Linux' /proc/cpuinfo.

    >>> name_in("processor : 0\\nmodel name : AMD EPYC 9654\\nmodel name : AMD EPYC 9654\\n")
    'AMD EPYC 9654'
    """
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
    return match[1] if match else None


def system_name() -> str:
    """Return name and version of the operating system."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def ask(*command: str) -> str | None:
    """Return what a command of the system prints, None where it cannot be asked."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def read(path: Path) -> str:
    """Return a text file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
