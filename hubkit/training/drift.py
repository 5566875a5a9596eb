"""How far what one model says lies from what another says, token by token, on texts of the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.training.rows.data import choose_columns, holds_rows, read_rows
from hubkit.training.rows.encode import encode

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "La Révolution française commence",
    "Der Wald ist im Herbst",
    "El mar y la montaña",
    "人工智能是",
    "Москва была основана",
    "def fibonacci(n):\n    ",
    'SELECT name, count(*) FROM "users" WHERE',
    "Dear customer, thank you for",
)
"""What texts begin with where nobody names any: several languages and code."""
ANSWER = 24
"""Tokens that a prompt is continued by, greedily."""
MOST = 1024
"""Tokens that are compared at most: their logits are kept in memory, in fp32."""


@dataclass(frozen=True)
class Drift:
    """How far one model's words lie from another's.

    Args:
        kl: KL divergence of the second from the first, nats a token, averaged.
        top1: part of the tokens at which both choose the same next one.
        largest: the largest difference of two logits.
        tokens: how many tokens were compared.
    """

    kl: float
    top1: float
    largest: float
    tokens: int


@dataclass(frozen=True)
class Said:
    """What a model said: texts as token ids, and its logits at each of their tokens, float32 on the CPU."""

    texts: Sequence[Tensor]
    logits: Sequence[Tensor]


def read_texts(path: Path | None, tokenizer: Any, longest: int) -> tuple[list[Tensor], bool]:
    """Token ids (1, n) of what is to be compared on, and whether these are prompts, to be continued.

    Args:
        path: prompts, one a line; or rows as for training (``.jsonl``, ``.csv``, ...), which are whole texts. None:
            `PROMPTS`.
        longest: tokens of a text at most; longer ones are cut.

    Raises:
        HubkitError: ``HK-MISSING``; ``HK-NO-ROWS`` for a file without a prompt; what reading rows raises.
    """
    if path is not None and holds_rows(path):
        records = read_rows(path)
        rows = encode(records, tokenizer, choose_columns(records), max_length=longest, truncate=True)
        return [torch.tensor([list(row.ids)]) for row in rows], False
    ids = [tokenizer(line, return_tensors="pt").input_ids[:, :longest] for line in read_prompts(path)]
    ids = [one for one in ids if one.shape[1]]
    if not ids:
        raise HubkitError("HK-NO-ROWS", "there is no prompt to compare on", where=str(path), want="one a line")
    return ids, True


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, one a line; `PROMPTS` without one.

    Raises:
        HubkitError: ``HK-MISSING``; ``HK-NO-ROWS`` for a file without a prompt.
    """
    try:
        lines = list(PROMPTS) if path is None else path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HubkitError("HK-MISSING", "the prompts cannot be read", where=str(path), have=str(error)) from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise HubkitError("HK-NO-ROWS", "there is no prompt to compare on", where=str(path), want="one a line")
    return lines


@torch.no_grad()
def said(model: nn.Module, texts: Sequence[Tensor], *, continued: bool) -> Said:
    """What `model` says of texts, the first `MOST` tokens of them.

    Args:
        texts: token ids, (1, n) each.
        continued: they are prompts: the model's own greedy answer is part of the text.
    """
    caller: Any = model
    if continued and caller.can_generate():
        texts = _continued(caller, texts)
    kept: list[Tensor] = []
    left = MOST
    for ids in texts:
        kept.append(ids[:, :left])
        left -= kept[-1].shape[1]
        if not left:
            break
    return Said(kept, [caller(input_ids=ids).logits[0].float().cpu() for ids in kept])


def _continued(model: Any, texts: Sequence[Tensor]) -> list[Tensor]:
    """Texts with the model's greedy answers, made in one batch, shorter prompts behind padding."""
    longest = max(ids.shape[1] for ids in texts)
    rows = torch.cat([torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in texts])
    there = torch.cat([torch.arange(longest)[None] >= longest - ids.shape[1] for ids in texts]).long()
    made = model.generate(input_ids=rows, attention_mask=there, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    return [row[longest - ids.shape[1] :][None] for row, ids in zip(made, texts, strict=True)]


def drift(want: Said, have: Said) -> Drift:
    """How far `have` lies from `want`; both of the same texts."""
    kl = top1 = largest = 0.0
    tokens = sum(len(one) for one in want.logits)
    for one, other in zip(want.logits, have.logits, strict=True):
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        top1 += float((one.argmax(-1) == other.argmax(-1)).sum())
        largest = max(largest, float((one - other).abs().max()))
    return Drift(max(kl / tokens, 0.0), top1 / tokens, largest, tokens)


def require_within(found: Drift, kl: float, top1: float, where: str) -> None:
    """Refuses what lies further from the model it stands for than the budget allows: ``HK-MERGE-DRIFT``.

    Args:
        kl: at most so many nats a token.
        top1: at least this part of equal first choices.
    """
    if not (found.kl <= kl and found.top1 >= top1):  # NaN is beyond every budget
        raise HubkitError(
            "HK-MERGE-DRIFT",
            "the merged model does not say what the adapted one says",
            where=where,
            want=f"at most {kl:g} nats a token, at least {top1:.1%} equal first choices",
            have=f"{found.kl:.4g} nats a token, {found.top1:.1%} equal, on {found.tokens} tokens",
            fix="--into trained, --dtype float32, or a budget that allows it: --check-kl, --check-top1",
        )
