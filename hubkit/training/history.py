"""The run's metrics on disk: `metrics.jsonl`, a line per step and evaluation, and `metrics.json`, the result.

No clock is in them: the same run writes the same bytes, also when it was killed and resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from hubkit.documents.files import write

HISTORY = "metrics.jsonl"
RESULT = "metrics.json"


class History:
    """Appends to `metrics.jsonl`.

    Args:
        step, evaluated: the state the run goes on from; lines of later steps and evaluations, which a kill left
            behind, are dropped because they will be written again.
        writes: False: another process does; nothing is read or written.
    """

    def __init__(self, run_dir: Path, step: int, evaluated: int, *, writes: bool = True) -> None:
        self._file: IO[bytes] | None = None
        if not writes:
            return
        self._path = run_dir / HISTORY
        kept = [line for line in _lines(self._path) if _is_before(line, step, evaluated)]
        write(self._path, b"".join(kept))
        (run_dir / RESULT).unlink(missing_ok=True)
        self._file = self._path.open("ab")

    def add(self, entry: Mapping[str, object]) -> None:
        """One line; it is with the operating system when this returns, so a killed process loses none."""
        if self._file is not None:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _is_before(line: bytes, step: int, evaluated: int) -> bool:
    """Whether a line is of a step or evaluation already done; half a line and a foreign one are not."""
    try:
        entry = json.loads(line)
        limit = evaluated if "validation_loss" in entry else step
        return line.endswith(b"\n") and bool(entry["step"] <= limit)
    except (ValueError, LookupError, TypeError):
        return False


def write_result(run_dir: Path, document: Mapping[str, object]) -> None:
    """`metrics.json`, replaced in one rename."""
    write(run_dir / RESULT, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
