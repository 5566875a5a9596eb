"""Adopting an adapter of PEFT that no method here can run: bound to its base and published as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.claims import require_promised
from hubkit.artifact.carried import MARK
from hubkit.artifact.folder import PEFT_CONFIG, TENSORS_NAME, WEIGHTS_NAME, tensors_bytes
from hubkit.documents.manifest import Manifest

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.base.base import Base


def carry(
    weights: Path,
    config: Mapping[str, Any],
    name: str,
    base: Base,
    record: BaseRecord,
    overrides: list[str],
    allow_partial: bool,
) -> tuple[Manifest, dict[str, bytes | Path]]:
    """The manifest and files of an adapter whose mathematics is PEFT's alone.

    Its tensors stay as they are, to the byte; in its configuration, what names the base names the one that it is bound
    to, and no place on this machine.

    Args:
        weights: its ``adapter_model.safetensors``.
        config: the ``adapter_config.json`` beside it.
        name: the adapter's.
        base: the sites of its base.
        record: the identity of its base.
        overrides: those in force.
        allow_partial: see `require_promised`.

    Raises:
        HubkitError: as `check_carried` and `require_promised`.
    """
    from hubkit.tensors.parts.carried import check_carried

    peft_type, where = str(config["peft_type"]), str(weights.parent / PEFT_CONFIG)
    _, modules = check_carried(peft_type, weights, base)
    layers, used = record.fingerprint.config.get("layers"), list(overrides)
    if modules:
        used += require_promised(
            config, ("target_modules", "target_parameters"), modules, base, layers, where, allow_partial
        )
    manifest = Manifest(
        kind="adapter", name=name, method=MARK + peft_type, base=record.fingerprint, overrides=tuple(used)
    )
    public = manifest.shareable().base
    assert public is not None
    document = {**config, "base_model_name_or_path": public.source, "revision": public.revision}
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return manifest, {PEFT_CONFIG: text.encode(), WEIGHTS_NAME: weights, TENSORS_NAME: tensors_bytes(record.tensors)}
