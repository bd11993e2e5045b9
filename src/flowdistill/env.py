"""What a run was made with: versions and machine, read without importing torch."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = ("flowdistill", "torch", "torchvision", "numpy")


def version() -> str:
    """This package's version."""
    return metadata.version("flowdistill")


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Python, the platform and the packages that can change a number."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
