"""What a method gets for the hooks it leaves out. Marked ``trylast``: the plugin's own answer wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubkit.methods.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hubkit.tensors.parts.adapter import Adapter


@hookimpl(trylast=True)
def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


@hookimpl(trylast=True)
def learning_rate() -> float:
    """The same rate everywhere."""
    return 1.0


@hookimpl(trylast=True)
def narrow(config: Any) -> Any:
    """Every tensor is stored."""
    return config


@hookimpl(trylast=True)
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:
    """PEFT's files, through the method's mapping."""
    from hubkit.methods.foreign import foreign_files

    return foreign_files(adapter, target)
