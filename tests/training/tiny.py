"""A tiny Llama with a tiny adapter, rows for it, and a small tokenizer: what the tests of the loop train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.training.rows.encode import Row

VOCABULARY = 61

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random LlamaForCausalLM of two layers, all frozen, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            **changes,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


class Adapted(nn.Module):
    """A base with low-rank hooks at its attention's inputs, held as the attachment of hubkit holds it."""

    def __init__(self, base: Any, dropout: float = 0.0, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.parts = nn.ParameterDict()
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(3)
        for number, layer in enumerate(base.model.layers):
            for name in ("q_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                for role, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
                    value = torch.randn(shape, generator=generator) * 0.1
                    self.parts[f"{number}_{name}_{role}"] = nn.Parameter(value)
                linear.register_forward_hook(self._hook(f"{number}_{name}"))

    def _hook(self, site: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = self.dropout(args[0])
            a, b = self.parts[f"{site}_A"].to(x.dtype), self.parts[f"{site}_B"].to(x.dtype)
            return output + F.linear(F.linear(x, a), b)

        return hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.parts.items())


def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The default of the methods' hook."""
    loss: Tensor = model(**batch).loss
    return loss


def rows(count: int = 10, seed: int = 0, masked: bool = True) -> list[Row]:
    """Rows of 4 to 12 random tokens; with `masked` the first half of each is no target."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number in range(count):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        skip = length // 2 if masked else 1
        out.append(Row(ids, [-100] * skip + ids[skip:], f"rows:{number + 1}"))
    return out


def tokenizer(template: str | None = TEMPLATE, *, bos: bool = False) -> Any:
    """A word-level tokenizer of a few words, with <s> put in front when `bos`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    words += ["one", "two", "three", "four", "five", "six"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([word for word in words if word.startswith("<")])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made
