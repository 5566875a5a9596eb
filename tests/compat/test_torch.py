"""Torch still is what `hubkit.compat.torch` takes it for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hubkit.compat import torch as insides


def test_changes_are_counted_also_through_views_but_not_through_data() -> None:
    tensor = torch.zeros(4)
    view = tensor[1:]
    seen = [insides.changes_of(tensor)]
    for changed in (tensor.add_, view.mul_, tensor.copy_):
        changed(torch.tensor(2.0))
        seen.append(insides.changes_of(tensor))
    assert seen == [0, 1, 2, 3]
    assert insides.changes_of(view) == 3
    tensor.data.add_(1)
    _ = tensor + 1
    assert insides.changes_of(tensor) == 3
    assert insides.version_of(tensor) == (tensor.data_ptr(), 3)
    assert insides.total_changes([tensor, view]) == 6
    with torch.inference_mode():
        assert insides.changes_of(torch.zeros(1)) is None


def test_views_are_known() -> None:
    tensor = torch.zeros(2, 3)
    assert [insides.is_view(t) for t in (tensor, tensor[0], tensor.t(), tensor.view(6))] == [False, True, True, True]
    assert not insides.is_view(nn.Linear(3, 2)(tensor))


def test_parameters_are_those_that_were_registered() -> None:
    module = nn.Linear(2, 2, bias=False)
    assert {**insides.parameters_of(module)} == {"weight": module.weight, "bias": None}
    module.register_parameter("other", nn.Parameter(torch.ones(1)))
    module.weight = nn.Parameter(torch.ones(2, 2))
    assert insides.parameters_of(module)["other"] is module.other
    assert insides.parameters_of(module)["weight"] is module.weight


def test_on_the_cpu_whatever_device_is_asked_for() -> None:
    with torch.device("meta"):
        with insides.on_cpu():
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).device.type == "meta"
    with insides.on_cpu():
        assert torch.zeros(1).device.type == "cpu"


def test_many_tensors_are_scaled() -> None:
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    insides.scale_(tensors, 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[0.5] * 2, [1.0] * 3]


def test_a_forward_of_the_object_is_what_a_call_runs() -> None:
    module = nn.Identity()
    with insides.running(module, lambda x: x + 1):
        assert module(torch.zeros(1)) == 1
        with insides.running(module, lambda x: x + 2):
            assert module(torch.zeros(1)) == 2
        assert module(torch.zeros(1)) == 1
        assert insides.own_forward(module) is not None
    assert insides.own_forward(module) is None
    assert module(torch.zeros(1)) == 0
    insides.set_forward(module, lambda x: x + 3)
    assert module(torch.zeros(1)) == 3
    insides.set_forward(module, None)
    assert module(torch.zeros(1)) == 0


HOOKS: dict[str, Any] = {
    "register_forward_hook": lambda *a: None,
    "register_forward_pre_hook": lambda *a: None,
    "register_full_backward_hook": lambda *a: None,
    "register_full_backward_pre_hook": lambda *a: None,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_hook_is_seen_under_the_number_of_its_handle(kind: str) -> None:
    module = nn.Identity()
    assert insides.hook_numbers(module) == set()
    handle = getattr(module, kind)(HOOKS[kind])
    assert insides.hook_numbers(module) == {handle.id}
    handle.remove()
    assert insides.hook_numbers(module) == set()


def test_torch_has_no_other_kind_of_hook_on_a_pass() -> None:
    names = {name for name in vars(nn.Identity()) if name.endswith("_hooks")}
    passes = {name for name in names if name.startswith(("_forward", "_backward"))}
    assert passes == {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}


def test_one_hook_on_the_output_is_told_from_none_and_from_two() -> None:
    module = nn.Identity()
    assert not insides.has_one_hook(module)
    module.register_forward_hook(lambda *a: None)
    assert insides.has_one_hook(module)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not insides.has_one_hook(module)
    everywhere.remove()
    module.register_forward_hook(lambda *a: None)
    assert not insides.has_one_hook(module)


def test_a_twin_computes_by_its_own_and_leaves_the_module_alone() -> None:
    module = nn.Linear(2, 2)
    calls: list[str] = []
    module.register_forward_hook(lambda *a: calls.append("hook"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    twin = insides.twin_of(module, parameters={"weight": torch.eye(2), "bias": None}, note="own")
    x = torch.randn(3, 2)
    assert torch.equal(type(module).forward(twin, x), x)
    assert vars(twin)["note"] == "own"
    assert not hasattr(module, "note")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert calls == []


def test_an_unhooked_twin_has_children_of_its_own_and_the_same_tensors() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    calls: list[str] = []
    for each in module.modules():
        each.register_forward_hook(lambda *a: calls.append("hook"))
        each.register_full_backward_hook(lambda *a: calls.append("hook"))

    def twin(child: nn.Module) -> nn.Module:
        return insides.unhooked_twin_of(child, twin)

    made = twin(module)
    x = torch.randn(3, 2)
    assert torch.equal(made(x), module[1].forward(module[0].forward(x)))
    made(x).sum().backward()
    assert calls == []
    assert made.training
    assert not module.training
    assert [*made.parameters()] == [*module.parameters()]
    assert next(made.children()) is not module[0]


class Recorder(insides.Observed):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("kept", torch.ones(1))
        self.heard = 0

    def _moving(self, fn: insides.OnTensor) -> insides.OnTensor:
        return lambda tensor: tensor if tensor is self.kept else fn(tensor)

    def _moved(self, fn: insides.OnTensor) -> None:
        self.heard += 1

    def _replicated(self) -> nn.Module:
        raise LookupError


@pytest.mark.parametrize("how", ["to", "half", "double", "bfloat16", "cpu", "to_empty"])
def test_a_module_hears_that_it_or_one_above_is_moved(how: str) -> None:
    module = Recorder()
    above = nn.Sequential(module)
    ways: dict[str, dict[str, Any]] = {"to": {"dtype": torch.float16}, "to_empty": {"device": "cpu"}}
    getattr(above, how)(**ways.get(how, {}))
    assert module.heard == 1
    assert module.kept.dtype == torch.float32
    if how == "to":
        assert module.weight.dtype == torch.float16


def test_dataparallel_copies_by_the_method_that_is_observed() -> None:
    """Without two devices nothing of it runs: that it calls the method is read from its source."""
    assert "module._replicate_for_data_parallel()" in inspect.getsource(nn.parallel.replicate)
    with pytest.raises(LookupError):
        Recorder()._replicate_for_data_parallel()

    class Silent(insides.Observed):
        pass

    assert isinstance(Silent()._replicate_for_data_parallel(), Silent)


def test_what_was_compiled_says_so() -> None:
    module = nn.Linear(2, 2)
    assert not insides.is_compiled(module)
    wrapped = torch.compile(module, backend="eager")
    assert insides.is_compiled(wrapped)  # type: ignore[arg-type]
    assert not insides.is_compiled(module)
    module.compile(backend="eager")
    assert insides.is_compiled(module)


def test_what_a_compiler_cannot_do_is_told_from_other_errors() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise ArithmeticError("no such operation")

    with pytest.raises(Exception, match="no such operation") as caught:
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(2))
    assert insides.is_compile_error(caught.value)
    assert not insides.is_compile_error(RuntimeError("CUDA out of memory"))


def test_programs_of_one_function_are_counted_apart() -> None:
    made: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return x * 2

    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    for each in (insides.counted_apart(double), insides.counted_apart(double)):
        compiled = torch.compile(each, backend=backend, dynamic=False)
        for size in range(2, limit + 4):
            assert compiled(torch.ones(size)).sum() == 2 * size
    assert len(made) == 2 * limit, "what the first has compiled is not counted against the second"


def test_autocast_takes_the_meta_device() -> None:
    before = torch.autocast
    with insides.autocast_on_meta(), torch.autocast(device_type="meta", enabled=False):
        assert torch.ones(2, device="meta").mul(2).shape == (2,)
    assert torch.autocast is before
    with pytest.raises(RuntimeError), torch.autocast(device_type="meta", enabled=False):
        pass
