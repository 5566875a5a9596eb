"""How much memory a training takes, before anything is loaded: states to the byte, activations as autograd keeps them.

Weights, gradients and moments follow from shapes. Activations are counted, not guessed: a model of the base's real
width and few layers is run on the meta device, with the method's own parts, and every tensor that autograd saves is
counted once; two depths give what one more layer costs. What is left are two constants per kind of machine, fitted to
real runs: what a process takes before it trains, and what its allocator and short-lived tensors take beside the saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hubkit.tensors.experts.expert import Expert
from hubkit.training.advice.activations import Pass, saved_by
from hubkit.training.loss import CHUNK

if TYPE_CHECKING:
    from hubkit.methods.host import Method
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.part import Part

MiB = 1 << 20
PROCESS = {"cpu": 560 * MiB}
"""What a process with torch and transformers takes before it trains; a device's own memory has none of it."""
OVERHEAD = {"cpu": 1.15}
"""Times the saved activations that a run needs: fitted to peaks of 1 to 4 rows of 256 and 512 tokens."""
DEVICE_OVERHEAD = 1.05
MASTER = 4
"""Bytes of a trained number, which is float32 whatever the base computes in; its gradient has as many."""


@dataclass(frozen=True)
class Run:
    """What a training is that memory is planned for.

    Args:
        rows: of one forward pass, on one process.
        tokens: of a row.
        optimizer: as in `TrainOptions`.
        checkpointing: activations are computed again.
        processes: over which the base is divided (``--shard``); what is trained is whole in each.
        dtype: in which the base computes.
        device: kind of device: ``cpu``, ``cuda``.
    """

    rows: int
    tokens: int
    optimizer: str
    checkpointing: bool
    processes: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Memory:
    """Bytes that one process takes.

    Args:
        weights: of the base, as they lie in memory: those in 4 bits packed, with their statistics.
        parameters: the adapter's, in float32.
        gradients: of these.
        moments: what the optimizer keeps.
        activations: what autograd saves in one forward pass.
        head: logits: two chunks of them, or all, where the output head is trained.
        gathered: what is whole for a while where the base is divided: embeddings and head, two layers, and the
            largest weight decoded.
        process: what is there before training, and short-lived tensors: the two fitted constants.
    """

    weights: int
    parameters: int
    gradients: int
    moments: int
    activations: int
    head: int
    gathered: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        kept = self.weights + self.parameters + self.gradients + self.moments
        return kept + self.activations + self.head + self.gathered + self.process


def planned_memory(method: Method, config: Any, base: Base, model: nn.Module, run: Run) -> tuple[Memory, int]:
    """The memory of one process, and how many numbers are trained.

    Args:
        base: the sites of `model`; what the method does to it (a codec) is done.
        model: the base on the meta device, see `hubkit.tensors.base.agreement.outline`.

    Raises:
        HubkitError: what the method's `inject` raises; as `saved_by`.
    """
    with torch.device("meta"):
        parts = method.inject(base, config)
    one = Pass(run.rows, run.tokens, run.dtype, run.device)
    saved = saved_by(method, config, model, parts, one)
    trained = list({id(p): p.numel() for part in parts.values() for p in part.parameters()}.values())
    count, shards = sum(trained), run.processes
    packed = _packed(base) if base.codec else {}
    weights = sum(_bytes(model, run.dtype, packed).values())
    activations = saved.checkpointed if run.checkpointing else saved.all
    overhead = OVERHEAD.get(run.device, DEVICE_OVERHEAD)
    memory = Memory(
        weights=_share(weights, shards),
        parameters=MASTER * count,
        gradients=MASTER * count,
        moments=sum(moment_bytes(run.optimizer, n) for n in trained),
        activations=activations,
        head=head_bytes(parts, base, run),
        gathered=_gathered(model, run.dtype, packed, base) if shards > 1 else 0,
        process=PROCESS.get(run.device, 0) + round((overhead - 1) * activations),
    )
    return memory, count


