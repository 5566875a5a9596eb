"""From file to file: the same bits as in memory, whatever the method, dtype, files and storage; faults on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import METHODS
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize, tiny_model
from hubkit.tensors.base import delta as tiles
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.pipeline import Pipeline
from hubkit.tensors.files.shards import Shards, open_shards, write_file
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum
from hubkit.tensors.weights.decoding import decoded
from hubkit.tensors.weights.finished import NOTE, take_over
from hubkit.tensors.weights.merging import MergePlan, plan_merge, write_merged

GPT2 = {"selective": {"weights": ["ln_1"]}, "full": {"targets": ["c_attn", "mlp.c_proj"]}}
MERGEABLE = [name for name in METHODS if name not in ("adapters", "prefix", "prompt", "tokens")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved(family: str, folder: Path, dtype: torch.dtype, size: str = "50GB") -> Path:
    tiny_model(family).to(dtype).save_pretrained(folder, max_shard_size=size)  # type: ignore[operator]
    return folder


def adapter(base: Base, name: str, seed: int = 1, family: str = "llama") -> Adapter:
    method, values = METHODS[name]
    values = GPT2.get(name, values) if family == "gpt2" else values
    loaded = host().load(method)
    config = parse_config(loaded.info.config, values, "x")
    return randomize(Adapter.fresh(name, loaded, config, base, seed), seed)


def planned(shards: Shards, *names: str, family: str = "llama") -> MergePlan:
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    made = {name: adapter(base, name, seed, family) for seed, name in enumerate(names)}
    return plan_merge(base, names[0] if len(names) == 1 else Sum([*names]), made)


def streamed(
    plan: MergePlan, shards: Shards, out: Path, dtype: torch.dtype | None = None, **more: Any
) -> dict[str, Tensor]:
    out.mkdir()
    done = write_merged(plan, shards, out, dtype, **more)
    return {name: tensor for file in done.files for name, tensor in load_file(out / file).items()}


def in_memory(plan: MergePlan, shards: Shards, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same merge with every weight as a whole."""
    made = {n: shards.read(n) for n in shards.headers}
    made = {n: t.to(dtype or t.dtype) for n, t in made.items()}
    if plan.tied_head is not None:
        made[f"{plan.tied_head.name}.weight"] = made[plan.tied_head.tensor].clone()
    for site in plan.sites:
        made[f"{site.name}.weight" if site.tied else site.tensor] = plan.weight(site, dtype)
        if site.bias_tensor is not None:
            bias = plan.bias(site, dtype)
            assert bias is not None
            made[site.bias_tensor] = bias
    return made


