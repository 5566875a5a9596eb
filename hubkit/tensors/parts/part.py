"""Parts: what one adapter adds at one site. A plugin subclasses these; the host attaches, weighs, casts, saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.decoder import no_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site


class Part(nn.Module):
    """What one adapter adds at one site: its parameters are its tensors, their attribute names its roles."""

    wide: ClassVar[frozenset[str]] = frozenset()
    """Roles that stay in the dtype of accumulation when the others are cast to the base's: a few numbers that scale
    whole rows, say, whose rounding would outweigh what was trained."""
    weighable: ClassVar[bool] = True
    """Whether a mix may give it a weight other than 1."""

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        """Sets the values of a fresh part, in place; called once, never for a part that is loaded.

        Args:
            site: where the part acts; ``site.weight()`` may be read.
            base: the whole base.
            generator: seeded by the adapter's seed and the site's name: the only source of randomness to use.
        """
        raise NotImplementedError

    def roles(self) -> dict[str, nn.Parameter]:
        """role -> parameter, in a fixed order."""
        return dict(sorted(self.named_parameters(remove_duplicate=False)))

    def values(self) -> Mapping[str, Tensor]:
        """role -> its value now, with what training has changed so far, in the form that files hold."""
        return self.roles()

    def merged(self) -> Mapping[str, Tensor]:
        """role -> tensor, as a method's ``merge`` gets them: `values`, and any that another part holds."""
        return self.values()

    def trainables(self) -> dict[str, nn.Parameter]:
        """role -> the parameter that training moves for it; the roles themselves unless a part says otherwise."""
        return self.roles()

    def settle(self) -> None:
        """Ends training: puts `values` into the roles. Needed by parts whose `trainables` are not these."""


class Edit(Part):
    """A part that acts at a module: it looks at the module's input and output and says what to add to the output."""

    reads_weight: ClassVar[bool] = False
    """Whether `forward` reads the site's weight or bias: members below it in a stack must then be mergeable."""

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What to add to `y`.

        Args:
            x: the module's input, (..., in); token ids (...) at an embedding.
            y: the module's output so far, (..., out).
            site: shape, weight() and bias() of the module.
        """
        raise NotImplementedError

    def act(self, x: Tensor, y: Tensor, site: Site, owned: bool) -> Tensor:
        """``y + forward(x, y, site)`` where nothing else acts and the weight is 1: the place for a faster way.

        Args:
            owned: nobody else holds `y`, which may be written into.
        """
        return y + self.forward(x, y, site).to(y.dtype)

    def at_head(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """As `forward`, at the output head that is tied to this part's embedding table: its change, transposed.

        Only of a part that can act at an embedding.
        """
        raise NotImplementedError

    def head_values(self) -> Mapping[str, Tensor]:
        """role -> what files repeat at the tied head, in a form that spells both out; nothing by default."""
        return {}


class LowRank(Edit):
    """An edit of the form ``scale · (x Aᵀ) Bᵀ``: neither `y` nor the weight is read.

    The host runs all low-rank parts of a site as one pair of products, shares ``x Aᵀ`` between sites with one input,
    and keeps nothing but x and x Aᵀ for the backward pass. `forward` is the plain formula that this must equal.

    Args:
        site: gives in and out.
        rank: r; A is (r, in), B is (out, r).
        scale: what multiplies B·A.
        dropout: probability with which components of x are dropped before A, in training only.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float
    is_lookup: bool

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        out_features, in_features = site.shape
        self.register_parameter("A", nn.Parameter(torch.empty(rank, in_features)))
        self.register_parameter("B", nn.Parameter(torch.empty(out_features, rank)))
        vars(self).update(scale=scale, dropout=dropout, is_lookup=site.kind == "embedding")

    def lower(self) -> Tensor:
        """A as it acts now, (r, in)."""
        return self.A

    def upper(self) -> Tensor:
        """B as it acts now, (out, r)."""
        return self.B

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = self.down(x, self.lower())
        return low @ (self.upper() * self.scale).to(low.dtype).t()

    def at_head(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.linear(x, self.upper().t().to(x.dtype))
        return low @ (self.lower() * self.scale).to(low.dtype)

    def head_values(self) -> Mapping[str, Tensor]:
        return {"A": self.upper().t(), "B": self.lower().t()}

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """``dropout(x) Aᵀ``, (..., r), in x's dtype; at an embedding the rows of Aᵀ for the ids x."""
        if self.is_lookup:
            return F.embedding(x, factor.t())
        if self.drops:
            x = F.dropout(x, self.dropout, training=True)
        return F.linear(x, factor.to(x.dtype))

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0 and not self.is_lookup


class _Virtual(Part):
    """Tokens that are not in the text: `length` of them in front of every row."""

    weighable = False

    def __init__(self, base: Base, length: int) -> None:
        super().__init__()
        context = base.decoder.context
        if length < 1 or (context is not None and length >= context):
            raise HubkitError(
                "HK-CONFIG",
                "so many virtual tokens leave no room for a text",
                where=base.source,
                want="at least 1" if context is None else f"1 to {context - 1}, the base's context being {context}",
                have=str(length),
            )
        self.length = length


class KV(_Virtual):
    """Learned keys and values that every token of the text attends to: at the virtual site ``kv``.

    The host hands each attention module a view of its cache that has them in front; the cache itself stays the base's.

    Args:
        base: gives layers, heads and head size; an architecture without a place for them is refused (``HK-ARCH``).
        length: n, the number of virtual tokens.
    """

    def __init__(self, base: Base, length: int) -> None:
        if "kv" in base.arch.without:
            raise no_place("kv", base.arch, base.source)
        super().__init__(base, length)
        decoder = base.decoder
        self.shape = (decoder.layers, 2, decoder.kv_heads, length, decoder.head_dim)

    def forward(self) -> Tensor:
        """Keys (as they are after rotary embedding) and values, (layers, 2, kv_heads, n, head_dim)."""
        raise NotImplementedError


class Tokens(_Virtual):
    """Learned embeddings in front of the text's, at the virtual site ``tokens``.

    In a causal decoder the host runs them once per pass, whatever the batch; their keys and values then act as a `KV`.
    In an encoder they run with each row, and what becomes of them is cut off its output.

    Args:
        base: a causal decoder or an encoder with a place for them (else ``HK-ARCH``).
        length: n, the number of virtual tokens.
    """

    def __init__(self, base: Base, length: int) -> None:
        if base.decoder.mutual and not base.arch.encoder:
            raise no_place("tokens", base.arch, base.source, "whose tokens see those behind them")
        super().__init__(base, length)

    def forward(self) -> Tensor:
        """The embeddings, (n, hidden)."""
        raise NotImplementedError


def front_length(parts: Iterable[object]) -> int:
    """How many tokens `parts` put in front of a text: the room that they take of the base's context."""
    return sum(part.length for part in parts if isinstance(part, _Virtual))
