"""Going on from an adapter: the same method and configuration, its values as the start, itself as the parent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import AdapterFolder, open_adapter
from hubkit.artifact.identity.base_match import require_same_base
from hubkit.documents.manifest import Parent
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import adapter_source
from hubkit.named.terms import require_adapter
from hubkit.named.writing import document_of
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.parts.adapter import Adapter


@dataclass(frozen=True)
class Start:
    """What a training begins with.

    Args:
        method, settings: what is trained, and how it is configured.
        folder: the adapter that it goes on from; None: a fresh one.
        reference: how that one was found.
        given: names of the options that a user chose: all of them, where there is an adapter to go on from.
    """

    method: Method
    settings: Any
    folder: AdapterFolder | None = None
    reference: str = ""
    given: frozenset[str] = frozenset()

    @property
    def parents(self) -> tuple[Parent, ...]:
        """For the manifest."""
        return () if self.folder is None else (Parent(self.reference, self.folder.manifest.digest, 1.0),)

    def identity(self, record: BaseRecord) -> dict[str, object]:
        """What a resumed run must share."""
        config = document_of(self.settings)
        own = {"base": record.fingerprint.weights, "method": self.method.name, "config": config}
        return {**own, **({} if self.folder is None else {"from": self.folder.manifest.digest})}

    def require_base(self, record: BaseRecord) -> None:
        """Refuses to go on with an adapter on another base: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``."""
        if self.folder is not None:
            manifest = self.folder.manifest
            assert manifest.base is not None  # an adapter without one does not open
            have = record.fingerprint, self.folder.base_tensors(), record.tensors
            require_same_base(manifest.name, self.reference, manifest.base, *have, False)

    def fill(self, fresh: Adapter) -> None:
        """Puts the stored values into a fresh adapter, whose parameters stay the ones that training moves.

        Raises:
            HubkitError: ``HK-OPTIONS`` where what is trained is not what is stored (factors beside frozen ones,
                a network that makes the values): the stored adapter does not say where training stood.
        """
        import torch

        from hubkit.methods.reading import read_adapter

        if self.folder is None:
            return
        moved, stored = fresh.trainables(), fresh.parameters()
        if moved.keys() - stored.keys() or any(moved[name] is not stored[name] for name in moved):
            raise HubkitError(
                "HK-OPTIONS",
                f"{self.method.name} under this configuration trains other values than it stores",
                where=str(self.folder.path),
                want="a configuration whose stored tensors are what is trained",
                have=f"{self.method.name}: {_starts(self.settings)}",
                fix="train it anew without --from; or go on with a killed run: --resume",
                status=USAGE,
            )
        values = read_adapter(self.folder, fresh.base).parameters()
        with torch.no_grad():
            for name, parameter in stored.items():
                parameter.copy_(values[name].to(parameter))


def _starts(settings: Any) -> str:
    """The options that say how values are made."""
    names = [name for name in vars(settings) if "init" in name or "projection" in name]
    return ", ".join(f"{name}={getattr(settings, name)!r}" for name in names) or "its own way"


def begin(parent: Path | str | None, method: str | None, config: Mapping[str, Any] | None, where: Where) -> Start:
    """Method and configuration: those of `parent`, or those named.

    Args:
        parent: folder or repository of an adapter; None: a fresh one is trained.
        method, config: as given; beside `parent` they may say what it says, and nothing else.

    Raises:
        HubkitError: ``HK-OPTIONS`` where they contradict the parent; ``HK-CONFIG``, ``HK-METHOD-UNKNOWN``,
            ``HK-NOT-ADAPTER``; what pulling and opening raise.
    """
    from hubkit.methods.config import parse_config
    from hubkit.methods.host import host
    from hubkit.methods.reading import method_of

    if parent is None:
        chosen = host().load(method or host().default())
        return Start(chosen, parse_config(chosen.info.config, config or {}, "--set"), given=frozenset(config or {}))
    source = adapter_source(parent, where)
    folder = require_adapter(open_adapter(source.path))
    own, settings = method_of(folder)
    wanted, found = [], []
    if method not in (None, own.name):
        wanted, found = [f"--method {own.name}"], [f"--method {method}"]
    else:
        given = parse_config(own.info.config, config or {}, "--set")
        differ = [name for name in config or {} if getattr(given, name) != getattr(settings, name)]
        wanted = [f"{name}={getattr(settings, name)}" for name in differ]
        found = [f"{name}={getattr(given, name)}" for name in differ]
    if wanted:
        what, fix = "--from goes on with the adapter's own method and configuration", "leave --method and --set out"
        where_ = str(folder.path)
        raise HubkitError("HK-OPTIONS", what, where=where_, want=wanted, have=found, fix=fix, status=USAGE)
    return Start(own, settings, folder, source.reference, frozenset(vars(settings)))
