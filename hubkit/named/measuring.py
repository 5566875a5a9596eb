"""What an adapter does on one base beside another: both bases say the same texts, adapted and bare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import AdapterFolder
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.drift import Said
    from hubkit.training.rows.encode import Row


def texts_to_compare(
    old: Path, new: Path, made: Adapter, prompts: Path | None, data: Path | None
) -> tuple[list[Tensor], bool, list[Row]]:
    """Texts to compare on, whether they are prompts, and rows to take the loss of, as the old base's tokenizer reads.

    Raises:
        HubkitError: ``HK-REBASE`` where the new base's tokenizer reads the texts otherwise; what reading raises.
    """
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.base.tokenizer import load_tokenizer, require_decoder
    from hubkit.tensors.parts.part import front_length
    from hubkit.training.drift import ANSWER, MOST, read_texts
    from hubkit.training.rows.data import choose_columns, read_rows
    from hubkit.training.rows.encode import encode

    require_decoder(old, "measuring a rebase", "train it on the new base")
    tokenizer, context = load_tokenizer(old), context_of_folder(old)
    room = (context or MOST) - front_length(made.parts.values())
    (texts, begun), (other, _) = (read_texts(prompts, t, room - ANSWER) for t in (tokenizer, load_tokenizer(new)))
    if [one.tolist() for one in texts] != [one.tolist() for one in other]:
        what = "the new base reads texts as other tokens: the adapter would not see what it was trained on"
        raise HubkitError("HK-REBASE", what, where=str(new), fix="train it on the new base")
    records = read_rows(data) if data else []
    rows = encode(records, tokenizer, choose_columns(records), max_length=room) if records else []
    return texts, begun, rows


def drift_between(
    folder: AdapterFolder, old: Path, new: Path, made: Adapter, texts: list[Tensor], begun: bool, rows: list[Row]
) -> dict[str, Any]:
    """Drift of the adapted and of the bare model, and the loss of both; one model is in memory at a time."""
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.drift import drift

    origin, stored = folder.manifest.base, made.tensors()
    assert origin is not None
    how = origin.codec, origin.compute_dtype if origin.codec else "float32"
    one, bare, loss = _said(old, *how, lambda sites: read_adapter(folder, sites, dtype="base"), texts, begun, rows)
    again = (made.name, made.method, made.config)
    read = lambda sites: Adapter.of_stored(*again, sites, stored, made.name, "base")  # noqa: E731
    two, other, new_loss = _said(new, *how, read, one.texts, False, rows)
    found = {"drift": drift(*_shared(one, two)), "base_drift": drift(*_shared(bare, other))}
    return {**found, "loss": (loss, new_loss) if rows else None}


def _said(
    path: Path,
    codec: str | None,
    dtype: str | None,
    read: Callable[[Base], Adapter],
    texts: Sequence[Tensor],
    begun: bool,
    rows: list[Row],
) -> tuple[Said, Said, float]:
    """What a base says of texts with the adapter that `read` gives at its sites, and without; its loss of rows with."""
    from hubkit.compat.transformers import quiet
    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.drift import said

    with quiet():
        attached = Attached(load_base(path, dtype, codec, "cpu"))
        attached.add("adapter", read(attached.sites))
        attached.set_mix("adapter")
        adapted, loss = said(attached, texts, continued=begun), _loss(attached, rows)
        return adapted, said(attached.detach(), adapted.texts, continued=False), loss


def _shared(one: Said, two: Said) -> tuple[Said, Said]:
    """The same, of the tokens that both vocabularies have."""
    size = min(one.logits[0].shape[-1], two.logits[0].shape[-1])
    first, second = (dataclasses.replace(s, logits=[logits[:, :size] for logits in s.logits]) for s in (one, two))
    return first, second


def _loss(model: Any, rows: Sequence[Row]) -> float:
    """The mean over all target tokens of `rows`, nats; 0 of none."""
    import torch

    total = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0].float()
        labels = torch.tensor(list(row.labels))[1:]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum"))
    return total / max(1, sum(row.targets() for row in rows))
