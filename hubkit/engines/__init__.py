"""Engines: what each runtime accepts, what it needs, which files it gets. One file per engine, one `Engine` in it.

An engine is asked what it refuses before anything is written, and asks for capabilities, never for a method's name.
"""

from __future__ import annotations

from importlib import import_module

from hubkit.engines.plan import Engine, Member, Plan
from hubkit.errors import HubkitError, nearest

__all__ = ["ENGINES", "Engine", "Member", "Plan", "engine_named"]

ENGINES = ("merged", "peft")


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
