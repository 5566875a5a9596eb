"""What the processes of a run decide together. A process on its own decides at once: nothing here costs it anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.device import device_named

T = TypeVar("T")
_GOES_ON, _STOPS, _FAILED = 0, 1, 2


@dataclass
class World:
    """The processes of a run, seen from one of them. What is called a collective must be called by all, in one order.

    Args:
        rank: this one's number.
        size: how many there are.
        local: this one's number on its machine.
        sharded: the base is divided among them: each must take part in each forward and backward pass.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> list[int | None]:
        """Of `count` micro-batches those that are this process's: every `size`-th. None: the round has none left."""
        rounds = -(-count // self.size)
        mine = range(self.rank, rounds * self.size, self.size)
        return [number if number < count else None for number in mine]

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the processes have (a collective)."""
        if self.size == 1:
            return number
        box = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def any(self, flag: bool) -> bool:
        """Whether one of them says so (a collective)."""
        return bool(self.greatest(int(flag)))

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, for all (a collective); its exception is everybody's.

        What it gives must be picklable.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                dist.broadcast_object_list([None, _portable(error)], src=0)
                raise
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made

    def each(self, make: Callable[[], T]) -> list[T]:
        """What `make` gives in each process, by their numbers, for all (a collective).

        What it gives must be picklable; an exception of one, that of the lowest number, is everybody's.
        """
        if self.size == 1:
            return [make()]
        made: list[Any] = [None, None]
        failure: Exception | None = None
        try:
            made[0] = make()
        except Exception as error:
            failure, made[1] = error, _portable(error)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, made)
        for rank, (_, theirs) in enumerate(found):
            if theirs is not None:
                raise failure if rank == self.rank and failure is not None else theirs
        return [value for value, _ in found]

    def rounds(self, count: int, cancelled: Callable[[], bool], work: Callable[[int | None], None]) -> bool:
        """Does `work` on this process's share of `count` micro-batches (a collective); False when one was `cancelled`.

        An exception in one process ends the round in all of them, which raise it.

        Args:
            work: gets the number of a micro-batch. None: there is none left for this process, but the base is divided
                and the others need its part.
        """
        failure: Exception | None = None
        for number in (*self.share(count), -1):
            last = number == -1
            if self.size > 1:
                code = _FAILED if failure else _STOPS if not last and cancelled() else _GOES_ON
                code = self.greatest(code)
                if code == _FAILED:
                    self._raise_first(failure)
            else:
                code = _STOPS if not last and cancelled() else _GOES_ON
            if code == _STOPS:
                return False
            if last or (number is None and not self.sharded):
                continue
            try:
                work(number)
            except Exception as error:
                if self.size == 1 or self.sharded:  # the others wait inside a pass: only this process's end wakes them
                    raise
                failure = error
        return True

    def _raise_first(self, failure: Exception | None) -> None:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, None if failure is None else _portable(failure))
        lowest = next(rank for rank, error in enumerate(found) if error is not None)
        raise failure if lowest == self.rank and failure is not None else found[lowest]

    def gathered(self, mine: Sequence[tuple[int, float]], count: int) -> list[float]:
        """`count` numbers of which each process has some, by their places (a collective): exact, whoever had them."""
        box = torch.zeros(count, dtype=torch.float64)
        for place, value in mine:
            box[place] = value
        if self.size > 1:
            dist.all_reduce(box)
        values: list[float] = box.tolist()
        return values

    def require_same(self, what: str, mine: str) -> None:
        """Refuses processes that see something differently: ``HK-RESUME`` (a collective)."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        if len({*found}) > 1:
            raise HubkitError(
                "HK-RESUME",
                f"the processes see {what} differently",
                want="one folder that all of them can read",
                have=[f"process {rank}: {said}" for rank, said in enumerate(found)],
                fix="an --out on a disk that all machines share",
            )

    def alike(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values of `tensors` (a collective)."""
        if self.size > 1:
            for tensor in tensors:
                values = tensor.detach()
                whole = values.contiguous()
                dist.broadcast(whole, src=0)
                if whole.data_ptr() != values.data_ptr():
                    values.copy_(whole)

    def require_work(self, batch_size: int, accumulate: int, shard: bool = False) -> None:
        """Refuses more processes than a step has micro-batches, and one alone to divide a base: ``HK-OPTIONS``."""
        if shard and self.size == 1:
            raise HubkitError(
                "HK-OPTIONS",
                "a base is divided among the processes of a launch, and this is one alone",
                want="several processes",
                have="--shard",
                fix="torchrun --nproc-per-node N -m hubkit train ..., or train without --shard",
                status=USAGE,
            )
        if self.size > accumulate:
            rows = batch_size * accumulate
            raise HubkitError(
                "HK-OPTIONS",
                f"{self.size} processes share the micro-batches of a step, and a step has {accumulate}",
                want=f"--accumulate {self.size} or more: all processes together have --batch-size x --accumulate rows",
                have=f"--batch-size {batch_size} --accumulate {accumulate}",
                fix=f"--batch-size {-(-rows // self.size)} --accumulate {self.size}",
                status=USAGE,
            )

    def device(self, word: str | torch.device) -> torch.device:
        """The device of this process that `word` names: of several processes each has a CUDA device of its own.

        Raises:
            HubkitError: ``HK-DEVICE``, in all processes where one of them has no such device (a collective).
        """
        if self.size == 1:
            return device_named(word)
        failure: HubkitError | None = None
        try:
            found = self._own_device(str(word))
        except HubkitError as error:
            found, failure = torch.device("cpu"), error
        if self.any(failure is not None):
            self._raise_first(failure)
        kinds: list[Any] = [None] * self.size
        dist.all_gather_object(kinds, found.type)
        if len({*kinds}) > 1:
            have = [f"process {rank}: {kind}" for rank, kind in enumerate(kinds)]
            raise HubkitError("HK-DEVICE", "the processes are on devices of two kinds", have=have, fix="--device cpu")
        return found

    def _own_device(self, word: str) -> torch.device:
        if word in ("auto", "cuda") and (word == "cuda" or torch.cuda.is_available()):
            if torch.cuda.is_available() and self.local >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise HubkitError(
                    "HK-DEVICE",
                    f"process {self.local} of this machine has no GPU",
                    want="a GPU for each process",
                    have=f"{count} GPU{'s' * (count > 1)}",
                    fix=f"torchrun --nproc-per-node {count}, or --device cpu",
                )
            found = device_named(f"cuda:{self.local}")
            torch.cuda.set_device(found)
            return found
        if word == "auto":
            return torch.device("cpu")
        found = device_named(word)
        if found.type != "cpu":
            what = f"{self.size} processes cannot share the device {word}"
            raise HubkitError("HK-DEVICE", what, want="auto, cuda or cpu", have=word, fix="--device auto", status=USAGE)
        return found


def _portable(error: Exception) -> Exception:
    """`error` as other processes may get it."""
    return error if isinstance(error, HubkitError) else RuntimeError(f"{type(error).__name__}: {error}")


_WORLD: ContextVar[World | None] = ContextVar("hubkit_world", default=None)


def world() -> World:
    """The processes of the run that goes on here; one where nothing else was said."""
    return _WORLD.get() or World()


@contextmanager
def within(found: World) -> Iterator[World]:
    """Inside, `world` is `found`."""
    token = _WORLD.set(found)
    try:
        yield found
    finally:
        _WORLD.reset(token)
