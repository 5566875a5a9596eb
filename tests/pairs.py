"""Tiny encoder-decoders of whole words, and rows that one word decides: w3 among others becomes v3."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
WORDS = [*SPECIAL, *(f"w{n}" for n in range(8)), *(f"v{n}" for n in range(8)), *(f"x{n}" for n in range(4))]
PAD, EOS, BOS = 0, 1, 3


def whole_words() -> Any:
    """A tokenizer of whole words that ends every text with </s>, as T5's does."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    kinds = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **kinds)


T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
SIZES: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": T5 | {"dropout_rate": 0.0},
    "BartForConditionalGeneration": BART,
    "BartForCausalLM": BART,
    "MarianMTModel": BART,
    "MBartForConditionalGeneration": BART,
}
"""Class of transformers -> sizes."""


def saved(kind: str, folder: Path, **more: Any) -> Path:
    """A base of random weights with its tokenizer, in `folder`."""
    import transformers

    made = getattr(transformers, kind)
    ids: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "decoder_start_token_id": PAD}
    ids["forced_eos_token_id"] = None
    torch.manual_seed(0)
    made(made.config_class(vocab_size=len(WORDS), **SIZES[kind], **ids | more)).eval().save_pretrained(folder)
    whole_words().save_pretrained(folder)
    return folder


def written(path: Path, count: int, seed: int, names: tuple[str, str] = ("prompt", "completion")) -> Path:
    """Rows of one deciding word among others; no two of them read the same."""
    draw, seen = random.Random(seed), dict[str, str]()
    while len(seen) < count:
        words = [f"x{draw.randrange(4)}" for _ in range(draw.randrange(1, 5))]
        word = draw.randrange(8)
        words.insert(draw.randrange(len(words) + 1), f"w{word}")
        seen[" ".join(words)] = f"v{word}"
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in seen.items()))
    return path


def logits(model: Any) -> torch.Tensor:
    """What a model says of two pairs of texts, padded on both sides."""
    read = torch.tensor([[4, 20, 21, EOS], [7, 22, EOS, PAD]])
    wanted = torch.tensor([[12, EOS], [15, EOS]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=read, attention_mask=(read != PAD).long(), labels=wanted).logits
    return found
