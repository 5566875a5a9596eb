"""What a Hub's listing of a commit promises of each file, and whether bytes keep it.

The Hub names a large file by its sha256 and a small one by git's sha1 of the blob; both are checked, size alone never.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import IO, Any

from hubkit.registry.directory.objects import git_blob
from hubkit.registry.hub.faults import Asked, malformed

HEX40 = re.compile(r"[0-9a-f]{40}")
HEX64 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Expected:
    """What a file must be.

    Args:
        size: bytes.
        sha256: 64 hex digits (large files), or None.
        oid: git's 40-hex name of the blob (small files), or None.
    """

    size: int
    sha256: str | None
    oid: str | None


def expected(row: Mapping[str, Any], asked: Asked) -> tuple[str, Expected]:
    """Path and promise of one row of ``/api/models/{repo}/tree/{commit}``.

    Raises:
        HubkitError: ``HK-REGISTRY`` for a row without path, size or a digest.
    """
    path, size, oid, lfs = row.get("path"), row.get("size"), row.get("oid"), row.get("lfs")
    sha256 = None
    if isinstance(lfs, dict):
        # git's name of a large file is that of its pointer and proves nothing about the file
        size, sha256, oid = lfs.get("size"), lfs.get("oid"), None
    digest, form = (oid, HEX40) if sha256 is None else (sha256, HEX64)
    sound = isinstance(digest, str) and form.fullmatch(digest) is not None
    if not sound or not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise malformed("a file without size and digest", asked, have=str(path))
    return path, Expected(size, sha256, oid)


def matches(file: IO[bytes] | BufferedIOBase, entry: Expected) -> bool:
    """Whether what is left to read of `file` is what was promised."""
    if entry.sha256 is None:
        return git_blob(file.read(entry.size + 1)) == entry.oid
    sha256 = hashlib.sha256()
    while piece := file.read(_CHUNK):
        sha256.update(piece)
    return sha256.hexdigest() == entry.sha256
