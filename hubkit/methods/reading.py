"""From an adapter's folder to the adapter in memory, with the method that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubkit.artifact.carried import carried_type
from hubkit.artifact.folder import MANIFEST_NAME, AdapterFolder
from hubkit.artifact.identity.header import TensorInfo
from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.carried import check_carried
from hubkit.tensors.parts.heads import of_document, with_body, with_made
from hubkit.tensors.parts.part import front_length

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import TensorDigest
    from hubkit.tensors.base.site import Site


def method_of(folder: AdapterFolder) -> tuple[Method, Any]:
    """The method of an adapter, loaded, and its configuration.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` for a mix or a model, ``HK-METHOD-UNKNOWN`` naming the distribution to install,
            or for an adapter that is only carried; ``HK-CONFIG``.
    """
    manifest, where = folder.manifest, folder.path / MANIFEST_NAME
    if manifest.kind != "adapter" or not manifest.method:
        raise HubkitError(
            "HK-NOT-ADAPTER", f"{manifest.name!r} is a {manifest.kind}, not an adapter with tensors", where=str(where)
        )
    if peft_type := carried_type(manifest.method):
        raise HubkitError(
            "HK-METHOD-UNKNOWN",
            f"adapters of PEFT's type {peft_type} are kept as they are, no method here runs them",
            where=f"{where}#/method",
            have=str(manifest.method),
            fix=f"PEFT runs it: PeftModel.from_pretrained(base, {str(folder.path)!r})",
        )
    plugin = manifest.plugin
    method = host().load(
        manifest.method,
        distribution=plugin.distribution if plugin else "",
        version=plugin.version if plugin else "",
    )
    return method, parse_config(method.info.config, manifest.config, f"{where}#/config")


def read_adapter(
    folder: AdapterFolder, base: Base, *, name: str = "", dtype: str | None = None, mapped: bool = False
) -> Adapter:
    """The adapter of an opened folder, at the sites of `base`.

    Args:
        name: for messages; the manifest's by default.
        dtype: ``"base"`` to compute, ``"master"`` to train, None as stored; see `Adapter.read`.
        mapped: leave the values in the file, where nobody may write to it meanwhile.

    Raises:
        HubkitError: as `method_of`; ``HK-TARGET``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``; ``HK-HEAD`` where the adapter
            has a head of its own and the base has no place for it.
    """
    method, config = method_of(folder)
    _require_head(folder, base)
    base = with_body(base, folder.manifest.task)
    adapter = Adapter.read(
        name or folder.manifest.name, method, config, base, folder.weights_path, dtype, mapped=mapped
    )
    origin = folder.manifest.base
    adapter.source, adapter.revision = (origin.source, origin.revision) if origin else (None, None)
    adapter.task = folder.manifest.task
    return adapter


def _require_head(folder: AdapterFolder, base: Base) -> None:
    made = of_document(folder.manifest.task)[0]
    lacking = [name for name in made if name not in base.sites]
    if lacking:
        raise HubkitError(
            "HK-HEAD",
            f"{folder.manifest.name!r} has a head of its own, for labels: this model has no place for it",
            where=str(folder.path),
            want=f"the model of the task {(folder.manifest.task or {}).get('kind')}",
            have=f"no {', '.join(lacking)} in {base.source}",
            fix=f"hubkit predict {folder.path}; PEFT reads the folder as it is",
        )
    base.keep(made)


def check_tensors(folder: AdapterFolder, base: Base) -> tuple[int, int]:
    """The numbers of an adapter's tensors and of the places they are at: all there, all of a use, all finite.

    Raises:
        HubkitError: as `read_adapter`; of an adapter that is only carried, as `check_carried`.
    """
    if peft_type := carried_type(folder.manifest.method):
        count, modules = check_carried(peft_type, folder.weights_path, base)
        return count, len(modules)
    adapter = read_adapter(folder, with_made(base, *of_document(folder.manifest.task)))
    return len(adapter.parameters()), len(adapter.parts)


@dataclass(frozen=True)
class Planned:
    """What a method would make for a base, known before anything is loaded.

    Args:
        sites: name -> site of each part.
        codec: how the method wants the base quantized; None when it does not.
        front: how many tokens its adapters put in front of every text.
    """

    sites: Mapping[str, Site]
    codec: str | None
    front: int


def planned(method: Method, config: Any, base: Base) -> Planned:
    """Injects on the meta device. `base` can be known by its headers alone.

    Raises:
        HubkitError: what the method's `inject` raises: ``HK-TARGET``, ``HK-CODEC``; ``HK-CONFIG`` for more virtual
            tokens than the base's context holds.
    """
    import torch

    with torch.device("meta"):
        parts = method.inject(base, config)
    return Planned({name: base.site(name) for name in parts}, base.codec, front_length(parts.values()))


def recorded_base(folder: AdapterFolder) -> Base:
    """The base of an adapter as its own ``tensors.json`` lists it: names, shapes, no values.

    Raises:
        HubkitError: ``HK-BASE-NEEDED`` when it lists none.
    """
    tensors, origin = folder.base_tensors(), folder.manifest.base
    if tensors is None or origin is None:
        raise HubkitError(
            "HK-BASE-NEEDED",
            f"{folder.manifest.name!r} does not list its base's tensors",
            where=str(folder.path),
            fix="hubkit pack it again, with --base",
        )
    return base_of_tensors(tensors, origin.config, str(folder.path))


def base_of_tensors(tensors: Iterable[TensorDigest], config: Any, source: str) -> Base:
    """The sites of a base known by its tensors' names and shapes alone."""
    headers = {one.name: TensorInfo(one.name, one.dtype, one.shape, 0, 0) for one in tensors}
    return Base.from_headers(headers, config, source)
