"""offer: adapters read when they are first named, checked then as `attach` checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import other_weights, refused

import hubkit
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.offer import offer


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return load_base(tiny_llama)


def test_a_route_reads_what_it_names(adapter: Path, tiny_llama: Path, model: Any, tmp_path: Path) -> None:
    second = make_adapter(tmp_path / "second", tiny_llama, seed=5)
    attached = offer(model, {"chat": str(adapter), "second": str(second), "gone": str(tmp_path / "gone")})
    assert not attached.adapters
    rows = torch.arange(12).view(3, 4)
    have = attached(rows, route=["second", None, "chat"]).logits
    assert set(attached.adapters) == {"chat", "second"}
    error = refused("HK-NOT-ADAPTER", attached, rows, route=["gone", None, None])
    assert "gone" in str(error)
    for row, folder in ((0, second), (2, adapter)):
        alone = hubkit.attach(load_base(tiny_llama), str(folder))
        assert torch.allclose(have[row], alone(rows[row : row + 1]).logits[0], atol=1e-5)
    assert torch.allclose(have[1], attached.detach()(rows[1:2]).logits[0], atol=1e-5)


def test_an_adapter_of_another_base_is_refused_when_named(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    attached = offer(load_base(other_weights(tiny_llama, tmp_path / "other")), {"chat": str(adapter)})
    rows = torch.arange(4)[None]
    want = attached(rows).logits
    refused("HK-BASE-MISMATCH", attached, rows, route=["chat"])
    assert torch.equal(attached(rows).logits, want)
    assert not attached.adapters
    forced = offer(attached, {"all the same": str(adapter)}, allow_base_mismatch=True)
    assert forced is attached
    assert not torch.equal(attached(rows, route=["all the same"]).logits, want)


def test_memory_and_names(adapter: Path, model: Any) -> None:
    attached = hubkit.offer(model, {"chat": str(adapter)}, memory=10)
    assert "10 bytes" in str(refused("HK-MEMORY", attached, torch.arange(4)[None], route=["chat"]).want)
    refused("HK-NAME-TAKEN", offer, attached, {"chat": str(adapter)})
    refused("HK-OPTIONS", offer, attached, {"x": str(adapter)}, memory=0)
    assert attached.offered == ["chat"]
