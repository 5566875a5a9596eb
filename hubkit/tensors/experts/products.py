"""What runs in a module of experts while something acts at one of them; see the room's own drawing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.torch import on_cpu, own_forward, set_forward, twin_of
from hubkit.errors import HubkitError
from hubkit.tensors.experts.expert import Expert, by_tensor, product
from hubkit.tensors.fourbit.linear import shell

Matrices = Sequence[Sequence[nn.Module]]
"""Of one tensor of a module of experts: expert -> the linear layers whose weights are its rows, in order."""


class Products:
    """The forward of a module of experts whose products are those of its `Expert` layers, while something acts there.

    Args:
        holder: the module.
        experts: its layers.
        acts: whether something acts now; always, by default.
    """

    def __init__(self, holder: nn.Module, experts: Iterable[Expert], acts: Callable[[], bool] = lambda: True) -> None:
        self._holder, self._tensors, self._acts = holder, by_tensor(experts), acts
        self._before = own_forward(holder)

    def attach(self) -> None:
        """Has the holder run this."""
        set_forward(self._holder, self)

    def remove(self) -> None:
        """Gives the holder back what it ran before."""
        set_forward(self._holder, self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._acts():
            run = self._before or type(self._holder).forward.__get__(self._holder)
            return run(*args, **kwargs)
        return run_by_products(self._holder, self._tensors, args, kwargs)

    def works(self) -> bool:
        """Whether the holder's forward multiplies token by token with its tensors, and does nothing else with them."""
        if not all(_is_whole(layers) for matrices in self._tensors.values() for layers in matrices):
            return False
        turned = multiplied(self._holder, self._tensors)
        return turned is not None and not any(turned.values())


class QuantExperts(nn.Module):
    """A module of experts whose matrices are packed layers below it, each named as in the files: ``7.gate_proj``.

    Args:
        holder: the module that it takes the place of, of which nothing but the forward remains.
        experts: name below the holder -> which of its matrices.
    """

    def __init__(self, holder: nn.Module, experts: Mapping[str, Expert]) -> None:
        super().__init__()
        layers: dict[Expert, nn.Module] = {}
        for name, expert in experts.items():
            number, _, last = name.partition(".")
            if number not in dict(self.named_children()):
                self.add_module(number, nn.Module())
            layers[expert] = shell(expert)
            self.get_submodule(number).add_module(last, layers[expert])
        tensors = by_tensor(experts.values())
        vars(self)["_tensors"] = {name: [[layers[e] for e in row] for row in rows] for name, rows in tensors.items()}
        vars(self)["_holder"] = twin_of(holder, parameters={})  # of no child: its forward alone is wanted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run_by_products(vars(self)["_holder"], vars(self)["_tensors"], args, kwargs)


def run_by_products(holder: nn.Module, tensors: Mapping[str, Matrices], args: tuple[Any, ...], kwargs: Any) -> Any:
    """The forward of a module of experts with an object in the place of each of its tensors.

    Args:
        tensors: name of the parameter -> the layers that are asked for each product.
    """
    places = {name: _Fused(matrices) for name, matrices in tensors.items()}
    own = {name: parameter for name, parameter in holder.named_parameters(recurse=False) if name not in places}
    return _run(holder, own, places, args, kwargs)


def multiplied(holder: nn.Module, tensors: Iterable[str]) -> dict[str, bool] | None:
    """Whether each of a module's tensors of experts is multiplied by as one of turned matrices; None where something
    else than multiplying is done with one.

    Found by running its forward with objects in their place that take note. Which arguments it has says how it is
    called: with tokens and where they go, with tokens that lie by expert and how many each has, or with tokens that all
    experts get.
    """
    parameters, wanted = dict(holder.named_parameters(recurse=False)), set(tensors)
    count, *widths = next(p.shape for name, p in parameters.items() if name in wanted)
    takes = len(inspect.signature(inspect.unwrap(type(holder).forward)).parameters) - 1
    for width in dict.fromkeys(reversed(widths)):
        places = {name: _Blank(parameters[name].shape) for name in wanted}
        try:
            with torch.no_grad(), on_cpu():  # wherever the model is being made
                own = {name: torch.zeros(p.shape) for name, p in parameters.items() if name not in places}
                x = torch.zeros(count if takes < 3 else 1, width)
                tokens = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
                rest: dict[int, tuple[Any, ...]] = {1: (), 2: ([1] * count,)}
                made = _run(holder, own, places, (x, *rest.get(takes, tokens)), {})
        except Exception:  # somebody else's forward, tried with what it may not know
            continue
        turned = {name: place.turned for name, place in places.items()}
        alone = takes == 2 and len(places) == 1  # one matrix of each, not what experts are made of
        if isinstance(made, Tensor) and (alone or made.numel() == x.numel()) and None not in turned.values():
            return {name: bool(value) for name, value in turned.items()}
    return None


