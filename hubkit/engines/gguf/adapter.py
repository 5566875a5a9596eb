"""An adapter as GGUF, beside a base in GGUF.

llama.cpp adds ``scale · alpha / r · B A`` at each tensor, with the request's scale, one alpha for the file and the rank
r of that tensor's B. Here alpha is the adapter's rank, so that scale 1 adds B A; a tensor of another rank R (several
modules of the base are one in the GGUF) gets B · R / alpha.

===================  ==========================================================================
a matrix             ``NAME.lora_a`` (r, in), ``NAME.lora_b`` (out, r), rows of B as in the base
a stack of experts   (experts, r, in), (experts, out, r); zeros for experts without a part
the token table      ``lora_a`` the other way round, (vocabulary, r)
several in one       their A below each other, their B beside each other, zeros elsewhere: exact
===================  ==========================================================================
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hubkit.engines.gguf.base import HEAD, TABLE, GgufBase, open_gguf
from hubkit.engines.gguf.header import package
from hubkit.engines.gguf.proof import Fit, Proof
from hubkit.errors import USAGE, HubkitError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.adapter import Adapter

FILE = "adapter.gguf"
DTYPES: Mapping[str, str] = {
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
"""What an adapter may be stored in, as llama.cpp and as torch call it -> ggml's type."""
SETTINGS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "gguf": ("a file", lambda value: isinstance(value, str | os.PathLike) and bool(os.fspath(value))),
    "dtype": ("f32, f16 or bf16", lambda value: isinstance(value, str) and value in DTYPES),
    "adapter_dtype": ("f32, f16 or bf16", lambda value: isinstance(value, str) and value in DTYPES),
    "task_name": ("a text", lambda value: isinstance(value, str)),
    "prompt_prefix": ("a text", lambda value: isinstance(value, str)),
    "alora_invocation_tokens": ("a list of token ids", lambda value: bool(_ids(value))),
}
"""Setting -> what it may be, in words, and whether a value is that."""
CHOICES = "merge it (--engine ollama, hubkit merge), or leave it out"


class Lowered(Protocol):
    """A plain LoRA: `hubkit.engines.lowered.Lowered`, which this room does not know."""

    @property
    def adapter(self) -> Adapter: ...


