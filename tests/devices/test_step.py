"""In a step of training the host waits for the device once, for the line it logs, and never in between.

transformers waits, too, where a forward begins: it asks whether the mask hides anything, and, of a base without an
`attention_mask`, for packed rows. Nothing is under way on the device then but the step before.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from every_method import METHODS, ROUTE, random_adapters
from torch import nn
from zoo import ids, model_of

from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.methods.suite import randomize
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum
from hubkit.training.loss import chunked_loss
from hubkit.training.rows.batching import collate
from hubkit.training.rows.encode import IGNORED, Row
from hubkit.training.stepper import Stepper

STAND_IN, META = standin.install(), torch.device("meta")
ROOT = Path(__file__).parent.parent.parent
KINDS = ("llama", "gpt2")
ROWS = [Row([5 + n, 6, 7, 8, 9][: 5 - n % 2], [IGNORED, IGNORED, 7, 8, 9][: 5 - n % 2], "") for n in range(4)]


def of(name: str, attached: Attached, kind: str) -> Adapter:
    """A random adapter of one method, with targets that the model has."""
    method, values = METHODS[name]
    if kind == "gpt2":
        values = {**values, **{"selective": {"weights": ["ln_1"]}, "full": {"targets": ["c_attn"]}}.get(name, {})}
    if name == "tokens":  # what `train` makes of the names
        values = {"rank": 2, "add_tokens": ["<one>", "<two>"], "token_ids": [48, 49]}
    loaded = host().load(method)
    config = parse_config(loaded.info.config, values, "test")
    return randomize(Adapter.fresh(name, loaded, config, attached.sites, 0), 1)


def attached_with(name: str, kind: str, device: torch.device) -> Attached:
    attached = Attached(model_of(kind))
    attached.add(name, of(name, attached, kind))
    attached.set_mix(name)
    return attached.to(device)


def steps(stepper: Stepper, stack: ExitStack, chunked: bool) -> None:
    """Two steps; what is worked out once, at the first, is not counted."""
    stack.enter_context(chunked_loss(stepper.model, collate(ROWS, stepper.device), chunked))
    stepper.step([ROWS[:2], ROWS[2:]], 1e-3, lambda: False)
    with standin.watching() as counts:
        assert stepper.step([ROWS[:2], ROWS[2:]], 1e-3, lambda: False) is not None
    ours = without_transformers(counts.syncs)
    assert [line for line in ours if "hubkit/training/stepper.py" not in line] == []
    assert len(ours) == 1
    assert counts.uploads == []


def without_transformers(lines: list[str]) -> list[str]:
    """What is not transformers' own question about a mask or padding."""
    return [line for line in lines if not re.search(r"transformers/(masking|modeling)_utils\.py", line)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_the_host_waits_once(name: str, kind: str, chunked: bool, checkpointing: bool) -> None:
    attached = attached_with(name, kind, STAND_IN).train()
    if checkpointing:
        attached.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = attached.adapters[name]
    assert isinstance(adapter.method, Method)
    stepper = Stepper(
        attached, adapter.trainables(), adapter.method.train_step, weight_decay=0.0, clip=0.1, kept=adapter.kept()
    )
    with ExitStack() as stack:
        steps(stepper, stack, chunked)


def test_the_host_waits_once_for_a_route() -> None:
    """Rows under adapters of different methods, mixes and none, in training."""
    attached = random_adapters(model_of("llama")).to(STAND_IN).train()
    params = {f"{n}.{k}": p for n in ("lora", "dora", "prefix") for k, p in attached.adapters[n].trainables().items()}
    batch = ids(len(ROUTE), 6).to(STAND_IN)

    def run() -> None:
        attached(batch, labels=batch, route=ROUTE).loss.backward()
        for parameter in params.values():
            parameter.grad = None

    run()
    with standin.watching() as counts:
        run()
    assert without_transformers(counts.syncs) == []
    assert counts.uploads == []


def test_a_step_of_decoding_asks_the_device_for_nothing() -> None:
    attached = random_adapters(model_of("llama")).to(STAND_IN)
    for parameter in attached.parts.parameters():
        parameter.requires_grad_(False)
    batch = ids(len(ROUTE), 6).to(STAND_IN)
    with torch.no_grad(), attached.using(None):
        out = attached(batch, route=ROUTE, use_cache=True)
        out = attached(batch[:, :1], route=ROUTE, past_key_values=out.past_key_values)
        with standin.watching() as counts:
            attached(batch[:, :1], route=ROUTE, past_key_values=out.past_key_values)
    ours = [line for line in (*counts.syncs, *counts.uploads) if "transformers/" not in line]
    assert ours == []


MIXES: dict[str, Mix] = {
    "sum": Sum({"lora": 0.5, "dora": -1.0, "full": 2.0}),
    "stack": Stack([("full", 0.5), "dora", "lora"]),
    "virtual": Sum(["prefix", "adapters"]),
    "nested": Sum([(Stack(["lora", "selective"]), -1.0), "heads"]),
}


# embeddings in front are run without a cache: transformers then looks for packed rows among their positions
VALUELESS = [name for name in METHODS if name not in ("prompt", "qlora")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VALUELESS)
def test_forward_loss_and_backward_hold_no_value_of_the_host(name: str, kind: str) -> None:
    """On the meta device there are no values: whatever reads one, or brings a tensor of the CPU, fails."""
    attached = attached_with(name, kind, META).train()
    attached.config.pad_token_id = None  # else transformers looks for it among the first and last tokens
    batch = {"input_ids": ids(3, 7).to(META), "labels": ids(3, 7).to(META)}
    method = attached.adapters[name].method
    assert isinstance(method, Method)
    torch.autograd.backward(method.train_step(attached, batch))
    assert {p.grad.device.type for p in attached.adapters[name].trainables().values() if p.grad is not None} == {"meta"}


@pytest.mark.parametrize("mix", [*MIXES.values(), "route"], ids=[*MIXES, "route"])
def test_mixes_and_routes_hold_no_value_of_the_host(mix: Any) -> None:
    attached = random_adapters(model_of("llama")).to(META).train()
    rows = ids(len(ROUTE), 6).to(META)
    if mix == "route":
        attached(rows, labels=rows, route=ROUTE).loss.backward()
    else:
        attached.set_mix(mix)
        attached(rows, labels=rows).loss.backward()
    assert any(p.grad is not None for p in attached.parts.parameters())


def test_a_packed_base_on_the_meta_device(tiny_llama: Path) -> None:
    attached = Attached(load_base(tiny_llama, codec=CODEC, device="cpu"))
    attached.add("qlora", of("qlora", attached, "llama"))
    attached.set_mix("qlora")
    rows = ids(2, 5).to(META)
    attached.to(META)(rows, labels=rows).loss.backward()


WINGS = ("parts", "lowrank", "front", "live")
BESIDES = {"loading", "loading_4bit", "fingerprint", "adapter", "values", "folded", "kernel"}
"""Modules of these wings that no step runs through."""
STEP = [
    *(path for wing in WINGS for path in (ROOT / "hubkit" / "tensors" / wing).glob("*.py") if path.stem not in BESIDES),
    *(ROOT / "hubkit" / "tensors" / name for name in ("base/site.py", "fourbit/linear.py")),
    *(ROOT / "hubkit" / "training" / name for name in ("stepper.py", "loss.py")),
    *(ROOT / "plugins").glob("*.py"),
]
ASKS = {"cpu", "item", "tolist", "numpy", "nonzero", "any", "all", "unique", "masked_select", "max"}
KNOWN = {
    ("hubkit/training/stepper.py", "_measured"): "the one wait of a step",
    ("hubkit/training/loss.py", "_positions"): "on a CPU, or where the number of targets is not known",
    ("hubkit/tensors/front/decoder_hooks.py", "_moved"): "positions that a caller gave, of a base that learns them",
    ("hubkit/tensors/front/encoder_hooks.py", "_require_room"): "where a batch may be too long",
    ("plugins/dora.py", "row_norm"): "on a CPU",
}
"""Where a value may be asked for, and why it costs no step."""


def asking(path: Path) -> Iterator[tuple[str, int]]:
    """(function, line) wherever a tensor may be asked for its values."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in ASKS:
                yield inside, child.lineno
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), "")


@pytest.mark.parametrize("path", STEP, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_of_a_step_asks_for_a_value(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = {(name, function): line for function, line in asking(path)}
    strange = {at: line for at, line in found.items() if at not in KNOWN}
    assert not strange, strange


def test_what_is_allowed_is_there() -> None:
    assert {at for at in KNOWN if at[1] in {function for function, _ in asking(ROOT / at[0])}} == set(KNOWN)


def test_the_stand_in_sees_a_wait() -> None:
    """What these tests rest on."""
    x = torch.ones(3, device=STAND_IN)
    with standin.watching() as counts:
        float(x.sum())
        nn.Linear(3, 3).to(STAND_IN)
    assert len(counts.syncs) == 1
    assert len(counts.uploads) == 2
