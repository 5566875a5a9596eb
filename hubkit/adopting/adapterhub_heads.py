"""The prediction head that lies beside an adapter of AdapterHub, as the head of one of our tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.heads import task_of
from hubkit.artifact.adapterhub import HEAD_CONFIG, HEAD_PICKLE, HEAD_WEIGHTS
from hubkit.artifact.adapterhub_heads import FIX, no_such_head, read_head
from hubkit.documents.files import read
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True)
class FoundHead:
    """The head of an adapter.

    Args:
        task: what it is for.
        tensors: (module, ``weight`` or ``bias``) -> values.
    """

    task: Task
    tensors: Mapping[tuple[str, str], Tensor]


def head_beside(
    folder: Path, data: Mapping[str, Any], base_folder: Path, base: Base, labels: Sequence[str] | None
) -> FoundHead | None:
    """The head in a folder of AdapterHub; None without one, or with that of the language model itself, unchanged.

    Args:
        data: its ``adapter_config.json``.
        base_folder: the base's.
        base: its sites.
        labels: as `hubkit.adopting.heads.task_of` has them; those that the head names when None.

    Raises:
        HubkitError: ``HK-HEAD``, ``HK-LABELS``, ``HK-KEYS``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-JSON``.
    """
    weights = next((folder / name for name in (HEAD_WEIGHTS, HEAD_PICKLE) if (folder / name).is_file()), None)
    if weights is None:
        return None
    if not (folder / HEAD_CONFIG).is_file():
        what = "the adapter has a prediction head, and nothing says what it is"
        raise HubkitError("HK-HEAD", what, where=str(folder), want=HEAD_CONFIG, have=weights.name, fix=FIX)
    document = parse(read(folder / HEAD_CONFIG, MAX_BYTES), str(folder / HEAD_CONFIG))
    stored, kind = tensors_in(weights), str(document.get("model_class"))
    found = read_head(document, stored, base.arch.model_type, str(folder))
    if found.kind is None:
        changed = [key for key, value in stored.items() if not _is_base(key, value, base_folder, base)]
        if changed:
            raise no_such_head(base.arch.model_type, [f"{kind}: {key}" for key in sorted(changed)], str(folder))
        return None
    whole = {module: tuple(stored[key].shape) for key, (module, role) in found.keys.items() if role == "weight"}
    named = found.labels if labels is None else labels
    task = task_of(found.kind, whole, base_folder, base, named, str(weights))
    if task is None:
        raise no_such_head(base.arch.model_type, f"{kind}: a head for {found.kind}", str(folder))
    return FoundHead(task, {at: stored[key] for key, at in found.keys.items()})


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file of AdapterHub."""
    from hubkit.tensors.files.pickles import read_pickle
    from hubkit.tensors.files.shards import read_file

    return read_file(path) if path.suffix == ".safetensors" else read_pickle(path)


def _is_base(key: str, value: Tensor, folder: Path, base: Base) -> bool:
    """Whether a tensor of a language model's own head is that of the base."""
    import torch

    from hubkit.tensors.files.shards import open_shards

    module, _, role = key.rpartition(".")
    site, shards = base.sites.get(module), open_shards(folder)
    if key in shards.headers:
        own: Tensor | None = shards.read(key)
    else:
        own = None if site is None else site.weight() if role == "weight" else site.bias()
    return own is not None and torch.equal(own, value.to(own.dtype))
