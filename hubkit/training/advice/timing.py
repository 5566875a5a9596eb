"""How long a training takes on this machine: a few layers of the base's width are trained on the spot, for a second.

Not products of matrices alone: on processors that are made for these they are a fifth of it, norms, activations and
copies the rest. So layers of the base are made here with values that say nothing, the method's own parts at them, and
forward and backward are measured at as many tokens as a step has. What comes beside the layers is measured alone: the
output head, the optimizer's pass over what is trained, and 4-bit weights that are decoded in each forward and backward
pass. What remains is why the answer is a range: `LEAST` and `MOST` times what was added up, held against real runs in
tests/benchmarks/bench_advise.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hubkit.compat.transformers import quiet
from hubkit.tensors.device import forked_rng
from hubkit.training.advice.activations import attach, saved_by, short_of
from hubkit.training.advice.depths import depth_of, depths, kinds_of
from hubkit.training.advice.fitting import parameters_of

if TYPE_CHECKING:
    from hubkit.methods.host import Method
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.part import Part
    from hubkit.training.advice.activations import Pass, Product, Saved
    from hubkit.training.rows.encode import Row

LEAST, MOST = 0.9, 1.6
"""Times the seconds that were added up."""
BUDGET = 0.25
"""Seconds for each thing that is measured."""
PASS = 1.0
"""Seconds that a forward and backward pass of the layers should take at most, or it gets fewer tokens."""
FEW = 64
"""Tokens that it gets at least."""
LARGEST = 4 << 30
"""Bytes of layers that are made; a base with larger ones is not tried."""
WORDS = 256
"""Of these layers' model: its head is measured alone."""
OPERATIONS = 4e9
"""Of a product that is measured: larger ones are cut to fewer tokens, and to `WIDEST` numbers in the weight."""
WIDEST = 1 << 26


@dataclass(frozen=True)
class Epoch:
    """What passes through the model in one epoch.

    Args:
        passes: forward and backward passes.
        steps: of the optimizer.
        tokens: with padding.
        pairs: tokens times tokens of their row, with padding: what attention looks at.
        targets: learnt tokens.
        held: tokens of the rows that are held out and evaluated at its end, with padding.
    """

    passes: int
    steps: int
    tokens: int
    pairs: int
    targets: int
    held: int


@dataclass(frozen=True)
class Took:
    """How long a training takes.

    Args:
        least, most: seconds; 0 where they are not known.
        operations: of all products, two for each number that is multiplied and added.
        speed: operations per second that follow; 0 where nothing was measured.
    """

    least: float
    most: float
    operations: float
    speed: float


def epoch_of(rows: Sequence[Row], batch_size: int, accumulate: int, validation: float, seed: int = 0) -> Epoch:
    """What training draws of `rows` in its first epoch."""
    from hubkit.training.rows.batching import plan_epoch, plan_evaluation, split

    train, held = split(rows, validation, seed)
    lengths = [len(row.ids) for row in train]
    steps = plan_epoch(lengths, batch_size, accumulate, seed, 0)
    batches = [(len(batch), max(lengths[n] for n in batch)) for step in steps for batch in step]
    apart = [len(row.ids) for row in held]
    last = [len(batch) * max(apart[n] for n in batch) for batch in plan_evaluation(apart, batch_size)]
    tokens, pairs = (sum(count * longest**power for count, longest in batches) for power in (1, 2))
    return Epoch(len(batches), len(steps), tokens, pairs, sum(row.targets() for row in train), sum(last))


@dataclass(frozen=True)
class Training:
    """What is trained on.

    Args:
        one: a forward pass, on one process.
        epoch: what passes through the model.
        checkpointing: all but the output head is computed once more.
        processes: that share the forward passes of a step.
    """

    one: Pass
    epoch: Epoch
    checkpointing: bool
    processes: int = 1


def runs_here(device: str, processes: int) -> bool:
    """Whether this machine has such devices, one for each process."""
    if device == "cpu":
        return processes == 1 and not torch.cuda.is_available()
    return torch.cuda.is_available() and torch.cuda.device_count() >= processes


def took(
    method: Method, config: Any, base: Base, model: nn.Module, training: Training, place: torch.device | None,
    epochs: float = 1.0,
) -> Took:  # fmt: skip
    """What a training computes, and how long that takes.

    Args:
        base: the sites of `model`, which is on the meta device.
        place: where it is measured, for about a second; None: on no machine that is here.
    """
    with torch.device("meta"):
        parts = method.inject(base, config)
    saved = saved_by(method, config, model, parts, training.one)
    heads = frozenset(site.shape[0] for site in base.sites.values() if base.arch.is_head(site.name))
    made = operations_of(saved, training, heads)
    operations = epochs * sum(made.values())
    if place is None:
        return Took(0.0, 0.0, operations, 0.0)
    whole = sum(made.values())
    try:
        with forked_rng(place):
            seconds = _seconds_of(method, config, base, model, parts, training, made, heads, place)
    except (RuntimeError, NotImplementedError, MemoryError):  # this machine does not compute so
        return Took(0.0, 0.0, operations, 0.0)
    return Took(LEAST * epochs * seconds, MOST * epochs * seconds, operations, whole / seconds if seconds else 0.0)


