"""Layers compiled while an adapter is trained: eager's loss and gradients, one graph for all layers, all undone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from variants import refused
from zoo import ids, model_of, near

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.compiling import layers_of
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum
from hubkit.training.loop import fit
from hubkit.training.options import TrainOptions

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "pissa": ("lora", {"rank": 3, "init": "pissa"}),
    "table": ("lora", {"rank": 2, "targets": ["embed_tokens", "q_proj"]}),
    "dora": ("dora", {"rank": 2}),
    "qlora": ("qlora", {"rank": 3}),
    "adapters": ("adapters", {"width": 4, "placement": "houlsby"}),
    "selective": ("selective", {}),
    "full": ("full", {}),
}


class Counting:
    """A backend of torch.compile that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend() -> Counting:
    torch._dynamo.reset()
    return Counting()


def attached(kind: str = "llama", dtype: torch.dtype = torch.float64, **adapters: Any) -> Attached:
    """A tiny model of two layers with adapters on it, the first one active; dropout of the base drops nothing."""
    model = model_of(kind).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made = Attached(model)
    for seed, (name, (method, values)) in enumerate((adapters or {"a": METHODS["lora"]}).items()):
        loaded = host().load(method)
        config = parse_config(loaded.info.config, values, "test")
        made.add(name, randomize(Adapter.fresh(name, loaded, config, made.sites, seed), seed))
    made.set_mix(next(iter(made.adapters)))
    return made.train()


def step(model: Attached, rows: int = 3, length: int = 6, padded: bool = False) -> dict[str, Tensor]:
    """The loss and every gradient of one pass."""
    batch, mask = ids(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[0, -2:] = 0 if padded else 1
    loss = model(input_ids=batch, attention_mask=mask, labels=batch, use_cache=False).loss
    loss.backward()
    params = {f"{n}.{k}": p for n, a in model.adapters.items() for k, p in a.trainables().items()}
    found = {"loss": loss.detach()} | {k: p.grad.clone() for k, p in params.items() if p.grad is not None}
    model.zero_grad()
    return found


def alike(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert have.keys() == want.keys()
    for name in want:
        near(have[name], want[name])


@pytest.mark.parametrize("name", METHODS)
def test_one_graph_for_all_layers_and_eagers_gradients(name: str, backend: Counting) -> None:
    model = attached(a=METHODS[name])
    want, other = step(model), step(model, 2, 9)
    with model.compiled_training(backend=backend, fullgraph=True):
        alike(step(model), want)
        alike(step(model, 2, 9), other)
    again = step(model)
    assert all(torch.equal(again[name], want[name]) for name in want)
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["dora", "selective"])
def test_layers_with_biases_share_it_too(name: str, backend: Counting) -> None:
    model = attached("gpt2", a=METHODS[name])
    want = step(model)
    with model.compiled_training(backend=backend, fullgraph=True):
        alike(step(model), want)
    assert backend.graphs == 1


def test_layers_that_differ_in_their_sites_are_not_confused(backend: Counting) -> None:
    model = attached(few=("lora", {"rank": 2, "targets": ["q_proj", "down_proj"], "layers": [1]}))
    want = step(model)
    with model.compiled_training(backend=backend, fullgraph=True):
        alike(step(model), want)
    assert backend.graphs == 2


def test_a_mix(backend: Counting) -> None:
    model = attached(a=METHODS["lora"], b=METHODS["adapters"])
    model.set_mix(Stack([("b", 0.5), Sum({"a": 0.5, "b": -1.0})]))
    want = step(model)
    with model.compiled_training(backend=backend):
        alike(step(model), want)


def test_where_torch_compiles_no_more_the_pass_is_eager_and_right(backend: Counting) -> None:
    model = attached()
    want, padded = step(model), step(model, padded=True)
    with model.compiled_training(backend=backend, recompile_limit=1):
        alike(step(model), want)
        alike(step(model, padded=True), padded)
    assert backend.graphs == 1


def test_passes_without_gradient_and_in_eval_mode_are_the_layers_own(backend: Counting) -> None:
    model = attached()
    with model.compiled_training(backend=backend):
        with torch.no_grad():
            model(ids(2, 5))
        model.eval()
        step(model)
    assert backend.graphs == 0


def test_another_mix_is_refused_and_the_old_one_goes_on(backend: Counting) -> None:
    model = attached(a=METHODS["lora"], b=METHODS["lora"])
    want = step(model)
    with model.compiled_training(backend=backend):
        step(model)
        for change in ("b", None):
            model.set_mix(change)
            refused("HK-COMPILE", lambda: step(model))
            with torch.no_grad():
                model(ids(2, 5))
        model.set_mix("a")
        refused("HK-COMPILE", lambda: step(model))  # another plan: an adapter may have been swapped
    alike(step(model), want)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method: str) -> None:
    model = attached(a=(method, {"num_virtual_tokens": 2}))
    refused("HK-COMPILE", lambda: model.compiled_training().__enter__())


