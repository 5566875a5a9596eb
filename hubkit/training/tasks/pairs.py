"""Rows of a text to read and one to write: their columns, and their token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hubkit.errors import HubkitError
from hubkit.training.rows.chat import has_chat, prompt_text, system_text, text_of
from hubkit.training.rows.data import Columns, Record, choose_columns, shorten
from hubkit.training.rows.paired import Paired

PAIRS = (
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
"""Columns of pairs of texts beside the names of a prompt and a completion."""


def pair_columns(records: Sequence[Record], asked: Columns | None) -> Columns:
    """The columns of both sides: those asked for, a pair of `PAIRS`, else a prompt and a completion.

    Raises:
        HubkitError: ``HK-NO-ROWS``; ``HK-COLUMNS``, also for plain texts and messages; ``HK-DATA`` for rows with
            messages, history or tools, which need a chat template.
    """
    if asked is None or not asked.names():
        present = records[0].values if records else {}
        pair = next((pair for pair in PAIRS if all(name in present for name in pair)), None)
        asked = Columns(prompt=pair[:1], completion=pair[1]) if pair else None
    columns = choose_columns(records, asked)
    if columns.completion is None:
        what, fix = "the task reads a text and writes another", "--prompt COLUMN --completion COLUMN"
        raise HubkitError("HK-COLUMNS", what, want="a prompt and a completion", have=columns.names(), fix=fix)
    chats = [record.where for record in records if has_chat(record, columns)]
    if chats:
        what, fix = "messages, history and tools need a chat template, and the task has none", "a prompt of plain text"
        raise HubkitError("HK-DATA", what, want="a prompt and a completion of text", have=shorten(chats), fix=fix)
    return columns


@dataclass(frozen=True)
class Limits:
    """Most tokens of a side; None where the base has no limit.

    Args:
        read: of the encoder.
        written: of the decoder.
    """

    read: int | None
    written: int | None

    def within(self, longest: int) -> tuple[int, int]:
        """Both, and not beyond `longest`."""
        return min(longest, self.read or longest), min(longest, self.written or longest)


@dataclass(frozen=True)
class Encoding:
    """How the rows of one base are made.

    Args:
        tokenizer: of transformers.
        limits: of the base.
        pad: the id that pads.
        eos: the id that ends what is written; None: nothing does.
    """

    tokenizer: Any
    limits: Limits
    pad: int
    eos: int | None

    def rows(self, records: Sequence[Record], columns: Columns, longest: int, truncate: bool) -> list[Paired]:
        """One row for each record.

        Args:
            longest: most tokens of each side; see `Limits` for what the base has room for.
            truncate: cut a longer side at its end; what is read keeps the special tokens that end it.

        Raises:
            HubkitError: ``HK-DATA``; ``HK-NO-TARGETS`` for rows with an empty side; ``HK-ROW-TOO-LONG``.
        """
        empty, long, rows = [], [], []
        most, spell = self.limits.within(longest), self._spell()
        for record in records:
            read = system_text(record, columns) + prompt_text(record, columns)
            answer = text_of(record, columns.completion or "")
            empty += [f"{record.where}: no {s}" for s, t in (("prompt", read), ("completion", answer)) if not t.strip()]
            ids, target = self.read(read), self.written(answer)
            cut = max(0, len(ids) - most[0]) + max(0, len(target) - most[1])
            if cut and truncate:
                ids = self.read(read, most[0]) if len(ids) > most[0] else ids
                target = target[: most[1]]
            elif cut:
                long.append(f"{record.where}: {len(ids)} tokens to read, {len(target)} to write")
            rows.append(Paired.of(ids, target, record.where, cut, pad=self.pad, answer=answer, spell=spell))
        if empty:
            what, want = f"{len(empty)} sides of {len(records)} rows are empty", "text in both columns"
            raise HubkitError("HK-NO-TARGETS", what, want=want, have=shorten(empty), fix="remove these rows")
        if long:
            what, want = f"{len(long)} of {len(rows)} rows are too long", f"at most {most[0]} tokens and {most[1]}"
            fix = "--max-length TOKENS (up to the base's context), shorter rows, or --truncate"
            raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=shorten(long), fix=fix)
        return rows

    def read(self, text: str, longest: int | None = None) -> list[int]:
        """The ids that the encoder is given, with the tokenizer's special tokens, cut to `longest`."""
        cut = {} if longest is None else {"truncation": True, "max_length": longest}
        return list(self.tokenizer(text, add_special_tokens=True, **cut)["input_ids"])

    def written(self, text: str) -> list[int]:
        """The ids that are to be written: those of the tokenizer for a target, and the end."""
        ids = list(self.tokenizer(text_target=text, add_special_tokens=True)["input_ids"])
        return ids if self.eos is None or self.eos in ids[-2:] else [*ids, self.eos]  # a language may stand behind it

    def _spell(self) -> Callable[[Sequence[int]], str]:
        return functools.partial(spelled, self.tokenizer)


def spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
