"""Sequence to sequence: an encoder reads a text, its decoder writes another. The model is the base's own, no head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.artifact.identity.base_files import local, read_config
from hubkit.compat.torch import running
from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.decoder import context_of_folder
from hubkit.tensors.base.tokenizer import is_seq2seq
from hubkit.tensors.parts.heads import TaskModel
from hubkit.training.rows.batching import collate, plan_evaluation
from hubkit.training.rows.data import Columns, Record
from hubkit.training.rows.encode import IGNORED, Row
from hubkit.training.rows.marked import MarkedRow, unmarked
from hubkit.training.rows.paired import Paired
from hubkit.training.tasks.answers import answer_scores, measured_names
from hubkit.training.tasks.names import SEQ2SEQ
from hubkit.training.tasks.pairs import Encoding, Limits, pair_columns
from hubkit.training.tasks.task import Asked, Reading, Task, TrainStep

ANSWERED = 200
"""Held-out rows, the first ones, that an answer is written for: exact match and ROUGE are of these."""


@dataclass(frozen=True)
class Seq2Seq(Task):
    """A text for a text.

    Args:
        limits: most tokens of each side, by the base.
        pad: the id that pads rows.
        eos: the id that ends what is written; None where the base names none.
        named: columns that were asked for; None: found by their names.
    """

    kind: ClassVar[str] = SEQ2SEQ
    learns_tokens: ClassVar[bool] = True
    frequent: ClassVar[bool] = False
    limits: Limits
    pad: int
    eos: int | None
    named: Columns | None

    @classmethod
    def of(cls, records: Sequence[Record], asked: Asked, folder: Path) -> Self:
        """Reads columns, then what the base's configuration says."""
        return cls._made(folder, cls.columns(records, asked), asked.columns)

    @classmethod
    def known(cls, document: Mapping[str, Any], folder: Path) -> Self:
        """Of the base alone: the manifest says nothing more."""
        return cls._made(folder, {}, None)

    @classmethod
    def columns(cls, records: Sequence[Record], asked: Asked) -> dict[str, tuple[str, ...]]:
        """What is read and what is to be written."""
        return pair_columns(records, asked.columns).roles()

    def on(self, records: Sequence[Record], asked: Asked) -> Self:
        """Also for rows with other columns."""
        return replace(self, roles=self.columns(records, asked), named=asked.columns)

    @classmethod
    def _made(cls, folder: Path, roles: Mapping[str, tuple[str, ...]], columns: Columns | None) -> Self:
        if not is_seq2seq(folder):
            raise no_encoder(folder)
        config: Any = outline(folder).config
        unsaid = [name for name in ("decoder_start_token_id", "pad_token_id") if getattr(config, name, None) is None]
        if unsaid:
            what = "the configuration does not say what the decoder begins with, or what pads"
            where, fix = str(folder / "config.json"), "another base, or these written into its config.json"
            raise HubkitError("HK-BASE-LOAD", what, where=where, want=unsaid, fix=fix)
        eos = config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        return cls(TaskModel(cls.kind), (), roles, limits_of(folder), config.pad_token_id, eos, columns)

    def encode(self, records: Sequence[Record], tokenizer: Any, longest: int, truncate: bool) -> list[Paired]:
        """One row per record; `longest` holds for each of its sides."""
        columns = pair_columns(records, self.named)
        return Encoding(tokenizer, self.limits, self.pad, self.eos).rows(records, columns, longest, truncate)

    def train_step(self, own: TrainStep) -> TrainStep:
        """`own`, with the model's loss in float32: in half precision T5 and its kin compute it in that, to 3 digits."""

        def step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            with running(model, _exactly(model.forward)):
                return own(model, batch)

        return step

    def measured(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
        """Perplexity of all rows; of the first `ANSWERED`, answered greedily, what `answer_scores` gives.

        An answer has at most as many tokens as the longest true one of these rows.
        """
        pairs = [row for row in rows if isinstance(row, Paired)]
        model.eval()
        loss = sum(_losses(model, pairs, batch_size)) / sum(row.targets() for row in pairs)
        some = pairs[:ANSWERED]
        written = _answers(model, some, batch_size)
        return {"perplexity": math.exp(min(loss, 700.0)), **answer_scores([row.answer for row in some], written)}

    @property
    def measures(self) -> tuple[str, ...]:
        """See `measured`."""
        return ("perplexity", *measured_names())

    def marked(self, row: Row, tokenizer: Any) -> MarkedRow:
        """With what is to be written."""
        return unmarked(row, tokenizer, row.answer if isinstance(row, Paired) else "")

    @classmethod
    def questions(
        cls, data: Path | str, asked: Asked, offline: bool, document: Mapping[str, Any] | None = None
    ) -> list[Record]:
        """Refuses: what writes text gives no labels."""
        what, fix = "an adapter of an encoder-decoder writes text", 'hubkit generate "PROMPT" --adapter ADAPTER'
        raise HubkitError("HK-HEAD", what, want="an adapter with labels to give", have=f"task {cls.kind}", fix=fix)

    def predicted(
        self, model: nn.Module, tokenizer: Any, records: Sequence[Record], asked: Asked, reading: Reading
    ) -> list[dict[str, Any]]:
        """Never called: see `questions`."""
        raise NotImplementedError


def no_encoder(folder: Path) -> HubkitError:
    """``HK-HEAD``: the base is a decoder, or an encoder."""
    have = ", ".join(map(str, read_config(local(folder)).get("architectures") or ())) or "no class in config.json"
    return HubkitError(
        "HK-HEAD",
        "the base is no encoder-decoder",
        where=str(folder),
        want="a base that was saved as T5ForConditionalGeneration, BartForConditionalGeneration and their kin",
        have=have,
        fix="leave --task out: a decoder learns prompt and completion as a language model",
    )


def limits_of(folder: Path) -> Limits:
    """Most tokens of each side of the encoder-decoder in `folder`; LED has a table of positions for each."""
    config, both = read_config(local(folder)), context_of_folder(folder)
    own = [config.get(f"max_{side}_position_embeddings") for side in ("encoder", "decoder")]
    read, written = (size if type(size) is int else both for size in own)
    return Limits(read, written)


def _exactly(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output, labels = original(*args, **kwargs), kwargs.get("labels")
        logits = getattr(output, "logits", None)
        if labels is not None and isinstance(logits, Tensor) and logits.dtype != torch.float32:
            output.loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return output

    return forward


def _losses(model: nn.Module, rows: Sequence[Paired], size: int) -> list[float]:
    """The sum over the targets of each batch, nats."""
    found, device = [], next(model.parameters()).device
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], size):
            inputs = collate([rows[n] for n in batch], device)
            logits = model(**inputs).logits.float().flatten(0, 1)
            found.append(
                float(F.cross_entropy(logits, inputs["labels"].flatten(), ignore_index=IGNORED, reduction="sum"))
            )
    return found


def _answers(model: Any, rows: Sequence[Paired], size: int) -> list[str]:
    """What the model writes for each row, greedily."""
    found, device = [""] * len(rows), next(model.parameters()).device
    longest = max(len(row.labels) - 1 for row in rows)
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], size):
            inputs = collate([rows[n] for n in batch], device)
            del inputs["labels"]
            made = model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
            for n, ids in zip(batch, made.tolist(), strict=True):
                found[n] = rows[n].spell(ids)
    return found
