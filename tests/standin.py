"""A device that is not the CPU, for tests on machines without a GPU: it computes, and refuses what CUDA refuses.

Torch keeps one place for a foreign device (PrivateUse1). `install` puts ``standin:0`` and ``standin:1`` there. Their
memory is the CPU's under another label: DLPack hands a tensor over without a copy, and the device it names can be
changed on the way. So a tensor of the stand-in is a plain `torch.Tensor` with storage, views, versions and gradients
like any other, and an operation on it is the CPU's kernel on the same memory. Bits are the CPU's, too, wherever torch
takes an operation apart in the same way; it does not for fused attention and dropout.

As on CUDA, tensors of two devices do not mix, 0-dim tensors of the CPU excepted; a CPU generator is refused; backward
runs in a thread of the device's own. `watching` lists what would make the host wait for a GPU. Unlike CUDA it has no
pinned memory, no autocast, no generator, and nothing is asynchronous.

Torch cannot take a device out again, and it counts devices at the first backward of the process. So call `install`
where pytest imports the test module, which is before any test runs. For code that looks for an accelerator there is
none, so tests of the CPU are as before.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

NAME, DEVICES = "standin", 2
_C: Any = torch._C  # most of what is used here has no types
_CPU = _C.DispatchKeySet(_C.DispatchKey.CPU)
_DLPACK_CPU, _DLPACK_FOREIGN = 1, 12
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_LABELS = {"as_strided", "view", "unfold", "_reshape_alias", "set_", "is_set_to", "view_as_real", "view_as_complex"}
"""Operations on the label of memory alone: the CPU's kernel takes them for any device, and keeps the storage."""
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "multinomial",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
}
"""Operations whose CUDA kernel makes the host wait, `item` being the first."""
_OURS = re.compile(r"(?:.*/)?(?<!tests/)((?:hubkit|plugins|transformers)/(?!tests/)(?!.*site-packages/).*\.py)$")
_kept: list[Any] = []  # what torch refers to without owning it
_watchers: list[Counts] = []


@dataclass
class Counts:
    """What would cost time on a GPU, as ``operation at file:line``: the innermost line of hubkit or transformers."""

    syncs: list[str] = field(default_factory=list)
    """The host waits for the device: a value is asked for, a shape depends on values, memory is copied to the host."""
    uploads: list[str] = field(default_factory=list)
    """Copies to the device that were not asked for with ``non_blocking=True``."""


@contextmanager
def watching() -> Iterator[Counts]:
    """Counts in all threads, that of the backward pass included, until the block ends."""
    counts = Counts()
    _watchers.append(counts)
    try:
        yield counts
    finally:
        _watchers.remove(counts)


def _note(kind: str, what: str) -> None:
    for counts in _watchers:
        getattr(counts, kind).append(f"{what} at {_place()}")


def _place() -> str:
    """Where the operation under way was asked for: our innermost frame, or else the first outside torch."""
    frame: FrameType | None = sys._getframe(2)
    first = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if found := _OURS.match(name):
            return f"{found[1]}:{frame.f_lineno}"
        if not first and "/torch/" not in name and name != __file__:
            first = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return first or "torch"


def _relabelled(tensor: Tensor, kind: int, index: int) -> Tensor:
    """The same memory as a tensor of another device; it keeps the memory alive."""
    capsule = _C._to_dlpack(tensor)
    device = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = [kind, index]
    made: Tensor = _C._from_dlpack(capsule)
    return made


def _to_host(tensor: Tensor) -> Tensor:
    """The memory of a stand-in's tensor as the CPU's. Without elements there is none: kernels may then resize it."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    host = _relabelled(tensor, _DLPACK_CPU, 0)
    host = host.conj() if tensor.is_conj() else host
    return torch._neg_view(host) if tensor.is_neg() else host


def _to_device(tensor: Tensor, index: int) -> Tensor:
    return _relabelled(tensor.resolve_conj().resolve_neg(), _DLPACK_FOREIGN, index)


def _point(tensor: Tensor, at: Tensor) -> Tensor:
    """Makes `tensor` the same memory and shape as `at`."""
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    set_.redispatch(_CPU, tensor, at.untyped_storage(), at.storage_offset(), at.shape, at.stride())
    return tensor


def _copy_from(op: Any, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What every copy between devices comes to."""
    here, there = source.device.type == NAME, target.device.type == NAME
    if here != there and source.numel() and not non_blocking:
        _note(*(("syncs", "copy to the host") if here else ("uploads", "copy to the device")))
    (_to_host(target) if there else target).copy_(_to_host(source) if here else source)
    return target


