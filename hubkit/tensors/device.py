"""Where a model computes: the device that a word names, what it can do, and what is said when it cannot.

``auto`` is the first CUDA device, then Apple's MPS, then the CPU. A word that names a device which is not there is
refused before anything is loaded; a memory that is full, and an operation that a device does not have, are refusals
with what to change, not tracebacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError

WORDS = "auto, cpu, cuda, cuda:N or mps"
_FULL = (
    "CUDA out of memory", "CUDA error: out of memory", "HIP out of memory", "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "MPS backend out of memory", "DefaultCPUAllocator:",
)  # fmt: skip
"""What errors of a full memory say, beside those that have a class of their own."""
_ASKED = re.compile(r"(?:[Tt]ried to allocate|Invalid buffer size:?) ([\d.]+ ?\w+)")
_BF16_SINCE = (8, 0)
"""Compute capability from which NVIDIA's devices have bfloat16 (Ampere, 2020)."""


def device_named(word: str | torch.device) -> torch.device:
    """The device that `word` names, with its number where it has one: ``cuda`` is CUDA's current device.

    Args:
        word: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; any other device of torch by its own name.

    Raises:
        HubkitError: ``HK-DEVICE`` for a word that names none, and for a device that is not there or cannot be used:
            no driver or one that is too old, a number beyond the last, a build of torch without it.
    """
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(word)
    except (RuntimeError, TypeError):
        fix = "--device cuda" if str(word).lower() in ("gpu", "cuda") or str(word).isdigit() else "--device auto"
        what = f"{str(word)!r} names no device"
        raise HubkitError("HK-DEVICE", what, want=WORDS, have=str(word), fix=fix, status=USAGE) from None
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        built = "this macOS or this machine has none" if torch.backends.mps.is_built() else "torch was built without it"
        raise HubkitError("HK-DEVICE", "there is no MPS device", have=built, fix="--device cpu, or auto")
    if device.type not in ("cpu", "mps"):
        _require_values(device)
    return device


def _require_values(device: torch.device) -> None:
    """Refuses a device that holds no values (``meta``), or that this build of torch or this machine does not have."""
    try:
        torch.empty(1, device=device).tolist()
    except Exception as error:  # a backend that is not there can raise anything
        what = f"the device {device} cannot be used here"
        raise HubkitError("HK-DEVICE", what, want=WORDS, have=_first_line(error), fix="--device auto") from None


def _cuda(device: torch.device) -> torch.device:
    if why := _no_cuda():
        raise HubkitError(
            "HK-DEVICE",
            "there is no CUDA device that can be used",
            have=why,
            fix="a driver and a build of torch that fit each other (https://pytorch.org/get-started), or --device cpu",
        )
    count = torch.cuda.device_count()
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        named = [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(count)]
        raise HubkitError("HK-DEVICE", f"there is no device cuda:{number}", want=named, have=f"cuda:{number}")
    return torch.device("cuda", number)


def _no_cuda() -> str:
    """Why CUDA cannot be used, in torch's own words; empty where it can."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # raises with the reason that `is_available` keeps to itself
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "torch finds no device"


def described(device: torch.device) -> str:
    """The device in words, for the first line of what runs there: ``cuda:0 (NVIDIA H200)``.

    Where the machine has a GPU that `auto` could not take, the CPU says why.
    """
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    why = _no_cuda() if device.type == "cpu" and torch.version.cuda is not None else ""
    return f"{device} (no CUDA: {why})" if why and "no NVIDIA driver" not in why else str(device)


def require_dtype(device: torch.device, dtype: torch.dtype | None) -> None:
    """Refuses half precision that `device` would compute in software, or with another range: ``HK-DTYPE``.

    Args:
        dtype: in which the base is to compute; None where that is not known yet.
    """
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.version.hip is not None:
        return
    if torch.cuda.get_device_capability(device) < _BF16_SINCE:
        raise HubkitError(
            "HK-DTYPE",
            f"{described(device)} does not compute in bfloat16",
            have="bfloat16",
            want="float16, whose losses are scaled in training, or float32",
            fix="--dtype float16, or float32",
        )


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch's generators, that of `device` among them, are this run's own; after it they are as they were."""
    if device.type in ("cuda", "mps"):
        return torch.random.fork_rng([device], device_type=device.type)
    return torch.random.fork_rng([])


