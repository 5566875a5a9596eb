"""Every registry keeps the same laws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from registry.contract import RegistryContract

from hubkit.registry.api import Registry
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.hub.huggingface import HuggingFaceRegistry

if TYPE_CHECKING:
    from registry.conftest import HubServer


class TestDirectory(RegistryContract):
    """A directory."""

    @pytest.fixture
    def registry(self, tmp_path: Path) -> Registry:
        return DirectoryRegistry(tmp_path / "registry")


class TestHuggingFace(RegistryContract):
    """The real client, over HTTP, as a user with a token."""

    @pytest.fixture
    def registry(self, hub_server: HubServer) -> Registry:
        return HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["ana"])
