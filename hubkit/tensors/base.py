"""The base as adapters see it: named sites, from a live model or from the headers of its files alone.

A site's name is the module's path in the model (``model.layers.0.self_attn.q_proj``), whatever the file calls it; its
weight is always (out, in), whatever the storage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hubkit.artifact.digest import ties
from hubkit.artifact.header import TensorInfo
from hubkit.errors import HubkitError, nearest
from hubkit.tensors.arch import Arch, arch_of
from hubkit.tensors.delta import Delta, accumulation_dtype
from hubkit.tensors.expressions import expression

Read = Callable[[str], Tensor]
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Site:
    """A place in the base where something can be added.

    Args:
        name: the module's path in the model.
        kind: ``linear`` or ``embedding``; ``block`` for a `hubkit.tensors.blocks.Block`, which has no weight.
        shape: (out, in); an embedding table is (hidden, vocabulary).
        dtype: dtype of the stored weight.
        transposed: the storage is (in, out): GPT-2's Conv1D, every embedding table.
        tensor: name of the weight in the base's files.
        bias_tensor: name of the bias there, or None.
        tied: the output head of a base that ties it: `tensor` is the embedding's.
        module: the live module, if there is one.
        read: reads a tensor of the base's files, if there are any.
        change: what lower members of a stack have already added.
        wide: hand out weight and bias in the dtype of accumulation (merging) instead of the stored one.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    tensor: str
    bias_tensor: str | None
    tied: bool = False
    module: nn.Module | None = field(default=None, compare=False, repr=False)
    read: Read | None = field(default=None, compare=False, repr=False)
    change: Delta | None = field(default=None, compare=False, repr=False)
    wide: bool = False

    @property
    def device(self) -> torch.device:
        """Where the live weight is; the CPU for files."""
        weight = getattr(self.module, "weight", None)
        return weight.device if isinstance(weight, Tensor) else torch.device("cpu")

    def weight(self) -> Tensor:
        """The weight, (out, in), with the changes of lower members of a stack; the base's own values are detached."""
        stored = self._stored(self.tensor, "weight")
        weight = stored.t() if self.transposed else stored
        matrix = None if self.change is None else self.change.matrix()
        if matrix is not None:
            weight = weight.to(matrix.dtype) + matrix
        return weight.to(accumulation_dtype(stored.dtype)) if self.wide else weight.to(stored.dtype)

    def bias(self) -> Tensor | None:
        """The bias, (out,), or None."""
        if self.bias_tensor is None:
            return None
        stored = self._stored(self.bias_tensor, "bias")
        bias = stored
        if self.change is not None and self.change.bias is not None:
            bias = bias.to(self.change.bias.dtype) + self.change.bias
        return bias.to(accumulation_dtype(stored.dtype)) if self.wide else bias.to(stored.dtype)

    def _stored(self, tensor: str, attribute: str) -> Tensor:
        if self.module is not None:
            value = getattr(self.module, attribute)
            assert isinstance(value, Tensor)
            return value.detach()
        if self.read is None:
            raise HubkitError(
                "HK-BASE-NEEDED", f"the weight of {self.name} is needed and only its header is at hand",
                where=self.tensor, fix="name the base's folder with --base",
            )  # fmt: skip
        return self.read(tensor)

    def widened(self) -> Site:
        """The same site, handing out weight and bias in the dtype of accumulation."""
        return _replace(self, wide=True)

    def after(self, delta: Delta) -> Site:
        """The same site with `delta` added: what the next member of a stack sees."""
        return _replace(self, change=delta if self.change is None else self.change.plus(delta))


def _replace(site: Site, **fields: object) -> Site:
    from dataclasses import replace

    return replace(site, **fields)  # type: ignore[arg-type]