def _run(holder: nn.Module, own: Any, places: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    # beneath what transformers chooses (ExpertsInterface) is its loop over one expert after the other
    forward = inspect.unwrap(type(holder).forward)
    return forward(twin_of(holder, parameters=own, **places), *args, **kwargs)


def _is_whole(layers: Sequence[Expert]) -> bool:
    """Whether the rows of `layers` are those of one expert's whole matrix, in order."""
    starts, stops = [one.rows.start for one in layers], [one.rows.stop for one in layers]
    return bool(layers) and [0, *stops] == [*starts, layers[0].all.shape[1]] and not any(e.turned for e in layers)


class _Fused:
    """In the place of the tensor of all experts: gives the matrix of one, and can be multiplied by as a whole."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices

    @property
    def shape(self) -> torch.Size:
        first = self._matrices[0][0]
        assert isinstance(first, Expert), "packed experts are multiplied by one after the other"
        return first.all.shape

    def __getitem__(self, number: Any) -> _Matrix:
        return _Matrix(self, int(number), isinstance(number, Tensor) and number.dim() == 1)

    def product(self, x: Tensor, number: int, turned: bool) -> Tensor:
        """``x Wᵀ``, (..., out), with whatever acts at the layers whose rows are W."""
        layers = self._matrices[number]
        plain = [layer for layer in layers if isinstance(layer, Expert) and own_forward(layer) is None]
        if any(isinstance(layer, Expert) and layer.turned != turned for layer in layers):
            raise _refusal("a product with its other side")
        if len(plain) == len(layers):
            made = _asked(plain, x, product(x, plain[0].all[number], turned))
        else:  # packed
            made = [layer(x) for layer in layers]
        return made[0] if len(made) == 1 else torch.cat(made, -1)

    def products(self, x: Tensor) -> Tensor:
        """The same for all experts, each with tokens of its own: x (experts, tokens, in)."""
        first = self._matrices[0][0]
        assert isinstance(first, Expert)
        whole = torch.bmm(x, first.all)
        pairs = zip(self._matrices, x, whole, strict=True)
        return torch.stack([_asked(layers, x, made)[0] for layers, x, made in pairs])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function not in (torch.bmm, Tensor.bmm) or len(args) != 2 or kwargs or not isinstance(args[1], _Fused):
            raise _refusal(function)
        return args[1].products(args[0])


def _asked(layers: Sequence[nn.Module], x: Tensor, whole: Tensor) -> list[Tensor]:
    """What experts make of a product: those at which nothing ever acted are not asked."""
    parts = ((layer, whole[..., layer.rows]) for layer in layers if isinstance(layer, Expert))
    return [layer(x, part) if layer.begun else part for layer, part in parts]


class _Blank(_Fused):
    """Makes the products' shapes alone, and notes how it is multiplied by.

    Args:
        shape: of the tensor.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__(())
        self._shape, self.turned = shape, None

    turned: bool | None

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def product(self, x: Tensor, number: int, turned: bool) -> Tensor:
        if self.turned not in (None, turned) or not 0 <= number < self._shape[0]:
            raise _refusal("products of two kinds")
        self.turned = turned
        return product(x, x.new_zeros(self._shape[1:]), turned)

    def products(self, x: Tensor) -> Tensor:
        self.turned = True
        return torch.bmm(x, x.new_zeros(self._shape))


_LINEAR = (F.linear,)
_TURNED = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class _Matrix:
    """In the place of the matrix of one expert: can be multiplied by, from the right, as models do.

    Args:
        tensor: of all of them.
        number: of the expert.
        listed: it was asked for by a list of one number, and has a dimension more.
    """

    def __init__(self, tensor: _Fused, number: int, listed: bool) -> None:
        self._tensor, self._number, self._listed = tensor, number, listed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        turned = function in _TURNED
        if not (turned or function in _LINEAR) or len(args) != 2 or kwargs or not isinstance(args[1], _Matrix):
            raise _refusal(function)
        x, matrix = args
        made: Tensor = matrix._tensor.product(x, matrix._number, turned)
        return made[None] if matrix._listed and made.dim() < 3 else made


def _refusal(function: Any) -> HubkitError:
    have = str(getattr(function, "__name__", function))
    what = "the base computes its experts in a way in which nothing can act at one of them"
    return HubkitError("HK-EXPERTS", what, have=have, fix="targets without the experts")
