"""Answer a prompt with what is in this folder: ``python run.py "What is the capital of France?"``.

Written by hubkit deploy; needs torch, transformers and, for adapters beside their base, peft; not hubkit. It runs on a
GPU where there is one; ``--device cpu`` keeps it off. The names, order and weights of the adapters are in hubkit.lock.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OWN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # only what is here, and no code of it


def device_named(word: str) -> str:
    """The device that `word` names, tried: ``auto`` is CUDA, then MPS, then the CPU."""
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=word).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        sys.exit(f"--device {word}: {str(error).splitlines()[0]}")
    return word


def load(device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer): ``model/`` as it is, or ``base/`` with the adapters of ``adapters/``, on `device`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device_named(device)
    whole = (HERE / "model").is_dir()
    folder = HERE / ("model" if whole else "base")
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **OWN)
    if found["missing_keys"]:  # transformers goes on with random values
        sys.exit(f"{folder}: the files lack {', '.join(sorted(found['missing_keys']))}")
    model = model.to(place)
    members = [] if whole else json.loads((HERE / "hubkit.lock").read_text("utf-8"))["adapters"]
    if members:
        model = attach(model, {member["name"]: member["weight"] for member in members})
    return model.eval(), AutoTokenizer.from_pretrained(folder, **OWN)


def attach(model: Any, weights: dict[str, float]) -> Any:
    """The model with all adapters acting at once, each times its weight."""
    from peft import PeftModel

    # Stored dtype is compute dtype: cast to fp32, an adapter would compute other bits than it was tested with.
    for name in weights:
        folder = HERE / "adapters" / name
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(model, folder, name, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(weights))
    for module in model.modules():  # not by PEFT's `scale_layer`, which leaves embeddings out (0.19 to 0.21)
        scaling: Any = getattr(module, "scaling", None)
        for name, weight in weights.items() if isinstance(scaling, dict) else ():
            if name in scaling:
                scaling[name] *= weight
    return model


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The model's greedy answer, through the chat template where there is one."""
    text = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.device)
    sys.stderr.write(f"answering on {model.device}\n")
    sys.stdout.write(answer(model, tokenizer, arguments.prompt, arguments.max_new_tokens) + "\n")


if __name__ == "__main__":
    main()
