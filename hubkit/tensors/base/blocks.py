"""Blocks: the sub-layers of a layer (attention, feed-forward) as sites; where they are is data in ``arch.json``.

A part at a block sees the residual stream before the sub-layer (x) and what the sub-layer is about to add to it (y,
with the sub-layer's own dropout and norm behind it), and says what to add to y.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import Arch, Sublayer
from hubkit.tensors.base.site import Site


@dataclass(frozen=True)
class Block(Site):
    """A sub-layer as a site; its shape is (hidden, hidden), and it has no weight of its own.

    Args:
        role: ``attention`` or ``feedforward``.
        path: of its layer: the name without that of the sub-layer.
        layer: number of its layer, from 0; a decoder's go on where its encoder's end.
        module: the live module whose output the sub-layer adds to the residual stream.
        residual: the live module that is called with the residual stream.
        argument: which of its arguments that is.
        norm: the live norm of their sum, in a post-norm architecture.
        projection: the linear or norm that says how wide the residual stream is.
        multiplier: what the sub-layer's output is multiplied by before it is added.
    """

    role: str = ""
    path: str = ""
    layer: int = 0
    residual: nn.Module | None = field(default=None, compare=False, repr=False)
    argument: int = 0
    norm: nn.Module | None = field(default=None, compare=False, repr=False)
    projection: Site | None = field(default=None, compare=False, repr=False)
    multiplier: float = 1.0

    @property
    def sublayer(self) -> str:
        """Its name below the layer."""
        return self.name.removeprefix(f"{self.path}.")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.projection is None else self.projection.device

    def weight(self) -> Tensor:
        raise HubkitError("HK-PLUGIN", f"{self.name} is a block and has no weight", fix="report this to the author")

    def bias(self) -> Tensor | None:
        return None


def block_sites(
    sites: Iterable[Site], arch: Arch, config: Mapping[str, Any], model: nn.Module | None = None
) -> list[Block]:
    """The blocks of a base: the known sub-layers that its layers have.

    Args:
        sites: its linear layers and norms.
        config: its configuration.
        model: the live base, if there is one.

    Raises:
        HubkitError: ``HK-ARCH-FILE`` for a sub-layer that is called as one of `sites`.
    """
    known = {site.name: site for site in sites if site.kind in ("linear", "norm")}
    paths: dict[nn.Module, str] = {} if model is None else {m: path for path, m in model.named_modules()}
    found: list[Block] = []
    first = 0
    for listed in arch.layers:
        stack = _stack(listed, known)
        numbers = sorted({int(n) for name in known if (n := _number(name, stack)) is not None})
        for number in numbers:
            layer: dict[str, Block] = {}
            for one in arch.sublayers:
                width = known.get(f"{stack}.{number}.{one.projection or one.residual}")
                if width is None or one.name in layer or not _holds(one, config):
                    continue
                block = _block(one, f"{stack}.{number}", first + number, width, config)
                if block.name in known:
                    raise _twice(block.name, one)
                if model is None:
                    layer[one.name] = block
                elif width.module is not None and (modules := _modules(one, model, paths[width.module])):
                    layer[one.name] = replace(block, **modules)
            found += layer.values()
        first += numbers[-1] + 1 if numbers else 0
    return found


def _twice(name: str, one: Sublayer) -> HubkitError:
    """The refusal of a sub-layer that is called as one of the weights: one of the two would be lost."""
    return HubkitError(
        "HK-ARCH-FILE",
        "a sub-layer has the name of a module that holds a weight",
        where=name,
        have=f'"name": "{one.name}"',
        fix=f'"name": another, "output": "{one.output or one.name}"',
    )


def _stack(listed: str, names: Collection[str]) -> str:
    """Where the layers are that `arch.json` lists at `listed`: there; or in the language model of several parts.

    Without its head ``model.layers`` is ``layers`` in a model, in a model of several parts it is called otherwise.
    """
    if any(name.startswith(f"{listed}.") for name in names):
        return listed
    held, short = {match[1] for name in names if (match := _LAYER.match(name))}, listed.partition(".")[2]
    inner = (n for n in held if n.endswith(f".{short}") and {"language_model", "text_model"} & {*n.split(".")})
    return next(inner, short)


_LAYER = re.compile(r"([^0-9]+)\.[0-9]+\.")


def _number(name: str, stack: str) -> int | None:
    inside = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(inside) if stack and name.startswith(f"{stack}.") and inside.isdecimal() else None


def _holds(one: Sublayer, config: Mapping[str, Any]) -> bool:
    return all(config.get(key) == value for key, value in one.when.items())


def _block(one: Sublayer, layer: str, number: int, width: Site, config: Mapping[str, Any]) -> Block:
    rows, factor = width.shape[0], config.get(one.multiplier, 1.0)
    return Block(
        f"{layer}.{one.name}",
        "block",
        (rows, rows),
        width.dtype,
        False,
        "",
        None,
        role=one.role,
        path=layer,
        layer=number,
        argument=one.argument,
        projection=width,
        multiplier=float(factor),
    )


def _modules(one: Sublayer, model: nn.Module, width: str) -> dict[str, Any]:
    """The live modules of a sub-layer, as fields of its block; none where the layer lacks one of them.

    Args:
        width: live path of its `projection`, by which the layer is found: files may call it otherwise.
    """
    layer = width.removesuffix(one.projection or one.residual)
    wanted = {"module": one.output or one.name, "residual": one.residual, "norm": one.norm}
    try:
        return {key: model.get_submodule(layer + path) if path else None for key, path in wanted.items()}
    except AttributeError:
        return {}
