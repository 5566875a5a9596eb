"""The stand-in accelerator: the CPU's bits, CUDA's refusals, and what it counts."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hubkit.methods.suite import batch, tiny_model

DEVICE = standin.install()
OTHER = torch.device("standin:1")


def model_pair(family: str, attention: str = "eager") -> tuple[Any, Any]:
    """The same tiny model on the CPU and on the stand-in."""
    pair: list[Any] = [tiny_model(family), tiny_model(family)]
    for model in pair:
        model.set_attn_implementation(attention)
    return pair[0], pair[1].to(DEVICE)


def same(host: Tensor | None, device: Tensor | None) -> bool:
    """Bit for bit, and on the right devices; or neither is there."""
    if host is None or device is None:
        return host is device
    return (host.device.type, device.device.type) == ("cpu", "standin") and torch.equal(host, device.cpu())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt2-float32"])
def test_training_steps_are_the_cpus_bit_for_bit(family: str, attention: str) -> None:
    """Attention in one kernel is the CPU's own, so it is held to the plain formula, which the stand-in gets."""
    host, device = model_pair(family, attention)
    ids = batch()
    for foreach in (False, True):
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=foreach) for m in (host, device)]
        with sdpa_kernel(SDPBackend.MATH):
            losses = host(ids, labels=ids).loss, device(ids.to(DEVICE), labels=ids.to(DEVICE)).loss
        assert same(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        for one, two in zip(host.parameters(), device.parameters(), strict=True):
            assert same(one.grad, two.grad)
            assert same(one, two)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients(reentrant: bool) -> None:
    host, device = (m.train() for m in model_pair("llama"))
    device.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model, ids in ((host, batch()), (device, batch().to(DEVICE))):
        model(ids, labels=ids).loss.backward()
    assert all(same(p.grad, q.grad) for p, q in zip(host.parameters(), device.parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_answers_with_the_same_tokens(family: str) -> None:
    host, device = model_pair(family, "sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(batch())
    with torch.inference_mode():
        have = device.generate(batch().to(DEVICE), attention_mask=mask.to(DEVICE), **options)
        assert same(host.generate(batch(), attention_mask=mask, **options), have)


def test_a_moved_module_keeps_its_parameters() -> None:
    model: Any = tiny_model("gpt2")
    before: list[nn.Parameter] = list(model.parameters())
    model(batch(), labels=batch()).loss.backward()
    grads = [p.grad.clone() for p in before if p.grad is not None]
    for target in (DEVICE, OTHER, torch.device("cpu"), DEVICE):
        model.to(target)
        assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
        assert all(type(p) is nn.Parameter and p.requires_grad and p.device == target for p in before)
        assert all(p.grad is not None and torch.equal(p.grad.cpu(), g) for p, g in zip(before, grads, strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight is before[0]
    twin = copy.deepcopy(nn.BatchNorm1d(3).to(OTHER))
    assert {t.device for t in twin.state_dict().values()} == {OTHER}


def test_a_model_on_two_devices() -> None:
    first, second = nn.Linear(4, 5).to(DEVICE), nn.Linear(5, 2).to(OTHER)
    x = torch.randn(3, 4)
    second(first(x.to(DEVICE)).to(OTHER)).square().sum().backward()
    host = [copy.deepcopy(part).cpu() for part in (first, second)]
    for part in host:
        part.zero_grad()
    host[1](host[0](x)).square().sum().backward()
    for part, own in zip(host, (first, second), strict=True):
        assert all(same(p.grad, q.grad) for p, q in zip(part.parameters(), own.parameters(), strict=True))


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda d, h: d + h,
    "add_": lambda d, h: h.add_(d),
    "mm": lambda d, h: d @ h,
    "cat": lambda d, h: torch.cat([h, d]),
    "where": lambda d, h: torch.where(d > 0, d, h),
    "linear": lambda d, h: nn.functional.linear(d, h),
    "embedding": lambda d, h: nn.functional.embedding(torch.zeros(1, dtype=torch.int64), d),
    "read": lambda d, h: h[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
    "write": lambda d, h: d.index_put_((torch.tensor([0], device=DEVICE),), h[:1]),
    "foreach": lambda d, h: torch._foreach_add([d, d], [h, h]),
    "number": lambda d, h: h * d[0, 0],
    "other": lambda d, h: d + h.to(OTHER),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[name](torch.ones(3, 3, device=DEVICE), torch.ones(3, 3))


def test_what_else_cuda_refuses_and_what_it_takes() -> None:
    x = torch.randn(3, 3)
    d = x.to(DEVICE)
    with pytest.raises(TypeError, match="to numpy"):
        d.numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=DEVICE, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="standin:2")
    assert same(x * 2 + 3, torch.tensor(2.0) * d + torch.tensor(3.0))
    assert same(x[[0, 2]], d[torch.tensor([0, 2])])
    assert same(torch.where(x > 0, x, 0.0), torch.where(d > 0, d, torch.tensor(0.0)))
    assert same(torch.ones(3, 3), torch.empty(3, 3).to(DEVICE).copy_(torch.ones(3, 3)))


def test_views_share_memory_and_versions() -> None:
    d = torch.arange(12.0, device=DEVICE).view(3, 4)
    row, turned = d[1, 1:], d.t()
    row.mul_(10)
    d.add_(1)
    assert row.tolist() == [51.0, 61.0, 71.0]
    assert turned[1:, 1].tolist() == row.tolist()
    assert row._base is not None
    assert row._version == d._version == 2
    assert d.untyped_storage().data_ptr() == row.untyped_storage().data_ptr() == d.data_ptr() == row.data_ptr() - 20
    w = torch.ones(3, device=OTHER, requires_grad=True)
    doubled = w * 2
    squared = doubled * doubled
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()  # type: ignore[no-untyped-call]


def test_new_tensors_are_where_they_are_wanted() -> None:
    with torch.device("standin"):
        assert nn.Linear(2, 2).weight.device == torch.zeros(1).device == DEVICE
    for made in (
        torch.empty(2, device=OTHER),
        torch.arange(3, device=OTHER),
        torch.tensor([1.0], device=OTHER),
        torch.randint(3, (2,), device=OTHER),
        torch.ones(2, device=DEVICE).to(OTHER),
        torch.zeros(2, device=OTHER).new_ones(3),
        torch.randn_like(torch.zeros(2, device=OTHER)),
        nn.Linear(2, 2, device="meta").to_empty(device=OTHER).weight,
        torch.empty(0, device=OTHER).resize_(3),
    ):
        assert made.device == OTHER


class Doubled(torch.autograd.Function):
    """Asks for a value in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2 if grads[0].sum().item() else grads[0]


def test_what_the_host_would_wait_for_is_counted() -> None:
    x = torch.randn(4, 4)
    d, mask = x.to(DEVICE), (x > 0).to(DEVICE)
    place = f"{__file__}:"
    waits: dict[str, Callable[[], object]] = {
        "_local_scalar_dense": lambda: float(d[0, 0]),
        "nonzero": mask.nonzero,
        "index by a mask": lambda: d[mask],
        "copy to the host": d.cpu,
        "equal": lambda: torch.equal(d, d),
    }
    for what, call in waits.items():
        with standin.watching() as counts:
            call()
        assert [one.split(" at ")[0] for one in counts.syncs] == [what]
        assert place in counts.syncs[0]
        assert not counts.uploads
    w = d.clone().requires_grad_()
    with standin.watching() as counts:
        x.to(DEVICE, non_blocking=True)
        d.to("cpu", non_blocking=True)
        d[mask] = 0
        (d @ d).softmax(-1)[:, 1:].masked_fill(mask[:, 1:], 0.0).to(OTHER)
    assert (counts.syncs, counts.uploads) == ([], [])
    with standin.watching() as counts:
        Doubled.apply(w).sum().backward()  # type: ignore[no-untyped-call]
        torch.tensor([1, 2], device=DEVICE)
    assert [one.split(" at ")[0] for one in counts.syncs] == ["_local_scalar_dense"]
    assert [one.split(" at ")[0] for one in counts.uploads] == ["copy to the device"]
    assert place in counts.syncs[0]
    with standin.watching() as counts:
        model_pair("llama")[1].generate(batch().to(DEVICE), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert all("transformers/" in one for one in counts.syncs)
    assert counts.syncs


def test_no_accelerator_is_seen_and_a_late_installation_says_so() -> None:
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() is None
    with torch.random.fork_rng():
        torch.randn(1, device=DEVICE)
    late = "import torch\ntorch.ones(1, requires_grad=True).sum().backward()\nimport standin\nstandin.install()"
    done = subprocess.run(
        [sys.executable, "-c", late], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert "before the first backward pass" in done.stderr
