"""The state of an attached model: what its adapters hold, masters and all, under names that outlive the process.

So a checkpoint of `transformers.Trainer` or accelerate is as small as the adapters, and going on from it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.token_sites import SUFFIX
from hubkit.tensors.parts.adapter import Adapter


class Incompatible(NamedTuple):
    """Keys that a state lacks, and keys that it should not have, under the names that torch gives them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def collected(adapters: Mapping[str, Adapter], prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """``<prefix><adapter>.<site>.<tensor>`` -> what it is now; each tensor once, where two parts share it."""
    return {f"{prefix}{key}": value if keep_vars else value.detach() for key, value in _held(adapters)}


def _held(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, adapter in adapters.items():
        for site, part in adapter.parts.items():
            for key, value in part.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    yield f"{name}.{site}.{key}", value


@torch.no_grad()
def put(adapters: Mapping[str, Adapter], values: Mapping[str, Tensor], strict: bool) -> Incompatible:
    """Copies `values` into the adapters' tensors.

    Raises:
        HubkitError: ``HK-KEYS``, ``HK-SHAPE``; nothing has changed then.
    """
    held = dict(_held(adapters))
    missing = [key for key in held if key not in values]
    superfluous = [key for key in values if key not in held]
    if (strict and (missing or superfluous)) or (held and len(missing) == len(held)):
        raise HubkitError(
            "HK-KEYS",
            "this is not the state of the adapters that are attached here",
            want=f"{len(held)} tensors of {', '.join(adapters) or 'no adapter'}",
            have=[*(f"{key}: missing" for key in missing[:5]), *(f"{key}: not here" for key in superfluous[:5])],
            fix="attach the same adapters under the same names; for the base's own: attached.model.load_state_dict",
        )
    shapes = [
        f"{key}: want {tuple(t.shape)}, have {tuple(values[key].shape)}"
        for key, t in held.items()
        if key in values and t.shape != values[key].shape
    ]
    if shapes:
        fix = "attach the adapter that was saved, or one of its configuration"
        raise HubkitError("HK-SHAPE", f"{len(shapes)} tensors have other shapes", have=shapes[:10], fix=fix)
    for key in held.keys() & values.keys():
        held[key].copy_(values[key])
    return Incompatible(missing, superfluous)


def acts_at(adapter: Adapter, module: nn.Module) -> bool:
    """Whether `adapter` has a part at `module`, be it for single tokens only."""
    base = adapter.base
    return any(
        (site := base.find(name.removesuffix(SUFFIX))) is not None and site.module is module for name in adapter.parts
    )
