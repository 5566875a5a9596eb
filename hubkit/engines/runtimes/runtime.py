"""What a reader of a protocol is: it lists what a server serves, and asks it for likeliest next tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hubkit.documents.probes import Prompt
from hubkit.engines.runtimes.fit import COMPARED, Answers
from hubkit.engines.runtimes.wire import Server
from hubkit.errors import HubkitError

_LEAST = 2
"""Likeliest tokens that an answer must have: a vocabulary may be smaller than what is asked for."""
_ABOVE_ZERO = 0.01
"""By how much rounding may lift a log-probability above 0."""


@dataclass(frozen=True)
class Entry:
    """One thing that a server answers as.

    Args:
        name: what a request calls it.
        path: where the server has it from, as it says; empty where it does not say.
        bare: it is a model without an adapter.
        number: the server's number of it, where it counts adapters.
    """

    name: str
    path: str = ""
    bare: bool = False
    number: int = -1


class Runtime(Protocol):
    """A reader of one protocol.

    Args:
        engine: its name, as `hubkit deploy` has it.
        server: who is asked.
        proven: it was tried on the real server; False: it was only read.
    """

    engine: str
    server: Server
    proven: bool

    def entries(self) -> Sequence[Entry]:
        """What the server says it serves."""

    def named(self, key: str) -> Entry | None:
        """What a request for `key` would get, though the server does not list it; None where there is no such way."""

    def bare(self, entry: Entry) -> Entry | None:
        """The base below `entry`, to be asked alone; None where the server cannot do that."""

    def likeliest(self, prompts: Sequence[Prompt], entry: Entry) -> Answers:
        """For each prompt the `COMPARED` likeliest next tokens and their log-probabilities, as `entry` answers."""


class WithParents:
    """What the readers of servers share that list adapters as models with a ``parent``, beside the base.

    Args:
        server: who is asked.
        models: the models that it listed, as JSON.
    """

    def __init__(self, server: Server, models: Sequence[dict[str, Any]]) -> None:
        self.server = server
        self._entries = [Entry(str(m.get("id")), str(m.get("root") or ""), m.get("parent") is None) for m in models]

    def entries(self) -> Sequence[Entry]:
        """What the server says it serves."""
        return self._entries

    def bare(self, entry: Entry) -> Entry | None:
        """The base: the model without a parent."""
        return None if entry.bare else next((one for one in self._entries if one.bare), None)


def chosen(runtime: Runtime, name: str, digest: str, model: str | None) -> Entry:
    """What a server serves an adapter as.

    Args:
        name: the adapter's.
        digest: its manifest's, by the first twelve digits of which deployments name it.
        model: the user's word for it, where there is one.

    Raises:
        HubkitError: ``HK-RUNTIME-MODEL`` where it serves no such thing, or several.
    """
    found, short = runtime.entries(), digest.removeprefix("sha256:")[:12]
    adapters = [one for one in found if not one.bare]
    if model is not None:
        hits = [one for one in found if model in (one.name, one.path)]
        hits = hits or [one for one in [runtime.named(model)] if one is not None]
    else:
        hits = [one for one in adapters if short in one.name or short in one.path]
        hits = hits or [one for one in adapters if one.name == name]
        hits = hits or [one for one in [runtime.named(f"{name}@{short}")] if one is not None]
    if len(hits) != 1:
        what = f"the server serves {'several' if hits else 'no'} models that may be {model or name!r}"
        raise not_served(runtime.server, what, f"{model or f'{name}@{short}'}", hits or found)
    return hits[0]


def not_served(server: Server, what: str, want: str, have: Sequence[Entry]) -> HubkitError:
    """``HK-RUNTIME-MODEL``."""
    listed = [f"{one.name}  {one.path}".strip() for one in have[:20]] or ["nothing"]
    return HubkitError(
        "HK-RUNTIME-MODEL", what, where=server.url, want=want, have=listed, fix="--model NAME, one of these"
    )


def require_model(server: Server, path: str, answer: Any, asked: str) -> None:
    """Refuses an answer that another model gave than the one that was asked: ``HK-RUNTIME-MODEL``."""
    if not isinstance(answer, dict):
        raise server.garbled(path, "it is no object", answer)
    have = answer.get("model")
    if have != asked:
        what = "the server answers as another model than the one that was asked"
        raise HubkitError("HK-RUNTIME-MODEL", what, where=server.url, want=asked, have=str(have)[:200])


def row(server: Server, path: str, pairs: Sequence[tuple[Any, Any]]) -> dict[int, float]:
    """One answer, checked: ids of tokens and log-probabilities.

    Raises:
        HubkitError: ``HK-RUNTIME-ANSWER``.
    """
    made: dict[int, float] = {}
    for token, logprob in pairs:
        good = type(token) is int and token >= 0 and isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not good or math.isnan(logprob) or logprob > _ABOVE_ZERO:
            raise server.garbled(path, "want ids of tokens and log-probabilities", (token, logprob))
        made[token] = min(float(logprob), 0.0)
    if len(made) < _LEAST or sum(map(math.exp, made.values())) > 1 + COMPARED * _ABOVE_ZERO:
        raise server.garbled(path, "these are no log-probabilities of likeliest tokens", made)
    return made


def dig(server: Server, path: str, answer: Any, *steps: str | int) -> Any:
    """What stands in an answer behind keys and numbers.

    Raises:
        HubkitError: ``HK-RUNTIME-ANSWER`` where there is nothing.
    """
    found = answer
    for step in steps:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            raise server.garbled(path, f"want {'/'.join(map(str, steps))}", answer) from None
    return found


def listed(server: Server, path: str, answer: Any, *steps: str | int) -> list[Any]:
    """As `dig`, a list."""
    found = dig(server, path, answer, *steps)
    if not isinstance(found, list):
        raise server.garbled(path, f"want a list at {'/'.join(map(str, steps))}", answer)
    return found


def require_read_alike(server: Server, prompt: Prompt, have: object) -> None:
    """Refuses a server that reads a prompt as another number of tokens: ``HK-PROBE-BASE``."""
    if have != len(prompt.ids):
        raise HubkitError(
            "HK-PROBE-BASE",
            "the server's tokenizer is not the base's: it reads a prompt as other tokens",
            where=server.url,
            want=f"{len(prompt.ids)} tokens of {prompt.text!r}",
            have=str(have),
            fix="serve the base that the adapter was trained on, with its tokenizer",
        )
