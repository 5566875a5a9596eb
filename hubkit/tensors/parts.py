"""Parts: what one adapter adds at one site. A plugin subclasses these; the host attaches, weighs, casts, saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from hubkit.tensors.base import Base, Site


class Part(nn.Module):
    """What one adapter adds at one site: its parameters are its tensors, their attribute names its roles."""

    wide: ClassVar[frozenset[str]] = frozenset()
    """Roles that stay in the dtype of accumulation when the others are cast to the base's: a few numbers that scale
    whole rows, say, whose rounding would outweigh what was trained."""

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
        own = self._parameters if not self._modules else dict(self.named_parameters())
        return {role: parameter for role, parameter in sorted(own.items()) if parameter is not None}

    def values(self) -> dict[str, Tensor]:
        """role -> its value now, with what training has changed so far: what is stored and merged."""
        return dict(self.roles())

    def trainables(self) -> dict[str, nn.Parameter]:
        """role -> the parameter that training moves for it; the roles themselves unless a part says otherwise."""
        return self.roles()

    def settle(self) -> None:
        """Ends training: puts `values` into the roles. Needed by parts whose `trainables` are not their roles."""


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
        # past torch's setter: loading an adapter makes hundreds of parts
        self._parameters["A"] = nn.Parameter(torch.empty(rank, in_features))
        self._parameters["B"] = nn.Parameter(torch.empty(out_features, rank))
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
