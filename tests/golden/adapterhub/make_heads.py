"""Makes the golden files in ``heads`` with the `adapters` library: adapters with prediction heads, their logits.

In the environment of `make.py`:

    /somewhere/bin/python tests/golden/adapterhub/make_heads.py [FOLDER]

Each base has no head for labels: what the library trains of one is in the adapter's folder alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.heads import ClassificationHead
from make import HEADS, SIZES, inputs, randomize
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

HERE = Path(__file__).parent / "heads"
NAME, OWN = "mood", ("classifier.", "score.")
LABELS = {0: "cold", 1: "hot", 2: "mild"}
MODELS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, **HEADS, max_position_embeddings=16)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, **HEADS, max_position_embeddings=16, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=4, n_positions=16, pad_token_id=0)
    ),
}
FLEX: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "deep": {"layers": 2, "activation_function": "tanh"},
        "pooled": {"layers": 1, "use_pooler": True},
        "flat": {"layers": 1},
        "relu": {"layers": 2, "activation_function": "relu"},
        "still": {"layers": 2, "activation_function": "tanh"},
    },
    "roberta": {name: {"layers": 2, "activation_function": "tanh"} for name in ("deep", "still")},
    "llama": {"bias": {"layers": 1}, **{name: {"layers": 1, "bias": False} for name in ("plain", "still")}},
    "gpt2": {"plain": {"layers": 1, "bias": False}},
}
"""Name of a head -> options of `ClassificationHead`."""
STATIC = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
}
PICKLED, STILL = "pooled", "still"
"""The head whose files are pickles, and that beside an adapter that changes nothing: what it says, the head says."""


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(family)).logits
    return found


def saved(model: Any, family: str, head: str, seed: int, out: Path) -> torch.Tensor:
    """The logits of a model with a head, given an adapter and random values and saved with both."""
    model.config.name_or_path = ""  # no place on this machine
    model.add_adapter(NAME, config=adapters.SeqBnConfig(reduction_factor=4))
    randomize([(n, p) for n, p in model.named_parameters() if f".{NAME}." in n or n.startswith(OWN)], seed, 0.3)
    with torch.no_grad():
        for parameter in [p for n, p in model.named_parameters() if f".{NAME}.adapter_up." in n and head == STILL]:
            parameter.zero_()
    model.set_active_adapters(NAME)
    if hasattr(model, "heads"):
        model.active_head = NAME
    found = logits(model.eval(), family)
    model.save_adapter(str(out / f"{family}-{head}"), NAME, with_head=True, use_safetensors=head != PICKLED)
    return found


def main(out: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for number, (family, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        base = make().eval()
        randomize(base.named_parameters(), number, 0.15)
        base.save_pretrained(out / family)
        (out / family / "generation_config.json").unlink(missing_ok=True)
        for index, (head, options) in enumerate(FLEX[family].items()):
            model = adapters.AutoAdapterModel.from_pretrained(out / family)
            model.add_prediction_head(ClassificationHead(model, NAME, 3, id2label=dict(LABELS), **options))
            expected[f"{family}/{head}"] = saved(model, family, head, 100 + index, out)
        model = adapters.AutoAdapterModel.from_pretrained(out / family)
        model.add_tagging_head(NAME, num_labels=3, id2label=dict(LABELS))
        expected[f"{family}/tags"] = saved(model, family, "tags", 200, out)
        if family in STATIC:
            torch.manual_seed(50)
            static = getattr(transformers, STATIC[family]).from_pretrained(out / family, num_labels=3)
            static.config.label2id = {label: n for n, label in LABELS.items()}
            adapters.init(static)
            expected[f"{family}/static"] = saved(static, family, "static", 300, out)
    save_file({name: value.contiguous() for name, value in expected.items()}, out / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
