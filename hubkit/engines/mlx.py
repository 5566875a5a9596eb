"""Engine ``mlx``: the base and one adapter in MLX-LM's own form, and the command that serves them.

Run with MLX-LM 0.32.2 on a CPU, on a base of fp32.

| | |
|---|---|
| accepts | its own form of LoRA, DoRA and full weights: linear layers, experts, embeddings, an untied output head |
| refuses | names and shapes that are none of its model's |
| silently wrong | one rank and one scale for all layers; only the last ``num_layers`` layers; ``rope_parameters`` in |
| | the config of a base that transformers 5 saved (it rotates by 10000 then); a request that names another |
| | ``model`` than ``default_model`` has no adapter, and ``adapters`` beside ``default_model`` are passed over |

So A and B are transposed, the scale is 1, every layer has every matrix (zeros where the adapter has nothing), and the
config of the base gets the ``rope_theta`` that it needs at its top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.engines.beside import (
    ADAPTER_DTYPE,
    COUNT,
    PORT,
    WORD,
    Kind,
    factors,
    flags,
    require,
    script,
    stored,
    write_beside,
    wrong_settings,
)
from hubkit.engines.plan import Plan
from hubkit.engines.served import SETTINGS, Served, served, unservable

VERSION = "0.32.2"
FLAGS = {"host": "--host", "port": "--port", "max_tokens": "--max-tokens"}
KINDS: Mapping[str, Kind] = {**ADAPTER_DTYPE, "host": WORD, "port": PORT, "max_tokens": COUNT}
LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
"""A module of a decoder layer, as the files of a base and MLX-LM's models both name it."""
EXPERT = re.compile(r"(model\.layers\.\d+\.\w+)\.experts\.(\d+)\.(\w+)")
"""A matrix of one expert; MLX-LM has those of all experts in one module."""
SWITCH = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OUTSIDE = ("model.embed_tokens", "lm_head")
"""Modules beside the layers that have the same names there."""


def adapter_files(served: Served, base: Path | None, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The adapter as ``adapter_config.json`` and ``adapters.safetensors`` of MLX-LM.

    Args:
        base: the folder of its base; not needed.
        settings: ``adapter_dtype``.

    Raises:
        HubkitError: ``HK-EXPORT`` for modules that MLX-LM has no place for; ``HK-NAN``.
    """
    require(ENGINE.name, served, settings, _homeless(served))
    adapter, rank = served.lowered.adapter, served.lowered.rank
    have, sites = factors(adapter), adapter.base.sites
    modules: dict[str, dict[int | None, str]] = {}
    for site in sites:
        if (found := _module(site)) is not None:
            modules.setdefault(found[0], {})[found[1]] = site
    keys = {_key(module) for module, held in modules.items() if any(site in have for site in held.values())}
    tensors: dict[str, Any] = {}
    for module in (module for module in modules if _key(module) in keys):
        pairs = {at: have.get(site) or _zeros(sites[site].shape, rank) for at, site in modules[module].items()}
        tensors |= dict(zip((f"{module}.lora_a", f"{module}.lora_b"), _laid_out(pairs), strict=True))
    form = adapter.method.peft_form
    assert form is not None, "a plain low-rank adapter is one of PEFT's, too"
    config = {
        "fine_tune_type": form.peft_type.lower(),  # both have one word for it
        "num_layers": len({module.split(".")[2] for module in modules if LAYER.fullmatch(module)}),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    return {
        "adapter_config.json": _text(config),
        "adapters.safetensors": stored(tensors, settings.get("adapter_dtype", "float32"), served.name),
    }


def _module(site: str) -> tuple[str, int | None] | None:
    """MLX-LM's module for a site, and which expert of it the site is; None where it has none."""
    if match := EXPERT.fullmatch(site):
        return f"{match[1]}.switch_mlp.{SWITCH.get(match[3], match[3])}", int(match[2])
    return (site, None) if LAYER.fullmatch(site) or site in OUTSIDE else None


def _key(module: str) -> str:
    """How the configuration lists a module: once for all layers."""
    match = LAYER.fullmatch(module)
    return match[1] if match else module


def _zeros(shape: tuple[int, int], rank: int) -> tuple[Any, Any]:
    import torch

    return torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)


def _laid_out(pairs: Mapping[int | None, tuple[Any, Any]]) -> tuple[Any, Any]:
    """A and B as MLX-LM multiplies by them: transposed, or stacked as they are, expert by expert."""
    import torch

    if None in pairs:
        a, b = pairs[None]
        return a.t(), b.t()
    numbers = sorted(number for number in pairs if number is not None)
    return torch.stack([pairs[at][0] for at in numbers]), torch.stack([pairs[at][1] for at in numbers])


class MlxEngine:
    """The whole mix is one adapter: the server holds one beside its model."""

    name = "mlx"
    summary = "base and one adapter side by side, served by MLX-LM"
    version = VERSION
    proven = True
    keys = SETTINGS | KINDS.keys()

    def refusals(self, plan: Plan) -> list[str]:
        reasons = wrong_settings(self.name, plan.settings, KINDS) + _rope(plan.base)[1]
        if plan.settings.get("serve") == "each" and len(plan.members) > 1:
            reasons.append(
                f"targets.{self.name}.serve: its server holds one adapter; deploy one folder for each, or mix"
            )
        reasons += unservable(plan) if not reasons else []
        return reasons or [line for one in served(plan) for line in _homeless(one)]

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        found = write_beside(plan, out, adapter_files)
        if more := _rope(plan.base)[0]:
            path = out / "base" / "config.json"
            path.write_bytes(_text({**json.loads(path.read_text("utf-8")), **more}))
        groups = [["python", "-m", "mlx_lm", "server", "--model", "base"], flags(plan.settings, FLAGS)]
        groups += [["--adapter-path", f"adapters/{one.folder}"] for one in found]
        names = [f"default_model   the base{''.join(f' with {one.key}' for one in found)}"]
        (out / "serve.sh").write_bytes(script("MLX-LM", self.version, names, groups))
        return ("sh", "serve.sh")


def _homeless(served: Served) -> list[str]:
    """Sites for which MLX-LM has no place, a line each."""
    from hubkit.tensors.parts.tied import tied_pairs

    adapter = served.lowered.adapter
    strange = [site for site in adapter.parts if _module(site) is None]
    reasons = [f"{served.name}: {site}: MLX-LM has no module of this name" for site in strange[:3]]
    reasons += [f"{served.name}: and {len(strange) - 3} more such modules"] if len(strange) > 3 else []
    both = [*tied_pairs(adapter.base).items()]
    return reasons + [
        f"{served.name}: {name}: tied to {other}, which MLX-LM would change with it"
        for pair in both
        for name, other in (pair, pair[::-1])
        if name in adapter.parts
    ]


def _rope(base: Path) -> tuple[dict[str, Any], list[str]]:
    """What MLX-LM needs at the top of a base's config, and why it cannot be told that."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}, []
    if any(isinstance(value, dict) for value in rope.values()):
        return {}, ["the base rotates each kind of attention by a base of its own, which MLX-LM does not read"]
    more = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope and "rope_theta" not in config else {}
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        more["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return more, []


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


ENGINE = MlxEngine()
