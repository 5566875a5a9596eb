"""A matrix of one expert as a linear layer, and its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.torch import parameters_of

_EXPERT = re.compile(r"(?:.*\.)?experts\.[0-9]+\..+")


def is_expert(name: str) -> bool:
    """Whether a name in the files is that of a module of one expert."""
    return _EXPERT.fullmatch(name) is not None


def expert_names(tensor: str, count: int) -> list[str]:
    """Names of the sites whose weights lie one after the other in one tensor of the files.

    That of the tensor, with the number of the expert before its last part, and ``experts`` before that where it is not
    there, so that an expert is named alike whether the files hold its matrix alone or with others: the fourth one of
    ``mlp.experts.down_proj`` is ``mlp.experts.3.down_proj``, that of ``moe.output_linear.weight`` is
    ``moe.experts.3.output_linear``.
    """
    stem, _, last = tensor.removesuffix(".weight").rpartition(".")
    stem = stem if stem.rpartition(".")[2] == "experts" else f"{stem}.experts"
    return [f"{stem}.{number}.{last}" for number in range(count)]


class Expert(nn.Module):
    """A matrix of one expert as a linear layer, (..., in) -> (..., out), outside the model's tree of modules.

    Args:
        holder: the module that holds all experts.
        tensor: which of its parameters, (experts, ...).
        number: of the expert.
        rows: of its matrix, (out, in), that are this one's.
        stored: name of the tensor in the files that holds it.
        whole: that tensor holds the matrices of all experts, this parameter's own.
        turned: the matrices of the parameter are (in, out); only where they are whole.
    """

    bias = None
    training = True
    begun = False
    """Whether it is a whole module yet: a large mixture has tens of thousands, and few of them are ever called."""
    holder: nn.Module
    tensor: str
    number: int
    rows: slice
    stored: str
    whole: bool
    turned: bool

    def __init__(
        self,
        holder: nn.Module,
        tensor: str,
        number: int,
        rows: slice,
        stored: str = "",
        whole: bool = False,
        turned: bool = False,
    ) -> None:
        own = {"holder": holder, "tensor": tensor, "number": number, "rows": rows}  # not as a child of this one
        vars(self).update(own, stored=stored, whole=whole, turned=turned)

    def __getattr__(self, name: str) -> Any:
        if self.begun:
            return super().__getattr__(name)
        own = dict(vars(self))
        super().__init__()
        vars(self).update(own, begun=True)
        return getattr(self, name)

    @property
    def all(self) -> nn.Parameter:
        """The parameter that holds it."""
        found = parameters_of(self.holder)[self.tensor]
        assert found is not None
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.rows.stop - self.rows.start, self.all.shape[1 if self.turned else 2]

    @property
    def weight(self) -> Tensor:
        """(out, in), or (in, out) where it is turned: a view of the model's own tensor."""
        return self.within(self.all)

    def within(self, all: Tensor) -> Tensor:
        """What it is of a tensor shaped like the parameter: a view."""
        return all[self.number] if self.turned else all[self.number, self.rows]

    def forward(self, x: Tensor, made: Tensor | None = None) -> Tensor:
        """``x Wᵀ``.

        Args:
            made: the result, where the caller has it already.
        """
        given = parameters_of(self).get("weight")  # of a twin that has another weight
        if made is not None and given is None:
            return made
        return product(x, self.weight if given is None else given, self.turned)


def product(x: Tensor, matrix: Tensor, turned: bool) -> Tensor:
    """``x Wᵀ`` as models write it: W is (out, in), or (in, out) and turned."""
    return x @ matrix if turned else F.linear(x, matrix)


def by_tensor(experts: Iterable[Expert]) -> dict[str, list[list[Expert]]]:
    """The experts of one holder in their order, by the parameter that holds them."""
    found: dict[str, list[list[Expert]]] = {}
    for expert in sorted(experts, key=lambda one: (one.number, one.rows.start)):
        if expert.tensor not in found:
            found[expert.tensor] = [[] for _ in range(expert.all.shape[0])]
        found[expert.tensor][expert.number].append(expert)
    return found
