"""The hooks of a method plugin. All take any subset of these arguments, so arguments can be added later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from hubkit.methods.info import MethodInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.delta import Delta
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import Part

PROJECT = "hubkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def describe() -> MethodInfo:  # type: ignore[empty-body]
    """The method's description. Required; it touches no model."""


@hookspec(firstresult=True)
def inject(base: Base, config: Any) -> Mapping[str, Part]:  # type: ignore[empty-body]
    """Site name -> part. Required; it makes the parts and never touches the model.

    Shapes depend on sites and config only: it also runs on the meta device, to load an adapter or to judge a base by
    its headers. ``base.match(config.targets, kind=...)`` finds sites and refuses any target that matches nothing.
    """


@hookspec(firstresult=True)
def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[empty-body]
    """The loss of one micro-batch: the mean over its target tokens, with gradient. Default: ``model(**batch).loss``."""


@hookspec(firstresult=True)
def merge(site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:  # type: ignore[empty-body]
    """What is added to the weight (out, in) and bias of one site. Pure: the same for files and live models.

    Absent, or raising `NotMergeable`, it means that merging is refused. `tensors` and ``site.weight()`` come in the
    dtype of accumulation.
    """


@hookspec(firstresult=True)
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:  # type: ignore[empty-body]
    """file name -> bytes in the form `target` (``"peft"``). Default: through the form in `MethodInfo.peft`."""