def packed_bytes(count: int) -> int:
    """Bytes of a weight of `count` numbers in NF4: codes, absmax in 8 bits, and their two tables and statistics.

    As in `hubkit.tensors.fourbit.nf4`, without the few bytes that say in JSON what it is.
    """
    from hubkit.tensors.fourbit.nf4 import BLOCK, NESTED

    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED) + 4 * (16 + 256)


def moment_bytes(optimizer: str, count: int) -> int:
    """What the optimizer keeps of a tensor of `count` numbers.

    AdamW has two moments in float32 and a step; bitsandbytes counts steps outside, and its 8-bit moments have an absmax
    per 256 values, and two tables of 256, from 4,096 values on.
    """
    if optimizer == "paged_adamw_8bit" and count >= 4096:
        return 2 * (count + 4 * -(-count // 256)) + 2 * 4 * 256
    return 2 * MASTER * count + (4 if optimizer == "adamw" else 0)


def head_bytes(parts: Mapping[str, Part], base: Base, run: Run) -> int:
    """Logits of one forward pass: those of a chunk, and one in float32; where the head is trained, all of them.

    Of all of them there are the logits themselves, a float32 copy, their log-softmax and its gradient at once.
    """
    sizes = [site.shape for site in base.sites.values() if base.arch.is_head(site.name)]
    vocabulary, hidden = sizes[0] if sizes else (0, 0)
    rows, size = run.rows * run.tokens, run.dtype.itemsize
    if any(base.arch.is_head(name) for name in parts):
        return rows * vocabulary * (size + 12)
    exact = 0 if run.dtype == torch.float32 else 4
    return min(CHUNK, rows) * vocabulary * (size + exact) + 2 * rows * hidden * size


def _packed(base: Base) -> dict[int, int]:
    """Parameter (its id) -> bytes in 4 bits of what it holds: one linear layer, or matrices of a mixture's experts."""
    found: dict[int, int] = {}
    for site in base.to_quantize():
        module: Any = site.module
        weight = module.holder.get_parameter(module.tensor) if isinstance(module, Expert) else module.weight
        found[id(weight)] = found.get(id(weight), 0) + packed_bytes(math.prod(site.shape))
    return found


def _bytes(model: nn.Module, dtype: torch.dtype, packed: Mapping[int, int]) -> dict[str, int]:
    """Name -> bytes of every tensor of the model, shared ones once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if id(value) not in seen:
            seen.add(id(value))
            size = dtype.itemsize if value.is_floating_point() else value.dtype.itemsize
            found[name] = packed.get(id(value), value.numel() * size)
    return found


def _gathered(model: nn.Module, dtype: torch.dtype, packed: Mapping[int, int], base: Base) -> int:
    """What FSDP2 gathers beside the shares: the root's group for the whole step, two layers, and a decoded weight.

    As `hubkit.training.ranks.sizes.gathered_at_most`: the next layer is gathered while one computes.
    """
    groups: dict[str, int] = {}
    for name, size in _bytes(model, dtype, packed).items():
        group = _layer(name)
        groups[group] = groups.get(group, 0) + size
    decoded = [math.prod(site.shape) * dtype.itemsize for site in base.to_quantize()] if packed else []
    root = groups.pop("", 0)
    return root + sum(sorted(groups.values())[-2:]) + max(decoded, default=0)


def _layer(name: str) -> str:
    steps = name.split(".")
    numbers = [n for n, step in enumerate(steps) if step.isdigit()]
    return ".".join(steps[: numbers[0] + 1]) if numbers else ""


def _share(count: int, processes: int) -> int:
    return -(-count // processes)


def textbook(parameters: int) -> dict[str, int]:
    """The rules of thumb, in bytes: 16 a parameter for full fine-tuning with AdamW, half a byte for weights in 4 bits.

    7B: 112 GB; 65B: 33 GB. https://arxiv.org/abs/1910.02054 §3.1; QLoRA, https://arxiv.org/abs/2305.14314.
    """
    return {"full": 16 * parameters, "4-bit weights": round(parameters * 0.5)}
