"""A few lines of C where torch has no way: compiled at the first use, kept below hubkit's folder, done without where no
compiler is. ``HUBKIT_COMPILE=0`` switches it off.

Cores are shared with torch: a library takes its OpenMP from the process, in which torch has loaded one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from hubkit.artifact.identity.digest_cache import home
from hubkit.documents.drafts import scratch

Library = TypeVar("Library")
SWITCH = "HUBKIT_COMPILE"
"""Environment variable: ``0`` leaves everything to torch."""
_FLAGS = ("-O3", "-fPIC", "-ffp-contract=off")
_PARALLEL = (("-fopenmp",), ())


def wanted() -> bool:
    """Whether compiled code may run."""
    return os.environ.get(SWITCH) != "0"


def built(source: Path, make: Callable[[ctypes.CDLL], Library], agrees: Callable[[Library], bool]) -> Library | None:
    """The library of a C file, compiled if need be; None where torch has to do, for whatever reason.

    Args:
        make: from what is loaded; an AttributeError says that it lacks a function.
        agrees: whether a sample is what torch makes of it.
    """
    folder = home()
    if not wanted() or folder is None or os.name != "posix" or sys.byteorder != "little":
        return None
    try:
        made = make(ctypes.CDLL(str(_compiled(source, folder / "compiled"))))
    except (AttributeError, OSError, subprocess.SubprocessError):
        return None
    return made if agrees(made) else None


def _compiled(source: Path, folder: Path) -> Path:
    """The library of `source`, in `folder`, compiled if it is not there.

    Raises:
        OSError: without a compiler, or where nothing can be written.
        subprocess.SubprocessError: when it does not compile.
    """
    text = source.read_bytes()
    facts = "\n".join([*_FLAGS, platform.system(), platform.machine(), torch.__version__, str(os.getuid())])
    path = folder / f"{source.stem}-{hashlib.sha256(text + facts.encode()).hexdigest()[:16]}.so"
    if path.exists():
        if path.stat().st_uid != os.getuid():
            raise PermissionError(f"{path} is another user's")  # code of somebody else is not run
        return path
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or "gcc"]
    with scratch(folder) as work:
        made, linked = work / "made.o", work / "made.so"
        for parallel in _PARALLEL:
            done = _run([*compiler, *_FLAGS, *parallel, "-c", str(source), "-o", str(made)], parallel == ())
            # without -fopenmp here: a second OpenMP beside torch's would mean twice the threads
            if done and _run([*compiler, "-shared", str(made), "-o", str(linked)], parallel == ()) and _loads(linked):
                break
        os.replace(linked, path)
    return path


def _run(command: list[str], required: bool) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=required).returncode == 0


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:  # there is no OpenMP in this process
        return False
    return True
