"""`predict`: the labels that an adapter with a head gives to rows, or to one text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_with_record, named_base, naming_digest
from hubkit.named.terms import Term, attached, open_terms, require_base
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True, repr=False)
class Predicted(Shown):
    """Labels of rows, in their order.

    Args:
        rows: for each row where it stands, its ``label``, and ``probabilities``: label -> share, adding up to 1.
        overrides: named overrides used.
    """

    rows: tuple[dict[str, Any], ...]
    overrides: tuple[str, ...] = ()


@checked
def predict(
    adapter: Path | str,
    data: Path | str,
    *,
    column: str | None = None,
    base: Path | str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Predicted:
    """Labels rows, or one text, by an adapter that was trained with ``--task classification``.

    Args:
        adapter: folder or reference.
        data: a file of rows; text that is no file is one row itself.
        column: of the text, in a file of rows; found by its name when None.
        base: folder or repository; by default the one that the manifest names.
        batch_size: rows per forward pass.
        device: where it computes: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        allow_base_mismatch: go on although the adapter was trained on another base.

    Raises:
        HubkitError: ``HK-HEAD`` for an adapter without labels; ``HK-OPTIONS``, ``HK-COLUMNS``, ``HK-DATA``,
            ``HK-ROW-TOO-LONG``, ``HK-BASE-MISMATCH``, ``HK-DEVICE``, ``HK-MEMORY``; what opening and reading raise.
    """
    from hubkit.compat.transformers import quiet
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.device import computing, device_named
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.rows.data import Columns
    from hubkit.training.tasks.task import Asked, Reading

    place = device_named(device)
    _require_size(batch_size)
    asked = Asked(Columns(text=column) if column else None)
    where = Where(registry, offline, progress)
    member = open_terms({adapter if isinstance(adapter, str) else str(adapter): 1.0}, where)[0]
    kind = _kind(member)
    records = kind.questions(data, asked, offline)
    named, revision = named_base(base, revision, member.folder.manifest.base)
    with naming_digest(member.folder.manifest.base):
        source, record = base_with_record(named, revision, where)
    overrides = require_base([member], record, allow_base_mismatch)
    task = kind.known(member.folder.manifest.task or {}, source.path)
    tokenizer = tokenizer_with(source.path, one_vocabulary([member]), member.name)
    reading = Reading(context_of_folder(source.path), batch_size)
    bare = load_base(source.path, None, None, place, task=task.model)
    task.clear(bare)
    model = attached(bare, [member], "sum")
    with quiet(), computing(place, "the rows", "a smaller --batch-size"):
        rows = task.predicted(model, tokenizer, records, asked, reading)
    return Predicted(tuple(rows), overrides)


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
            want="an adapter trained with --task classification",
            fix="hubkit generate, for a language model",
        )
    return KINDS[kind]
