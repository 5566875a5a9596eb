"""Insides of torch, as they are from 2.6 to 2.13: the dictionaries of a module, the version of a tensor, what moving a
module calls, what torch.compile leaves behind.

Overriding ``_save_to_state_dict`` and ``_load_from_state_dict`` is none: torch's own docstrings invite to it.
"""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Forward = Callable[..., Any]
OnTensor = Callable[[Tensor], Tensor]
_changes = attrgetter("_version")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def changes_of(tensor: Tensor) -> int | None:
    """How often `tensor` was changed in place, through a view too; None for one of inference mode, which has no count.

    ``Tensor._version``: the counter by which autograd refuses a backward pass over changed values. Its rules are
    documented (https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks), its name is not.
    Writing through ``.data``, and fused optimizers, leave it as it was.
    """
    return None if tensor.is_inference() else tensor._version


def total_changes(tensors: Iterable[Tensor]) -> int:
    """`changes_of` thousands of tensors together, none of inference mode; without a call for each."""
    return sum(map(_changes, tensors))


def version_of(tensor: Tensor) -> tuple[int, int | None]:
    """Equal for as long as a tensor lies where it lay and nobody has changed it in place: see `changes_of`."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows `tensor` as a view of another one, which a change in place would change as well.

    ``Tensor._is_view``: no public name says it.
    """
    return tensor._is_view()


def parameters_of(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The module's own parameters by name, None where one was registered as None.

    ``Module._parameters``: ``parameters(recurse=False)`` makes a generator and a set, twenty times as slow, for what is
    looked at once per site and forward.
    """
    return module._parameters


def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiplies all of them in place, on a device by one kernel.

    ``torch._foreach_mul_``, which torch's own optimizers use: operations on lists of tensors have no public names.
    """
    torch._foreach_mul_(tensors, factor)


def own_forward(module: nn.Module) -> Forward | None:
    """The forward that this very object was given, in place of its class's: by hubkit, accelerate, or a user.

    A call of a module runs ``self.forward``, so an attribute of the object stands before the method. There is no other
    way to run something else under the same object; hooks cannot leave the forward out.
    """
    return vars(module).get("forward")


def set_forward(module: nn.Module, forward: Forward | None) -> None:
    """Has calls of `module` run `forward`: see `own_forward`. None: its class's again."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


@contextmanager
def running(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside, calls of `module` run `forward`; then what they ran before."""
    before = own_forward(module)
    set_forward(module, forward)
    try:
        yield
    finally:
        set_forward(module, before)


def hook_numbers(module: nn.Module) -> set[int]:
    """The ``id`` of the handle of every hook on the forward or backward pass of `module`.

    The dictionaries that ``register_forward_hook`` and its fellows fill: torch lists hooks nowhere.
    """
    return {number for name in _HOOKS for number in getattr(module, name)}


def has_one_hook(module: nn.Module) -> bool:
    """Whether exactly one hook sees the output of `module`, those that torch runs for every module included."""
    return len(module._forward_hooks) == 1 and not torch.nn.modules.module._global_forward_hooks


def twin_of(module: M, **others: Any) -> M:
    """A second object over the same tensors: with parameters, children or attributes of its own where they are given.

    ``functional_call`` would put other parameters into the module itself for a while, which threads would see, and run
    its hooks.

    Args:
        others: ``parameters`` and ``modules`` take the place of all the module's own; the rest are attributes.
    """
    twin = object.__new__(type(module))
    insides = {f"_{name}" if name in ("parameters", "modules") else name: value for name, value in others.items()}
    vars(twin).update({**vars(module), **insides})
    return twin


def unhooked_twin_of(module: M, twin_of_child: Callable[[nn.Module], nn.Module]) -> M:
    """A `twin_of` a module without hooks, in training mode, whose children are what `twin_of_child` makes of them."""
    children = {name: child if child is None else twin_of_child(child) for name, child in module._modules.items()}
    hooks: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
    return twin_of(module, modules=children, training=True, **hooks)


class Observed(nn.Module):
    """A module that hears what torch does to it beside calling it, and may say what.

    ``Module._apply`` is what ``to``, ``cuda`` and ``half`` of a module, and of all above it, come to, and
    ``_replicate_for_data_parallel`` what DataParallel copies with; there is no hook for either.
    """

    def _moving(self, fn: OnTensor) -> OnTensor:
        """What is done to each tensor here and below; `fn` where nothing else is said."""
        return fn

    def _moved(self, fn: OnTensor) -> None:
        """Called when it was done."""

    def _replicated(self) -> nn.Module:
        """What DataParallel gets for one device."""
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        return replica

    def _apply(self, fn: OnTensor, recurse: bool = True) -> Observed:
        super()._apply(self._moving(fn), recurse)  # type: ignore[no-untyped-call]
        self._moved(fn)
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        return self._replicated()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped `module`, or `Module.compile` has: hooks registered from now on are ignored.

    ``_orig_mod`` and ``_compiled_call_impl``: the class of the wrapper is as private as its attribute.
    """
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def is_compile_error(error: Exception) -> bool:
    """Whether torch.compile could not compile something: ``torch._dynamo.exc`` has no public name."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def counted_apart(function: Any) -> types.FunctionType:
    """`function` with a code object of its own: torch counts what it has compiled by code and gives up beyond a limit,
    so that one compiled function would use up what the next may compile.

    ``isolate_recompiles`` of torch.compile says it publicly, from 2.13 on.
    """
    return types.FunctionType(function.__code__.replace(co_name=function.__name__), function.__globals__)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, new tensors are on the CPU, whatever device a model is being made on.

    ``with torch.device("cpu")`` alone costs a Python call for each operation, also where nothing else was asked for.
    """
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Within it ``torch.autocast(device_type="meta")`` is taken, and does nothing there.

    torch refuses it ("unsupported scalarType"), and models of transformers 4.57 switch autocast off by the name of
    their inputs' device; those of 5 ask first whether it is one that can be named.
    """
    real: Any = torch.autocast

    def named(device_type: str, *args: Any, **options: Any) -> Any:
        return real("cpu" if device_type == "meta" else device_type, *args, **options)

    torch.autocast = named  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]
