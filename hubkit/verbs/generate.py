"""`generate`: the answer of a base with its adapters to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_source, base_with_record, named_base, naming_digest
from hubkit.named.terms import Term, Terms, attached, codec_of_terms, open_terms, require_base, require_mix
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, repr=False)
class Generated(Shown):
    """One answer.

    Args:
        text: the answer, special tokens left out.
        tokens: number of new tokens.
        base: what answered.
        adapters: the adapters with their weights, in order.
        overrides: named overrides used.
        device: where it was computed.
    """

    text: str
    tokens: int
    base: str
    adapters: tuple[tuple[str, float], ...]
    overrides: tuple[str, ...]
    device: str


@checked
def generate(
    prompt: str,
    *,
    base: Path | str | None = None,
    terms: Terms = (),
    mix: str = "sum",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    allow_incomplete_base: bool = False,
    report: Callable[[str], None] = lambda device: None,
    progress: Progress | None = None,
) -> Generated:
    """Answers a prompt.

    Args:
        prompt: one user message, put through the chat template where the base has one; with `raw` the plain text. An
            encoder-decoder reads the plain text and writes the answer.
        base: folder or repository; by default the one that the first adapter's manifest names.
        terms: adapters: ``"1.0*./a + -0.5*org/b"``, or a mapping reference -> weight. None: the base alone.
        mix: ``sum`` or ``stack``.
        max_new_tokens: at most so many.
        temperature: 0: greedy; above: sampling, seeded by `seed`.
        dtype: in which the base computes; its own by default.
        device: where it answers: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        allow_base_mismatch: go on although an adapter was trained on another base.
        allow_incomplete_base: go on with a base whose files lack weights that transformers then makes up, or hold some
            that it leaves out.
        report: called with the device in words, before anything is loaded.

    Raises:
        HubkitError: ``HK-BASE-NEEDED``, ``HK-BASE-MISMATCH``, ``HK-MIX``, ``HK-OPTIONS``, ``HK-ROW-TOO-LONG``,
            ``HK-DEVICE``, ``HK-DTYPE``, ``HK-MEMORY``, ``HK-TEMPLATE``, ``HK-VOCABULARY``; what pulling, opening and
            reading raise.
    """
    import torch

    from hubkit.compat.transformers import quiet
    from hubkit.tensors.base.agreement import INCOMPLETE
    from hubkit.tensors.base.tokenizer import is_seq2seq
    from hubkit.tensors.device import computing, described, device_named, forked_rng
    from hubkit.tensors.live.loading import load_base
    from hubkit.tensors.parts.part import front_length
    from hubkit.tensors.rendering import begin

    require_ranges(max_new_tokens, temperature)
    require_mix(mix)
    place = device_named(device)
    where = Where(registry, offline, progress)
    members = open_terms(terms, where) if terms else []
    _require_writers(members)
    named, revision = named_base(base, revision, members[0].folder.manifest.base if members else None)
    overrides: tuple[str, ...] = ()
    if members:
        with naming_digest(members[0].folder.manifest.base):
            source, record = base_with_record(named, revision, where)
        overrides = require_base(members, record, allow_base_mismatch)
    else:
        source = base_source(named, revision, where)
    overrides += (INCOMPLETE,) if allow_incomplete_base else ()
    tokens = one_vocabulary(members)
    report(described(place))
    reads = is_seq2seq(source.path)  # an encoder-decoder reads the prompt as it is
    if not raw and not reads:
        begin(source.path)
    model: nn.Module = load_base(
        source.path, dtype, codec_of_terms(members), place, allow_incomplete_base=allow_incomplete_base
    )
    tokenizer = tokenizer_with(source.path, tokens, " + ".join(member.name for member in members))
    front = 0
    if members:
        live = attached(model, members, mix)
        front = front_length(part for adapter in live.adapters.values() for part in adapter.parts.values())
        model = live
    smaller = "--max-new-tokens, a shorter prompt, or fewer adapters"
    with quiet(), forked_rng(place), computing(place, "the answer", smaller):
        torch.manual_seed(seed)
        how = max_new_tokens, temperature, source.path
        if reads:
            text, count = _written(model, tokenizer, prompt, *how)
        else:
            text, count = _answer(model, tokenizer, prompt, raw, *how, front)
    shown = tuple((member.reference, member.weight) for member in members)
    return Generated(text, count, source.reference, shown, overrides, described(place))


def _require_writers(members: Sequence[Term]) -> None:
    """Refuses adapters that were trained for something else than writing: ``HK-HEAD``."""
    from hubkit.training.tasks.names import CAUSAL_LM, SEQ2SEQ, TASKS

    for member in members:
        kind = (member.folder.manifest.task or {}).get("kind")
        if kind in TASKS and kind not in (CAUSAL_LM, SEQ2SEQ):
            what = f"adapter {member.name!r} was trained for the task {kind}: it writes no text"
            raise HubkitError("HK-HEAD", what, where=member.reference, fix=f"hubkit predict {member.reference} TEXT")


def require_ranges(max_new_tokens: int, temperature: float) -> None:
    """Refuses a number that cannot be: ``HK-OPTIONS``, naming that one alone."""
    bad: list[tuple[str, str, float]] = [("max_new_tokens", ">= 1", max_new_tokens)] if max_new_tokens < 1 else []
    bad += [] if 0 <= temperature < float("inf") else [("temperature", ">= 0", temperature)]
    if bad:
        fix = "    and    ".join(f"--{name.replace('_', '-')} {want}" for name, want, _ in bad)
        want, have = [f"{n} {w}" for n, w, _ in bad], [f"{n} = {value}" for n, _, value in bad]
        raise HubkitError("HK-OPTIONS", "out of range", want=want, have=have, fix=fix, status=USAGE)


def _answer(
    model: Any, tokenizer: Any, prompt: str, raw: bool, tokens: int, temperature: float, base: Path, front: int
) -> tuple[str, int]:
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.training.rows.encode import render

    text, templated = prompt, bool(tokenizer.chat_template) and not raw
    if templated:
        messages = [{"role": "user", "content": prompt}]
        text = render(tokenizer, messages, True, str(base), fix="--raw")
    inputs = tokenizer(text, add_special_tokens=not templated, return_tensors="pt")
    length, longest = inputs["input_ids"].shape[1], context_of_folder(base)
    if length == 0 or (longest is not None and front + length + tokens > longest):
        virtual = f"{front} virtual + " if front else ""
        raise HubkitError(
            "HK-ROW-TOO-LONG",
            "prompt and answer do not fit the base's context",
            want=f"1 to {longest} tokens",
            have=f"{virtual}{length} of the prompt + {tokens} new",
            fix="--max-new-tokens, or a shorter prompt",
        )
    new = _made(model, tokenizer, inputs, tokens, temperature)[length:]
    return str(tokenizer.decode(new, skip_special_tokens=True)), len(new)


def _written(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float, base: Path) -> tuple[str, int]:
    """What an encoder-decoder writes for a text that it reads; see `_answer`."""
    from hubkit.training.tasks.seq2seq import limits_of

    inputs = tokenizer(prompt, return_tensors="pt")
    limits, length = limits_of(base), inputs["input_ids"].shape[1]
    # the decoder begins with a token of its own
    if length == 0 or length > (limits.read or length) or tokens > (limits.written or tokens + 1) - 1:
        want = [f"1 to {limits.read or 'any number of'} tokens of the prompt"]
        want += [f"at most {limits.written - 1} new"] if limits.written else []
        what, have = "prompt or answer do not fit the base's context", f"{length} of the prompt, {tokens} new"
        fix = "--max-new-tokens, or a shorter prompt"
        raise HubkitError("HK-ROW-TOO-LONG", what, want=want, have=have, fix=fix)
    new = _made(model, tokenizer, inputs, tokens, temperature)[1:]
    return str(tokenizer.decode(new, skip_special_tokens=True)), len(new)


def _made(model: Any, tokenizer: Any, inputs: Any, tokens: int, temperature: float) -> Any:
    """The ids of the whole text that a model goes on with, (length,)."""
    import torch

    device = next(model.parameters()).device
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.no_grad():
        return model.generate(
            **{k: v.to(device) for k, v in inputs.items() if k != "token_type_ids"},
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **choice,
        )[0]