class Base:
    """The sites of one base.

    Made by `from_model` or `from_folder`; both give the same sites, in the order of their names (layer 10 after 9).
    """

    def __init__(self, sites: Iterable[Site], arch: Arch, source: str, others: Iterable[str] = ()) -> None:
        self.sites: dict[str, Site] = {s.name: s for s in sorted(sites, key=lambda site: natural(site.name))}
        self.arch = arch
        self.source = source
        self._others = frozenset(others)

    @classmethod
    def from_model(cls, model: nn.Module) -> Base:
        """The sites of a live model: its Linear, Conv1D (GPT-2) and Embedding modules."""
        from hubkit.tensors.blocks import block_sites

        arch = arch_of(str(getattr(getattr(model, "config", None), "model_type", "")))
        sites: list[Site] = []
        others: list[str] = []
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first.setdefault(id(parameter), name)
        for name, module in model.named_modules():
            kind = _kind(module)
            weight = getattr(module, "weight", None)
            if not kind or not isinstance(weight, Tensor) or weight.dim() != 2:
                others.append(name)
                continue
            transposed = kind == "embedding" or type(module).__name__ == "Conv1D"
            rows, columns = int(weight.shape[0]), int(weight.shape[1])
            bias = getattr(module, "bias", None)
            bias_name = first.get(id(bias), f"{name}.bias") if isinstance(bias, Tensor) else None
            shape = (columns, rows) if transposed else (rows, columns)
            twin = first.get(id(weight), f"{name}.weight")
            tied = twin != f"{name}.weight" and kind == "linear"
            sites.append(Site(name, kind, shape, weight.dtype, transposed, twin, bias_name, tied, module=module))
        return cls([*sites, *block_sites(sites, arch, model)], arch, type(model).__name__, others)

    @classmethod
    def from_headers(
        cls, headers: Mapping[str, TensorInfo], config: Mapping[str, object], source: str, read: Read | None = None
    ) -> Base:
        """The sites of a base given by the headers of its files (no module, no weight in memory)."""
        from hubkit.tensors.blocks import block_sites

        arch = arch_of(str(config.get("model_type", "")))
        sites: list[Site] = []
        bare = not any(tensor.startswith(arch.prefix) for tensor in headers)  # old files leave the prefix out
        for tensor, info in headers.items():
            stem, _, last = tensor.rpartition(".")
            if last != "weight" or len(info.shape) != 2 or not stem:
                continue
            name = arch.prefix + stem if bare and not arch.is_head(stem) else stem
            leaf = stem.rpartition(".")[2]
            kind = "embedding" if leaf in arch.embeddings else "linear"
            transposed = kind == "embedding" or leaf in arch.transposed
            rows, columns = info.shape
            shape = (columns, rows) if transposed else (rows, columns)
            bias = f"{stem}.bias" if f"{stem}.bias" in headers else None
            sites.append(Site(name, kind, shape, torch_dtype(info.dtype), transposed, tensor, bias, read=read))
        sites = _with_tied_head(sites, arch, config, read, headers)
        return cls([*sites, *block_sites(sites, arch)], arch, source)

    @classmethod
    def from_folder(cls, path: Path) -> Base:
        """The sites of a base on disk, from headers; weights are read when `Site.weight` asks for them."""
        from hubkit.tensors.shards import open_shards

        shards = open_shards(path)
        return cls.from_headers(shards.headers, shards.config, str(path), shards.read)

    def match(self, targets: str | Sequence[str], kind: str | Sequence[str] | None = None) -> list[Site]:
        """The sites that `targets` name, in order.

        Args:
            targets: ``"all-linear"`` (every linear but the output heads); a list of names, or one name, each matching a
                module path or its last components; any other string is a regular expression for a whole path.
            kind: site kinds the method can serve; None for any that has a weight.

        Raises:
            HubkitError: ``HK-TARGET`` when any one target matches nothing or a kind that the method cannot serve.
        """
        kinds = (kind,) if isinstance(kind, str) else kind
        if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
            targets = [targets]
        if targets == "all-linear":
            return [s for s in self.sites.values() if s.kind == "linear" and not self.arch.is_head(s.name)]
        pool = [name for name, site in self.sites.items() if site.kind != "block" or "block" in (kinds or ())]
        chosen: set[str] = set()
        for target in [targets] if isinstance(targets, str) else targets:
            if isinstance(targets, str):
                found = {name for name in pool if _pattern(target).fullmatch(name)}
            else:
                found = {name for name in pool if name == target or name.endswith("." + target)}
            if not found:
                self._refuse(target)
            foreign = sorted(name for name in found if kinds and self.sites[name].kind not in kinds)
            if foreign:
                raise HubkitError(
                    "HK-TARGET", f"the method cannot act at {target!r}", where=self.source,
                    want=f"sites of kind {' or '.join(kinds or ())}",
                    have=[f"{name}: {self.sites[name].kind}" for name in foreign],
                )  # fmt: skip
            chosen |= found
        return [site for site in self.sites.values() if site.name in chosen]

    def _refuse(self, target: str) -> None:
        counts: dict[str, int] = {}
        for site in self.sites.values():
            if not self.arch.is_head(site.name) and site.kind == "linear":
                last = site.name.rpartition(".")[2]
                counts[last] = counts.get(last, 0) + 1
        families = " ".join(f"{name} ({count})" for name, count in counts.items())
        names = {site.rpartition(".")[2] for site in self.sites} | set(self.sites)
        near = nearest(target.rpartition(".")[2], names) or nearest(target, names)
        known = target in self._others or any(o.endswith("." + target) for o in self._others)
        why = "names a module that holds no weight of its own" if known else "matches nothing in the base"
        raise HubkitError(
            "HK-TARGET",
            f"the target {target!r} {why}",
            where=self.source,
            want=f"one of: {families}" if families else "a base with linear layers",
            have=target,
            fix=f"near: {', '.join(near)}" if near else "all-linear takes every linear layer but the head",
        )


