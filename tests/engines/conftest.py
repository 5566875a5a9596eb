"""Adapters with probes, and what servers get in their places: other values, other scales, another adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from probing import gentle

from hubkit.verbs.pack import pack


@pytest.fixture(scope="session")
def probed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter named chat on `tiny_llama`, with probes."""
    folder = gentle(tmp_path_factory.mktemp("probed") / "chat", tiny_llama)
    pack(folder, base=tiny_llama, probes=True)
    return folder
