"""The plugin host: finds methods by entry point, loads one by name, and is the only caller of their hooks.

Names are read from package metadata, nothing is imported for them. Each method has its own plugin manager: specs,
defaults, wrappers and that plugin; in a shared one, plugins registered later would answer for others.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from hubkit.errors import HubkitError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hubkit.artifact.adapterhub import AdapterHubForm
    from hubkit.artifact.forms import PeftForm
    from hubkit.methods.info import MethodInfo
    from hubkit.methods.recipes import BaseFacts
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.delta import Delta
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import Part
    from hubkit.tensors.parts.tied import Tied
    from hubkit.tensors.parts.whole import Holds

GROUP = "hubkit.methods"
DEFAULT_GROUP = "hubkit.default_method"
WRAPPERS = "hubkit.wrappers"
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What the code of a method raises when it is wrong; what the machine raises (no memory, no disk) is not its fault."""


@dataclass(frozen=True)
class Offer:
    """A method that an installed distribution offers: known from metadata, not yet imported."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint


class Method:
    """One loaded method: calls go through its own plugin manager; a fault of the plugin becomes an ``HK-PLUGIN``."""

    def __init__(self, offer: Offer, plugin: object) -> None:
        from hubkit.methods import defaults, hookspecs
        from hubkit.methods.info import MethodInfo

        self.offer = offer
        self.name = offer.name
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        try:
            self._manager.register(defaults, "defaults")
            for name, wrapper in _wrappers():
                self._manager.register(wrapper, f"wrapper:{name}")
            self._manager.register(plugin, offer.name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as e:
            raise _plugin_error(offer, "does not follow the hook specifications", e) from e
        self._plugin = plugin
        for hook in ("describe", "inject"):
            if not self._answers(hook):
                raise HubkitError(
                    "HK-PLUGIN",
                    f"method {offer.name!r} implements no {hook}",
                    where=_origin(offer),
                    fix="every method implements describe and inject",
                )
        self.info: MethodInfo = self._call("describe", MethodInfo)
        if self.info.name != offer.name:
            raise HubkitError(
                "HK-PLUGIN",
                f"method {offer.name!r} calls itself {self.info.name!r}",
                where=_origin(offer),
                want=offer.name,
                have=self.info.name,
                fix="entry point and description carry one name",
            )

    @functools.cached_property
    def peft_form(self) -> PeftForm | None:
        """How PEFT writes this method, if it knows it."""
        from hubkit.artifact.forms import PeftForm

        form: PeftForm | None = self._call("foreign_form", PeftForm | None, target="peft")
        return form

    @functools.cached_property
    def adapterhub_form(self) -> AdapterHubForm | None:
        """How AdapterHub writes this method, if hubkit reads and writes that."""
        from hubkit.artifact.adapterhub import AdapterHubForm

        form: AdapterHubForm | None = self._call("foreign_form", AdapterHubForm | None, target="adapterhub")
        return form

    @property
    def unmergeable(self) -> str:
        """Why merging is refused, known before any hook is called; empty when it is not."""
        if self.info.unmergeable:
            return self.info.unmergeable
        return "" if self._answers("merge") else f"method {self.name!r} does not say how it merges"

    def inject(self, base: Base, config: Any) -> Mapping[str, Part]:
        """See `hookspecs.inject`."""
        made: Mapping[str, Part] = self._call("inject", Mapping, base=base, config=config)
        return made

    def train_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """See `hookspecs.train_step`."""
        from torch import Tensor

        loss: Tensor = self._call("train_step", Tensor, model=model, batch=batch)
        return loss

    def merge(self, site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:
        """See `hookspecs.merge`.

        Raises:
            NotMergeable: with the method's reason.
        """
        from hubkit.methods.info import NotMergeable
        from hubkit.tensors.base.delta import Delta

        if self.unmergeable:
            raise NotMergeable(self.unmergeable, where=self.name)
        delta: Delta = self._call("merge", Delta, site=site, tensors=tensors, config=config)
        return delta

    def learning_rate(self, config: Any, site: Site, role: str) -> float:
        """See `hookspecs.learning_rate`."""
        factor = self._call("learning_rate", int | float, config=config, site=site, role=role)
        if not math.isfinite(factor) or factor < 0:
            fault = ValueError(f"{factor!r} at {site.name}.{role}")
            raise _plugin_error(self.offer, "gives no usable factor of the learning rate", fault)
        return float(factor)

    def recipe_for(self, facts: BaseFacts, config: Any) -> tuple[Mapping[str, Any], bool]:
        """See `hookspecs.recipe_for`; and whether the method answered, so that the recipe is one for this base."""
        found: Mapping[str, Any] | None = self._call("recipe_for", Mapping | None, facts=facts, config=config)
        return (self.info.recipe, False) if found is None else (found, True)

    def grown(self, config: Any, given: frozenset[str], sites: Mapping[str, Site]) -> Any | None:
        """See `hookspecs.grown`; None where the configuration stays as it is."""
        return self._call("grown", self.info.config | None, config=config, given=given, sites=sites)

    def narrow(self, config: Any, changed: frozenset[str]) -> Any:
        """See `hookspecs.narrow`."""
        return self._call("narrow", self.info.config, config=config, changed=changed)

    def low_rank(
        self, targets: tuple[str, ...], rank: int, saved: tuple[str, ...] = (), tied: Tied = "break"
    ) -> Any | None:
        """See `hookspecs.low_rank`; None where the method cannot."""
        given = {"targets": targets, "rank": rank, "saved": saved, "tied": tied}
        return self._call("low_rank", self.info.config | None, **given)

    def whole(self, tensors: tuple[str, ...], tied: Tied, holds: Holds = "change") -> Any | None:
        """See `hookspecs.whole`; None where the method cannot."""
        return self._call("whole", self.info.config | None, tensors=tensors, tied=tied, holds=holds)

    def export(self, adapter: Adapter, target: str) -> Mapping[str, bytes]:
        """See `hookspecs.export`."""
        files: Mapping[str, bytes] = self._call("export", Mapping, adapter=adapter, target=target)
        return files

    def _answers(self, hook: str) -> bool:
        caller = getattr(self._manager.hook, hook)
        return any(impl.plugin is self._plugin for impl in caller.get_hookimpls())

    def _call(self, hook: str, want: Any, **arguments: Any) -> Any:
        try:
            made = getattr(self._manager.hook, hook)(**arguments)
            if not isinstance(made, want):
                raise TypeError(f"it returned {type(made).__name__}, not {getattr(want, '__name__', want)}")
            return made
        except HubkitError:
            raise
        except _FAULTS as e:
            raise _plugin_error(self.offer, f"failed in {hook}", e) from e


class MethodHost:
    """All methods that are installed.

    Args:
        entries: the entry points of group ``hubkit.methods``; read from the environment by default.
    """

    def __init__(self, entries: Callable[[], list[EntryPoint]] | None = None) -> None:
        self._entries = entries or (lambda: list(entry_points(group=GROUP)))
        self._loaded: dict[str, Method] = {}

    def offers(self) -> dict[str, tuple[Offer, ...]]:
        """name -> who offers it, from metadata alone; more than one is a conflict, reported when it is used."""
        found: dict[str, dict[str, Offer]] = {}
        for entry in self._entries():
            distribution = entry.dist.name if entry.dist else "(unknown)"
            version = entry.dist.version if entry.dist else "0"
            found.setdefault(entry.name, {})[distribution] = Offer(entry.name, distribution, version, entry)
        return {name: tuple(found[name][d] for d in sorted(found[name])) for name in sorted(found)}

    def default(self) -> str:
        """The method taken when none is named: the one that hubkit's own metadata marks so."""
        names = sorted(entry.name for entry in entry_points(group=DEFAULT_GROUP))
        if not names:
            raise HubkitError(
                "HK-METHOD-UNKNOWN",
                "hubkit's own metadata names no default method",
                fix="install hubkit-adapters again",
            )
        return names[0]

    def load(self, name: str, *, distribution: str = "", version: str = "") -> Method:
        """The method `name`, imported on first use.

        Args:
            distribution: who offered it when the adapter was made: named in the error when it is missing.
            version: its version then.

        Raises:
            HubkitError: ``HK-METHOD-UNKNOWN``, ``HK-METHOD-CONFLICT``, ``HK-PLUGIN``.
        """
        if name in self._loaded:
            return self._loaded[name]
        offers = self.offers()
        claims = offers.get(name, ())
        if not claims:
            near = nearest(name, offers)
            install = _install(distribution, version)
            raise HubkitError(
                "HK-METHOD-UNKNOWN",
                f"no installed package offers the method {name!r}",
                want=", ".join(offers),
                have=name,
                fix=install or (f"near: {', '.join(near)}" if near else "hubkit methods"),
            )
        if len(claims) > 1:
            raise HubkitError(
                "HK-METHOD-CONFLICT",
                f"several packages offer the method {name!r}",
                have=[f"{c.distribution} {c.version} ({c.entry.value})" for c in claims],
                fix=f"uninstall one of them: pip uninstall {claims[-1].distribution}",
            )
        self._loaded[name] = Method(claims[0], _import(claims[0]))
        return self._loaded[name]