def _pattern(text: str) -> re.Pattern[str]:
    """A target expression; bounded, because it can come from a stranger's file."""
    try:
        return expression(text)
    except re.error as e:
        raise HubkitError(
            "HK-TARGET", "the target is not a usable regular expression", where=text[:80], have=str(e),
            fix="list the module names instead: q_proj,v_proj",
        ) from e  # fmt: skip


def _with_tied_head(
    sites: list[Site], arch: Arch, config: Mapping[str, object], read: Read | None, names: Iterable[str]
) -> list[Site]:
    """`sites`, the output head among them where it is the embedding table: files leave it out or hold it twice."""
    tables = [site for site in sites if site.kind == "embedding"]
    table = min(tables, key=lambda s: arch.embeddings.index(s.name.rpartition(".")[2]), default=None)
    if table is None or not ties(config):
        return sites
    shape = (table.shape[1], table.shape[0])
    bias = arch.head_bias if arch.head_bias in names else None
    heads = [site for site in sites if arch.is_head(site.name)]
    if heads:
        fields: dict[str, object] = {"tensor": table.tensor, "tied": True}
        fields |= {"bias_tensor": bias} if bias else {}
        tied = [_replace(site, **fields) for site in heads if site.shape == shape]
        return [site for site in sites if site.name not in {head.name for head in tied}] + tied
    classes = config.get("architectures")
    if not isinstance(classes, list) or not any(str(name).endswith(LANGUAGE_MODELS) for name in classes):
        return sites
    return [*sites, Site(arch.heads[0], "linear", shape, table.dtype, False, table.tensor, bias, tied=True, read=read)]


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    return ""


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        HubkitError: ``HK-DTYPE`` for one that torch has no counterpart of here.
    """
    if name not in _DTYPES:
        raise HubkitError("HK-DTYPE", f"tensors of dtype {name} are not supported", want=", ".join(_DTYPES), have=name)
    return _DTYPES[name]
