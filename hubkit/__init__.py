"""hubkit: a package manager for model adapters.

Every command of ``hubkit`` is a function of the same name here: ``hubkit.train(...)``, ``hubkit.push(...)``.
They are imported on first use, so ``import hubkit`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

VERBS = (
    "compose", "deploy", "export", "generate", "inspect", "list", "lock", "merge", "methods", "mix", "pack", "pull",
    "push", "serve", "train", "verify",
)  # fmt: skip
_NAMES = {verb: f"hubkit.verbs.{verb}" for verb in VERBS} | {
    "HubkitError": "hubkit.errors",
    "Route": "hubkit.tensors.parts.mix",
    "Stack": "hubkit.tensors.parts.mix",
    "Sum": "hubkit.tensors.parts.mix",
    "attach": "hubkit.verbs.attach",
    "load_base": "hubkit.tensors.live.loading",
    "load_tokenizer": "hubkit.tensors.base.tokenizer",
    "offer": "hubkit.verbs.offer",
    "save": "hubkit.verbs.save",
    "trainer_callback": "hubkit.verbs.trainer_callback",
}

__all__ = [
    "HubkitError", "Route", "Stack", "Sum", "__version__", "attach", "load_base", "load_tokenizer", "offer", "save",
    "trainer_callback", *VERBS,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'hubkit' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
