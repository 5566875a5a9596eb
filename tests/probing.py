"""An adapter as it should not be served: the same folder with other values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from every_method import METHODS
from making import make_adapter
from safetensors.torch import load_file, save_file

from hubkit.artifact.folder import open_adapter
from hubkit.documents.probes import Probes
from hubkit.engines.runtimes.fit import Answers
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.named.probing import Live
from hubkit.named.sources import Source
from hubkit.named.terms import open_sources
from hubkit.registry.opening import Where
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.verbs.pack import pack

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RSLORA = "lora", {"rank": 4, "rslora": True, "targets": ["q_proj", "v_proj"]}


def gentle(folder: Path, base: Path, name: str = "lora", seed: int = 0, by: float = 0.01) -> Path:
    """An adapter of one of `METHODS`, as training leaves it: a little away from a fresh one, which changes nothing."""
    method, options = {**METHODS, "rslora": RSLORA}[name]
    loaded = host().load(method)
    make_adapter(folder, base, seed=seed, method=loaded, **options)
    config = parse_config(loaded.info.config, options, "test")
    fresh = Adapter.fresh(folder.name, loaded, config, Base.from_folder(base), seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: v + by * torch.randn(v.shape, generator=generator) for k, v in fresh.tensors().items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    pack(folder)
    return folder


def scaled(adapter: Path, out: Path, factor: float) -> Path:
    """A copy of an adapter whose B is multiplied by `factor`; its manifest is not touched."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    made = {key: value * (factor if ".lora_B." in key else 1.0) for key, value in tensors.items()}
    save_file(made, out / "adapter_model.safetensors", {"format": "pt"})
    return out


def naming(rules: dict[str, str]) -> Callable[[str], str]:
    """A name of a module or tensor as it was called once."""

    def old(name: str) -> str:
        for pattern, called in rules.items():
            name = re.sub(pattern, called, name)
        return name

    return old


def aged(peft: Path, out: Path, rules: dict[str, str]) -> Path:
    """A folder of PEFT under the names of before."""
    old = naming(rules)
    shutil.copytree(peft, out)
    stored = load_file(out / WEIGHTS)
    save_file({old(key): value for key, value in stored.items()}, out / WEIGHTS, {"format": "pt"})
    config = json.loads((out / CONFIG).read_text())
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in stored}
    ends = {old(name).rpartition(".")[2] for name in modules}
    config["target_modules"] = sorted(ends)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {old(name): value for name, value in (config.get(key) or {}).items()}
    (out / CONFIG).write_text(json.dumps(config))
    return out


def larger(base: Path, out: Path) -> Path:
    """Another base of the same shape and tokenizer: every weight is half as large again."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    save_file({key: 1.5 * value for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def key_of(adapter: Path) -> str:
    """What a deployment calls an adapter: its name and twelve digits of its digest."""
    manifest = open_adapter(adapter).manifest
    return f"{manifest.name}@{manifest.digest.removeprefix('sha256:')[:12]}"


def live(adapter: Path, base: Path, dtype: str = "float32") -> Live:
    """The adapter on its base, on this machine."""
    return Live(base, open_sources([(Source(adapter, str(adapter)), 1.0)], Where()), dtype)


def answers_at(adapter: Live, probes: Probes, scales: Iterable[float]) -> dict[float, Answers]:
    """What a server would answer that applies the adapter at each scale."""
    return {scale: adapter.answers(probes.prompts, scale) for scale in scales}
