"""The base as adapters see it: named sites, from a live model or from the headers of its files alone.

A site's name is the module's path (``model.layers.0.self_attn.q_proj``) as the base's files name it, whatever a release
of transformers calls it in memory (`hubkit.compat.transformers_names`); its weight is always (out, in), whatever the
storage; that of a norm is (n, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hubkit.artifact.identity.header import TensorInfo
from hubkit.compat.torch import own_forward
from hubkit.compat.transformers_bodies import body_of
from hubkit.compat.transformers_names import file_naming
from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import Arch, arch_for
from hubkit.tensors.base.blocks import block_sites
from hubkit.tensors.base.decoder import Decoder, decoder_of, embedding_table, virtual_sites
from hubkit.tensors.base.formats import DECODED, computed_in, is_coded, refuse_codes, require_weights_of_their_own
from hubkit.tensors.base.layers import Layers
from hubkit.tensors.base.site import Site, expert_sites, natural
from hubkit.tensors.base.targets import named_sites
from hubkit.tensors.base.token_sites import encodes, heads_last, row_sites, shared_tables, tied_name, with_tied_head
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.experts.expert import Expert, is_expert
from hubkit.tensors.experts.finding import experts_of
from hubkit.tensors.files.coded import coded_weights, decoded_headers, in_mxfp4
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import ReadTensor
from hubkit.tensors.fourbit.files import PackedHeaders
from hubkit.tensors.fourbit.linear import QuantLinear, packed_facts, packed_of, quantizable
from hubkit.tensors.fourbit.nf4 import CODEC

NORMS = ("LayerNorm", "RMSNorm", "LayerNorm1P")
"""Ends of the class names of norms with a gain per feature."""
_DIMENSIONS = {"linear": 2, "embedding": 2, "norm": 1}
"""Of the weights of modules of each kind."""


class Base:
    """The sites of one base.

    Made by `from_model` or `from_folder`; both give the same sites, in the order of their names (layer 10 after 9).
    """

    def __init__(
        self,
        sites: Iterable[Site],
        arch: Arch,
        source: str,
        others: Mapping[str, str] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self._config, self._others, sites = config or {}, dict(others or {}), list(sites)
        self.encodes = encodes(self._config, (site.name for site in sites))
        """Whether an encoder reads the text for its decoder, as T5's does."""
        self.shared = shared_tables(sites) if self.encodes else {}
        """Tables of such a base that are no sites -> why not."""
        self._others |= self.shared
        sites = [site for site in sites if site.name not in self.shared]
        self.sites: dict[str, Site] = {s.name: s for s in sorted(sites, key=lambda site: natural(site.name))}
        self.arch = arch
        self.source = source
        self.model = model
        self.tokenizer = tokenizer
        """Gives the base's tokenizer, for values that are taken from a text."""
        self.body, self.poolers = body_of(model)
        """Where it is a body without a head: what names lack in other tools' model of it, and what that has beside."""
        self.codec: str | None = None
        self.kept: frozenset[str] = frozenset()
        """Sites that stay as they are where the base is quantized, see `keep`."""
        self.virtual = virtual_sites(self.sites, arch, self._config, source)
        """Sites that hold no weight: ``kv`` and ``tokens`` of a causal decoder. `match` never chooses them."""
        self.rows = row_sites(self.sites, embedding_table(self.sites.values(), arch), arch.is_head)
        """Where rows of single tokens act: beside the embedding table and an untied output head."""

    @property
    def decoder(self) -> Decoder:
        """The sizes of its decoder; ``HK-ARCH`` where virtual tokens have no known place."""
        return decoder_of(self.arch, self._config, self.source)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it is or was saved as: ``LlamaForCausalLM``."""
        named = self._config.get("architectures")
        return (self.source,) if self.model is not None else tuple(map(str, named if isinstance(named, list) else ()))

    def find(self, name: str) -> Site | None:
        """The site of that name, a virtual one too, or None."""
        return self.sites.get(name) or self.virtual.get(name) or self.rows.get(name)

    def modules(self) -> frozenset[str]:
        """Names of the modules that hold weights, and of those that they are in."""
        ends = (name.split(".") for name in self.sites)
        return frozenset(".".join(steps[:n]) for steps in ends for n in range(1, len(steps) + 1))

    def beside_experts(self) -> set[str]:
        """Sites whose last name is that of matrices of experts: shared experts, and dense layers of a mixture.

        On transformers 5 PEFT takes a target of that name for the experts, wherever it is.
        """
        lasts = {name.rpartition(".")[2] for name, s in self.sites.items() if s.number is None and is_expert(name)}
        return {name for name in self.sites if name.rpartition(".")[2] in lasts and not is_expert(name)}

    def linear(self) -> list[Site]:
        """Its linear layers: the matrices of experts among them where the files hold each alone."""
        return [site for site in self.sites.values() if site.kind == "linear" and site.number is None]

    def site(self, name: str) -> Site:
        """The site of that name, a virtual one too; it must exist."""
        return self.sites[name] if name in self.sites else {**self.virtual, **self.rows}[name]

    def token_ids(self, text: str, length: int) -> Tensor:
        """The first `length` tokens of `text`, (length,), which is repeated where it has fewer.

        Raises:
            HubkitError: ``HK-TOKENIZER-NEEDED``, ``HK-TOKENIZER-LOAD``, ``HK-CONFIG`` for a text without a token.
        """
        tokenizer = self.tokenizer() if self.tokenizer is not None else None
        if tokenizer is None:
            raise HubkitError(
                "HK-TOKENIZER-NEEDED",
                "values are to be taken from a text and the base has no tokenizer at hand",
                where=self.source,
                fix="load the base from its folder, or leave the text out",
            )
        ids: list[int] = tokenizer(text)["input_ids"]
        if not ids:
            raise HubkitError("HK-CONFIG", "the text that values are to be taken from has no token", have=repr(text))
        return torch.tensor((ids * -(-length // len(ids)))[:length])

    def embed(self, ids: Tensor) -> Tensor:
        """The base's embeddings of token ids (n,), (n, hidden), on the CPU."""
        table = self.site("tokens")
        if table.module is not None:
            found: Tensor = table.module(ids.to(table.device))
            return found.detach().cpu()
        return table.weight()[:, ids].t()

    def keys_values(self, ids: Tensor) -> Tensor:
        """What the base's own attention makes of a text: keys and values, (layers, 2, kv_heads, n, head_dim).

        Args:
            ids: its tokens, (n,).

        Raises:
            HubkitError: ``HK-BASE-NEEDED`` where only files are at hand.
        """
        from hubkit.tensors.front.encoder_hooks import run_once

        if self.model is None:
            raise HubkitError(
                "HK-BASE-NEEDED",
                "keys and values of a text need the base in memory",
                where=self.source,
                fix="make the adapter on a loaded model, or choose another init",
            )
        rows = run_once(self.model, self, {"input_ids": ids[None].to(self.site("tokens").device)})
        return torch.stack([torch.stack([keys[0].cpu(), values[0].cpu()]) for keys, values in rows])

    @classmethod
    def from_model(cls, model: nn.Module) -> Base:
        """The sites of a live model: its Linear, Conv1D (GPT-2), Embedding and norm modules, and its blocks."""
        config = _live_config(model)
        arch = arch_for(config)
        sites: list[Site] = []
        others: dict[str, str] = {}
        first: dict[int, str] = {}
        naming = file_naming(model)
        held = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
        require_weights_of_their_own(held, config, type(model).__name__)
        for path, parameter in heads_last(model, model.named_parameters(remove_duplicate=False)):
            first.setdefault(id(parameter), naming(path) or path)
        for path, module in model.named_modules():
            kind, weight = _kind(module), getattr(module, "weight", None)
            own = naming(f"{path}.weight") if kind else None  # None: made of several tensors of the files
            name = (own or path).removesuffix(".weight")
            if own is None or not isinstance(weight, Tensor) or weight.dim() != _DIMENSIONS[kind] or arch.skips(name):
                others[path] = ""
                continue
            transposed = kind == "embedding" or type(module).__name__ == "Conv1D"
            rows, columns = (*weight.shape, 1)[:2]
            bias = getattr(module, "bias", None)
            bias_name = first.get(id(bias), f"{name}.bias") if isinstance(bias, Tensor) else None
            shape, dtype = (columns, rows) if transposed else (rows, columns), weight.dtype
            packed, coded = packed_facts(module), is_coded(dtype)
            if packed is not None:
                (shape, dtype, transposed), coded = packed, False
            elif coded:
                dtype = bias.dtype if isinstance(bias, Tensor) else computed_in(config)
            twin = first.get(id(weight), own)
            tied = twin != own and kind == "linear"
            name = tied_name(name, twin, config) if tied and arch.is_head(name) else name
            made = partial(Site, name, kind, shape, dtype, transposed, twin, bias_name, tied, module=module)
            sites.append(made(packed=packed is not None, coded=coded))
        folder = str(getattr(model, "name_or_path", ""))
        reader = partial(load_tokenizer, folder) if folder and Path(folder, "tokenizer_config.json").is_file() else None
        for name, one in experts_of(model, arch.holds_experts).items():
            if not arch.skips(name):
                number, dtype = one.number if one.whole else None, one.all.dtype
                site = Site(name, "linear", one.shape, dtype, one.turned, one.stored, None, number=number, module=one)
                sites.append(site)
        sites += block_sites(sites, arch, config, model)
        return cls(sites, arch, type(model).__name__, others, config=config, model=model, tokenizer=reader)

    @classmethod
    def from_headers(
        cls,
        headers: Mapping[str, TensorInfo],
        config: Mapping[str, object],
        source: str,
        read: ReadTensor | None = None,
    ) -> Base:
        """The sites of a base given by the headers of its files (no module, no weight in memory)."""
        arch = arch_for(config)
        sites: list[Site] = []
        packed, codes = PackedHeaders(headers, read, source), coded_weights(headers, config, read, source)
        # bitsandbytes turns the layers of GPT-2 round, and its files do not say so
        codes = {name: one for name, one in codes.items() if name.split(".")[-2] not in arch.transposed}
        headers = decoded_headers(headers, codes.values(), computed_in(config))
        require_weights_of_their_own(headers, config, source)
        bare = arch.leaves_out(headers)
        for tensor, info in headers.items():
            stem, _, last = tensor.rpartition(".")
            leaf = stem.rpartition(".")[2]
            if len(info.shape) == 3 and arch.holds_experts(tensor):
                sites += expert_sites(tensor, info, arch.experts_turned, computed_in(config), read)
                continue
            is_norm = len(info.shape) == 1 and arch.is_norm(leaf) and f"{stem}.running_mean" not in headers
            if last != "weight" or not stem or not (is_norm or len(info.shape) == 2):
                continue
            name = arch.prefix + stem if bare and not arch.is_head(stem) else stem
            uncalled = leaf == "out_proj" and f"{stem.removesuffix(leaf)}in_proj_weight" in headers
            if uncalled or arch.skips(name):
                continue
            kind = "norm" if is_norm else "embedding" if leaf in arch.embeddings else "linear"
            transposed = kind == "embedding" or (kind == "linear" and leaf in arch.transposed)
            rows, columns = (*info.shape, 1)[:2]
            shape, dtype = (columns, rows) if transposed else (rows, columns), torch_dtype(info.dtype)
            coded = tensor in codes or (is_coded(dtype) and tensor not in packed)
            dtype = computed_in(config) if coded else dtype
            bias, reader = f"{stem}.bias" if f"{stem}.bias" in headers else None, read
            if tensor in packed:
                shape, dtype = packed.facts(tensor)
                reader = packed.reader(tensor, transposed)
            made = partial(Site, name, kind, shape, dtype, transposed, tensor, bias, read=reader)
            sites.append(made(packed=tensor in packed, coded=coded, codes=codes.get(tensor)))
        sites = with_tied_head(sites, arch, config, read, headers)
        others = dict.fromkeys(in_mxfp4({name: info.shape for name, info in headers.items()}), DECODED["mxfp4"])
        return cls([*sites, *block_sites(sites, arch, config)], arch, source, others, config=config)

    @classmethod
    def from_folder(cls, path: Path) -> Base:
        """The sites of a base on disk, from headers; weights are read when `Site.weight` asks for them."""
        from hubkit.tensors.files.shards import open_shards

        shards = open_shards(path)
        base = cls.from_headers(shards.headers, shards.config, str(path), shards.read)
        base.tokenizer = partial(load_tokenizer, path)
        return base

    def match(
        self, targets: str | Sequence[str], kind: str | Sequence[str] | None = None, *, layers: Layers | None = None
    ) -> list[Site]:
        """The sites that `targets` name, in order.

        Args:
            targets: ``"all-linear"`` (every linear but the output heads; of a model that sees, the text part alone),
                ``"all-norm"``; a list of names, or one name, each matching a module path or its last components; any
                other string is a regular expression for a whole path, which leaves out norms where the method cannot
                serve them. Experts that the files hold in one tensor are meant by what says ``experts``: a name
                (``experts.down_proj`` is that of all of them) or an expression.
            kind: site kinds the method can serve; None for linear layers and embeddings.
            layers: only modules in these layers: ``"0-11"``, ``"0-3,8"`` or a list of numbers; None for all modules.

        Raises:
            HubkitError: ``HK-TARGET`` when any one target matches nothing or a kind that the method cannot serve, or
                for a layer that the base does not have; ``HK-CONFIG`` for `layers` that are no numbers.
        """
        kinds = (kind,) if isinstance(kind, str) else tuple(kind or ("linear", "embedding"))
        return named_sites(self.sites, targets, kinds, layers, arch=self.arch, source=self.source, others=self._others)

    def quantize(self, codec: str) -> None:
        """Asks for the base to be quantized: called by the `inject` of a method that trains on a quantized base.

        Nothing happens here: an `Attached` quantizes the live layers when it gets an adapter made for this base, and
        `load_base` while it loads; a base known by its headers only notes the codec. Layers that are quantized
        already, whatever their codec, stay as they are.

        Raises:
            HubkitError: ``HK-CODEC`` for one that hubkit does not write, and for an encoder-decoder.
        """
        if self.encodes:  # T5 casts to the dtype of its weights, whatever they hold
            what, fix = "an encoder-decoder is not quantized", "a --method in 16 bits: hubkit methods"
            raise HubkitError("HK-CODEC", what, where=self.source, have=codec, fix=fix)
        if codec != CODEC:
            raise HubkitError("HK-CODEC", f"unknown codec {codec!r}", want=CODEC, have=codec)
        self.codec = codec

    def keep(self, names: Iterable[str]) -> None:
        """Asks for modules to stay as they are where the base is quantized: a head that was made is no part of it."""
        self.kept |= {*names}

    def to_quantize(self) -> list[Site]:
        """The sites that quantizing is about: linear layers but heads and what is kept, each with its own weight.

        Raises:
            HubkitError: ``HK-BASE-FORMAT`` for a base that stores codes already.
        """
        linear = [s for s in self.linear() if not (self.arch.is_head(s.name) or s.name in self.kept)]
        refuse_codes((site.name for site in linear if site.coded), self.source)
        own = (s for s in linear if not s.tied and not s.packed and s.dtype.is_floating_point)
        return [s for s in own if s.module is None or (packed_of(s.module) is None and _quantizable(s.module))]


def _quantizable(module: nn.Module) -> bool:
    return own_forward(module) is None if isinstance(module, Expert) else quantizable(module)


def _live_config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return {**config.to_dict(), "model_type": config.model_type}  # the class's own, unless it is set otherwise
    return {} if config is None else dict(vars(config))


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return ""  # of torch's own attention, which multiplies by its weight and never calls it
    if isinstance(module, nn.Linear | QuantLinear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    if type(module).__name__.endswith(NORMS) and {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return "norm"
    return ""