def test_what_a_twin_would_leave_out_is_refused() -> None:
    model = attached()
    layer: Any = layers_of(model.sites)["model.layers.1"]
    hook = layer.mlp.register_forward_hook(lambda module, args, y: None)
    assert "model.layers.1.mlp" in str(refused("HK-COMPILE", lambda: model.compiled_training().__enter__()))
    hook.remove()
    layer.self_attn.forward = layer.self_attn.forward
    refused("HK-COMPILE", lambda: model.compiled_training().__enter__())
    del layer.self_attn.forward
    model.gradient_checkpointing_enable()
    refused("HK-COMPILE", lambda: model.compiled_training().__enter__())
    model.gradient_checkpointing_disable()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_torch_cannot_compile_is_refused_and_undone() -> None:
    model = attached()

    def broken(graph: Any, inputs: list[Tensor]) -> Any:
        raise OSError("no compiler")

    torch._dynamo.reset()
    with model.compiled_training(backend=broken):
        refused("HK-COMPILE", lambda: step(model))
    assert not any("forward" in vars(module) for module in model.modules())
    step(model)


@pytest.mark.slow
def test_the_loop_trains_compiled_with_its_own_loss(tmp_path: Path, backend: Counting) -> None:
    def trained(where: str, **how: Any) -> tuple[float, float | None, Mapping[str, Tensor]]:
        model = Attached(tiny.llama())
        method = host().load("lora")
        config = parse_config(method.info.config, {"rank": 2}, "test")
        adapter = Adapter.fresh("a", method, config, model.sites, 0)
        model.add("a", adapter)
        model.set_mix("a")
        options = TrainOptions(steps=3, batch_size=3, learning_rate=1e-2)
        with model.compiled_training(**how) if how else nullcontext():
            done = fit(
                model,
                adapter.trainables(),
                method.train_step,
                tiny.rows(9),
                tiny.rows(3, 1),
                options,
                run_dir=tmp_path / where,
            )
        return done.loss, done.validation_loss, adapter.parameters()

    loss, held, values = trained("eager")
    have_loss, have_held, have = trained("compiled", backend=backend, fullgraph=True)
    assert 1 <= backend.graphs <= 2  # batches with padding and without; one row alone would be a third
    assert (have_loss, have_held) == pytest.approx((loss, held), rel=1e-4)
    for name in values:
        near(have[name], values[name], 1e-3)


@pytest.mark.slow
def test_decoded_weights_are_not_kept() -> None:
    torch._dynamo.reset()
    model = attached(dtype=torch.float32, a=METHODS["qlora"])
    want, kept = step(model, padded=True), set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    with model.compiled_training(fullgraph=True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model.model(ids(2, 7))  # type: ignore[operator]
        alike(step(model, padded=True), want)
    assert kept
    assert not kept & {(48, 32), (32, 48), (16, 32), (32, 16)}  # of feed-forward, keys and values


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    model = attached(dtype=torch.float32, a=("lora", {"rank": 3, "dropout": 0.2}))
    with model.compiled_training():
        torch.manual_seed(1)
        first = step(model)
        torch.manual_seed(1)
        second = step(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for adapter in model.adapters.values():
        for part in adapter.parts.values():
            part.dropout = 0.0  # type: ignore[assignment]
    want = step(model)
    with model.compiled_training():
        alike(step(model), want)


@pytest.mark.slow
def test_one_training_does_not_use_up_what_the_next_may_compile(backend: Counting) -> None:
    """Torch counts programs by code, eight at the most: each training has a code of its own."""
    for rank in range(2, 12):
        model = attached(a=("lora", {"rank": rank, "targets": ["q_proj"]}))
        before = backend.graphs
        with model.compiled_training(backend=backend):
            step(model)
        assert backend.graphs > before, rank
