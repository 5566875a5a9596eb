"""Loads exported folders with the `adapters` library and writes the logits it computes; run in its own environment.

python oracle.py BASE MODEL-CLASS OUT.safetensors FOLDER...

MODEL-CLASS is one of transformers, or AutoAdapterModel, for folders with a head of the library's own.
"""

from __future__ import annotations

import sys

import adapters
import torch
import transformers
from make import inputs
from safetensors.torch import save_file


def main(base: str, kind: str, out: str, *folders: str) -> None:
    if kind == "AutoAdapterModel":
        model = adapters.AutoAdapterModel.from_pretrained(base)
    else:
        model = getattr(transformers, kind).from_pretrained(base).eval()
        adapters.init(model)
    found: dict[str, torch.Tensor] = {}
    for number, folder in enumerate(folders):
        loading: dict[str, list[str]] = {}
        name = model.load_adapter(folder, load_as=f"loaded{number}", use_safetensors=True, loading_info=loading)
        missing = [key for key in loading["missing_keys"] if "loaded" in key]
        assert not missing, missing
        assert not loading["unexpected_keys"], loading
        model.set_active_adapters(name)
        if hasattr(model, "heads"):
            assert model.active_head in model.heads, "the head was not loaded"
        model.eval()  # what it loads begins in training mode
        with torch.no_grad():
            family = model.config.model_type
            found[str(number)] = model(**inputs(family)).logits.contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
