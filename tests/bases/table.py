"""The table architecture × method: its cells run in processes of their own, and are written as Markdown."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bases.architectures import save
from bases.cells import METHODS, Cell, run_cell

SECONDS = 180
"""What one architecture may take; it takes about three."""
REFUSALS = Path(__file__).parent / "refusals.json"
_HEAVY = ("cells", "hubkit.verbs.train", "hubkit.training.loop", "peft", "transformers.models.auto.modeling_auto")
"""What every process needs: imported once, in the one that they are forked from."""


def run(kinds: Sequence[str], methods: Sequence[str] = tuple(METHODS), workers: int = 2) -> Iterator[Cell]:
    """The cells of `kinds` × `methods`, row by row, each as soon as its row is there.

    A row has a process of its own, so one that crashes, hangs or leaves things changed spoils no other.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_HEAVY))
    with ThreadPoolExecutor(workers) as pool:
        for cells in pool.map(lambda kind: _row(context, kind, methods), kinds):
            yield from cells


def _row(context: multiprocessing.context.ForkServerContext, kind: str, methods: Sequence[str]) -> list[Cell]:
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, tuple(methods), theirs))
    process.start()
    theirs.close()
    stop = threading.Timer(SECONDS, process.kill)
    stop.start()
    found: list[Cell] = []
    try:
        while True:
            found.append(mine.recv())
    except EOFError:
        process.join()
    late = not stop.is_alive()
    stop.cancel()
    what = f"no answer within {SECONDS} s" if late else f"its process ended with status {process.exitcode}"
    missing = methods[len(found) :]
    return found + [Cell(kind, method, faults={"crash": what}) for method in missing]


def _child(kind: str, methods: Sequence[str], out: Connection) -> None:
    with tempfile.TemporaryDirectory() as room, open(os.devnull, "w") as nowhere:
        os.environ.update(HUBKIT_HOME=f"{room}/home", HF_HOME=f"{room}/hf", HF_HUB_OFFLINE="1")
        os.dup2(nowhere.fileno(), 2)  # transformers and PEFT have much to say
        warnings.simplefilter("ignore")
        import torch

        torch.set_num_threads(1)
        base = Path(room) / "base"
        try:
            save(kind, base)
        except Exception as error:  # says what is wrong in `architectures`, or in this transformers
            for method in methods:
                out.send(Cell(kind, method, faults={"crash": f"making the base: {error!r}"}))
            return
        for method in methods:
            out.send(run_cell(kind, method, base, Path(room) / "work"))


def expected() -> Mapping[tuple[str, str], str]:
    """(architecture, method) -> the code that `train` is to refuse it with; every other cell is to be ok."""
    return {
        (kind, method): group["code"]
        for group in groups(release())
        for kind in group["architectures"]
        for method in group["methods"]
    }


def groups(of: int) -> list[dict[str, Any]]:
    """The known refusals on a major release of transformers: those of every release, and those of that one alone."""
    return [group for group in json.loads(REFUSALS.read_text()) if group.get("transformers", of) == of]


def release() -> int:
    """The major release of transformers at hand."""
    import transformers

    return int(transformers.__version__.partition(".")[0])


def markdown(cells: Iterable[Cell]) -> str:
    """The table, one row per architecture."""
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.architecture, {})[cell.method] = cell
    columns = [method for method in METHODS if any(method in row for row in rows.values())]
    lines = [f"| architecture | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for kind, row in rows.items():
        words = [row[method].verdict.removeprefix("refused ") if method in row else "" for method in columns]
        lines.append(f"| `{kind}` | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def written(document: str, table: str) -> str:
    """`document` with `table` between its marks.

    Raises:
        ValueError: it has no marks, or not in order.
    """
    begin, end = marks()
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"there is no {begin} ... {end}")
    return f"{before}{begin}\n{table}{end}{after}"


def marks() -> tuple[str, str]:
    """What stands before and behind the table of the transformers at hand."""
    return f"<!-- transformers {release()}: scripts/bases --write -->", f"<!-- transformers {release()}: end -->"


def faults(cells: Iterable[Cell]) -> str:
    """What should not be, a line for each fault, for people."""
    return "".join(
        f"{cell.architecture} {cell.method}: {kind}: {what}\n" for cell in cells for kind, what in cell.faults.items()
    )
