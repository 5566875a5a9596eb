"""`predict`: what an adapter that was trained for a task says of rows, or of one text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.arguments import checked
from hubkit.documents.files import require_free, write
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_with_record, named_base, naming_digest
from hubkit.named.terms import Term, attached, codec_of_terms, open_terms, require_base
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True, repr=False)
class Predicted(Shown):
    """What is said of rows, in their order.

    Args:
        rows: for each row where it stands, and what the task says of it. Of ``classification`` its ``label``, and
            ``probabilities``: label -> share, adding up to 1. Of ``token-classification`` the ``spans`` of a text, or
            the ``labels`` of a list of words. Of ``embedding`` its ``vector``, of length 1. Empty where they were
            written into a file.
        overrides: named overrides used.
        out: the file that was written.
        count: how many rows it has.
    """

    rows: tuple[dict[str, Any], ...]
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    count: int = 0


@checked
def predict(
    adapter: Path | str,
    data: Path | str,
    *,
    column: str | None = None,
    text_pair: str | None = None,
    out: Path | str | None = None,
    replace: bool = False,
    base: Path | str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Predicted:
    """Labels rows, or one text, by an adapter that was trained with ``--task``.

    Args:
        adapter: folder or reference.
        data: a file of rows; text that is no file is one row itself.
        column: of the text, or of the words, in a file of rows; found by its name when None.
        text_pair: the column of the second text, for an adapter that was trained on pairs; found by its name when None.
        out: write the rows into this file, ``.jsonl``, one JSON object a line.
        replace: replace a file that is at `out`.
        base: folder or repository; by default the one that the manifest names.
        batch_size: rows per forward pass.
        device: where it computes: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        allow_base_mismatch: go on although the adapter was trained on another base.

    Raises:
        HubkitError: ``HK-HEAD`` for an adapter of no task; ``HK-OPTIONS``, ``HK-COLUMNS``, ``HK-DATA``,
            ``HK-ROW-TOO-LONG``, ``HK-EXISTS``, ``HK-IO``, ``HK-BASE-MISMATCH``, ``HK-DEVICE``, ``HK-MEMORY``; what
            opening and reading raise.
    """
    from hubkit.compat.transformers import quiet
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.device import computing, device_named
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.rows.data import Columns
    from hubkit.training.tasks.task import Asked, Reading

    place = device_named(device)
    _require_size(batch_size)
    asked = Asked(Columns(text=column) if column else None, pair=text_pair)
    target = _place(Path(out), replace) if out is not None else None
    where = Where(registry, offline, progress)
    member = open_terms({adapter if isinstance(adapter, str) else str(adapter): 1.0}, where)[0]
    kind, document = _kind(member), member.folder.manifest.task or {}
    _require_pairs(asked.pair, document)
    records = kind.questions(data, asked, offline, document)
    named, revision = named_base(base, revision, member.folder.manifest.base)
    with naming_digest(member.folder.manifest.base):
        source, record = base_with_record(named, revision, where)
    overrides = require_base([member], record, allow_base_mismatch)
    task = kind.known(document, source.path)
    tokenizer = tokenizer_with(source.path, one_vocabulary([member]), member.name)
    reading = Reading(context_of_folder(source.path), batch_size)
    bare = load_base(source.path, None, codec_of_terms([member]), place, task=task.model)
    task.clear(bare)
    model = attached(bare, [member], "sum")
    with quiet(), computing(place, "the rows", "a smaller --batch-size"):
        rows = task.predicted(model, tokenizer, records, asked, reading)
    if target is None:
        return Predicted(tuple(rows), overrides)
    write(target, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
    return Predicted((), overrides, target, len(rows))


def _place(out: Path, replace: bool) -> Path:
    """Where answers may be written: ``HK-OPTIONS`` for another kind of file, ``HK-EXISTS``, ``HK-IO``."""
    if out.suffix != ".jsonl":
        what, want = "predictions are written as JSON, an object a line", "a name that ends in .jsonl"
        raise HubkitError("HK-OPTIONS", what, want=want, have=str(out), status=USAGE)
    return require_free(out, replace)


def _require_pairs(pair: str | None, document: Mapping[str, Any]) -> None:
    if pair and not document.get("pair"):
        what, fix = "the adapter was trained on single texts", "leave --text-pair out"
        raise HubkitError("HK-OPTIONS", what, have=f"--text-pair {pair}", fix=fix, status=USAGE)


def _require_size(batch_size: int) -> None:
    if batch_size < 1:
        raise HubkitError(
            "HK-OPTIONS", "batch_size is not usable", want="1 or more", have=str(batch_size), status=USAGE
        )


def _kind(member: Term) -> type[Task]:
    """What an adapter does: ``HK-HEAD`` where that is nothing that is predicted."""
    from hubkit.training.tasks.kinds import KINDS

    kind = str((member.folder.manifest.task or {}).get("kind"))
    if kind not in KINDS:
        raise HubkitError(
            "HK-HEAD",
            f"adapter {member.name!r} has no labels to give",
            where=member.reference,
            want="an adapter trained with --task",
            fix="hubkit generate, for a language model",
        )
    return KINDS[kind]
