"""Base, adapted and merged model side by side, with transformers and PEFT alone: hubkit takes no part in it.

python compare.py BASE ADAPTER MERGED HELDOUT.jsonl
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

Row = dict[str, str]
SHOWN = 2
"""Prompts whose answers are printed."""


def models(base: Path, adapter: Path, merged: Path) -> Iterator[tuple[str, Any]]:
    """(name, model), one at a time."""
    yield "base", AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    yield "adapted", PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).eval()
    yield "merged", AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()


def row_ids(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer that follows it, both through the chat template, as in training."""
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    start, ids = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, whole))
    return start, ids[len(start) :]


@torch.no_grad()
def loss(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Mean over all completion tokens, in nats."""
    total, count = 0.0, 0
    for row in rows:
        prompt, answer = row_ids(tokenizer, row)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


@torch.no_grad()
def answer(model: Any, tokenizer: Any, row: Row) -> str:
    """The greedy answer, one line."""
    ids = torch.tensor([row_ids(tokenizer, row)[0]])
    stop = [tokenizer.eos_token_id]
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=stop
    )
    return " ".join(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split())


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base, adapter, merged, heldout = map(Path, sys.argv[1:])
    rows = [json.loads(line) for line in heldout.read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses, answers = {}, []
    for name, model in models(base, adapter, merged):
        losses[name] = loss(model, tokenizer, rows)
        answers.append((name, [answer(model, tokenizer, row) for row in rows[:SHOWN]]))
    for number, row in enumerate(rows[:SHOWN]):
        print(f"\n{row['prompt']}")
        for name, texts in answers:
            print(f"  {name:<8} {texts[number]}")
        print(f"  {'person':<8} {row['completion']}")
    print(f"\nheld-out loss ({len(rows)} rows, nats per token)")
    for name, value in losses.items():
        print(f"  {name:<8} {value:.4f}")


if __name__ == "__main__":
    main()
