"""Makes the golden files beside it with the `adapters` library: tiny models, adapters in its folders, their logits.

    python -m venv /somewhere && /somewhere/bin/pip install torch==2.13.0 transformers==4.57.6 adapters==1.3.0
    /somewhere/bin/python tests/golden/adapterhub/make.py [FOLDER]

The library runs on transformers 4.57 only, so it has an environment of its own; see also `oracle.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.composition import Stack
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent
HIDDEN, LAYERS, VOCABULARY = 16, 2, 24
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 24}
HEADS = {"num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=16)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, **HEADS, max_position_embeddings=16)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=4,
            d_ff=24,
            num_layers=LAYERS,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    ),
}
CASES: dict[str, Any] = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=5, non_linearity="gelu"),
    "parallel": adapters.ParBnConfig(reduction_factor=2, leave_out=[0]),
    "learned": adapters.SeqBnConfig(reduction_factor=1, scaling="learned", non_linearity="leakyrelu"),
    "channel": adapters.DoubleSeqBnConfig(reduction_factor=8, scaling="channel", non_linearity="gelu_new"),
}
PICKLED = "channel"


def randomize(named: Any, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in named:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def inputs(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if family == "t5" else {})


def logits(model: Any, family: str, active: Any) -> torch.Tensor:
    model.set_active_adapters(active)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(family), **({} if family == "bert" else {"use_cache": False})).logits
    return found


def main(out: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for number, (family, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = make().eval()
        randomize(model.named_parameters(), number, 0.15)
        model.save_pretrained(out / family)
        (out / family / "generation_config.json").unlink(missing_ok=True)
        adapters.init(model)
        expected[f"{family}/base"] = logits(model, family, None)
        for index, (case, config) in enumerate(CASES.items()):
            model.add_adapter(f"the_{case}", config=config)
            own = [(n, p) for n, p in model.named_parameters() if f".the_{case}." in n]
            randomize(own, 100 + index, 0.3)
            expected[f"{family}/{case}"] = logits(model, family, f"the_{case}")
            folder = out / "adapters" / f"{family}-{case}"
            folder.parent.mkdir(exist_ok=True)
            model.save_adapter(str(folder), f"the_{case}", with_head=False, use_safetensors=case != PICKLED)
        expected[f"{family}/stack"] = logits(model, family, Stack("the_pfeiffer", "the_learned"))
    save_file({name: value.contiguous() for name, value in expected.items()}, out / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
