"""What stands in front of one forward's text: keys and values per layer, the view of a cache that has them first, and
the masks that see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.compat.torch import changes_of
from hubkit.tensors.device import indices
from hubkit.tensors.parts.part import Tokens

T = TypeVar("T")
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, kv_heads, n, head_dim); (rows, ...) where rows have their own."""


class Front:
    """Virtual keys and values of one forward.

    Args:
        layers: of each layer; empty when there are none.
        length: n.
        lengths: where rows have different numbers of them, the number of each row, (rows,); they lie at the right end.
    """

    def __init__(self, layers: Layers, length: int, lengths: Tensor | None = None) -> None:
        self.layers = layers
        self.length = length
        self.shift: int | Tensor = length if lengths is None else lengths[:, None]
        """By how much positions of the text move, (rows, 1) where rows differ."""
        places = None if lengths is None else torch.arange(length, device=lengths.device)
        self._seen = None if lengths is None or places is None else (places >= length - lengths[:, None])[:, None, None]
        self.recorded: dict[int, tuple[Tensor, Tensor]] | None = None
        """Where it is a mapping, it receives the text's own keys and values of each layer that runs."""
        self.leaves: list[Tensor] = []
        self._made: list[Tensor] = []
        self._mask: tuple[Any, Any, Tensor] | None = None

    def before(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`keys` and `values`, (rows, kv_heads, tokens, head_dim), with those of `layer` in front."""
        if self.recorded is not None:
            self.recorded[layer] = (keys, values)
        if not self.layers:
            return keys, values
        first = [t.to(keys).expand(keys.shape[0], -1, -1, -1) for t in self.layers[layer]]
        return torch.cat([first[0], keys], 2), torch.cat([first[1], values], 2)

    def widened(self, mask: Tensor | None, text: Tensor, keys: Callable[[], int]) -> tuple[Tensor | None, int]:
        """The mask that also lets every token see what is in front, and how many keys of the text it covers (0: all).

        Args:
            mask: (rows, 1, tokens, keys), True or 0 where a key is seen. None: every token sees those up to its own,
                of a cache that may be longer; a single token sees all.
            text: (rows, tokens, hidden).
            keys: the number of keys that a single token sees.
        """
        tokens = text.shape[1]
        if not self.length or (mask is None and tokens == 1 and self._seen is None):
            return mask, 0
        count = keys() if mask is None and tokens == 1 else tokens
        version = (tokens, count, text.device) if mask is None else changes_of(mask)
        known = self._mask
        if known is None or known[0] is not mask or known[1] != version:
            if mask is None:
                mine = torch.ones(1, 1, tokens, count, dtype=torch.bool, device=text.device).tril_(count - tokens)
                known = self._mask = (mask, version, self._before_mask(mine))
            else:
                known = self._mask = (mask, version, self._before_mask(mask))
        return known[2], tokens if mask is None and tokens > 1 else 0

    def _before_mask(self, mask: Tensor) -> Tensor:
        """`mask` with that of what is in front, on the left."""
        if self._seen is None:
            return F.pad(mask, (self.length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
        seen = self._seen.to(mask.device).expand(-1, mask.shape[1], mask.shape[2], -1)
        if mask.dtype != torch.bool:
            # made in the mask's own dtype: the least fp64 is no fp32
            seen = mask.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, mask.expand(seen.shape[0], -1, -1, -1)], -1)

    def part_from_graph(self) -> None:
        """Makes leaves of the keys and values, for a backward that runs layer by layer (checkpointing).

        Their gradients collect in them, and `Anchor`, whose backward is the last of the layers', hands them on.
        """
        self._made = [tensor for pair in self.layers for tensor in pair]
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._made]
        self.layers = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))

    def anchored(self, hidden: Tensor) -> Tensor:
        """`hidden`, the input of the first layer, tied to what the leaves are copies of."""
        tied: Tensor = Anchor.apply(hidden, self.leaves, *self._made)  # type: ignore[no-untyped-call]
        return tied


class Anchor(torch.autograd.Function):
    """Passes the first layer's input on; its backward gives the gradients that leaves collected to their originals.

    It also makes that input require grad, without which reentrant checkpointing would give no gradient at all.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: Sequence[Tensor], *made: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad if ctx.needs_input_grad[0] else None, None, *grads


class CacheView:
    """A cache, or none, as an attention module sees it: with what is in front of the text.

    Args:
        cache: the model's own; only the text's keys and values go into it.
        front: what comes first.
        crop: keys of the text that the mask covers; 0 for all.
    """

    def __init__(self, cache: Any, front: Front, crop: int) -> None:
        self._cache, self._front, self._crop = cache, front, crop

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the cache's own."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        if self._crop:
            keys, values = keys[:, :, : self._crop], values[:, :, : self._crop]
        return self._front.before(keys, values, layer_idx)

    def get_seq_length(self, *args: Any) -> int:
        """As the cache's own: what attention takes the place of its first token for (Llama 4, MPT)."""
        own = 0 if self._cache is None else int(self._cache.get_seq_length(*args))
        return own + self._front.length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def front_of_rows(fronts: Mapping[int, Front], of: Sequence[int | None]) -> Front:
    """What is in front of a batch whose rows have different mixes: each row's own, nothing where it has none.

    Args:
        fronts: number of a mix -> what it puts in front.
        of: the mix of each row.
    """
    some = next(front for front in fronts.values())
    length = max(front.length for front in fronts.values())
    layers: Layers = []
    for layer, like in enumerate(some.layers):
        padded = {
            number: [F.pad(side.to(like[0]), (0, 0, length - front.length, 0)) for side in front.layers[layer]]
            for number, front in fronts.items()
        }
        nothing = [side.new_zeros(1, side.shape[1], length, side.shape[3]) for side in like]
        sides = zip(*(padded.get(number, nothing) if number is not None else nothing for number in of), strict=True)
        keys, values = (torch.cat(side) for side in sides)
        layers.append((keys, values))
    lengths = [0 if number is None or number not in fronts else fronts[number].length for number in of]
    same = all(own == length for own in lengths)
    return Front(layers, length, None if same else indices(tuple(lengths), some.layers[0][0].device))


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The tensors along `dim`; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def runs_of_one_kind(parts: Sequence[T]) -> Iterator[list[T]]:
    """Neighbours of one kind together: embeddings that follow one another are run as one row."""
    for _, group in groupby(parts, key=lambda part: isinstance(part, Tokens)):
        yield list(group)
