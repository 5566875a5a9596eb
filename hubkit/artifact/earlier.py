"""Earlier folders: what stood under a name before, kept beside it, so that one can go back.

===========================  =====================================================
``name``                     the folder that is in use
``name.earlier/0003-4f1c…``  one that was: a running number and 12 digits of its digest
===========================  =====================================================

Kept folders share their files with the one they were made of (hard links) where the file system can: they take no room
until the other is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hubkit.artifact.staging import staged
from hubkit.documents.files import refusing

_NAME = re.compile(r"(\d{4,})-([0-9a-f]{12})")


def earlier(folder: Path) -> list[Path]:
    """The folders that stood at `folder` before, the last one first."""
    place = _place(folder)
    with refusing(place):
        found = [path for path in place.iterdir() if _NAME.fullmatch(path.name)] if place.is_dir() else []
    return sorted(found, key=lambda path: _number(path), reverse=True)


def keep(folder: Path, digest: str, most: int) -> None:
    """Keep `folder` as it is, though its name is about to be another's; the oldest beyond `most` go.

    Args:
        digest: ``sha256:…`` of what is in it; kept once, as the last one.

    Raises:
        HubkitError: ``HK-DISK``, ``HK-IO``.
    """
    known, short = earlier(folder), digest.removeprefix("sha256:")[:12]
    if most > 0:
        number = _number(known[0]) + 1 if known else 1
        with staged(_place(folder) / f"{number:04d}-{short}") as stage:
            copy_linked(folder, stage)
    same = [path for path in known if path.name.endswith(short)]
    forget(*same, *[path for path in earlier(folder) if path not in same][max(0, most) :])


def copy_linked(source: Path, target: Path) -> None:
    """Fill the empty folder `target` with what is in `source`: hard links where these can be, else copies."""
    for place, folders, names in os.walk(source):
        below = target / Path(place).relative_to(source)
        for name in folders:
            (below / name).mkdir()
        for name in names:
            try:
                os.link(os.path.join(place, name), below / name, follow_symlinks=False)
            except OSError:
                shutil.copy2(os.path.join(place, name), below / name, follow_symlinks=False)


def forget(*folders: Path) -> None:
    """Remove kept folders, and the place of all when it is empty."""
    for folder in folders:
        with refusing(folder):
            shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _place(folder: Path) -> Path:
    real = Path(os.path.realpath(folder))
    return real.with_name(f"{real.name}.earlier")


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, "only kept folders are asked"
    return int(match[1])
