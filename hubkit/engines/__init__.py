"""Engines: what each runtime accepts, what it needs, which files it gets. One file per engine, one `Engine` in it.

An engine is asked what it refuses before anything is written, and asks for capabilities, never for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.engines.plan import Engine, Member, Plan
from hubkit.errors import HubkitError, nearest

if TYPE_CHECKING:
    from hubkit.engines.served import Served

__all__ = ["ENGINES", "FORMS", "Engine", "Member", "Plan", "engine_named", "form_named"]

ENGINES = ("kubernetes", "llamacpp", "merged", "mlx", "ollama", "peft", "sglang", "vllm")
FORMS = {
    "gguf": "hubkit.engines.gguf.adapter",
    "mlx": "hubkit.engines.mlx",
    "sglang": "hubkit.engines.sglang",
    "vllm": "hubkit.engines.vllm",
}
"""Forms of adapters that engines read, for `hubkit export`: name -> the module whose ``adapter_files`` writes it."""


def engine_named(name: str) -> Engine:
    """The engine `name`, imported now.

    Raises:
        HubkitError: ``HK-ENGINE-UNKNOWN``, with the nearest names.
    """
    if name not in ENGINES:
        near = nearest(name, ENGINES) or ENGINES
        what, fix = f"unknown engine {name!r}", f"--engine {near[0]}"
        raise HubkitError("HK-ENGINE-UNKNOWN", what, want=", ".join(ENGINES), have=name, fix=fix)
    engine: Engine = import_module(f"hubkit.engines.{name}").ENGINE
    return engine


def form_named(name: str) -> Callable[[Served, Path | None, Mapping[str, Any]], Mapping[str, bytes]]:
    """What writes one of `FORMS`: of an adapter, its base's folder where that is needed, and settings, the files."""
    write: Callable[[Served, Path | None, Mapping[str, Any]], Mapping[str, bytes]]
    write = import_module(FORMS[name]).adapter_files
    return write