def _install(distribution: str, version: str) -> str:
    """The command that installs a distribution; nothing where its name or version is not one: both are a stranger's."""
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", distribution):
        return ""
    return f"pip install {distribution}" + (f"=={version}" if re.fullmatch(r"[A-Za-z0-9.!+_-]+", version) else "")


def _import(offer: Offer) -> object:
    try:
        return offer.entry.load()
    except (Exception, SystemExit) as e:  # a stranger's module can raise anything while it is imported
        raise _plugin_error(offer, "cannot be imported", e) from e


def _plugin_error(offer: Offer, what: str, error: BaseException) -> HubkitError:
    return HubkitError(
        "HK-PLUGIN",
        f"method {offer.name!r} {what}",
        where=_origin(offer),
        have=f"{type(error).__name__}: {error}",
        fix=f"update or uninstall {offer.distribution}; the other methods are not affected",
    )


def _origin(offer: Offer) -> str:
    return f"{offer.distribution} {offer.version} ({offer.entry.value})"


@functools.cache
def _wrappers() -> tuple[tuple[str, object], ...]:
    """Wrappers named in HUBKIT_WRAPPERS, in that order; installed ones that are not named stay off."""
    wanted = [name for name in os.environ.get("HUBKIT_WRAPPERS", "").split(",") if name]
    known = {entry.name: entry for entry in entry_points(group=WRAPPERS)}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise HubkitError(
            "HK-WRAPPER",
            f"no installed package offers the wrapper {missing[0]!r}",
            where="HUBKIT_WRAPPERS",
            want=", ".join(sorted(known)) or "(none installed)",
            have=missing[0],
        )
    return tuple(
        (name, _import(Offer(name, e.dist.name if e.dist else "", e.dist.version if e.dist else "", e)))
        for name, e in ((name, known[name]) for name in wanted)
    )


@functools.cache
def host() -> MethodHost:
    """The host of this process."""
    return MethodHost()
