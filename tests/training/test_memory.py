"""Plans of memory: states against torch's own, activations against what autograd really keeps, sums against figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bases.architectures import save
from torch import nn
from variants import refused

from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.fourbit.nf4 import CODEC, quantize
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.advice.memory import Run, moment_bytes, packed_bytes, planned_memory, textbook
from hubkit.training.optimizers import make_optimizer
from hubkit.verbs.plan import plan

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
CPU = Run(2, 24, "adamw", False, 1, torch.float32, "cpu")


def test_moments_are_those_that_torch_keeps() -> None:
    params = [nn.Parameter(torch.ones(*shape)) for shape in ((7, 5), (3,), (64, 64))]
    optimizer = make_optimizer("adamw", [{"params": params}], 0.0, torch.device("cpu"))
    torch.stack([param.sum() for param in params]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert sum(moment_bytes("adamw", param.numel()) for param in params) == held


@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (100, 33)])
def test_packed_weights_take_what_packing_makes_of_them(shape: tuple[int, int]) -> None:
    tensors = quantize(torch.randn(shape)).tensors()
    held = sum(value.nbytes for key, value in tensors.items() if not key.startswith("quant_state"))
    assert packed_bytes(shape[0] * shape[1]) == held


def test_the_textbook() -> None:
    assert textbook(7_000_000_000)["full"] == 112_000_000_000
    assert textbook(65_000_000_000)["4-bit weights"] == pytest.approx(33e9, rel=0.02)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "llama"])
def test_weights_in_4_bits_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """Those of experts, too, which lie in one tensor for all."""
    save(kind, tmp_path)
    model, bare = load_base(tmp_path, "float32", CODEC, "cpu"), outline(tmp_path)
    base, method = Base.from_model(bare), host().load("qlora")
    memory, _ = planned_memory(method, method.info.config(), base, bare, CPU)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {id(value): value.nbytes for name, value in named.items() if "quant_state" not in name}
    assert memory.weights == pytest.approx(sum(held.values()), rel=0.01)


def test_weights_and_states_are_those_of_the_model(tiny_llama: Path) -> None:
    model, method = load_base(tiny_llama, "float32", device="cpu"), host().load("lora")
    bare = outline(tiny_llama)
    memory, count = planned_memory(method, method.info.config(), Base.from_model(bare), bare, CPU)
    adapter = Adapter.fresh("x", method, method.info.config(), Base.from_model(model), 0)
    held = {id(value): value.nbytes for value in (*model.parameters(), *model.buffers())}
    assert memory.weights == sum(held.values())
    assert count == sum(p.numel() for p in adapter.parameters().values())
    assert memory.parameters == memory.gradients == 4 * count


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), "utf-8")
    return tmp_path


def test_70b_in_4_bits_on_8_gpus(llama_70b: Path) -> None:
    """Figures of PEFT's guide and by hand: 70.6 B, a rank unit of 12.9 M, 36 GB packed with embeddings in 16 bits."""
    done = plan(llama_70b, method="qlora", gpus=8, batch_size=1, max_length=512, checkpointing=True)
    (one,) = done.methods
    assert done.parameters == 70_553_706_496
    assert one.parameters == pytest.approx(16 * 12.9e6, rel=0.01)
    linear, rest = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672), 2 * 128256 * 8192
    want = (linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * rest) / 8
    assert one.memory["weights"] == pytest.approx(want, rel=1e-3)
    assert one.memory["parameters"] + one.memory["gradients"] + one.memory["moments"] == pytest.approx(
        16 * one.parameters, rel=1e-3
    )
    assert one.total < 80e9, "fits a GPU of 80 GB"


def test_sharding_divides_the_base_alone(llama_70b: Path) -> None:
    one, eight = (plan(llama_70b, method="lora", gpus=n, max_length=64).methods[0].memory for n in (1, 8))
    assert eight["weights"] == pytest.approx(one["weights"] / 8, abs=1)
    for part in ("parameters", "gradients", "moments", "activations"):
        assert eight[part] == one[part]
    assert (one["gathered"], eight["gathered"] > 0) == (0, True)


def test_checkpointing_keeps_what_enters_the_layers(llama_70b: Path) -> None:
    long, short = (
        plan(llama_70b, method="lora", gpus=1, batch_size=1, max_length=64, checkpointing=on).methods[0].memory
        for on in (False, True)
    )
    entries = 80 * 64 * 8192 * 2
    assert entries < short["activations"] < entries + long["activations"] / 40


def test_all_methods_or_one_of_each_kind(tiny_llama: Path) -> None:
    every = plan(tiny_llama, method="all", max_length=16)
    assert {one.method for one in every.methods} | set(every.left_out) >= set(host().offers())
    assert every.left_out == {}
    kinds = {one.method for one in plan(tiny_llama, max_length=16).methods}
    assert kinds < {one.method for one in every.methods}
    assert host().default() in kinds


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_length": 1}, {"gpus": 0}, {"device": "tpu"}])
def test_what_cannot_be_planned(wrong: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    refused("HK-OPTIONS", lambda: plan(tiny_llama, **wrong))
    refused("HK-BASE-MISSING", lambda: plan(tmp_path))


RUN = """
import json, re, sys
from pathlib import Path
from hubkit.training.events import Stepped
from hubkit.verbs.train import train
base, folder, method, rows, tokens = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
line = json.dumps({"text": "the cat sat on a mat and went home to eat some fish with rice " * 60})
(folder / "rows.jsonl").write_text((line + chr(10)) * (2 * rows))
def report(event):
    if isinstance(event, Stepped) and event.step == 2:
        print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], flush=True)
train(base, folder / "rows.jsonl", folder / "out", method=method, steps=2, batch_size=rows, max_length=tokens,
      truncate=True, dtype="bfloat16", device="cpu", report=report)
"""


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("method", "rows", "tokens"), [("lora", 1, 256), ("lora", 4, 256), ("qlora", 4, 256)])
def test_the_plan_is_near_the_peak_of_a_run(method: str, rows: int, tokens: int, smol: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-W", "ignore", "-c", RUN, str(smol), str(tmp_path), method, str(rows), str(tokens)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    (peak,) = re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    said = plan(smol, method=method, batch_size=rows, max_length=tokens, dtype="bfloat16", device="cpu").methods[0]
    assert said.total == pytest.approx(int(peak) * 1024, rel=0.15)


def test_options_are_of_one_method(tiny_llama: Path) -> None:
    with pytest.raises(HubkitError, match="of several methods"):
        plan(tiny_llama, config={"rank": 4})
    assert plan(tiny_llama, method="lora", config={"rank": 4}).methods[0].parameters > 0
