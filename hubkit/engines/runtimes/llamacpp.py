"""llama.cpp's server, read and run at build 11434 (autumn 2026): its own ``/completion``.

| | |
|---|---|
| asked | one request a prompt, as ids; ``n_probs``: log-probabilities before any sampler |
| adapters | ``/lora-adapters``; each request lists all of them with its scale, those left out would be at 0 |
| base | all scales 0 |
| silently wrong | ``cache_prompt`` keeps keys and values of another scale: false here; ``model`` is ignored |
| silently wrong | where the token that it draws is half of a character, it gives no log-probabilities: one is forced |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from hubkit.documents.probes import Prompt
from hubkit.engines.runtimes.fit import COMPARED, Answers
from hubkit.engines.runtimes.runtime import Entry, dig, listed, require_read_alike, row
from hubkit.engines.runtimes.wire import Server

ADAPTERS, COMPLETION = "lora-adapters", "completion"
BASE = "base"
FORCED = [[" a", 100.0]]
"""What it is made to draw, which changes nothing of the log-probabilities: whole characters in every vocabulary."""


class LlamacppRuntime:
    """A `hubkit.engines.runtimes.runtime.Runtime`.

    Args:
        server: who is asked.
        models: the models that it listed, as JSON.
    """

    engine = "llamacpp"
    proven = True

    def __init__(self, server: Server, models: Sequence[dict[str, Any]]) -> None:
        self.server = server
        found = server.get(ADAPTERS)
        if not isinstance(found, list):
            raise server.garbled(ADAPTERS, "want a list", found)
        numbers = [dig(server, ADAPTERS, one, "id") for one in found]
        paths = [str(dig(server, ADAPTERS, one, "path")) for one in found]
        if any(type(number) is not int for number in numbers):
            raise server.garbled(ADAPTERS, "want numbers of adapters", numbers)
        self._adapters = [Entry(_name(path), path, False, n) for n, path in zip(numbers, paths, strict=True)]
        self._base = Entry(next((str(m.get("id")) for m in models), BASE), "", True)

    def entries(self) -> Sequence[Entry]:
        """What the server says it serves."""
        return [self._base, *self._adapters]

    def named(self, key: str) -> Entry | None:
        """None: it loads nothing while it runs."""
        return None

    def bare(self, entry: Entry) -> Entry | None:
        """The base: every adapter at scale 0."""
        return None if entry.bare else self._base

    def likeliest(self, prompts: Sequence[Prompt], entry: Entry) -> Answers:
        """See `Runtime.likeliest`."""
        scales = [{"id": one.number, "scale": float(one.number == entry.number)} for one in self._adapters]
        return [self._asked(prompt, scales) for prompt in prompts]

    def _asked(self, prompt: Prompt, scales: list[dict[str, Any]]) -> dict[int, float]:
        body = {
            "prompt": list(prompt.ids),
            "n_predict": 1,
            "n_probs": COMPARED,
            "cache_prompt": False,
            "lora": scales,
            "logit_bias": FORCED,
        }
        answer = self.server.post(COMPLETION, body)
        first = dig(self.server, COMPLETION, answer, "completion_probabilities", 0)
        require_read_alike(self.server, prompt, dig(self.server, COMPLETION, answer, "tokens_evaluated"))
        top = listed(self.server, COMPLETION, first, "top_logprobs")
        pairs = [(dig(self.server, COMPLETION, t, "id"), dig(self.server, COMPLETION, t, "logprob")) for t in top]
        return row(self.server, COMPLETION, pairs)


def _name(path: str) -> str:
    """What an adapter is called: its folder where the file's own name says nothing, as in deployments."""
    file = PurePath(path)
    return file.parent.name if file.stem in ("adapter", "lora", "model") and file.parent.name else file.stem
