"""Tiny bases whose files have no head for labels, and what their adapters say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hubkit

LABELS = ["cold", "hot", "mild"]
TEXT = "w1 hot w2 w3"


def whole_words() -> Any:
    """A tokenizer of whole words; [PAD] is 0."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *LABELS, *(f"w{n}" for n in range(20))]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def headless(kind: str, folder: Path) -> Path:
    """A tiny base of this class of transformers with that tokenizer."""
    import transformers

    made, tokenizer = getattr(transformers, kind), whole_words()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": kind != "LlamaForCausalLM",
    }
    if kind.startswith("DistilBert"):
        sizes |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    torch.manual_seed(0)
    made(made.config_class(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(base: Path, seed: int, labels: int = 3) -> Any:
    """The classifier that transformers makes of a base; it draws the head by the seed."""
    import transformers

    torch.manual_seed(seed)
    made: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    return made.eval()


def logits(model: Any, base: Path) -> torch.Tensor:
    """Of `TEXT`, (labels,)."""
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits[0]
    return found


def shares(adapter: Path, base: Path) -> list[float]:
    """The probabilities that hubkit gives for `TEXT`."""
    return list(hubkit.predict(adapter, TEXT, base=base).rows[0]["probabilities"].values())
