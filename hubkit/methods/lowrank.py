"""Options that every method with a pair of factors B·A has, spelled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from hubkit.errors import HubkitError
from hubkit.methods.patterns import pattern_value
from hubkit.methods.recipes import doubled_rank
from hubkit.tensors.base.layers import layer_numbers

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.part import Edit, Part


@dataclass(frozen=True)
class LowRankConfig:
    """Configuration shared by methods with factors A (r, in) and B (out, r).

    Args:
        targets: ``all-linear`` (all but the output head), an expression, or names of modules.
        rank: r.
        alpha: numerator of the scale.
        dropout: probability with which components of x are dropped before A, in training only.
        rslora: scale by 1/sqrt(r) instead of 1/r.
        rank_pattern: module expression -> r, where it differs.
        alpha_pattern: module expression -> alpha, where it differs.
        layers: numbers of the layers to act in, ``0-11`` or ``0,4,8-11``; all when empty.
        lora_plus_ratio: learning rate of B as a multiple of that of A (LoRA+, https://arxiv.org/abs/2402.12354).
        modules_to_save: names of modules that are trained as a whole beside the factors: heads, embeddings, norms.
        tied: where the base ties its output head to its embeddings and one of the two is chosen: break, only that one
            changes, and the merged model has two tensors; keep, one change acts at both, and they stay tied.
        add_tokens: tokens that the base's tokenizer does not have: the adapter holds their rows of the embeddings and
            of an untied output head.
        token_ids: ids of the tokens whose rows are trained; the last of them are those of add_tokens, which training
            finds.
    """

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: str | tuple[int, ...] = ()
    lora_plus_ratio: float = 1.0
    modules_to_save: tuple[str, ...] = ()
    tied: Literal["keep", "break"] = "break"
    add_tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = [f"rank {r}" for r in (self.rank, *self.rank_pattern.values()) if r < 1]
        wrong += [] if 0 <= self.dropout < 1 else [f"dropout {self.dropout}"]
        wrong += [] if self.lora_plus_ratio > 0 else [f"a ratio of {self.lora_plus_ratio}"]
        if wrong:
            want = "rank >= 1, 0 <= dropout < 1, a ratio of learning rates above 0"
            raise HubkitError("HK-CONFIG", "out of range", want=want, have=wrong)
        if self.layers:
            layer_numbers(self.layers)

    def rank_at(self, site: str) -> int:
        """r of one site."""
        return pattern_value(self.rank_pattern, site, self.rank)

    def scale_at(self, site: str) -> float:
        """s of one site."""
        rank, alpha = self.rank_at(site), pattern_value(self.alpha_pattern, site, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def learning_rate(self, site: Site, role: str) -> float:
        """What multiplies the learning rate of one tensor: in a linear layer all but A have the ratio, as in PEFT."""
        return self.lora_plus_ratio if role in ("B", "m") and site.kind == "linear" else 1.0

    def grown(self, given: frozenset[str], sites: Mapping[str, Site], fits: Callable[..., int] = max) -> Self | None:
        """Twice the rank, or None where it stays; alpha stays, with which the best rate hardly depends on the rank.

        Args:
            given, fits: as in `hubkit.methods.recipes.doubled_rank`.
            sites: name -> site of each part.
        """
        widths = [min(site.shape) for site in sites.values() if site.kind == "linear"]
        rank = doubled_rank(self.rank, given, widths, fits)
        return None if rank is None else replace(self, rank=rank)

    def sites(self, base: Base, kinds: str | Sequence[str]) -> list[Site]:
        """The sites of `base` that targets and layers choose; see `Base.match`."""
        return base.match(self.targets, kinds, layers=self.layers or None)

    def parts(self, base: Base, kinds: str | Sequence[str], make: Callable[[Site], Edit]) -> dict[str, Part]:
        """What `make` makes at each target, and what `modules_to_save`, `tied` and tokens ask for beside it.

        Raises:
            HubkitError: ``HK-TARGET``; ``HK-HEAD`` for a module that is to be trained as a whole and does not exist;
                ``HK-CONFIG`` for one that is a target, too; ``HK-VOCABULARY`` for ids that cannot be.
        """
        from hubkit.tensors.parts.tied import at_tables, with_tied_heads
        from hubkit.tensors.parts.vocabulary import token_rows
        from hubkit.tensors.parts.whole import WholeModule, whole_sites

        chosen, whole = {site.name for site in self.sites(base, kinds)}, whole_sites(base, self.modules_to_save)
        if self.tied == "keep":
            chosen, whole = at_tables(base, chosen), at_tables(base, whole)
        if self.targets == "all-linear":
            chosen -= whole
        self._refuse(base, kinds, chosen, whole)
        parts: dict[str, Part] = {
            name: WholeModule(site) if name in whole else make(site)
            for name, site in base.sites.items()
            if name in whole or name in chosen
        }
        parts |= token_rows(base, self.token_ids, self.add_tokens)
        return with_tied_heads(base, parts) if self.tied == "keep" else parts

    def _refuse(self, base: Base, kinds: str | Sequence[str], chosen: set[str], whole: set[str]) -> None:
        """Refuses sites that cannot be: chosen twice, of a kind without such parts, or of two scales."""
        from hubkit.tensors.parts.tied import tied_pairs

        packed = {site.name for site in base.to_quantize()} if whole and base.codec else set()
        wrong = [f"{name}: a target, and trained as a whole" for name in sorted(chosen & whole)]
        wrong += [
            f"{name}: quantized, and trained as a whole"
            for name in sorted(whole)
            if name in packed or base.sites[name].packed
        ]
        wrong += [
            f"{name}: the method has no part for an {kind}, where the change of a tied pair is held"
            for name in sorted(chosen)
            if (kind := base.sites[name].kind) not in ((kinds,) if isinstance(kinds, str) else kinds)
        ]
        if self.token_ids or self.add_tokens:
            tables = {site.tensor for site in base.rows.values()}
            wrong += [
                f"{name}: chosen as a module, and for rows of its own"  # PEFT has no such adapter
                for name in sorted(chosen | whole)
                if base.sites[name].kind != "norm" and base.sites[name].tensor in tables
            ]
        if self.tied == "keep":
            wrong += [
                f"{head} and {table}: one change, and two ranks or scales"
                for head, table in tied_pairs(base).items()
                if table in chosen
                and (self.rank_at(head), self.scale_at(head)) != (self.rank_at(table), self.scale_at(table))
            ]
        if wrong:
            raise HubkitError(
                "HK-CONFIG",
                "these modules cannot be trained so",
                where=base.source,
                have=wrong,
                fix="name each module once, in targets or in modules_to_save; or --set tied=break",
            )
