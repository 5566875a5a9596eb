"""AdamW, torch's or bitsandbytes' paged one, and its moments as tensors that a checkpoint can hold.

Paged moments lie in memory that a GPU which is full moves out to the host and back, so that one long row does not end
a run: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.compat.bitsandbytes import make_state
from hubkit.errors import HubkitError

PAGED = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
"""Option -> class of bitsandbytes."""


def require_optimizer(optimizer: str, device: torch.device) -> None:
    """Refuses an optimizer that cannot run on `device`, before anything is loaded.

    Raises:
        HubkitError: ``HK-OPTIMIZER`` for a paged one off a CUDA device or without bitsandbytes.
    """
    if optimizer not in PAGED:
        return
    have, fix = "", ""
    if device.type != "cuda":
        have, fix = f"the device {device}", "--optimizer adamw"
    elif importlib.util.find_spec("bitsandbytes") is None:
        have, fix = "no bitsandbytes", "pip install 'hubkit-adapters[bitsandbytes]', or --optimizer adamw"
    if have:
        raise HubkitError(
            "HK-OPTIMIZER",
            f"the optimizer {optimizer} cannot run here",
            want="a CUDA device and bitsandbytes",
            have=have,
            fix=fix,
        )


def make_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float, device: torch.device) -> Any:
    """The optimizer of that name over parameter groups; each step sets their rates.

    Returns:
        a ``torch.optim.Optimizer``.
    """
    if name in PAGED:
        import bitsandbytes

        return getattr(bitsandbytes.optim, PAGED[name])(groups, lr=0.0, weight_decay=weight_decay)
    # one kernel for all parameters instead of five passes over each
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=fused)


def moments(optimizer: Any, param: nn.Parameter) -> dict[str, Tensor]:
    """Quantity -> value of one parameter's state; none before its first step. bitsandbytes counts steps in an int."""
    return {key: torch.as_tensor(value) for key, value in optimizer.state.get(param, {}).items()}


def adopt_moment(optimizer: Any, param: nn.Parameter, key: str, value: Tensor) -> None:
    """Sets one quantity of a parameter's state: what `moments` gave."""
    state = optimizer.state[param]
    if isinstance(optimizer, torch.optim.AdamW):
        state[key] = value.to(param.device)  # the fused kernel counts steps on the parameter's device, too
        return
    if not state:  # its buffers are pages: they are made by bitsandbytes and filled here
        make_state(optimizer, param)
    if isinstance(state[key], Tensor):
        state[key].copy_(value)
    else:
        state[key] = int(value)