class Servable(Protocol):
    """An adapter as an engine serves it: `hubkit.engines.served.Served`, likewise."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def lowered(self) -> Lowered: ...


@dataclass(frozen=True)
class Facts:
    """What an adapter in GGUF says of itself, beside its tensors; empty: nothing.

    Args:
        name: ``general.name``.
        digest: of the adapter that it was made of: ``hubkit.digest``.
        task: ``adapter.lora.task_name``, which the server lists beside its id.
        prefix: ``adapter.lora.prompt_prefix``.
        invocation: token ids after which it acts, of an activated adapter; it acts everywhere without them.
    """

    name: str = ""
    digest: str = ""
    task: str = ""
    prefix: str = ""
    invocation: tuple[int, ...] = ()


def adapter_files(served: Servable, base: Path | None, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
    """A served adapter as ``adapter.gguf``.

    Args:
        base: the folder of its base; None where the adapter knows its weights.
        settings: ``gguf``: the base in GGUF. ``adapter_dtype``, or ``dtype``: ``f32`` (the default), ``f16``, ``bf16``.
            ``task_name``, ``prompt_prefix``, ``alora_invocation_tokens``: see `Facts`.

    Raises:
        HubkitError: ``HK-GGUF`` without a GGUF of the base, for one that was not made of it, and for an adapter that it
            has no place for; ``HK-OPTIONS`` for settings that are none; ``HK-BASE-NEEDED``, ``HK-NAN``, ``HK-EXTRA``.
    """
    require_settings(settings)
    if "gguf" not in settings:
        what, fix = "an adapter in GGUF needs its base in GGUF, for names and the order of rows", "--set gguf=BASE.gguf"
        raise HubkitError("HK-GGUF", what, where=served.name, want="the base's GGUF", fix=fix)
    adapter, dtype = served.lowered.adapter, settings.get("adapter_dtype", settings.get("dtype", "f32"))
    facts = Facts(
        name=served.name,
        digest=served.digest,
        task=settings.get("task_name", served.key),
        prefix=settings.get("prompt_prefix", ""),
        invocation=_ids(settings.get("alora_invocation_tokens", ())),
    )
    gguf = open_gguf(Path(settings["gguf"]), adapter.base.arch.model_type)
    return {FILE: adapter_gguf(adapter, _with_weights(adapter.base, base), gguf, facts, dtype)}


def require_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of an adapter's file that are none: ``HK-OPTIONS``, with all of them."""
    strange = [key for key in settings if key not in SETTINGS]
    wrong = [
        f"{key}: want {SETTINGS[key][0]}, have {value!r}" for key, value in settings.items() if not _fits(key, value)
    ]
    if strange or wrong:
        near = [one for key in strange for one in nearest(key, SETTINGS, 1)]
        what, want = "these settings of an adapter in GGUF are none", ", ".join(SETTINGS)
        have = [*(f"{key}: unknown" for key in strange), *wrong]
        fix = f"did you mean {near[0]}?" if near else "leave them out"
        raise HubkitError("HK-OPTIONS", what, want=want, have=have, fix=fix, status=USAGE)


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids, of a list or of ``"5,6"``; none of what is neither."""
    if isinstance(value, str):
        value = [int(one) if one.strip().isdecimal() else None for one in value.split(",")]
    fits = isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)
    return tuple(value) if fits else ()


def _fits(key: str, value: Any) -> bool:
    return key not in SETTINGS or SETTINGS[key][1](value)


def adapter_gguf(adapter: Adapter, base: Base, gguf: GgufBase, facts: Facts, dtype: str = "f32") -> bytes:
    """The bytes of an adapter in GGUF.

    Args:
        adapter: low-rank parts alone.
        base: its base, with weights.
        gguf: the same in GGUF.
        dtype: of the factors.

    Raises:
        HubkitError: as `adapter_files`.
    """
    placed = _placed(adapter, base, gguf)
    alpha = max(piece.a.shape[0] for pieces in placed.values() for piece in pieces)
    tensors: dict[str, Tensor] = {}
    for name in gguf.tensors:
        if name in placed:
            a, b = _joined(gguf, name, placed[name])
            a, b = _balanced(a, b * (a.shape[-2] / alpha))
            tensors[f"{name}.lora_a"] = a.transpose(-1, -2) if name == TABLE else a
            tensors[f"{name}.lora_b"] = b
    return _written(gguf.architecture, facts, float(alpha), tensors, DTYPES[dtype], adapter.name)


@dataclass(frozen=True)
class _Piece:
    """What one site adds to a GGUF tensor: rows, A (r, in) and their rows of B (rows, r)."""

    fit: Fit
    a: Tensor
    b: Tensor


def _placed(adapter: Adapter, base: Base, gguf: GgufBase) -> dict[str, list[_Piece]]:
    """GGUF tensor -> what the adapter adds there, with the order of rows proven."""
    from hubkit.tensors.parts.part import LowRank

    proof, found = Proof(gguf, base), dict[str, list[_Piece]]()
    homeless: list[str] = []
    for name, part in adapter.parts.items():
        site = base.site(name)
        reason = _homeless(site, part, gguf)
        fits = [] if reason else proof.weight(site)
        if not fits:
            homeless.append(f"{name}: {reason or 'the GGUF has no tensor for it'}")
            continue
        assert isinstance(part, LowRank), "others were refused"
        a, b = part.A.detach().float().cpu(), part.B.detach().float().cpu() * part.scale
        for fit in fits:
            if site.kind == "embedding":
                piece = _Piece(fit, a[:, fit.place.source[0] : fit.place.source[1]], b)
            else:
                piece = _Piece(fit, a, fit.taken(b))
            found.setdefault(fit.place.tensor, []).append(piece)
    if homeless:
        what = f"the adapter {adapter.name!r} acts where a GGUF adapter cannot"
        raise HubkitError("HK-GGUF", what, where=str(gguf.path), have=homeless, fix=CHOICES)
    return found


def _homeless(site: Site, part: Any, gguf: GgufBase) -> str:
    """Why llama.cpp has no place for a part, whatever the GGUF's names; empty where it has."""
    from hubkit.tensors.parts.part import LowRank

    if not isinstance(part, LowRank):
        return "it is not low-rank"
    if (site.kind == "embedding" or site.tied) and HEAD not in gguf.tensors:
        return "the output head is tied to the embeddings, and llama.cpp cannot adapt either of a tied pair"
    return ""


