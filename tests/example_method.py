"""IA3 of `examples/hubkit-ia3` as a loaded method, without installing it: a method that is not low-rank, reads weights
and outputs, and merges weight and bias."""

from __future__ import annotations

import importlib.util
from importlib.metadata import EntryPoint
from pathlib import Path

from hubkit.methods.host import GROUP, Method, Offer

SOURCE = Path(__file__).parent.parent / "examples" / "hubkit-ia3" / "hubkit_ia3.py"


def ia3() -> Method:
    """The method, as the host would load it."""
    spec = importlib.util.spec_from_file_location("hubkit_ia3", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Method(Offer("ia3", "hubkit-ia3", "0.1.0", EntryPoint("ia3", "hubkit_ia3", GROUP)), module)