def same(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert torch.equal(have[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", DTYPES)
def test_streamed_and_in_memory_are_the_same_bits(
    family: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt2's weights are transposed, its head is tied. Tiles are small, so that every weight has several."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 200)
    for size in ("50GB", "4KB"):
        shards = open_shards(saved(family, tmp_path / size, stored, size))
        assert (len(shards.files()) > 1) is (size == "4KB")
        for name in MERGEABLE:
            plan = planned(shards, name, family=family)
            for dtype in (None, *DTYPES):
                out = tmp_path / f"{size}-{name}-{dtype}"
                same(streamed(plan, shards, out, dtype, limit=3000 if dtype else None), in_memory(plan, shards, dtype))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_decoded_weights_and_mixes_are_the_same_bits(stored: torch.dtype, tmp_path: Path) -> None:
    shards = decoded(open_shards(saved("llama", tmp_path / "base", stored, "8KB")), CODEC, "bfloat16")
    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    made = {name: adapter(base, name, seed) for seed, name in enumerate(("lora", "dora", "full"))}
    mixes: list[Mix] = [Sum({"lora": 0.3, "dora": -1.0}), Stack(["full", "dora", ("lora", 2.0)])]
    for number, mix in enumerate(mixes):
        plan = plan_merge(base, mix, made)
        for dtype in (None, torch.float16):
            out = tmp_path / f"{number}-{dtype}"
            same(streamed(plan, shards, out, dtype, limit=5000), in_memory(plan, shards, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_on_one_arithmetic_for_all_processors(threads: str) -> None:
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "same_bits"]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout


def test_real_sizes_of_tiles_too(tmp_path: Path) -> None:
    """One weight of two and a half tiles: what is in memory at once is less than it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 10240, "num_hidden_layers": 1, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    shards = open_shards(tmp_path / "base")
    plan = planned(shards, "lora", "dora")
    same(streamed(plan, shards, tmp_path / "out"), in_memory(plan, shards, None))


@pytest.mark.parametrize("limit", [1, 700, 3000, 9000, 10**9])
def test_files_are_those_of_huggingface(limit: int, tmp_path: Path) -> None:
    shards = open_shards(saved("llama", tmp_path / "base", torch.float32))
    plan = planned(shards, "lora")
    tensors = streamed(plan, shards, tmp_path / "out", limit=limit)
    order = {name: tensors[name] for name in shards.headers}
    want = split_torch_state_dict_into_shards(order, max_shard_size=limit)
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {*want.filename_to_tensors}
    for file, names in want.filename_to_tensors.items():
        assert [*open_shards(tmp_path / "out").file_of.items()].count((names[0], file)) == 1
        assert set(load_file(tmp_path / "out" / file)) == set(names)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() is want.is_sharded
    if want.is_sharded:
        document = json.loads(index.read_text())
        assert document == {
            "metadata": {"total_size": want.metadata["total_size"]},
            "weight_map": want.tensor_to_filename,
        }


def at_read(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Does something to the base's files just before the `number`-th block of them is read."""
    read, count = Pipeline._read, [0]

    def reading(self: Pipeline, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == number:
            action()
        read(self, *arguments)

    monkeypatch.setattr(Pipeline, "_read", reading)


@pytest.mark.parametrize("number", [1, 5, 12])
def test_a_file_that_shrinks_or_changes_meanwhile(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(saved("llama", tmp_path / "base", torch.float32, "20KB"))
    before = threading.active_count()
    last = tmp_path / "base" / shards.files()[-1]
    for action, code in (
        (lambda: os.utime(last, ns=(1, 1)), "HK-IO"),
        (lambda: os.truncate(last, last.stat().st_size - 3), "HK-SAFETENSORS"),
    ):
        out = tmp_path / code
        out.mkdir()
        plan = planned(shards, "lora")
        with monkeypatch.context() as patch:
            at_read(patch, number, action)
            with pytest.raises(HubkitError) as caught:
                write_merged(plan, shards, out)
        assert caught.value.code == code
        assert str(last) in caught.value.where
    assert threading.active_count() == before


def test_torch_has_its_threads_back(tmp_path: Path) -> None:
    shards = open_shards(saved("llama", tmp_path / "base", torch.float32))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Pipeline() as pipeline:
            assert torch.get_num_threads() == 1
            write_file(tmp_path / "x", [shards.copied(name) for name in shards.headers], pipeline)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_buffers_are_few_and_used_again(tmp_path: Path) -> None:
    """Whatever goes through: one tensor of many blocks, many small ones, blocks that are slow to be used up."""
    shards = open_shards(saved("llama", tmp_path / "base", torch.float32))
    seen: set[int] = set()
    with Pipeline() as pipeline:
        for _ in range(20):
            for name in shards.headers:
                pipeline.run(shards.copied(name).blocks(), lambda view: seen.add(memoryview(view).nbytes))
        assert pipeline._count <= 6
    assert seen == {info.stop - info.start for info in shards.headers.values()}


def test_only_the_same_bytes_of_the_same_merge_are_taken_over(tmp_path: Path) -> None:
    shards = open_shards(saved("llama", tmp_path / "base", torch.float32, "8KB"))
    plan = planned(shards, "lora")
    want = streamed(plan, shards, tmp_path / "whole")
    first, second, *_ = shards.files()

    def half(name: str, key: str) -> Path:
        """As a kill after two files leaves it."""
        left = tmp_path / name
        left.mkdir()
        for file in (first, second):
            (left / file).write_bytes((tmp_path / "whole" / file).read_bytes())
        noted = {file: {"sha256": digest(left / file), "changed": []} for file in (first, second)}
        (left / NOTE).write_text(json.dumps({"key": key, "shards": noted}))
        return left

    left, out = half("left", "k"), tmp_path / "out"
    (left / second).write_bytes((left / second).read_bytes()[:-1] + b"x")  # noted, and damaged since
    out.mkdir()
    take_over("k", left, out)
    moved = (out / first).stat().st_ino
    write_merged(plan, shards, out, key="k")
    assert (out / first).stat().st_ino == moved
    assert not (out / NOTE).exists()
    same({n: t for f in shards.files() for n, t in load_file(out / f).items()}, want)
    for key, left in (("other", half("a", "k")), ("", half("b", ""))):
        (tmp_path / f"for-{left.name}").mkdir()
        take_over(key, left, tmp_path / f"for-{left.name}")
        assert not [*(tmp_path / f"for-{left.name}").iterdir()]
    for text in ("", "[]", "{}", '{"key": "k", "shards": 3}', '{"key": "k", "shards": {"../x": {}}}'):
        (left / NOTE).write_text(text)
        take_over("k", left, tmp_path / "for-a")
        assert not [*(tmp_path / "for-a").iterdir()]


def digest(path: Path) -> str:
    from hubkit.artifact.identity.digest import hash_file

    return hash_file(path)