def _joined(gguf: GgufBase, tensor: str, pieces: list[_Piece]) -> tuple[Tensor, Tensor]:
    """A and B of a whole GGUF tensor, stacked where it is a stack: (…, r, in), (…, out, r)."""
    import torch

    by_matrix: dict[int, list[_Piece]] = {}
    for piece in pieces:
        by_matrix.setdefault(piece.fit.place.expert or 0, []).append(piece)
    rank = max(sum(piece.a.shape[0] for piece in group) for group in by_matrix.values())
    matrices, rows, columns = gguf.shape(tensor)
    if tensor == TABLE:
        (piece,) = pieces
        return piece.a.contiguous(), piece.b.contiguous()
    a, b = torch.zeros(matrices, rank, columns), torch.zeros(matrices, rows, rank)
    for matrix, group in by_matrix.items():
        at = 0
        for piece in sorted(group, key=lambda one: one.fit.place.rows):
            (first, last), r = piece.fit.place.rows, piece.a.shape[0]
            a[matrix, at : at + r] = piece.a
            b[matrix, first:last, at : at + r] = piece.b
            at += r
    return (a, b) if len(gguf.tensors[tensor].shape) > 2 else (a[0], b[0])


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of about one size, so that 16 bits hold both: a power of two, which is exact."""
    largest = float(a.abs().max()), float(b.abs().max())
    if not all(map(math.isfinite, largest)) or 0.0 in largest:
        return a, b
    steps = round((math.log2(largest[1]) - math.log2(largest[0])) / 2)
    return a * 2.0**steps, b * 2.0**-steps


def _written(
    architecture: str, facts: Facts, alpha: float, tensors: Mapping[str, Tensor], kind: str, name: str
) -> bytes:
    """The file, written by the package gguf."""
    gguf = package()
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / FILE
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.General.NAME, facts.name)
        writer.add_string("hubkit.digest", facts.digest)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string("adapter.lora.task_name", facts.task)
        writer.add_string("adapter.lora.prompt_prefix", facts.prefix)
        if facts.invocation:
            types = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value("adapter.alora.invocation_tokens", list(facts.invocation), *types)
        for key, tensor in tensors.items():
            writer.add_tensor(key, *_values(tensor, kind, f"{name}: {key}"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _values(tensor: Tensor, kind: str, where: str) -> tuple[Any, None, Any]:
    """A tensor as the package's writer takes it: values, shape (None: theirs), type.

    Raises:
        HubkitError: ``HK-NAN`` for a value beyond float16.
    """
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    cast = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        what, fix = f"a value leaves the range of {kind.lower()}", 'adapter_dtype = "f32"'
        raise HubkitError("HK-NAN", what, where=where, fix=fix)
    bits = cast.view(torch.uint8).numpy() if kind == "BF16" else cast.numpy()
    return bits, None, package().GGMLQuantizationType[kind]


def _with_weights(base: Base, folder: Path | None) -> Base:
    """`base`, or that of its folder where it was made of an adapter's own list.

    Raises:
        HubkitError: ``HK-BASE-NEEDED``.
    """
    from hubkit.tensors.base.base import Base

    if all(site.read is not None or site.module is not None for site in base.sites.values()):
        return base
    if folder is None:
        what = "the order of rows in a GGUF is proven beside the base's own weights"
        raise HubkitError("HK-BASE-NEEDED", what, where=base.source, fix="name the base's folder with --base")
    return Base.from_folder(folder)
