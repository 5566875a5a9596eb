"""Engine ``sglang``: the base and its adapters as PEFT folders, and the command that serves them with SGLang.

Read in the source of SGLang 0.5.23; it needs a GPU, so nothing of this was run here, and deployments say so.

| | |
|---|---|
| accepts | LoRA of linear layers, embeddings and the output head |
| refuses | DoRA, added tokens, types that are not LoRA, a rank above ``--max-lora-rank`` |
| silently wrong | rsLoRA and ``alpha_pattern`` (the scale is always alpha / r), ``rank_pattern`` (of another scale); |
| | tensors that match no module are passed over, unless ``--lora-strict-loading``; ``modules_to_save`` and biases |
| | are not looked at; of experts as PEFT 0.18 and newer fuses them the keys are dropped |
| fails | q without v (a KeyError), v without q, up without gate |

So the adapter is lowered to one rank and scale 1, strict loading is always on, and the modules that SGLang holds as one
(q, k and v; gate and up) get zeros where the adapter has nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.engines.beside import (
    ADAPTER_DTYPE,
    COUNT,
    PART,
    PORT,
    WORD,
    Kind,
    flags,
    one_of,
    peft_files,
    require,
    script,
    with_partners,
    write_beside,
    wrong_settings,
)
from hubkit.engines.plan import Plan
from hubkit.engines.served import SETTINGS, Served, served, unservable
from hubkit.engines.vllm import homeless

VERSION = "0.5.23"
AS_ONE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last names of modules that SGLang holds as one matrix."""
FLAGS = {
    "dtype": "--dtype",
    "context_length": "--context-length",
    "max_running_requests": "--max-running-requests",
    "mem_fraction_static": "--mem-fraction-static",
    "tp_size": "--tp-size",
    "host": "--host",
    "port": "--port",
}
KINDS: Mapping[str, Kind] = {
    **ADAPTER_DTYPE,
    "dtype": one_of(("auto", "float32", "float16", "bfloat16")),
    "context_length": COUNT,
    "max_running_requests": COUNT,
    "mem_fraction_static": PART,
    "tp_size": COUNT,
    "host": WORD,
    "port": PORT,
    "max_lora_rank": COUNT,
    "max_loras_per_batch": COUNT,
}


def adapter_files(served: Served, base: Path | None, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The adapter as a folder of PEFT's that SGLang reads rightly.

    Args:
        base: the folder of its base; not needed.
        settings: ``adapter_dtype``.

    Raises:
        HubkitError: ``HK-EXPORT`` for modules that SGLang has no place for; ``HK-NAN``.
    """
    require(ENGINE.name, served, settings, homeless(served, "SGLang"))
    return peft_files(with_partners(served.lowered.adapter, AS_ONE), settings)


class SglangEngine:
    """Adapters stay separate; the server knows each by its name with its digest."""

    name = "sglang"
    summary = "base and adapters side by side, served by SGLang"
    version = VERSION
    proven = False
    keys = SETTINGS | KINDS.keys()

    def refusals(self, plan: Plan) -> list[str]:
        reasons = wrong_settings(self.name, plan.settings, KINDS)
        reasons += unservable(plan, rank=plan.settings.get("max_lora_rank")) if not reasons else []
        return reasons or [line for one in served(plan) for line in homeless(one, "SGLang")]

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        found, settings = write_beside(plan, out, adapter_files), plan.settings
        rank = max((one.lowered.rank for one in found), default=0)
        together = settings.get("max_loras_per_batch", min(len(found), 8) + 1)  # the base counts as one
        groups = [
            ["python", "-m", "sglang.launch_server", "--model-path", "base", "--served-model-name", "base"],
            flags(settings, FLAGS),
        ]
        if found:
            groups += [
                ["--enable-lora", "--lora-strict-loading", "--max-lora-rank", str(settings.get("max_lora_rank", rank))],
                ["--max-loras-per-batch", str(together), "--max-loaded-loras", str(max(together, len(found)))],
                ["--lora-paths", *(f"{one.key}=adapters/{one.folder}" for one in found)],
            ]
        names = ["base", *(f"base:{one.key}" for one in found)]
        (out / "serve.sh").write_bytes(script("SGLang", self.version, names, groups))
        return ("sh", "serve.sh")


ENGINE = SglangEngine()
