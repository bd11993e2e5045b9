"""What a run was made with: versions and machine, read without importing torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .registry import PLUGINS

PACKAGES = ("flowdistill", "torch", "torchvision", "numpy")
LIBRARIES = ("timm",)  # of networks; they change a number only where they are used


def version() -> str:
    """This package's version."""
    return metadata.version("flowdistill")


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less if its container (a control group) or a limit grants less."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    granted = [*([] if limit == resource.RLIM_INFINITY else [limit]), *_granted_by_groups()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *granted])


def _granted_by_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """The memory limits of the control groups that this process is in, of version 1 and 2; each group above it counts too."""
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
                inside = Path(path.lstrip("/"))
                for folder in (inside, *inside.parents):  # in a container the outer folders are not there
                    with contextlib.suppress(OSError, ValueError):
                        yield int((top / folder / name).read_text())  # "max" is no limit


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python, the platform and the packages that can change a number."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}
    for package in (*PACKAGES, *(library for library in LIBRARIES if library in sys.modules)):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts | PLUGINS


def circumstances() -> dict[str, str]:
    """Facts about a run's time and source that change no number: the mean number of processes that wanted to compute in the minute
    before (``load``), and the commit of this package's source, if it runs from a checkout.
    """
    with contextlib.suppress(OSError):
        return {"load": f"{os.getloadavg()[0]:.2f}", **_commit()}
    return _commit()


@functools.cache
def code_hash(package: Path = Path(__file__).parent) -> str:
    """SHA-256 over the names and contents of this package's modules: equal on machines that have the same code."""
    hasher = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        hasher.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return hasher.hexdigest()


@functools.cache
def _commit(root: Path = Path(__file__).parents[2]) -> dict[str, str]:
    """The commit; ``-dirty`` if the source was edited since. A folder above an installation is not looked at: its commit is another's."""
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            return {"commit": subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()}
    return {}
