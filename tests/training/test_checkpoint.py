"""The checkpoint file: what is stored comes back, and what is no checkpoint is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hubkit.errors import HubkitError
from hubkit.training.checkpoint import CHECKPOINT, PARTIAL, Checkpoint, RunProgress, discard, load, machine, save


def stored() -> Checkpoint:
    progress = RunProgress(step=3, tokens=7, best_loss=0.1 + 0.2, recent=[(1 / 3, 4)], early=True)
    tensors = {"param/a": torch.randn(2, 3), "adamw.step/a": torch.tensor(3.0), "best/a": torch.randn(3).bfloat16()}
    return Checkpoint({"seed": 1, "rows": "sha256:0"}, machine(torch.device("cpu")), progress, tensors)


def test_what_is_stored_comes_back_exactly(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    made = stored()
    save(tmp_path, made)
    found = load(tmp_path)
    assert found is not None
    assert (found.identity, found.machine, found.progress) == (made.identity, made.machine, made.progress)
    assert found.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    made = stored()
    save(tmp_path, made)
    before = (tmp_path / CHECKPOINT).read_bytes()
    save(tmp_path, made)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_half_written_one_is_never_used(tmp_path: Path) -> None:
    made = stored()
    save(tmp_path, made)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / PARTIAL).write_bytes(whole[:50])  # what a kill leaves
    found = load(tmp_path)
    assert found is not None
    assert found.progress == made.progress
    save(tmp_path, made)
    assert not (tmp_path / PARTIAL).exists()


def other_format(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, metadata={"hubkit": json.dumps({"format": "hubkit/checkpoint/2"})})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x04K\x01."),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: save_file({"a": torch.zeros(1)}, path),
        other_format,
        lambda path: save_file({"a": torch.zeros(1)}, path, metadata={"hubkit": "[]"}),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    save(tmp_path, stored())
    write(tmp_path / CHECKPOINT)
    with pytest.raises(HubkitError, match="HK-RESUME"):
        load(tmp_path)


def test_discard(tmp_path: Path) -> None:
    save(tmp_path, stored())
    (tmp_path / PARTIAL).write_bytes(b"")
    discard(tmp_path)
    assert list(tmp_path.iterdir()) == []
    discard(tmp_path)
