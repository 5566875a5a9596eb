"""What autograd keeps of one forward pass, counted on the meta device at the base's real width."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hubkit.compat.torch import autocast_on_meta
from hubkit.compat.torch_meta import Followed, Multiplied
from hubkit.compat.transformers import quiet
from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import without_values
from hubkit.training.advice.attending import Attending
from hubkit.training.advice.depths import depth_of, depths, kinds_of, layers_of, shortened

if TYPE_CHECKING:
    from hubkit.methods.host import Method


@dataclass(frozen=True)
class Product:
    """Products of matrices of one size, in a forward pass and its backward pass.

    Args:
        size: tokens, in, out.
        forward, backward: operations, two for each number that is multiplied and added.
    """

    size: tuple[int, int, int]
    forward: int
    backward: int


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd saves in a forward pass, and what is multiplied.

    Args:
        all: of the whole base.
        outside: of all but the layers.
        largest: of the layer that keeps most.
        entry: of what enters a layer: all that checkpointing keeps of it.
        layers: how many there are.
        products: of the whole base, all logits among them.
    """

    all: int
    outside: int
    largest: int
    entry: int
    layers: int
    products: tuple[Product, ...]

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: what enters each layer, and one layer that is computed again."""
        return min(self.all, self.outside + self.layers * self.entry + self.largest)


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Args:
        rows, tokens: of each row.
        dtype: in which the base computes.
        device: kind of device: its attention keeps what it needs.
    """

    rows: int
    tokens: int
    dtype: torch.dtype
    device: str = "cpu"


_SAVED: WeakKeyDictionary[nn.Module, dict[Hashable, Saved]] = WeakKeyDictionary()
"""What was counted: advice asks for the same forward pass more than once."""


def saved_by(method: Method, config: Any, model: nn.Module, sites: Collection[str], one: Pass) -> Saved:
    """What is saved of a forward pass.

    Where the layers of the base repeat, models of a few say it of all; else the whole base is run. Tokens that a method
    puts in front count as tokens of each row: they pass through the same layers.

    Args:
        model: the base, on the meta device; read only for its class, configuration and the kinds of its layers.
        sites: names of the sites at which something is trained.

    Raises:
        HubkitError: ``HK-BASE-LOAD`` where a model of the base cannot be made or run without values.
    """
    known, key = _SAVED.setdefault(model, {}), (method.name, repr(config), one)
    if key not in known:
        known[key] = _saved_by(method, config, model, sites, one)
    return known[key]


def _saved_by(method: Method, config: Any, model: nn.Module, sites: Collection[str], one: Pass) -> Saved:
    whole = depth_of(model) or 0
    kinds = kinds_of(model, sites)
    found = depths(kinds)
    if found is not None:
        try:
            with quiet():
                short, long = (short_of(model, n, one.dtype) for n in found)
            plain = kinds_of(model, [])
            if all(kinds_of(m, []) == plain[:n] for m, n in zip((short, long), found, strict=True)):
                few, more = _counted(method, config, short, one), _counted(method, config, long, one)
                return _saved(model, few, more, (whole - found[0], found[1] - found[0]), one)
        except Exception:  # what a model of fewer layers lacks, the whole one may have
            found = None
    try:
        with quiet():
            counted = _counted(method, config, short_of(model, None, one.dtype), one)
    except HubkitError:
        raise
    except Exception as e:  # models of other makers look at values, which are not there
        raise _unknown(model, f"{type(e).__name__}: {e}") from e
    return _saved(model, counted, counted, (0, 1), one)


@dataclass(frozen=True)
class _Counted:
    """Args: kept: bytes outside the layers, then of each; products: size -> operations forward and backward."""

    kept: list[int]
    products: dict[tuple[int, int, int], tuple[int, int]]


def _saved(model: nn.Module, few: _Counted, more: _Counted, times: tuple[int, int], one: Pass) -> Saved:
    """What the whole base saves: what a model of a few layers does, and times[0] / times[1] of what more layers add."""

    def line(less: int, greater: int) -> int:
        return less + times[0] * ((greater - less) // times[1])

    products = [
        Product(size, *(line(a, b) for a, b in zip(few.products.get(size, (0, 0)), ends, strict=True)))
        for size, ends in more.products.items()
    ]
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0))  # type: ignore[union-attr, operator]
    entry = one.rows * one.tokens * hidden * one.dtype.itemsize
    every, largest = line(sum(few.kept), sum(more.kept)), max(more.kept[1:], default=0)
    return Saved(every, more.kept[0], largest, entry, depth_of(model) or 0, tuple(products))


def _counted(method: Method, config: Any, model: nn.Module, one: Pass) -> _Counted:
    """What one forward pass saves and multiplies; a storage counts where it is first saved."""
    from hubkit.tensors.live.attached import Attached

    attached = Attached(model)
    layers = layers_of(model)
    front = attach(method, config, attached)
    own = {id(value.untyped_storage()) for value in (*attached.parameters(), *attached.buffers())}
    kept: dict[int, tuple[Any, int]] = {}
    place = [0]
    for number, layer in enumerate(layers, 1):
        layer.register_forward_pre_hook(lambda *args, number=number: place.__setitem__(0, number))
        layer.register_forward_hook(lambda *args: place.__setitem__(0, 0))

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if id(storage) not in own and id(storage) not in kept:
            kept[id(storage)] = storage, place[0]  # held, so that no other one gets its id
        return value

    ids = torch.zeros(one.rows, one.tokens + front, dtype=torch.long, device="meta")
    mask, multiplied = torch.ones_like(ids), Multiplied()
    with (
        _computing(ids, mask, one.device, multiplied),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        output = attached(input_ids=ids, attention_mask=mask, use_cache=False)
    del output
    sums = [0] * (len(layers) + 1)
    for storage, number in kept.values():
        sums[number] += storage.nbytes()
    return _Counted(sums, multiplied.found)


@contextmanager
def _computing(ids: Tensor, mask: Tensor, device: str, multiplied: Multiplied) -> Iterator[None]:
    """Within it a model on the meta device runs as it would on `device`, on tokens that are all alike."""
    followed = Followed()
    for given in (ids, mask):
        followed.give(given, torch.ones(ids.shape, dtype=torch.long))
    with quiet(), autocast_on_meta(), Attending(device, multiplied), multiplied, followed:
        yield


def short_of(model: nn.Module, layers: int | None, dtype: torch.dtype, vocabulary: int | None = None) -> nn.Module:
    """The base with fewer layers, or all, on the meta device; with fewer words where that is said."""
    config = shortened(model, layers, vocabulary)
    short = without_values(lambda: type(model)(config))
    return short.to("meta").to(dtype).eval().requires_grad_(False)


def attach(method: Method, config: Any, attached: Any, place: torch.device | str = "meta") -> int:
    """Attaches fresh parts in training mode; returns the tokens in front, which act as tokens of the rows instead.

    A base in 4 bits keeps what the plain one keeps: its weights are decoded again in the backward pass.
    """
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import front_length

    with torch.device(place):
        parts = method.inject(Base.from_model(attached.model), config)
    front = front_length(parts.values())
    if front:
        table = attached.model.get_input_embeddings()
        table.register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
        return front
    for part in parts.values():
        part.float()
    attached.add("plan", Adapter("plan", method, config, dict(parts), attached.sites))
    attached.set_mix("plan")
    attached.train()
    return 0


def _unknown(model: nn.Module, why: str) -> HubkitError:
    return HubkitError(
        "HK-BASE-LOAD",
        "what this base keeps while it trains cannot be counted without its weights",
        where=type(model).__name__,
        have=why,
        fix="train one step and watch",
    )
