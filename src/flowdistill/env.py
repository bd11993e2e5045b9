"""What a run was made with: versions and machine, read without importing torch."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("flowdistill", "torch", "torchvision", "numpy")
LIBRARIES = ("timm",)  # of networks; they change a number only where they are used


def version() -> str:
    """This package's version."""
    return metadata.version("flowdistill")


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python, the platform and the packages that can change a number."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}
    for package in (*PACKAGES, *(library for library in LIBRARIES if library in sys.modules)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