@functools.lru_cache(1024)
def indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` as an index on `device`, (n,) int64; made once, because an upload in the middle of a step waits."""
    with torch.inference_mode(False):  # one made in a pass without gradient is used in later ones
        return torch.tensor(numbers, dtype=torch.int64, device=device)


@contextlib.contextmanager
def computing(device: torch.device, doing: str, fix: str) -> Iterator[None]:
    """Inside, what `device` cannot do is a refusal: its memory is full, or it has no such operation or kernel.

    Args:
        doing: what is going on, for the message: "loading the base".
        fix: what to change where memory is short.

    Raises:
        HubkitError: ``HK-MEMORY`` with what was asked and what is free; ``HK-DEVICE``.
    """
    try:
        yield
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        refusal = _refusal(device, error, doing, fix)
        if refusal is None:
            raise
        raise refusal from None  # the frames of `error` hold the tensors that filled the memory


def _refusal(device: torch.device, error: Exception, doing: str, fix: str) -> HubkitError | None:
    text = str(error)
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(word in text for word in _FULL):
        asked = _ASKED.search(text)
        return HubkitError(
            "HK-MEMORY",
            f"there is not enough memory for {doing}",
            where=described(device),
            want=f"{_size(asked[1])} more" if asked else "more",
            have=[_free(device) or "no more", _first_line(error)],
            fix=fix,
        )
    if isinstance(error, NotImplementedError) and device.type == "mps":
        return HubkitError(
            "HK-DEVICE",
            f"MPS lacks an operation for {doing}",
            have=_first_line(error),
            fix="PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment, or --device cpu",
        )
    if device.type == "cuda" and "no kernel image" in text:
        return HubkitError(
            "HK-DEVICE",
            "this build of torch has no kernels for the device",
            where=described(device),
            have=f"built for {', '.join(torch.cuda.get_arch_list())}",
            fix="a build of torch for this device (https://pytorch.org/get-started), or --device cpu",
        )
    return None


def _free(device: torch.device) -> str:
    """How much memory is free there, where that can be asked."""
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        return f"{_size(left)} of {_size(total)} free, {_size(held)} in use by this process"
    if device.type == "mps":
        most, held = torch.mps.recommended_max_memory(), torch.mps.current_allocated_memory()
        return f"{_size(held)} of {_size(most)} in use by this process"
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()  # Linux; elsewhere nothing cheap says it
        free = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return f"{_size(int(free) * 1024)} free"
    return ""


def used(device: torch.device) -> int:
    """Bytes in use: what torch holds on a GPU, else what this process has in memory (its peak, where that is told).

    Nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def _size(amount: int | str) -> str:
    """A number of bytes in words; text that has a unit of its own as it is, ``123 bytes`` as a number."""
    text = str(amount).removesuffix("bytes").strip()
    if not text.isdigit():
        return str(amount)
    count = int(text)
    scale, unit = next(((s, u) for s, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if count >= 2**s), (0, "bytes"))
    return f"{count / 2**scale:.2f} {unit}" if scale else f"{count} {unit}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def arithmetic() -> dict[str, str]:
    """What the last bits of a product on the CPU depend on: ``torch``, its version, and ``processor``.

    The processor by its kind, the instructions that torch uses of it, and its model; MKL's compatibility mode, which
    makes it compute like another, belongs to it.
    """
    facts = [platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor_model()]
    facts += [f"MKL_CBWR={mode}"] if (mode := os.environ.get("MKL_CBWR")) else []
    return {"torch": str(torch.__version__), "processor": ", ".join(fact for fact in facts if fact)}


def _processor_model() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()
