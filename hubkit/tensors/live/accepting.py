"""What adapters can be attached to: a live model as it was loaded, no name of one, none that others have changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from hubkit.compat.torch import is_compiled
from hubkit.errors import HubkitError

PEFT = "peft"
"""Where the modules come from that PEFT puts in the place of a base's own."""


def require_model(model: Any) -> None:
    """Refuses what adapters cannot be attached to, before anything is done with it.

    Raises:
        HubkitError: ``HK-NOT-LIVE`` for a name, a tokenizer, a class, anything that is no module, and for a model that
            PEFT has changed; ``HK-COMPILED`` for one that torch.compile has.
    """
    if not isinstance(model, nn.Module):
        what, fix = _instead(model)
        raise HubkitError("HK-NOT-LIVE", what, want="a model in memory", have=_described(model), fix=fix)
    changed = [f"{name or 'the model'}: {type(m).__name__}" for name, m in model.named_modules() if is_foreign(m)]
    if changed:
        raise HubkitError(
            "HK-NOT-LIVE",
            "PEFT has put modules of its own into this model: it is no base any more",
            want="the base as it was loaded",
            have=f"{len(changed)} modules of PEFT, first {changed[0]}",
            fix="model.unload() of PEFT gives the base back, hubkit pack takes the adapter over",
        )
    require_uncompiled(model)


def require_uncompiled(model: nn.Module) -> None:
    """Refuses a model that torch.compile has wrapped, or a part of it: ``HK-COMPILED``."""
    if any(is_compiled(module) for module in model.modules()):
        raise HubkitError(
            "HK-COMPILED",
            "the model is compiled already: hooks registered now would be ignored",
            fix="attach first, then torch.compile the attached model",
        )


def is_foreign(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's."""
    return type(module).__module__.partition(".")[0] == PEFT


def _instead(model: Any) -> tuple[str, str]:
    """What was given in the place of a model, and what to do."""
    load = "hubkit.load_base(FOLDER), or from_pretrained of transformers"
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        return "this is the name of a model, not the model", load
    if isinstance(model, type):
        return "this is a class, not a model made of it", load
    if hasattr(model, "get_vocab"):
        return "this is a tokenizer, not a model", "give the model first; tokenizer=... compares the tokenizer as well"
    return "this is no model", load


def _described(model: Any) -> str:
    text = repr(model) if isinstance(model, str | type) else type(model).__name__
    return text if len(text) <= 80 else text[:77] + "..."
