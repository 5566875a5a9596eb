"""The training loop's own loss: output head and cross-entropy in chunks of rows, the gradient made on the way.

A stock causal model makes all logits (tokens x vocabulary), a float32 copy, their log-softmax and a gradient of each.
Here positions without a target are dropped before the head, and the rest goes through head and cross-entropy `CHUNK`
rows at a time in two buffers that every step uses again; the gradient with respect to the head's input is ready when
the loss is. Values are those of transformers' loss: the head's product in its own dtype, everything after in float32.

It works from outside: `chunked_loss` lets the whole model run, hooks and all, takes what arrives at the head, and
leaves the head one position to work on. Whether a model is of the kind this can be done to is not read from its
class but tried on a few tokens: see `find_head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hubkit.compat.torch import hook_numbers, own_forward, running
from hubkit.tensors.device import forked_rng
from hubkit.tensors.live.likeness import Likeness
from hubkit.training.rows.encode import IGNORED

CHUNK = 256
"""Rows of logits in memory at once: at a vocabulary of 49,152 in bfloat16, 25 MB and 50 MB."""

LIFT = 2.0**14
"""A power of two, so that no digit changes; smaller where the head's weights are large, so that nothing overflows."""

TRIED = 16
"""Tokens on which a model's head is tried."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Buffers:
    """The two buffers, made at the first use and again only when a larger, or another kind, is needed."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._exact: Tensor | None = None

    def take(self, rows: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in the dtype of `weight` and in float32, (rows, vocabulary); one tensor when these are the same."""
        shape = (rows, weight.shape[0])
        self._exact = self._fit(self._exact, shape, torch.float32, weight.device)
        if weight.dtype == torch.float32:
            return self._exact[:rows], self._exact[:rows]
        self._kept = self._fit(self._kept, shape, weight.dtype, weight.device)
        return self._kept[:rows], self._exact[:rows]

    @staticmethod
    def _fit(buffer: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        fits = buffer is not None and buffer.dtype == dtype and buffer.device == device
        if buffer is not None and fits and buffer.shape[0] >= shape[0] and buffer.shape[1] == shape[1]:
            return buffer
        return torch.empty(shape, dtype=dtype, device=device)


_COUNTED: ContextVar[tuple[Tensor, int] | None] = ContextVar("hubkit_targets_counted", default=None)


@contextmanager
def counted(labels: Tensor, targets: int) -> Iterator[None]:
    """Inside, `labels` are known to hold so many targets: a device that runs ahead of the host need not be asked."""
    token = _COUNTED.set((labels, targets))
    try:
        yield
    finally:
        _COUNTED.reset(token)


def _positions(targets: Tensor, labels: Tensor) -> Tensor:
    """Where a target is, in order. How many there are is the size of the result: off the CPU, finding out waits for all
    work that is under way, so it is sorted instead where the number is known."""
    known = _COUNTED.get()
    if targets.device.type == "cpu" or known is None or known[0] is not labels:
        return (targets != IGNORED).nonzero().squeeze(1)
    return torch.argsort((targets == IGNORED).to(torch.uint8), stable=True)[: known[1]]


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of head(hidden) over the positions that have a target.

    In float16 the gradient is made and kept `LIFT` times as large: it is ready before the loss is scaled, and its
    smallest values would be zeros by then.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, buffers: _Buffers, lift: float) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(flat.device)
        rows = _positions(targets, labels)
        ctx.lift = lift
        share = ctx.lift / len(rows)
        picked, targets = flat.index_select(0, rows), targets.index_select(0, rows).unsqueeze(1)
        losses = torch.empty(len(rows), dtype=torch.float32, device=flat.device)
        grad = torch.empty_like(picked) if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), CHUNK):
            part = slice(start, min(start + CHUNK, len(rows)))
            logits, exact = buffers.take(part.stop - start, weight)
            torch.mm(picked[part], weight.t(), out=logits)
            if exact is not logits:
                exact.copy_(logits)
            torch.log_softmax(exact, -1, out=exact)
            losses[part] = exact.gather(1, targets[part]).squeeze(1).neg_()
            if grad is not None:
                exact.exp_().mul_(share)
                exact.scatter_add_(1, targets[part], exact.new_full((exact.shape[0], 1), -share))
                if exact is not logits:
                    logits.copy_(exact)
                torch.mm(logits, weight, out=grad[part])
        ctx.shape = hidden.shape
        ctx.save_for_backward(rows, *([] if grad is None else [grad]))
        return losses.mean()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, grad = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape).view(-1, ctx.shape[-1])
        # the factor (a micro-batch's share of the targets) stays float32: rounding it would bias the whole gradient
        full.index_copy_(0, rows, (grad.float() * (upstream / ctx.lift)).to(grad.dtype))
        return full.view(ctx.shape), None, None, None, None


class ChunkedOutput:
    """What a model under `chunked_loss` returns: the model's output with `loss`; logits are made when asked for."""

    def __init__(self, output: Any, loss: Tensor, hidden: Tensor, head: nn.Linear) -> None:
        self.loss = loss
        self._output, self._hidden, self._head = output, hidden, head

    @property
    def logits(self) -> Tensor:
        """All logits, (rows, tokens, vocabulary), with grad; computed again at each use."""
        return F.linear(self._hidden, self._head.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def __getitem__(self, key: str | int) -> Any:
        names = {0: "loss", 1: "logits"}
        if isinstance(key, int) and key not in names:
            raise IndexError(key)
        return getattr(self, names[key] if isinstance(key, int) else key)


@contextmanager
def _reaching(head: nn.Linear, *, shorten: bool) -> Iterator[list[Tensor]]:
    """Collects what arrives at `head`; with `shorten` the head itself gets the first position of each row only."""
    arrived: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        arrived.append(args[0])
        # contiguous: torch multiplies a strided batch by a copy of the weight for each row
        return (args[0][:, :1].contiguous(),) if shorten and args[0].dim() == 3 else None

    handle = head.register_forward_pre_hook(hook)
    try:
        yield arrived
    finally:
        handle.remove()


def _is_plain(head: object) -> bool:
    """Whether `head` is a linear that does what its weight says and nothing else, and is not trained."""
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    if own_forward(head) is not None or head.weight.dtype not in _DTYPES:
        return False
    return not hook_numbers(head) and not torch.is_autocast_enabled(head.weight.device.type)


def find_head(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Linear | None:
    """The output head of `model` if its loss is the plain one, else None.

    The first `TRIED` tokens of `batch` are run once, without gradient, as inputs and targets. The logits must be,
    bit for bit, what reached the head times its weight (a soft cap, a scale, a bias or an adapter at the head would
    show), and the loss the mean cross-entropy of the next tokens (an auxiliary loss would show).

    Random generators are left as they were.
    """
    asked = (module for module in model.modules() if not isinstance(module, Likeness))  # it would refuse some
    owners: Iterator[Any] = (module for module in asked if hasattr(module, "get_output_embeddings"))
    candidates = (owner.get_output_embeddings() for owner in owners)
    head = next((candidate for candidate in candidates if isinstance(candidate, nn.Module)), None)
    if not isinstance(head, nn.Linear) or not _is_plain(head):
        return None
    ids = batch["input_ids"][:1, :TRIED]
    if ids.shape[1] < 2:
        return None
    with torch.no_grad(), forked_rng(head.weight.device), _reaching(head, shorten=False) as arrived:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if len(arrived) != 1 or not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
            return None
        if arrived[0].dim() != 3 or arrived[0].shape[:2] != ids.shape or arrived[0].dtype != head.weight.dtype:
            return None
        plain = F.linear(arrived[0], head.weight)
        if plain.shape != logits.shape or not torch.equal(plain.float(), logits.float()):
            return None
        expected = F.cross_entropy(plain[0, :-1].float(), ids[0, 1:].to(plain.device))
        # the same operations in the same order, up to the reduction: 1e-5 is far below any auxiliary loss
        same = torch.isclose(loss.float().to(expected.device), expected, rtol=1e-5, atol=1e-7)
    return head if bool(same) else None


@contextmanager
def chunked_loss(model: nn.Module, batch: Mapping[str, Tensor], enabled: bool = True) -> Iterator[bool]:
    """Within it, `model(input_ids=..., labels=...)` computes its loss in chunks; yields whether it does.

    Calls that ask for something else (no labels, tuples, other losses) go the model's own way, and so does
    everything when the head gets a hook or is made trainable meanwhile.

    Args:
        model: the model as the training step calls it; its `forward` is replaced on the object, and restored.
        batch: rows to try the head on.
        enabled: False leaves the model alone.
    """
    head = find_head(model, batch) if enabled else None
    if head is None:
        yield False
        return
    with running(model, _chunked_forward(model.forward, head)):
        yield True


def _chunked_forward(original: Callable[..., Any], head: nn.Linear) -> Callable[..., Any]:
    buffers, lift = _Buffers(), 1.0
    if head.weight.dtype == torch.float16:
        # a gradient is at most 2 * lift * the largest weight: half of float16's range
        lift = min(LIFT, 2.0 ** math.floor(math.log2(2.0**14 / max(1e-6, float(head.weight.abs().amax())))))
    apply: Callable[..., Tensor] = _HeadLoss.apply
    foreign = ("num_items_in_batch", "shift_labels", "logits_to_keep")

    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            return original(*args, **kwargs)
        stock = kwargs.get("return_dict") is False or any(name in kwargs for name in foreign)
        if stock or not _is_plain(head):
            return original(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "labels"}
        with _reaching(head, shorten=True) as arrived:
            output = original(*args, **rest)
        if len(arrived) != 1 or arrived[0].shape[:2] != labels.shape:
            return original(*args, **kwargs)
        loss: Tensor = apply(arrived[0], head.weight, labels, buffers, lift)
        return ChunkedOutput(output, loss, arrived[0], head)

    return forward
