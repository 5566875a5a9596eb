"""A base that is divided while it is read: the same model, and no process holds more than its shares and one tensor."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bases.architectures import save
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_ranks import HERE, launch
from tiny import llama
from torch import Tensor

from hubkit.tensors.live.loading import load_base
from hubkit.training.ranks.skeleton import skeleton

CASES = ("plain", "quantized", "packed")
FUSED = "mixtral"
"""Whose experts are fused in transformers 5."""
SMALL = 1 << 15
"""Bytes of gains of norms, frequencies and levels: what is neither a share nor a tensor to speak of."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes have noted; made once, by whichever worker comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "divided"
    with FileLock(shared / "divided.lock"):
        if not (folder / "done").exists():
            _make(folder)
            (folder / "done").touch()
    return folder


def _make(folder: Path) -> None:
    folder.mkdir()
    sizes: dict[str, Any] = {"vocab_size": 601, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5}
    llama(**sizes).save_pretrained(folder / "base")
    quantized: Any = load_base(folder / "base", codec="nf4/64/double", device="cpu")
    quantized.save_pretrained(folder / "packed")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    tensors = load_file(folder / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = launch(HERE / "divided_run.py", folder / "base", folder / "packed", broken, folder)
    assert done.returncode == 0, done.stderr


def facts(held: Path, rank: int, case: str) -> Any:
    return json.loads((held / f"held-{rank}.json").read_text())[case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_holds_its_shares_and_one_tensor(held: Path, rank: int, case: str) -> None:
    shares = facts(held, rank, case)["shares"]
    one = max(tensor.nbytes for tensor in load_file(held / "base" / "model.safetensors").values())
    assert shares < facts(held, rank, case)["most"] <= shares + one + SMALL
    assert facts(held, rank, f"{case}-whole")["most"] > shares + one + SMALL  # else the figure would say nothing


@pytest.mark.parametrize("case", CASES)
def test_the_shares_are_those_of_a_base_that_is_read_as_a_whole(held: Path, case: str) -> None:
    for rank in (0, 1):
        assert facts(held, rank, case)["shares"] == facts(held, rank, f"{case}-whole")["shares"]
        assert facts(held, rank, case)["sums"] == facts(held, rank, f"{case}-whole")["sums"]
    assert facts(held, 0, case)["sums"] == facts(held, 1, case)["sums"]


def test_each_process_reads_its_part_of_the_files(held: Path) -> None:
    whole = sum(tensor.nbytes for tensor in load_file(held / "base" / "model.safetensors").values())
    assert [facts(held, rank, "plain")["read"] for rank in (0, 1)] == [
        facts(held, r, "plain")["shares"] for r in (0, 1)
    ]
    for case in ("plain", "quantized"):
        assert sum(facts(held, rank, case)["read"] for rank in (0, 1)) == whole


def test_a_weight_that_cannot_be_quantized_is_everybody_s_error(held: Path) -> None:
    for rank in (0, 1):
        assert facts(held, rank, "broken") == ["HK-NAN", "model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "opt", "gemma2", "qwen3", "phi", "bloom", "mamba", "llava"])
def test_a_skeleton_is_the_loaded_model_without_its_values(kind: str, tmp_path: Path) -> None:
    """Names, dtypes and ties of parameters; the very bits of buffers that are in no file."""
    save(kind, tmp_path)
    loaded, outline = load_base(tmp_path, "bfloat16", device="cpu"), skeleton(tmp_path, "bfloat16", None)
    assert outline is not None
    have, want = (_facts(model) for model in (outline.model, loaded))
    assert have == want
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    buffers = dict(outline.model.named_buffers())
    for name, buffer in loaded.named_buffers():
        if name not in outline.names:
            assert torch.equal(buffers[name], buffer), name
    stored = {**dict(loaded.named_parameters(remove_duplicate=False)), **dict(loaded.named_buffers())}
    for name, own in outline.names.items():
        assert torch.equal(stored[name], outline.shards.read(own).to(stored[name].dtype)), name


def _facts(model: Any) -> Any:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    shapes: dict[str, tuple[Any, ...]] = {name: (t.dtype, tuple(t.shape)) for name, t in tensors}
    return shapes, Counter(map(tuple, groups.values())), model.training, model.config.to_dict()


def test_there_is_no_skeleton_where_names_are_not_one_to_one(tmp_path: Path) -> None:
    save("llama", tmp_path / "llama")
    base = tmp_path / "llama" / "model.safetensors"
    with safe_open(base, "pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert skeleton(tmp_path / "llama", None, None) is not None
    for changed in (
        {**tensors, "model.norm.more": torch.zeros(3)},
        {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        {**tensors, "model.norm.weight": torch.zeros(3)},
        {**tensors, "model.norm.weight": torch.zeros(32, dtype=torch.int32)},
    ):
        save_file(changed, base, {"format": "pt"})
        assert skeleton(tmp_path / "llama", None, None) is None


def test_a_mixture_whose_experts_are_fused_has_no_skeleton(tmp_path: Path) -> None:
    save(FUSED, tmp_path)
    fused = any(parameter.dim() == 3 for parameter in load_base(tmp_path, device="cpu").parameters())
    assert (skeleton(tmp_path, None, None) is None) == fused