def _to_copy(op: Any, tensor: Tensor, memory_format: Any = None, non_blocking: bool = False, **wanted: Any) -> Tensor:
    """As torch's own, which takes pinned memory for what is copied to the host without blocking."""
    wanted = {k: v for k, v in wanted.items() if k in ("dtype", "device")}
    made = torch.empty_like(tensor, memory_format=memory_format or torch.preserve_format, **wanted)
    return made.copy_(tensor, non_blocking)


def _resize(op: Any, tensor: Tensor, size: list[int], **_: Any) -> Tensor:
    host = torch.empty(size, dtype=tensor.dtype)
    count = min(host.numel(), tensor.numel())
    host.view(-1)[:count] = _to_host(tensor).reshape(-1)[:count]
    return _point(tensor, _to_device(host, tensor.device.index))


def _index(op: Any, tensor: Tensor, indices: list[Tensor | None], *rest: Any, **more: Any) -> Tensor:
    """Reads or writes ``tensor[indices]``: indices of the CPU are copied, a mask becomes positions.

    Unless one value is written: that is a fill.
    """
    moved = [i.to(tensor.device) if i is not None and i.device.type == "cpu" else i for i in indices]
    masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in moved)
    if masks and not (rest and rest[0].numel() == 1):
        _note("syncs", "index by a mask")
    made: Tensor = _compute(op, tensor, moved, *rest, **more)
    return made


_OWN: dict[str, Callable[..., Tensor]] = {
    "_copy_from": _copy_from,
    "_to_copy": _to_copy,
    "resize_": _resize,
    "index": _index,
    "_index_put_impl_": _index,
}


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation that a tensor of the stand-in takes part in, or that makes one."""
    name = op._schema.name.removeprefix("aten::")
    with _C.DisableTorchFunction():  # ``with torch.device(...)`` must not reach in here
        if name in _OWN:
            return _OWN[name](op, *args, **kwargs)
        if name in _LABELS:
            return op.redispatch(_CPU, *args, **kwargs)
        if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            _note("syncs", name)
        return _compute(op, *args, **kwargs)


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the CPU's kernel, after refusing what CUDA's would refuse."""
    found = list(_tensors([*args, *kwargs.values()]))
    index = _common(op, found, kwargs.get("device"))
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    hosts = {id(t): _to_host(t) for t in found if t.device.type == NAME}
    owners = {id(hosts[id(t)]): t for t in found if id(t) in hosts}
    lower = functools.partial(_mapped, lambda t: hosts.get(id(t), t))
    named = {k: torch.device("cpu") if k == "device" else lower(v) for k, v in kwargs.items() if k != "pin_memory"}
    result = op(*map(lower, args), **named)
    for host in hosts.values():
        if owners[id(host)].shape != host.shape:  # the kernel resized an empty tensor that it was to write to
            _point(owners[id(host)], _to_device(host, index))
    return _mapped(lambda t: owners[id(t)] if id(t) in owners else _to_device(t, index), result)


def _common(op: Any, tensors: list[Tensor], wanted: torch.device | None) -> int:
    """The number of the device that all tensors are on, or that a new one is wanted on.

    Raises:
        RuntimeError: There are several. A 0-dim tensor of the CPU is a number.
    """
    if wanted is not None:
        if (wanted.index or 0) >= DEVICES:
            raise RuntimeError(f"invalid device ordinal: there is no {wanted}")
        return wanted.index or 0
    devices = {t.device for t in tensors if t.device.type == NAME or t.dim() > 0}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices), reverse=True))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names}! ({op})"
        )
    return devices.pop().index


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, one) for one in value)
    return value


