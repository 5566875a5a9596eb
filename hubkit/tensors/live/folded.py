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
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.parts.part import LowRank
from hubkit.tensors.weights.merging import BESIDE, MergePlan


class Folded:
    """A mix merged into the weights of a live model until `undo`; also a context manager, whose value is the model.

    Everything is computed before the first weight changes; it takes memory for one more copy of the weights that
    change. No other thread may run the model while it is merged or restored: it would meet weights of both kinds.

    Args:
        model: the live base.
        plan: what is merged, at its own sites.
        hold: told of this object once the weights are replaced, and of None once they are back.

    Raises:
        HubkitError: ``HK-NOT-MERGEABLE`` for a quantized base; ``HK-NAN``. The model is then as it was.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, plan: MergePlan, hold: Callable[[Folded | None], None]) -> None:
        _require_floats(plan)
        replaced, split = _weights(plan)
        self._model, self._hold, self._merged = model, hold, True
        self._before = [(parameter, parameter.data) for parameter, _ in replaced]
        self._tied = [(module, module.get_parameter("weight")) for module, _ in split]
        try:
            for module, value in split:
                module.register_parameter("weight", nn.Parameter(value, requires_grad=False))
            for parameter, value in replaced:
                parameter.data = value
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


def _require_floats(plan: MergePlan) -> None:
    packed = [site.name for site in plan.sites if packed_of(site.module) is not None]
    if packed:
        raise HubkitError(
            "HK-NOT-MERGEABLE",
            "the base is in 4 bits: rounding to its levels would undo most of the change",
            have=f"{len(packed)} of {len(plan.sites)} weights are packed, first {packed[0]}",
            fix="leave it unmerged; or hubkit merge into the 16-bit base that it was made from",
        )


def _weights(plan: MergePlan) -> tuple[list[tuple[nn.Parameter, Tensor]], list[tuple[nn.Module, Tensor]]]:
    """Parameter -> its merged value; and the output head -> its own weight, where it ceases to be that of a table."""
    replaced: list[tuple[nn.Parameter, Tensor]] = []
    split: list[tuple[nn.Module, Tensor]] = []
    head = plan.tied_head
    for site in plan.sites:
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
    return replaced, split


def _bias(plan: MergePlan, site: Site) -> list[tuple[nn.Parameter, Tensor]]:
    if all(isinstance(a.parts.get(site.name), LowRank | None) for a in plan.adapters.values()):
        return []
    if plan.delta(site).bias is None:
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
