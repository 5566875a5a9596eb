"""One adapter in memory: its parts at sites, made fresh, read from a folder, written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hubkit.artifact.adapterhub import AdapterHubForm
from hubkit.artifact.forms import PeftForm, require_all, split_keys, to_key
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import Delta, accumulation_dtype, aligned
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.part import KV, Edit, Part, Tokens
from hubkit.tensors.parts.tied import TiedChange
from hubkit.tensors.parts.values import assign, joined, require_finite, target_dtype
from hubkit.tensors.parts.vocabulary import rows_delta
from hubkit.tensors.parts.whole import WholeModule, whole_delta
from hubkit.tensors.seed import generator_for


class MethodLike(Protocol):
    """What an adapter needs of its method; `hubkit.methods.host.Method` is one."""

    @property
    def name(self) -> str: ...
    @property
    def peft_form(self) -> PeftForm | None: ...
    @property
    def adapterhub_form(self) -> AdapterHubForm | None: ...
    def inject(self, base: Base, config: Any) -> Mapping[str, Part]: ...
    @property
    def unmergeable(self) -> str: ...
    def merge(self, site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta: ...
    def learning_rate(self, config: Any, site: Site, role: str) -> float: ...
    def narrow(self, config: Any, changed: frozenset[str]) -> Any: ...
    def export(self, adapter: Adapter, target: str) -> Mapping[str, bytes]: ...


@dataclass
class Adapter:
    """Parts at sites, made by one method under one configuration.

    Args:
        name: for messages.
        method: the mathematics.
        config: an instance of the method's configuration class.
        parts: site name -> part, in the base's order.
        base: the base they were made for.
        source, revision: repository or folder name of the base and its commit, for other tools' files.
        task: as its manifest says what it was trained for, for the same files; None for a language model.
    """

    name: str
    method: MethodLike
    config: Any
    parts: dict[str, Part]
    base: Base
    source: str | None = None
    revision: str | None = None
    task: Mapping[str, Any] | None = None

    @property
    def sites(self) -> dict[str, Site]:
        """Name -> site, of the sites acted on."""
        return {name: self.base.site(name) for name in self.parts}

    @classmethod
    def fresh(cls, name: str, method: MethodLike, config: Any, base: Base, seed: int) -> Adapter:
        """A new adapter with fp32 masters (fp64 on an fp64 base), reset site by site.

        Each site has its own generator, seeded by sha256(seed, site name): same seed, same parts, in any order.
        """
        adapter = cls._empty(name, method, config, base)
        for site_name, part in adapter.parts.items():
            site = base.site(site_name)
            part.to_empty(device="cpu").to(accumulation_dtype(site.dtype))
            with torch.no_grad():
                part.reset(site, base, generator_for(seed, site_name))
            part.to(site.device)
        return adapter

    @classmethod
    def read(
        cls, name: str, method: MethodLike, config: Any, base: Base, file: Path, dtype: str | None, mapped: bool = False
    ) -> Adapter:
        """The adapter whose tensors are in the safetensors `file`.

        Args:
            dtype: ``"base"``: each part in the dtype of its site (inference); ``"master"``: fp32 masters, trainable;
                None: as stored.
            mapped: leave the values in the file, see `hubkit.tensors.files.shards.read_file`.

        Raises:
            HubkitError: ``HK-KEYS`` (missing or homeless tensors), ``HK-SHAPE``, ``HK-NAN``.
        """
        from hubkit.tensors.files.shards import read_file

        return cls.of_stored(name, method, config, base, read_file(file, mapped=mapped), str(file), dtype)

    @classmethod
    def of_stored(
        cls,
        name: str,
        method: MethodLike,
        config: Any,
        base: Base,
        stored: Mapping[str, Tensor],
        where: str,
        dtype: str | None = None,
    ) -> Adapter:
        """As `read`, with the tensors of a file in hand: key -> values."""
        return cls._empty(name, method, config, base)._filled(stored, where, dtype)

    def _filled(self, stored: Mapping[str, Tensor], where: str, dtype: str | None) -> Adapter:
        """This adapter, made on the meta device, with the values of a file."""
        own = [s.removeprefix(self.base.body) for s, p in self.parts.items() if isinstance(p, WholeModule | TiedChange)]
        keys, want = split_keys(self.method.peft_form, stored, where, own), {k: at for at, k in self.keys().items()}
        self._refuse_foreign_copies(keys.copies, stored, self.base, where)
        require_all(want, (key for roles in keys.parts.values() for key in roles.values()), where)
        repeated = {key: at for key, at in want.items() if isinstance(self.parts[at[0]], TiedChange)}
        want = {key: at for key, at in want.items() if key not in repeated}
        roles = {site: part.roles() for site, part in self.parts.items()}
        shapes = [
            f"{key}: want {tuple(roles[site][role].shape)}, have {tuple(stored[key].shape)}"
            for key, (site, role) in want.items()
            if roles[site][role].shape != stored[key].shape
        ]
        if shapes:
            raise HubkitError(
                "HK-SHAPE",
                f"{len(shapes)} tensors do not fit the base",
                where=where,
                have=shapes,
                fix="use the base that the adapter was trained on",
            )
        if not self._fill({at: stored[key] for key, at in want.items()}, dtype):
            self.require_finite(where)
        self._refuse_untied(repeated, stored, where)
        return self

    def _refuse_untied(self, repeated: Mapping[str, tuple[str, str]], stored: Mapping[str, Tensor], where: str) -> None:
        """What a file repeats at a tied head must be what stands at its table."""
        values = {site: self.parts[site].values() for site, _ in repeated.values()}
        have = {key: values[site][role].detach() for key, (site, role) in repeated.items()}
        other = [k for k, v in have.items() if v.shape != stored[k].shape or not torch.equal(v, stored[k].to(v))]
        if other:
            raise HubkitError(
                "HK-TIED",
                "the file ties the output head to the embeddings and changes the two differently",
                where=where,
                have=other,
                fix="take the tie out of its configuration: then each has its own change",
            )

    def _fill(self, values: Mapping[tuple[str, str], Tensor], dtype: str | None) -> bool:
        """Puts (site, role) -> value in place; returns whether the sum of all is finite.

        Tensors that go the same way are joined, cast and moved as one: hundreds of small steps cost more than reading.
        """
        ways: dict[tuple[torch.device, torch.dtype, torch.dtype], list[tuple[str, str]]] = {}
        sites = {name: (self.base.site(name), self.base.site(name).device) for name in self.parts}
        for at, value in values.items():
            site, device = sites[at[0]]
            rule = "master" if dtype == "base" and at[1] in self.parts[at[0]].wide else dtype
            ways.setdefault((device, value.dtype, target_dtype(rule, site.dtype, value.dtype)), []).append(at)
        finite = True
        for (device, _, wanted), places in ways.items():
            places.sort(key=lambda at: values[at].data_ptr())
            whole = joined([values[at] for at in places]).to(device, wanted)
            finite = finite and bool(torch.isfinite(whole.sum()))
            pieces = torch.split(whole, [values[at].numel() for at in places])
            for at, piece in zip(places, pieces, strict=True):
                value = piece.view(values[at].shape).data  # .data: each counts its own changes in place
                if dtype == "master":
                    value = value.clone()  # in a storage of its own: who stores a state looks at storages
                assign(self.parts[at[0]], at[1], nn.Parameter(value, requires_grad=dtype == "master"))
        return finite

    @classmethod
    def of_factors(
        cls, name: str, method: MethodLike, config: Any, base: Base, values: Mapping[str, Mapping[str, Tensor]]
    ) -> Adapter:
        """The adapter with the given tensors: site -> role -> values of the shapes that `method` makes."""
        adapter = cls._empty(name, method, config, base)
        for site, roles in values.items():
            for role, value in roles.items():
                assign(adapter.parts[site], role, nn.Parameter(value, requires_grad=False))
        return adapter

    @classmethod
    def _empty(cls, name: str, method: MethodLike, config: Any, base: Base) -> Adapter:
        with torch.device("meta"):
            made = method.inject(base, config)
        unknown = [site for site in made if base.find(site) is None]
        if unknown:
            raise HubkitError(
                "HK-PLUGIN",
                f"method {method.name!r} made parts for sites that the base does not have",
                have=unknown,
                fix="report this to the method's author",
            )
        if not made:
            raise HubkitError(
                "HK-TARGET",
                f"this configuration of method {method.name!r} chooses no module",
                where=base.source,
                want="at least one",
                fix=f"hubkit methods {method.name} lists its options",
            )
        parts = {site: made[site] for site in (*base.sites, *base.virtual, *base.rows) if site in made}
        return cls(name, method, config, parts, base)

    def _refuse_foreign_copies(
        self, copies: Mapping[str, str], stored: Mapping[str, Tensor], base: Base, where: str
    ) -> None:
        """PEFT writes the base's own embedding beside a part on it: harmless when it is the base's, in its dtype."""
        for tensor, key in copies.items():
            site = base.sites.get(base.body + tensor.rpartition(".")[0])
            weight = None if site is None else (site.weight().t() if site.transposed else site.weight())
            copy = stored[key]
            if weight is None or weight.shape != copy.shape or not torch.equal(weight.to(copy.dtype), copy):
                raise HubkitError(
                    "HK-KEYS",
                    "the adapter carries a changed copy of a base weight",
                    where=f"{where}: {key}",
                    want="the base's own values",
                    fix="use the base that the adapter was trained on",
                )

    def require_finite(self, where: str) -> None:
        """Raises ``HK-NAN`` naming every tensor that holds a NaN or an infinity."""
        require_finite(((name, value.detach()) for name, value in self.parameters().items()), where)

    def parameters(self) -> dict[str, nn.Parameter]:
        """``<site>.<role>`` -> parameter, in a fixed order."""
        return {f"{site}.{role}": p for site, part in self.parts.items() for role, p in part.roles().items()}

    def learning_rates(self) -> dict[str, float]:
        """``<site>.<role>`` -> what multiplies the learning rate, where it is not 1."""
        return {
            f"{site}.{role}": factor
            for site, part in self.parts.items()
            for role in part.roles()
            if (factor := self.method.learning_rate(self.config, self.base.site(site), role)) != 1.0
        }

    def without_zeros(self) -> Adapter:
        """This adapter without tensors that are zero throughout, where its method can leave them out.

        The configuration says which are left; an adapter of zeros alone stays as it is.
        """
        parameters = self.parameters()
        changed = frozenset(name for name, p in parameters.items() if torch.count_nonzero(p.detach()))
        config = self.method.narrow(self.config, changed) if 0 < len(changed) < len(parameters) else self.config
        if config == self.config:
            return self
        kept = Adapter._empty(self.name, self.method, config, self.base)
        for site, part in kept.parts.items():
            for role in part.roles():
                assign(part, role, self.parts[site].get_parameter(role))
        return kept

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in the file, contiguous, on the CPU."""
        values = {site: part.values() for site, part in self.parts.items()}
        return {key: values[site][role].detach().cpu().contiguous() for (site, role), key in self.keys().items()}

    def trainables(self) -> dict[str, nn.Parameter]:
        """``<site>.<role>`` -> the parameter that training moves for it."""
        return {f"{site}.{role}": p for site, part in self.parts.items() for role, p in part.trainables().items()}

    def kept(self) -> dict[str, nn.Parameter]:
        """``<site>.<role>`` -> tensors that training reads and does not change: a resumed run needs the same."""
        return {name: p for name, p in self.parameters().items() if not p.requires_grad}

    def keys(self) -> dict[tuple[str, str], str]:
        """(site, role) -> name of the tensor in the file, in a fixed order."""
        form, body = self.method.peft_form, self.base.body
        return {
            (site, role): to_key(form, site.removeprefix(body), self.base.site(site).kind, role)
            for site, part in self.parts.items()
            for role in part.values()
        }

    def to_compute_dtype(self) -> None:
        """Ends training: casts every part to its site's dtype, wide roles to that of accumulation.

        It is stored so, and a reloaded adapter computes the same bits.
        """
        for site, part in self.parts.items():
            part.settle()
            at = self.base.site(site)
            wide = {role: part.get_parameter(role).data for role in part.wide}
            part.to(target_dtype("base", at.dtype, at.dtype)).requires_grad_(False)
            for role, value in wide.items():
                part.get_parameter(role).data = value.to(target_dtype("master", at.dtype, at.dtype))

    def delta(self, site: Site, *, grad: bool = False, device: torch.device | None = None) -> Delta | None:
        """What this adapter adds to the weight of `site`, accumulated wide; None when it does not act there.

        Args:
            grad: let gradients flow into the part's parameters; off, the result is detached.
            device: where the parameters are taken; on ``meta``, at a `Site.hollow`, only shapes come of it.

        Raises:
            hubkit.methods.api.NotMergeable: from the method, with its reason.
        """
        change, rows = self._delta(site, grad, device), rows_delta(site, self.parts, grad)
        if rows is None or change is None:
            return change if rows is None else rows
        return change.plus(rows)

    def _delta(self, site: Site, grad: bool, device: torch.device | None) -> Delta | None:
        """As `delta`, of the part at the site alone."""
        part = self.parts.get(site.name)
        if part is None:
            return None
        if isinstance(part, TiedChange):
            change = self._delta(part.seen_from(site), grad, device)
            return None if change is None else change.transposed()
        wide = accumulation_dtype(site.dtype)
        values = {role: value if grad else value.detach() for role, value in part.merged().items()}
        tensors = {role: aligned(value.to(device or value.device, wide)) for role, value in values.items()}
        if isinstance(part, WholeModule):
            return whole_delta(site.widened(), tensors)
        change = self.method.merge(site.widened(), tensors, self.config)
        if not change.fits(site.shape):
            raise HubkitError(
                "HK-PLUGIN",
                f"method {self.method.name!r} merges into another shape at {site.name}",
                want=f"weight {site.shape}, bias ({site.shape[0]},)",
                have=change.describe(),
                fix="report this to the method's author",
            )
        return change

    def edits(self) -> dict[str, Edit]:
        """The parts that act at modules."""
        return {site: part for site, part in self.parts.items() if isinstance(part, Edit)}

    def virtual(self) -> list[KV | Tokens]:
        """The parts that act as tokens in front of the text."""
        return [part for part in self.parts.values() if isinstance(part, (KV, Tokens))]