class _Guard(_C._acc.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return _C._autograd.DeviceType.PrivateUse1


class _Hooks(_C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return True


_module = SimpleNamespace(
    is_available=lambda: False,
    is_initialized=lambda: True,
    device_count=lambda: DEVICES,
    current_device=lambda: 0,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    synchronize=lambda device=None: None,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
)
"""``torch.standin``. Random numbers are the CPU generator's."""


def install() -> torch.device:
    """Registers the devices, once in a process, and returns ``standin:0``. Where there is a GPU, the caller is skipped.

    Raises:
        RuntimeError: A backward pass ran before, so that autograd has no thread for the device.
    """
    if torch.cuda.is_available():
        pytest.skip("the stand-in would hide the GPU from torch.accelerator", allow_module_level=True)
    if reason := _registered():
        raise RuntimeError(f"install() has to come before the first backward pass of the process: {reason}")
    return torch.device(NAME, 0)


@functools.cache
def _registered() -> str:
    """Registers everything, then tries a backward pass: why that failed, or nothing."""
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module)  # type: ignore[no-untyped-call]
    _kept.extend([hooks := _Hooks(), guard := _Guard()])
    _C._acc.register_python_privateuseone_hook(hooks)
    _C._acc.register_python_privateuseone_device_guard(guard)
    _count_devices()
    _register_kernels()
    _let_storages_be_made()
    _let_parameters_move()
    torch.accelerator.current_accelerator = lambda check_available=False: None
    try:
        torch.ones(1, device=NAME, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return ""


def _count_devices() -> None:
    """Lets backward run on the second device, too: autograd has a thread for each that the device guard counts.

    The guard of Python backends counts the constant 1. That is a function in its table of virtual functions; the guard
    gets a copy of the table with another one, if the machine code there is "return 1". Elsewhere only the first device
    has a backward pass.
    """
    if sys.platform != "linux":
        return
    guards = (ctypes.c_size_t * 64).in_dll(ctypes.CDLL("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE")
    guard = ctypes.c_size_t.from_address(guards[_C._autograd.DeviceType.PrivateUse1.value])
    before, count = 2 * ctypes.sizeof(ctypes.c_size_t), 15  # what stands before the functions; the one that counts
    table = (ctypes.c_size_t * 32).from_buffer_copy((ctypes.c_size_t * 32).from_address(guard.value - before))
    if not ctypes.string_at(table[2 + count], 8).startswith(
        (b"\xb8\x01\x00\x00\x00\xc3", b"\x20\x00\x80\x52\xc0\x03\x5f\xd6")  # x86-64, arm64
    ):
        return
    counted = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _: DEVICES)
    table[2 + count] = ctypes.cast(counted, ctypes.c_void_p).value or 0
    guard.value = ctypes.addressof(table) + before
    _kept.extend([table, counted])


def _register_kernels() -> None:
    """`_run` for what torch does not take apart, and for what it does take apart though the CPU has a kernel."""
    library: Any = torch.library
    everything, aten = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    has = _C._dispatch_has_kernel_for_dispatch_key
    for name in (n.removeprefix("aten::") for n in _C._dispatch_get_all_op_names() if n.startswith("aten::")):
        apart = any(has(f"aten::{name}", f"Composite{how}Autograd") for how in ("Explicit", "Implicit"))
        if (apart and has(f"aten::{name}", "CPU")) or name in ("_to_copy", "index.Tensor"):
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, functools.partial(_run, op), "PrivateUse1")
    for lazy in ("Conjugate", "Negative"):  # torch resolves these by a copy, which must not have to be resolved again
        aten.impl("_copy_from", library.fallthrough_kernel, lazy)
    _kept.extend([everything, aten])


def _let_storages_be_made() -> None:
    """``UntypedStorage(n, device=...)``, which `copy.deepcopy` calls, crashes for a device without an allocator."""
    plain = torch.UntypedStorage.__new__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.device(kwargs.get("device") or "cpu").type != NAME:
            return plain(cls, *args, **kwargs)
        return torch.empty(*(args or (0,)), dtype=torch.uint8, device=kwargs["device"]).untyped_storage()

    torch.UntypedStorage.__new__ = new  # type: ignore[method-assign]


def _let_parameters_move() -> None:
    """Lets a parameter move to the device and stay the same object, as between torch's own devices.

    ``parameter.data = value`` refuses a foreign device, and `nn.Module.to` would make new parameters: what is tied, or
    held by an optimizer, would come apart.
    """
    data: Any = _C.TensorBase.data
    plain: Any = nn.Module._apply

    def set_data(self: Tensor, value: Tensor) -> None:
        if isinstance(value, Tensor) and _differ(self.device, value.device):
            _C._swap_tensor_impl(self, value.detach().requires_grad_(self.requires_grad))
        else:
            data.__set__(self, value)

    @torch.no_grad()
    def move(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> None:
        if _differ(parameter.device, fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device)).device):
            grad, parameter.grad = parameter.grad, None
            parameter.data = fn(parameter.data)
            parameter.grad = None if grad is None else fn(grad)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for parameter in self._parameters.values():
            if parameter is not None:
                move(parameter, fn)
        return plain(self, fn, recurse)

    torch.Tensor.data = property(data.__get__, set_data)  # type: ignore[assignment]
    nn.Module._apply = apply  # type: ignore[method-assign]


def _differ(one: torch.device, other: torch.device) -> bool:
    """Whether exactly one is the stand-in's."""
    return one.type != other.type and NAME in (one.type, other.type)
