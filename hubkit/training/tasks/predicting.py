"""What a head says of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubkit.errors import HubkitError
from hubkit.training.rows.batching import collate, plan_evaluation
from hubkit.training.rows.data import Columns, read_rows, shorten
from hubkit.training.rows.labelled import Labelled
from hubkit.training.tasks.classification import Head, text_column


def texts_of(data: Path | str, column: str | None, offline: bool) -> list[tuple[str, str]]:
    """(where, text) of each row of a file; what is no file is a text itself.

    Raises:
        HubkitError: ``HK-COLUMNS``, ``HK-DATA``; what `read_rows` raises.
    """
    if isinstance(data, str) and (" " in data or not Path(data).suffix):
        return [("", data)]
    records = read_rows(Path(data), offline)
    name = text_column(records, Columns(text=column) if column else None)
    bad = [r.where for r in records if not isinstance(r.values.get(name), str) or not str(r.values[name]).strip()]
    if bad:
        raise HubkitError("HK-DATA", f"column {name!r} holds no text", want="text in each row", have=shorten(bad))
    return [(record.where, str(record.values[name])) for record in records]


def probabilities(
    model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, str]], head: Head, longest: int | None, size: int
) -> list[list[float]]:
    """The softmax of the logits of each text, in float32, in the order of the head's outputs.

    Args:
        texts: (where, text).
        longest: tokens that the base can take; None where it has no limit.
        size: rows per forward pass.

    Raises:
        HubkitError: ``HK-ROW-TOO-LONG``; ``HK-DATA`` for a text without a token.
    """
    rows = [Labelled.of(tokenizer(t, add_special_tokens=True)["input_ids"], 0, head.pad, at) for at, t in texts]
    long = [f"{r.where}: {len(r.ids)} tokens" for r in rows if longest is not None and len(r.ids) > longest]
    if long:
        want = f"at most {longest} tokens"
        raise HubkitError("HK-ROW-TOO-LONG", "rows are longer than the context", want=want, have=shorten(long))
    empty = [r.where or "the text" for r in rows if not len(r.ids)]
    if empty:
        raise HubkitError("HK-DATA", "there is nothing to label", want="text", have=shorten(empty))
    found: list[list[float]] = [[] for _ in rows]
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], size):
            inputs = collate([rows[n] for n in batch], device)
            del inputs["labels"]
            for n, shares in zip(batch, model(**inputs).logits.float().softmax(-1).tolist(), strict=True):
                found[n] = shares
    return found