def _seconds_of(
    method: Method, config: Any, base: Base, model: nn.Module, parts: Mapping[str, Part], training: Training,
    made: dict[Product, float], heads: frozenset[int], place: torch.device,
) -> float:  # fmt: skip
    """Seconds of an epoch; 0 where the layers are too large to be tried."""
    one, epoch = training.one, training.epoch
    most = max(made, key=lambda product: made[product])
    speed = product_speed(most.size, one.dtype, place)
    inner = sum(made[product] for product in made if not heads & {*product.size}) / epoch.tokens
    tokens = min(epoch.tokens / epoch.passes, max(FEW, PASS * speed / inner * (depth_of(model) or 1)))
    size = max(1, min(one.rows, round(tokens / FEW)))
    shape = size, max(2, round(tokens / size))
    timed = layer_seconds(method, config, model, parts, shape, one.dtype, place)
    if timed is None:
        return 0.0
    forward, backward = timed
    again = forward if training.checkpointing else 0.0
    shared = epoch.tokens * (forward + backward + again) + epoch.held * forward
    head = max((product for product in made if heads & {*product.size}), key=lambda p: made[p], default=None)
    if head is not None:
        shared += made[head] / product_speed(head.size, one.dtype, place)
    if base.codec:
        packed = sum(math.prod(site.shape) for site in base.to_quantize())
        shared += packed * epoch.passes * (3 if training.checkpointing else 2) * _decoding_seconds(one.dtype, place)
    trained = parameters_of(parts)
    return shared / training.processes + epoch.steps * trained * _optimizer_seconds(trained, place)


def layer_seconds(
    method: Method, config: Any, model: nn.Module, sites: Collection[str], shape: tuple[int, int], dtype: torch.dtype,
    place: torch.device,
) -> tuple[float, float] | None:  # fmt: skip
    """Seconds a token of a forward and of a backward pass through all layers, of which a few are tried.

    Args:
        shape: rows and tokens.

    Returns:
        None where they are larger than `LARGEST`, or there are none.
    """
    from hubkit.tensors.live.attached import Attached
    from hubkit.training.attention import short_attention

    whole, found = depth_of(model), depths(kinds_of(model, sites))
    if not whole:
        return None
    few = whole if found is None else found[0]
    with quiet():
        short: Any = short_of(model, few, dtype, WORDS)
    if sum(p.nbytes for p in short.parameters()) > LARGEST:
        return None
    short.to_empty(device=place)
    attached = Attached(short)
    attach(method, config, attached, place)
    with torch.no_grad():
        for value in (*attached.parameters(), *attached.buffers()):
            if value.dim() > 1 and value.is_floating_point():
                value.normal_(0.0, 0.02)  # as if trained: processors are slow at numbers next to zero
            else:
                value.fill_(1)
    ids = torch.randint(3, 64, shape, device=place)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    times: list[tuple[float, float]] = []
    with short_attention(short):
        while len(times) < 3 or sum(map(sum, times)) < BUDGET:
            begun = _now(place)
            loss = attached(**given).logits.float().square().mean()
            middle = _now(place)
            loss.backward()
            times.append((middle - begun, _now(place) - middle))
    scale = whole / few / ids.numel()
    forward, backward = (min(one) * scale for one in zip(*times[1:], strict=True))
    return forward, backward


def operations_of(saved: Saved, training: Training, heads: frozenset[int]) -> dict[Product, float]:
    """Products of one forward pass -> operations of these in an epoch.

    Args:
        saved: of the forward pass that is `training`'s.
        heads: rows of output heads, which get the tokens alone that say a target.
    """
    one, epoch = training.one, training.epoch
    area = one.rows * one.tokens
    made: dict[Product, float] = {}
    for product in saved.products:
        tokens, inner, outer = product.size
        head = inner in heads or outer in heads
        share = epoch.targets / area if head else epoch.tokens / area
        if not head and tokens == one.tokens and tokens in (inner, outer):  # of tokens with tokens
            share = epoch.pairs / (area * tokens)
        again = product.forward if training.checkpointing and not head else 0
        made[product] = share * (product.forward + product.backward + again) + product.forward * epoch.held / area
    return made


def product_speed(size: tuple[int, int, int], dtype: torch.dtype, place: torch.device) -> float:
    """Operations per second of a product and of its gradient.

    Args:
        size: tokens, in, out.
    """
    tokens, inner, outer = size
    inner, outer = min(inner, WIDEST), min(outer, max(1, WIDEST // inner))
    tokens = max(1, min(tokens, max(FEW, int(OPERATIONS / (2 * inner * outer)))))
    x, weight = (torch.randn(rows, inner, device=place).to(dtype) for rows in (tokens, outer))
    y = x @ weight.T
    return 4 * tokens * inner * outer / _seconds(lambda: (x @ weight.T, y @ weight), place)


def _optimizer_seconds(trained: int, place: torch.device) -> float:
    """Seconds of a step of the optimizer, a number."""
    from hubkit.training.optimizers import make_optimizer

    count = max(1, min(trained, 1 << 22))
    parameter = nn.Parameter(torch.zeros(count, device=place))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer("adamw", [{"params": [parameter]}], 0.0, place)
    return _seconds(optimizer.step, place) / count


def _decoding_seconds(dtype: torch.dtype, place: torch.device) -> float:
    """Seconds of decoding a weight in 4 bits, a number."""
    from hubkit.tensors.fourbit.decode import dequantize
    from hubkit.tensors.fourbit.nf4 import quantize

    packed = quantize(torch.randn(1024, 1024, device=place))
    return _seconds(lambda: dequantize(packed, dtype), place) / (1 << 20)


CLOCK = time.perf_counter


def _seconds(call: Callable[[], object], place: torch.device) -> float:
    """Seconds of a call, the least of as many as `BUDGET` allows: other work on the machine adds to the rest."""

    times: list[float] = []
    while len(times) < 3 or sum(times) < BUDGET:
        begun = _now(place)
        call()
        times.append(_now(place) - begun)
    return min(times[1:])


def _now(place: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return CLOCK()
