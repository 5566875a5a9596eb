"""MLX-LM's server, read and run at 0.32.2: OpenAI's completions.

| | |
|---|---|
| asked | ``/v1/completions``, one prompt a request, as text: its own tokenizer reads it, and its count is compared |
| adapters | none is listed: ``default_model`` is the base with the adapter of its start, ``--adapter-path`` |
| | any other: ``"adapters": PATH`` of the request, beside the base by its path |
| base | by its path, which loads it a second time |
| silently wrong | under the name ``default_model`` it ignores ``adapters``, even a path where nothing is |
| refuses | more than 11 likeliest tokens |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from hubkit.documents.probes import Prompt
from hubkit.engines.runtimes.fit import COMPARED, Answers
from hubkit.engines.runtimes.runtime import Entry, dig, listed, require_model, require_read_alike, row
from hubkit.engines.runtimes.wire import Server

COMPLETIONS = "v1/completions"
DEFAULT = "default_model"


class MlxRuntime:
    """A `hubkit.engines.runtimes.runtime.Runtime`.

    Args:
        server: who is asked.
        models: the models that it listed, as JSON: cached ones by name, its own by path.
    """

    engine = "mlx"
    proven = False

    def __init__(self, server: Server, models: Sequence[dict[str, Any]]) -> None:
        self.server = server
        names = [str(one.get("id")) for one in models]
        own = [name for name in names if PurePath(name).is_absolute()]
        self._models = own or names

    def entries(self) -> Sequence[Entry]:
        """What the server says it serves."""
        return [Entry(name, name, True) for name in self._models]

    def named(self, key: str) -> Entry | None:
        """What it was started with; or, by a path, an adapter beside its model."""
        if not PurePath(key).is_absolute():
            return Entry(DEFAULT)
        return Entry(self._models[0], key) if len(self._models) == 1 else None

    def bare(self, entry: Entry) -> Entry | None:
        """The base: its model by its path, without an adapter."""
        known = [one for one in self.entries() if one.name == entry.name or entry.name == DEFAULT]
        return known[0] if len(known) == 1 and not entry.bare else None

    def likeliest(self, prompts: Sequence[Prompt], entry: Entry) -> Answers:
        """See `Runtime.likeliest`."""
        return [self._asked(prompt, entry) for prompt in prompts]

    def _asked(self, prompt: Prompt, entry: Entry) -> dict[int, float]:
        body = {
            "model": entry.name,
            "prompt": prompt.text,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": COMPARED,
            **({"adapters": entry.path} if entry.path and not entry.bare else {}),
        }
        answer = self.server.post(COMPLETIONS, body)
        require_model(self.server, COMPLETIONS, answer, entry.name)
        require_read_alike(self.server, prompt, dig(self.server, COMPLETIONS, answer, "usage", "prompt_tokens"))
        top = listed(self.server, COMPLETIONS, answer, "choices", 0, "logprobs", "content", 0, "top_logprobs")
        pairs = [(dig(self.server, COMPLETIONS, t, "id"), dig(self.server, COMPLETIONS, t, "logprob")) for t in top]
        return row(self.server, COMPLETIONS, pairs)
