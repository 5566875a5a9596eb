"""Adapters to publish, lock and deploy: small, random, not identity, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    version: str = "0.1.0",
    method: Any = None,
    size: float = 0.3,
    **options: Any,
) -> Path:
    """Write an adapter of `method` (the default one) with random tensors into `folder`, bound to the base at `base`.

    Args:
        size: standard deviation of the values.
    """
    import torch

    from hubkit.artifact.card import render_card
    from hubkit.artifact.folder import tensors_bytes, write_adapter
    from hubkit.artifact.identity.digest import fingerprint_folder
    from hubkit.documents.manifest import Manifest, Plugin
    from hubkit.methods.config import config_document, parse_config
    from hubkit.methods.foreign import own_files
    from hubkit.methods.host import host
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter

    if method is None:
        method, options = host().load(host().default()), {"rank": 2, **options}
    config = parse_config(method.info.config, options, "test")
    adapter = Adapter.fresh(folder.name, method, config, Base.from_folder(base), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.normal_(0, size, generator=generator)
    adapter.to_compute_dtype()
    record = fingerprint_folder(base, source="ana/base")
    manifest = Manifest(
        kind="adapter",
        name=folder.name,
        version=version,
        method=method.name,
        plugin=Plugin(method.offer.distribution, method.offer.version),
        config=config_document(config),
        base=record.fingerprint,
        license="apache-2.0",
    )
    files: dict[str, bytes | Path] = {**own_files(adapter), "tensors.json": tensors_bytes(record.tensors)}
    files["README.md"] = render_card(manifest, None).encode()
    write_adapter(folder, manifest, files, replace=folder.exists())
    return folder
