"""Merging into a live model for a while: the weights of the active mix take the place of the base's, which are kept.

    with attached.merge():
        attached.generate(...)        # no hook does anything: the speed of the bare base

What is merged is what `hubkit merge` would write, to the bit. Nothing is subtracted back: the tensors that were there
are put in their places again, so any number of merges leaves the base as it was, in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.site import Site
from hubkit.tensors.experts.expert import Expert
from hubkit.tensors.fourbit.dense import Dense
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.weights.merging import BESIDE, MergePlan


class Folded:
    """A mix merged into the weights of a live model until `undo`; also a context manager, whose value is the model.

    Everything is computed before the first weight changes; it takes memory for one more copy of the weights that
    change, decoded where they are packed: quantized layers multiply by their merged weights meanwhile. No other thread
    may run the model while it is merged or restored: it would meet weights of both kinds.

    Args:
        model: the live base.
        plan: what is merged, at its own sites.
        hold: told of this object once the weights are replaced, and of None once they are back.

    Raises:
        HubkitError: ``HK-NOT-MERGEABLE``; ``HK-QUANT-STATE`` for layers of bitsandbytes whose first forward came
            before the adapters; ``HK-NAN``. The model is then as it was.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, plan: MergePlan, hold: Callable[[Folded | None], None]) -> None:
        replaced, split, packed = _weights(plan)
        self._model, self._hold, self._merged = model, hold, True
        self._before = [(parameter, parameter.data) for parameter, _ in replaced]
        self._dense: list[Dense] = []
        self._tied = [(module, module.get_parameter("weight")) for module, _ in split]
        try:
            for module, value in split:
                module.register_parameter("weight", nn.Parameter(value, requires_grad=False))
            for parameter, value in replaced:
                parameter.data = value
            self._dense += [Dense(module, value) for module, value in packed]
            hold(self)
        except BaseException:
            self._restore()
            raise

    def undo(self) -> None:
        """Puts the base's own tensors back; doing it twice changes nothing."""
        if self._merged:
            self._restore()
            self._merged = False
            self._hold(None)

    def _restore(self) -> None:
        for dense in self._dense:
            dense.undo()
        for parameter, value in self._before:
            parameter.data = value.to(parameter.device, parameter.dtype)  # it may have been moved or cast meanwhile
        for module, own in self._tied:
            merged = module.get_parameter("weight")
            own.data = own.data.to(merged.device, merged.dtype)
            module.register_parameter("weight", own)

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_Modules = list[tuple[nn.Module, Tensor]]


def _weights(plan: MergePlan) -> tuple[list[tuple[nn.Parameter, Tensor]], _Modules, _Modules]:
    """Parameter -> its merged value; the output head -> its own weight, where it ceases to be that of a table; and
    quantized layers -> their merged weights, (out, in)."""
    replaced: list[tuple[nn.Parameter, Tensor]] = []
    split: _Modules = []
    packed: _Modules = []
    experts: dict[nn.Parameter, Tensor] = {}
    head = plan.tied_head
    for site in plan.sites:
        if isinstance(site.module, Expert):
            all = site.module.all
            site.module.within(experts.setdefault(all, all.detach().clone())).copy_(plan.weight(site))
            continue
        if packed_of(site.module) is not None:
            assert site.module is not None
            packed.append((site.module, plan.weight(site).t() if site.transposed else plan.weight(site)))
            replaced += _bias(plan, site)
            continue
        module, weight = _live(site, "weight")
        value = plan.weight(site).to(weight.device)
        if site.tied:
            split.append((module, value))
        else:
            replaced.append((weight, value))
        replaced += _bias(plan, site)
    if head is not None and not split:
        module, weight = _live(head, "weight")
        split.append((module, weight.data))
    return [*replaced, *experts.items()], split, packed


def _bias(plan: MergePlan, site: Site) -> list[tuple[nn.Parameter, Tensor]]:
    if plan.keeps_bias(site) or plan.delta(site).bias is None:
        return []
    if site.bias_tensor is None:
        raise HubkitError(
            "HK-NOT-MERGEABLE", f"the mix adds a bias at {site.name} and the base has none there", fix=BESIDE
        )
    _, own = _live(site, "bias")
    value = plan.bias(site)
    assert value is not None
    return [(own, value.to(own.device))]


def _live(site: Site, role: str) -> tuple[nn.Module, nn.Parameter]:
    module = site.module
    assert module is not None
    return module, module.get_parameter(role)
