"""Joining the other processes of a launch, and telling of an error once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hubkit.errors import HubkitError, set_told
from hubkit.training.ranks.launched import Launch
from hubkit.training.ranks.world import World, within

PATIENCE = timedelta(hours=12)
"""How long one process waits for another: the first may pull and hash a base meanwhile. One that died is noticed at
once, by the launcher and by its closed connections."""
_TOLD = "hubkit/told"
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of a process that is no more."""


@contextlib.contextmanager
def joined(launch: Launch) -> Iterator[World]:
    """Inside, the processes of `launch` act as one `world`.

    Small things travel by gloo, on the CPU; what lies on CUDA devices by nccl. A group that the caller has initialized
    is used as it is, and left.
    """
    if dist.is_initialized():
        with within(World(dist.get_rank(), dist.get_world_size(), launch.local)) as found:
            yield found
        return
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if torch.cuda.is_available() and launch.local < torch.cuda.device_count():
        torch.cuda.set_device(launch.local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        with within(World(rank, size, launch.local)) as found:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
            yield found
    except BaseException as error:
        told = _lost() if _of_another(error) else error
        if not _first_to_tell(store):
            set_told(told)
        if told is not error:
            raise told from None
        raise  # without leaving the group: the others may wait in it, and notice this process's end
    dist.destroy_process_group()


def _of_another(error: BaseException) -> bool:
    """Whether another process's end is behind `error`, whatever was made of it on the way (a failed plugin, say): a
    closed connection, or the launcher that ends those that are left."""
    if isinstance(error, SystemExit):
        return bool(error.code)
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, RuntimeError) and any(word in str(behind) for word in _GONE):
            return True
        behind = behind.__cause__ or behind.__context__
    return False


def _lost() -> HubkitError:
    return HubkitError(
        "HK-INTERRUPTED",
        "another process of this training has ended, or the launcher was told to end them",
        want="all processes to the end",
        have="a closed connection or SIGTERM; what the launcher says below tells whose, and its exit code (-9: killed)",
        fix="--resume goes on from the last checkpoint",
    )


def _first_to_tell(store: Any) -> bool:
    """Whether no other process has told of an error; where nobody keeps count any more, the one who did has ended."""
    try:
        return bool(store.add(_TOLD, 1) == 1)
    except RuntimeError:
        return False
