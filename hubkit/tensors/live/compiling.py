"""Training compiled: torch.compile on the layers of the base, with what the active mix adds inside them.

Hooks are no place for that: torch does not look whether a module that had none when it was compiled has one now, so a
layer without an adapter would lend its program to one with, without a word. What is compiled is therefore the layer's
twin: the same modules over the same tensors, without hooks, where the forward of a site is its own and what
its parts add. Layers that are alike share one compilation. Embeddings, head and loss stay as they are, and so does the
layer, which has a forward of its own for as long as it is compiled and runs as ever in passes without gradient.

Sizes of a batch are unknown to what is compiled, from the first one on: another length compiles nothing again, and what
is compiled does not depend on the batch that came first, which in a resumed run is another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.compat.torch import (
    Forward,
    counted_apart,
    hook_numbers,
    is_compile_error,
    own_forward,
    running,
    unhooked_twin_of,
)
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block
from hubkit.tensors.experts.expert import is_expert
from hubkit.tensors.fourbit.linear import swapped
from hubkit.tensors.live.block_hooks import changed
from hubkit.tensors.live.plan import At, Plan

Wrap = Callable[[Forward], Forward]


@contextmanager
def compiled_layers(base: Base, active: Callable[[], Plan], own: Collection[int], **options: Any) -> Iterator[None]:
    """Within it the layers of a live base run compiled in training mode and with gradient, under the mix active now.

    Where torch gives up on compiling more (`recompile_limit`), the pass at hand runs as ever, and right.

    Args:
        base: its sites; its model's layers get a forward each, and are given back without.
        active: the plan of the forward that is running.
        own: numbers of the hooks that act by the plan; in a layer, there must be no others.
        options: of torch.compile.

    Raises:
        HubkitError: ``HK-COMPILE`` for a route, virtual tokens, checkpointing, hooks or forwards of others, a base
            without layers; later for another mix, or where torch cannot compile a layer.
    """
    plan, layers = active(), layers_of(base)
    _require_compilable(base, plan, layers, own)
    compiled = torch.compile(counted_apart(_run), **{"dynamic": True, **_limit(2 * len(layers) + 8), **options})
    forwards = {path: _forward(layer, Twins(base, plan, path), active, compiled) for path, layer in layers.items()}
    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(running(layer, forwards[path]))
        yield


def _limit(programs: int) -> dict[str, Any]:
    """Lets torch compile so many programs, where it takes a limit: layers of different ranks are a program each."""
    return {"recompile_limit": programs} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


def layers_of(base: Base) -> dict[str, nn.Module]:
    """Path -> layer of a live base: modules with linear sites below them whose path ends at its first number."""
    assert base.model is not None, "only a live base has layers to run"
    found: dict[str, nn.Module] = {}
    for site in base.sites.values():
        steps = site.name.split(".")
        end = next((place for place, step in enumerate(steps, 1) if step.isdigit()), len(steps))
        if site.kind == "linear" and end < len(steps):
            path = ".".join(steps[:end])
            found.setdefault(path, base.model.get_submodule(path))
    return found


def _run(layer: nn.Module, sites: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled. It looks at `sites`, so torch does: layers share code where these agree, and only there."""
    return layer(*args, **kwargs) if sites is not None else None


def _forward(layer: nn.Module, twins: Twins, active: Callable[[], Plan], compiled: Callable[..., Any]) -> Forward:
    """The forward of `layer` while it is compiled."""
    twin, own = twins.of(layer), layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return own(*args, **kwargs)
        if active() is not twins.plan:
            raise HubkitError(
                "HK-COMPILE", "the layers were compiled under another mix", fix="set the mix before, and keep it"
            )
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
            args = (args[0].detach().requires_grad_(), *args[1:])  # so that the first layer is like the others
        try:
            return compiled(twin, twins.names, args, kwargs)
        except Exception as error:
            if not is_compile_error(error):
                raise
            raise HubkitError(
                "HK-COMPILE",
                "torch could not compile a layer",
                where=type(layer).__name__,
                have=str(error).partition("\n")[0],
                fix="train without --compile",
            ) from error

    return forward


class Twins:
    """Makes the twin of one layer.

    Args:
        base: the sites.
        plan: what happens at them.
        path: of the layer.

    Attributes:
        names: of the sites that something happens at, seen from the layer.
    """

    def __init__(self, base: Base, plan: Plan, path: str) -> None:
        inside = {base.sites[name]: at for name, at in plan.items() if name.startswith(f"{path}.")}
        self.plan, self.names = plan, tuple(site.name.removeprefix(path) for site in inside)
        self._wraps: list[tuple[nn.Module | None, Wrap]] = []
        self._made: dict[nn.Module, nn.Module] = {}
        for site, at in inside.items():
            if isinstance(site, Block):
                stream = _Stream()
                self._wraps += [(site.residual, stream.seen(site.argument)), (site.module, stream.ended(site, at))]
            else:
                self._wraps.append((site.module, _adding(site.module, at)))

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of `module`, in training mode."""
        if module not in self._made:
            twin = self._made[module] = unhooked_twin_of(module, self.of)
            for wrapped, wrap in self._wraps:
                if wrapped is module:
                    vars(twin)["forward"] = wrap(twin.forward)
        return self._made[module]


def _adding(module: nn.Module | None, at: At) -> Wrap:
    """A site's forward: its own, and what happens to the output."""
    assert module is not None, "only a live site has a module"

    def wrap(own: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            return at(module, x, own(*args, **kwargs))

        return forward

    return wrap


class _Stream:
    """The residual stream of a block, from the module that sees it to the one that ends the sub-layer."""

    x: Tensor | None = None

    def seen(self, argument: int) -> Wrap:
        def wrap(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.x = [*args, *kwargs.values()][argument]
                return own(*args, **kwargs)

            return forward

        return wrap

    def ended(self, site: Block, at: At) -> Wrap:
        module = site.module
        assert module is not None

        def wrap(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                y = own(*args, **kwargs)
                x, self.x = self.x, None
                assert x is not None, "a layer calls its norm before its sub-layer"
                return changed(site, x, y, lambda y: at(module, x, y))

            return forward

        return wrap


def _require_compilable(base: Base, plan: Plan, layers: Mapping[str, nn.Module], own: Collection[int]) -> None:
    """Refuses what the twins would leave out: ``HK-COMPILE``."""
    assert base.model is not None
    inside = {f"{path}.{name}".rstrip("."): m for path, layer in layers.items() for name, m in layer.named_modules()}
    strange = [
        name
        for name, module in inside.items()
        if not (own_forward(module) is None or swapped(module)) or not hook_numbers(module) <= {*own}
    ]
    faults = {
        "the base has no layers": not layers,
        "a route gives each row a mix of its own": plan.rows is not None,
        "experts are computed one after the other": any(map(is_expert, plan)),
        "virtual tokens act on a layer's cache": plan.virtual is not None,
        "checkpointed layers run twice": any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules()),
        "hooks or forwards of others would be left out": bool(strange),
    }
    for what, found in faults.items():
        if found:
            raise HubkitError(
                "HK-COMPILE",
                f"this training cannot be compiled: {what}",
                where=base.source,
                have=strange[:10],
                fix="train without --compile",
            )
