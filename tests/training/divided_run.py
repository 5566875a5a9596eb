"""A base divided among the processes of a launch, once read share by share and once as a whole: what each holds.

``divided_run.py BASE PACKED BROKEN OUT``; facts go to OUT/held-RANK.json. Held are bytes of
tensors in memory, looked at after every read and quantization, before bytes are handed out, and before and after a
whole model is divided.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from hubkit.errors import HubkitError
from hubkit.tensors.files.shards import Shards
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.live.loading_4bit import Packing
from hubkit.training.ranks import loading
from hubkit.training.ranks.joining import joined
from hubkit.training.ranks.launched import launched
from hubkit.training.ranks.sharding import shard
from hubkit.training.ranks.skeleton import skeleton
from hubkit.training.ranks.world import World

CODEC = "nf4/64/double"
CPU = torch.device("cpu")


def held() -> int:
    """Bytes of all tensors that have come since `Watch` began, storages that several share once."""
    sizes: dict[int, int] = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class Watch:
    """What lies in memory at most, and what is read, while it watches."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what was there before is not looked at
        self.most = self.read = 0

    def seen(self, function: Callable[..., Any], reads: bool = False, before: bool = False) -> Callable[..., Any]:
        """`function`, looked after."""

        def run(*arguments: Any, **options: Any) -> Any:
            if before:
                self.look()
            result = function(*arguments, **options)
            self.read += result.nbytes if reads else 0
            self.look()
            return result

        return run

    def look(self) -> None:
        self.most = max(self.most, held())


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    places: list[tuple[Any, str, dict[str, bool]]] = [
        (Shards, "rows", {"reads": True}),
        (Shards, "read", {"reads": True}),
        (Packing, "packed", {}),
        (dist, "scatter", {"before": True}),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, how in places:
        setattr(owner, name, watch.seen(getattr(owner, name), **how))
    try:
        yield watch
    finally:
        for owner, name, before in kept:
            setattr(owner, name, before)
        gc.unfreeze()


def facts_of(base: Path, codec: str | None, world: World) -> dict[str, Any]:
    """Of one base: bytes held at most and at the end, beside what was there before, and bytes read."""
    with watched() as watch:
        attached = loading.attached_divided(base, None, codec, world, CPU)
        if attached is None:
            attached = Attached(load_base(base, None, codec, "cpu"))
            watch.look()
            shard(attached.model, world, CPU)
        watch.look()
    shares = [part.to_local() for part in attached.model.parameters()]  # type: ignore[attr-defined]
    return {
        "most": watch.most,
        "read": watch.read,
        "shares": sum(share.nbytes for share in shares),
        "sums": _sums(attached),
    }


def _sums(attached: Attached) -> list[float]:
    """The sum of each weight, of the layers in 4 bits decoded."""
    sites = attached.sites.sites.values()
    return [float(site.weight().double().sum()) for site in sites if site.kind in ("linear", "embedding", "norm")]


def main(base: Path, packed: Path, broken: Path, out: Path) -> None:
    launch = launched()
    assert launch is not None
    facts: dict[str, Any] = {}
    skeleton(base, None, None)  # what it imports is no fact of the base
    with joined(launch) as world:
        cases = {"plain": (base, None), "quantized": (base, CODEC), "packed": (packed, None)}
        for name, (folder, codec) in cases.items():
            facts[name] = facts_of(folder, codec, world)
        with patch("hubkit.training.ranks.loading.skeleton", lambda *arguments: None):
            for name, (folder, codec) in cases.items():
                facts[f"{name}-whole"] = facts_of(folder, codec, world)
        try:
            loading.attached_divided(broken, None, CODEC, world, CPU)
        except HubkitError as error:
            facts["broken"] = [error.code, error.where]
    (out / f"held-{launch.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
