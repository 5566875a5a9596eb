"""Engine ``vllm``: the base and its adapters as PEFT folders, and a command and a compose file that serve them.

Run with vLLM 0.32.0 on a CPU (fp32), read in the source of 0.32.0 and 0.33.0.

| | |
|---|---|
| accepts | LoRA, rsLoRA, ``rank_pattern`` and ``alpha_pattern``, of linear layers, embeddings and the output head |
| refuses | DoRA, biases, ``modules_to_save`` but for a classifier, trained rows of tokens, aLoRA, starts at the |
| | weight's own factors (PiSSA, OLoRA, CorDA, LoftQ), names of no module, a rank above ``--max-lora-rank`` |
| silently wrong | no module found at all: a line of the debug log; fields of ``adapter_config.json`` that it does not |
| | know; ``--lora-target-modules`` leaves out parts of an adapter; a name of the Hub is its main branch; files |
| | exchanged under one path answer from the cache of those before |

So the adapter is lowered to one rank and scale 1, ``--max-lora-rank`` is the next that vLLM allows, and every path and
served name carries a digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.artifact.folder import PEFT_CONFIG, WEIGHTS_NAME
from hubkit.documents.schema import parse
from hubkit.engines.beside import (
    ADAPTER_DTYPE,
    COUNT,
    PART,
    PORT,
    SWITCH,
    WORD,
    Kind,
    flags,
    one_of,
    peft_files,
    require,
    script,
    write_beside,
    wrong_settings,
)
from hubkit.engines.plan import Plan
from hubkit.engines.served import SETTINGS, Served, served, unservable

VERSION = "0.32.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""
ACTIVE = (
    "use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "target_parameters", "use_qalora", "use_bdlora",
)  # fmt: skip
"""Keys of PEFT's configuration that vLLM refuses, or does not read, when they are set."""
STARTS = (True, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of ``init_lora_weights`` under which the stored factors are all of the change."""
TENSORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
FLAGS = {
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "tensor_parallel_size": "--tensor-parallel-size",
    "enforce_eager": "--enforce-eager",
    "host": "--host",
    "port": "--port",
}
KINDS: Mapping[str, Kind] = {
    **ADAPTER_DTYPE,
    "dtype": one_of(("auto", "float32", "float16", "bfloat16")),
    "max_model_len": COUNT,
    "max_num_seqs": COUNT,
    "gpu_memory_utilization": PART,
    "tensor_parallel_size": COUNT,
    "enforce_eager": SWITCH,
    "host": WORD,
    "port": PORT,
    "max_lora_rank": one_of(RANKS),
    "max_loras": COUNT,
    "max_cpu_loras": COUNT,
    "image": WORD,
}


def adapter_files(served: Served, base: Path | None, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The adapter as a folder of PEFT's that vLLM reads rightly.

    Args:
        base: the folder of its base; not needed.
        settings: ``adapter_dtype``.

    Raises:
        HubkitError: ``HK-EXPORT`` for modules that vLLM has no place for; ``HK-NAN``.
    """
    require(ENGINE.name, served, settings, homeless(served, "vLLM"))
    return peft_files(served.lowered.adapter, settings)


def homeless(served: Served, engine: str) -> list[str]:
    """Sites of an adapter for which an engine that reads PEFT's folders has no place, a line each kind.

    Args:
        engine: as people call it.
    """
    from hubkit.tensors.experts.expert import is_expert

    adapter = served.lowered.adapter
    experts = [site for site in adapter.parts if is_expert(site)]
    towers = sorted({tower for site in adapter.parts if (tower := adapter.base.arch.tower(site))})
    reasons = [f"{served.name}: it acts at {len(experts)} matrices of experts, which {engine} was not tried with"]
    return (reasons if experts else []) + [f"{served.name}: it acts in {tower}, beside the text" for tower in towers]


def unreadable(folder: Path, *, most: int = RANKS[-1]) -> list[str]:
    """Why vLLM refuses an adapter as it is, or gets it wrong without a word; a line each, empty where it does neither.

    It reads rsLoRA, ``rank_pattern`` and ``alpha_pattern`` rightly, so these are no reasons.

    Args:
        folder: with PEFT's two files.
        most: the server's ``--max-lora-rank``.

    Raises:
        HubkitError: ``HK-JSON``, ``HK-SAFETENSORS``.
    """
    from hubkit.artifact.identity.header import read_header
    from hubkit.tensors.experts.expert import is_expert

    if not (folder / PEFT_CONFIG).is_file():
        return [f"it has no {PEFT_CONFIG}: it is of a method that PEFT does not know"]
    config = parse((folder / PEFT_CONFIG).read_bytes(), str(folder / PEFT_CONFIG))
    active = [key for key in ACTIVE if config.get(key) not in (None, False, "none", [], {})]
    active += [] if config.get("init_lora_weights", True) in STARTS else ["init_lora_weights"]
    reasons = [f"{key}: {json.dumps(config[key])}" for key in active]
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    reasons += [f"rank {max(ranks)}: the server takes {most} at most"] if max(ranks) > most else []
    keys = read_header(folder / WEIGHTS_NAME)
    strange = [key for key in keys if not key.endswith(TENSORS)]
    reasons += [f"{len(strange)} tensors that are no factors: {', '.join(strange[:2])}"] if strange else []
    return reasons + (["it acts at single experts"] if any(map(is_expert, keys)) else [])


def allowed_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` that vLLM allows for adapters of `rank`."""
    return next(one for one in RANKS if one >= rank)


class VllmEngine:
    """Adapters stay separate; the server knows each by its name with its digest."""

    name = "vllm"
    summary = "base and adapters side by side, served by vLLM"
    version = VERSION
    proven = True
    keys = SETTINGS | KINDS.keys()

    def refusals(self, plan: Plan) -> list[str]:
        settings = plan.settings
        reasons = wrong_settings(self.name, settings, KINDS)
        if not reasons and settings.get("max_cpu_loras", RANKS[-1]) < settings.get("max_loras", 1):
            reasons.append(f"targets.{self.name}.max_cpu_loras: want max_loras or more")
        reasons += unservable(plan, rank=settings.get("max_lora_rank", RANKS[-1])) if not reasons else []
        return reasons or [line for one in served(plan) for line in homeless(one, "vLLM")]

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        found = write_beside(plan, out, adapter_files)
        words = [["vllm", "serve", "base", "--served-model-name", "base"], *options(plan.settings, found)]
        names = ["base", *(one.key for one in found)]
        (out / "serve.sh").write_bytes(script("vLLM", self.version, names, words))
        (out / "compose.yaml").write_bytes(_compose(plan.settings))
        return ("sh", "serve.sh")


def options(settings: Mapping[str, Any], found: tuple[Served, ...]) -> list[list[str]]:
    """What follows the model in the command, a line each."""
    groups = [flags(settings, FLAGS)]
    if found:
        rank = settings.get("max_lora_rank") or allowed_rank(max(one.lowered.rank for one in found))
        most = settings.get("max_loras", min(len(found), 8))
        groups += [
            ["--enable-lora", "--max-lora-rank", str(rank)],
            ["--max-loras", str(most), "--max-cpu-loras", str(settings.get("max_cpu_loras", max(most, len(found))))],
            ["--lora-modules", *(f"{one.key}=adapters/{one.folder}" for one in found)],
        ]
    return groups


def _compose(settings: Mapping[str, Any]) -> bytes:
    """``compose.yaml``: the same command in vLLM's container, the folder mounted so that nothing can change it."""
    import yaml

    port, gpus = settings.get("port", 8000), {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    service = {
        "image": settings.get("image", f"vllm/vllm-openai:v{VERSION}"),
        "entrypoint": ["sh", "/deployment/serve.sh"],
        "volumes": [".:/deployment:ro"],
        "ports": [f"{port}:{port}"],
        "ipc": "host",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
    }
    text: str = yaml.safe_dump({"services": {"vllm": service}}, sort_keys=False)
    return text.encode()


ENGINE = VllmEngine()
