"""Embedding: a vector for a text, near to those of texts that belong to it. No head is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.parts.heads import TaskModel, spare_tensors
from hubkit.training.options import TrainOptions
from hubkit.training.rows.batching import plan_evaluation
from hubkit.training.rows.contrast import Texts, stacked
from hubkit.training.rows.data import Record, shorten
from hubkit.training.rows.encode import Row
from hubkit.training.tasks.columns import TEXTS, column_of, require_texts
from hubkit.training.tasks.metrics import RETRIEVAL, retrieval
from hubkit.training.tasks.pooling import POOLINGS, contrast, pooling_of, vectors
from hubkit.training.tasks.task import Asked, Reading, Task, TrainStep

ANCHORS = ("anchor", "query", "question", "sentence1")
POSITIVES = ("positive", "document", "answer", "sentence2")
NEGATIVES = ("negative", "negatives")
SCALE = 20.0
"""What cosines are multiplied by: a temperature of 0.05, as sentence-transformers has it."""


@dataclass(frozen=True)
class Embedding(Task):
    """Texts that belong together, told from the others of their batch.

    Args:
        pooling: how a vector is made of hidden states: one of `hubkit.training.tasks.pooling.POOLINGS`.
        scale: what cosines are multiplied by in the loss.
        pad: the id that pads texts; behind the mask any computes the same.
    """

    kind: ClassVar[str] = "embedding"
    pooling: str
    scale: float = SCALE
    pad: int = 0

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """Reads columns, then what the base's files hold."""
        roles = cls.columns(records, asked)
        (second,) = roles["positive"]
        if "negative" not in roles and len(records) > 1 and len({str(r.values.get(second)) for r in records}) == 1:
            what, want = "all rows have the same positive: there is nothing to tell apart", "different texts"
            raise HubkitError("HK-DATA", what, want=want, have=f"column {second!r} of {len(records)} rows")
        return cls(body_of_base(folder), (), roles, pooling_of(folder), pad=_pad(folder))

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> Mapping[str, tuple[str, ...]]:
        """Two columns of texts that belong together, and one of texts that do not, where there is one.

        Raises:
            HubkitError: ``HK-COLUMNS``.
        """
        first, second = _columns(records, asked)
        negative = next((name for name in NEGATIVES if name in records[0].values), None)
        return {"anchor": (first,), "positive": (second,)} | ({"negative": (negative,)} if negative else {})

    @classmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """As the adapter was trained, whatever the base's folder says of pooling."""
        pooling = str(document.get("pooling"))
        if pooling not in POOLINGS:
            what, want = "the adapter's pooling is not known here", f"one of {', '.join(POOLINGS)}"
            raise HubkitError("HK-HEAD", what, want=want, have=pooling, fix="a newer hubkit")
        return cls(body_of_base(folder), (), {}, pooling, float(document.get("scale", SCALE)), _pad(folder))

    @property
    def facts(self) -> dict[str, Any]:
        """How vectors are made, and what the loss multiplies cosines by."""
        return {"pooling": self.pooling, "normalize": True, "scale": self.scale}

    def fitted(self, settings: Any, method: str, options: TrainOptions) -> tuple[Any, TrainOptions]:
        """As for any task; ``HK-OPTIONS`` for a batch of one, in which there is nothing to tell a text from."""
        if options.batch_size < Texts.fewest:
            what = "a row is told from the others of its forward pass, and there are none"
            want, fix = f"--batch-size {Texts.fewest} or more", "--batch-size 16; more rows, more to tell apart"
            have = f"--batch-size {options.batch_size}"
            raise HubkitError("HK-OPTIONS", what, want=want, have=have, fix=fix, status=USAGE)
        return super().fitted(settings, method, options)

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> list[Texts]:
        """One row per record; `longest` holds for each of its texts."""
        (first,), (second,), further = self.roles["anchor"], self.roles["positive"], self.roles.get("negative")
        require_texts(records, first)
        require_texts(records, second)
        rows, long, empty = [], [], []
        for record in records:
            written = [record.values[first], record.values[second]]
            written += _negatives(record, further[0]) if further else []
            texts = [_ids(tokenizer, text) for text in written]
            cut = sum(max(0, len(ids) - longest) for ids in texts)
            if cut and truncate:  # the tokenizer's own way keeps the special tokens
                texts = [_ids(tokenizer, text, truncation=True, max_length=longest) for text in written]
                cut = max(1, cut)
            elif cut:
                long.append(f"{record.where}: {max(map(len, texts))} tokens")
            empty += [record.where] * (not all(texts))
            rows.append(Texts.of(texts, self.pad, record.where, cut))
        if empty:
            raise HubkitError("HK-DATA", "texts without a token", want="text in each column", have=shorten(empty))
        if long:
            want, fix = f"at most {longest} tokens in each text", "shorter rows, or --truncate"
            what = "rows are longer than the context"
            raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=shorten(long), fix=fix)
        return rows

    def train_step(self, own: TrainStep) -> TrainStep:
        """`own`, of a model whose loss is that of `contrast`."""

        def step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            contrasting: Any = _Contrasting(model, self)
            return own(contrasting, batch)

        return step

    @property
    def measures(self) -> tuple[str, ...]:
        """See `scored`."""
        return RETRIEVAL

    def scored(self, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """How well what belongs to an anchor is found among all: see `hubkit.training.tasks.metrics.retrieval`."""
        return retrieval(answers)

    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[list[int]]:
        """For each anchor the ranks of its right texts among all different positives of `rows`, from 1, ascending.

        Right are its own positive and those of equal anchors.
        """
        pairs = [row.texts()[:2] for row in rows if isinstance(row, Texts)]
        anchors, texts = [*dict.fromkeys(one[0] for one in pairs)], [*dict.fromkeys(one[1] for one in pairs)]
        right: dict[tuple[int, ...], set[int]] = {anchor: set() for anchor in anchors}
        number = {text: n for n, text in enumerate(texts)}
        for anchor, positive in pairs:
            right[anchor].add(number[positive])
        made = self._vectors(model, [*anchors, *texts], batch_size)
        asked, candidates = made[: len(anchors)], made[len(anchors) :]
        at = {anchor: n for n, anchor in enumerate(anchors)}
        return [_ranks(asked[at[anchor]] @ candidates.t(), right[anchor]) for anchor, _ in pairs]

    @classmethod
    def questions(
        cls, data: Path | str, asked: Asked, offline: bool, document: Mapping[str, Any] | None = None
    ) -> list[Record]:
        """As for any task; the column of a file is one of texts, else of anchors, else of positives."""
        records = cls.asked_of(data, asked, offline)
        require_texts(records, _asked_text(records, asked))
        return records

    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """For each row its ``vector``, of length 1."""
        column = _asked_text(records, asked)
        rows = [Texts.of([_ids(tokenizer, r.values[column])], self.pad, r.where) for r in records]
        reading.require_short(rows)
        made = self._vectors(model, [tuple(row.ids) for row in rows], reading.batch_size)
        return [{"where": row.where, "vector": one} for row, one in zip(rows, made.tolist(), strict=True)]

    def _vectors(self, model: nn.Module, texts: Sequence[Sequence[int]], size: int) -> Tensor:
        """(texts, hidden), float32, on the CPU; dropout off.

        Args:
            texts: token ids of each.
            size: texts per forward pass.
        """
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        device = next(model.parameters()).device
        model.eval()
        with torch.no_grad():
            for batch in plan_evaluation([len(text) for text in texts], size):
                made = vectors(model, stacked([texts[n] for n in batch], self.pad, device), self.pooling).cpu()
                for n, one in zip(batch, made, strict=True):
                    found[n] = one
        return torch.stack(found)


class _Contrasting:
    """A model as a method's training step calls it: what it gives has a loss."""

    def __init__(self, model: nn.Module, task: Embedding) -> None:
        self._model, self._task = model, task

    def __call__(self, *, labels: Tensor, wrong: Tensor, **inputs: Tensor) -> Any:
        found = vectors(self._model, inputs, self._task.pooling)
        return SimpleNamespace(loss=contrast(found, labels, wrong, self._task.scale))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def body_of_base(folder: Path) -> TaskModel:
    """How the model that gives hidden states is made of the base in `folder`: without what its files hold above them.

    Raises:
        HubkitError: ``HK-HEAD`` for an encoder-decoder, and where transformers has no such model; ``HK-CODEC`` for a
            base in 4 bits.
    """
    stored, plain = Base.from_folder(folder), TaskModel(Embedding.kind)
    if any(site.packed for site in stored.sites.values()):
        what, fix = "a base in 4 bits is loaded as a language model only", "a base in 16 bits"
        raise HubkitError("HK-CODEC", what, where=str(folder), want="a base that is not quantized", fix=fix)
    if stored.encodes:
        raise _no_body(folder, "an encoder-decoder: it reads a text to write another")
    try:
        live = Base.from_model(outline(folder, plain))
    except HubkitError as error:
        if error.code != "HK-BASE-LOAD":
            raise
        raise _no_body(folder, [error.what, *error.have]) from error
    names, config = open_shards(folder).headers, live.model.config  # type: ignore[union-attr]
    kinds = getattr(config, "architectures", None) or ()
    spare = {*spare_tensors(kinds, config, names)}
    if any(name.startswith(live.body) for name in names):
        spare |= {name for name in names if not name.startswith(live.body)}
    pools = {f"{name.removeprefix(live.body)}." for name in live.poolers}
    pooling = {name for name in names if name.removeprefix(live.body).startswith(tuple(pools))}
    spare |= pooling | {name.removeprefix(live.body) for name in pooling}
    spare |= {live.body + name.removeprefix(live.body) for name in pooling}
    without = tuple(n for n, s in stored.sites.items() if n not in live.sites and (s.tensor in spare or s.tied))
    return TaskModel(Embedding.kind, spare=frozenset(spare), without=without, body=live.body, poolers=live.poolers)


def _no_body(folder: Path, have: str | Sequence[str]) -> HubkitError:
    what, want = "the base gives no hidden states of a text alone", "an encoder or a decoder that transformers has"
    return HubkitError("HK-HEAD", what, where=str(folder), want=want, have=have, fix="another base")


def _pad(folder: Path) -> int:
    pad = load_tokenizer(folder).pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _columns(records: Sequence[Record], asked: Asked) -> tuple[str, str]:
    """The columns of the two texts that belong together."""
    chosen = asked.columns
    other = [name for name in (chosen.names() if chosen else ()) if chosen and name != chosen.text]
    if other:
        what = "the task reads two columns of text that belong together"
        raise HubkitError("HK-COLUMNS", what, want="--text, --text-pair", have=other)
    first = column_of(records, chosen.text if chosen else None, ANCHORS, "--text")
    second = column_of(records, asked.pair, POSITIVES, "--text-pair")
    if first == second:
        what = "the two texts of a row are one column"
        raise HubkitError("HK-COLUMNS", what, want="two columns", have=first, fix="--text COLUMN --text-pair COLUMN")
    return first, second


def _asked_text(records: Sequence[Record], asked: Asked) -> str:
    named = asked.columns.text if asked.columns else None
    return column_of(records, named, (*TEXTS, *ANCHORS, *POSITIVES), "--text")


def _negatives(record: Record, column: str) -> list[str]:
    """The texts that do not belong to an anchor, one or a list of them: ``HK-DATA`` for anything else."""
    value = record.values.get(column)
    given = value if isinstance(value, list) else [value]
    found = [text for text in given if isinstance(text, str) and text.strip()]
    if not found or len(found) < len(given):
        what, want = f"column {column!r} holds no text", "a text, or a list of texts, in each row"
        raise HubkitError("HK-DATA", what, where=record.where, want=want, have=repr(value)[:100])
    return found


def _ids(tokenizer: Any, text: Any, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True, **options)["input_ids"])


def _ranks(scores: Tensor, right: set[int]) -> list[int]:
    """The ranks of the right candidates, from 1, best first; of equal scores the wrong ones come first.

    Args:
        scores: (candidates,).
    """
    own = scores[sorted(right)].sort(descending=True).values
    wrong = torch.ones(len(scores), dtype=torch.bool)
    wrong[sorted(right)] = False
    above = (scores[wrong][None, :] >= own[:, None]).sum(1).tolist()
    return [1 + n + before for n, before in enumerate(above)]
