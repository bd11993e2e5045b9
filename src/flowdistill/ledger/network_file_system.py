"""Whether a folder lies on a file system that several machines share, where SQLite can't keep a write-ahead log."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")  # Linux alone has it
NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "orangefs", "pvfs2", "glusterfs", "ncpfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs", "fuse.beegfs", "fuse.weka"),
    *("wekafs", "panfs", "daos", "fuse.dfuse"),
)
"""Kinds of file systems, as the kernel names them."""


def kind(folder: Path) -> str:
    """The kind of network file system that a folder, or the nearest folder above it that is there, lies on; empty if it is local, or if
    nobody knows.
    """
    place = os.path.realpath(folder)
    best, found = "", ""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount on the same point hides the earlier one
            best, found = point, after.split(" ")[0]
    return found if found in NETWORK else ""
