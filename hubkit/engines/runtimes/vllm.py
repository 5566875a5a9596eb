"""vLLM's server, read at 0.33.0 and run at 0.32.0 (CPU): its form of OpenAI's completions.

| | |
|---|---|
| asked | ``/v1/completions`` with all prompts as ids in one request, one token each |
| ids in answers | ``return_tokens_as_token_ids``: ``{"token_id:42": -0.1}`` |
| adapters | models of ``/v1/models`` with a ``parent``; ``root`` is the path |
| not listed | what a resolver would load: it is asked for by name; 404 where there is none |
| refuses | more likeliest tokens than ``--max-logprobs`` (20) |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubkit.documents.probes import Prompt
from hubkit.engines.runtimes.fit import COMPARED, Answers
from hubkit.engines.runtimes.runtime import Entry, WithParents, dig, listed, not_served, require_model, row

COMPLETIONS = "v1/completions"
_ID = "token_id:"


class VllmRuntime(WithParents):
    """vLLM, asked by its form of OpenAI's protocol."""

    engine = "vllm"
    proven = True

    def named(self, key: str) -> Entry | None:
        """What a resolver plugin would load for `key`."""
        return Entry(key)

    def likeliest(self, prompts: Sequence[Prompt], entry: Entry) -> Answers:
        """See `Runtime.likeliest`."""
        body = {
            "model": entry.name,
            "prompt": [list(one.ids) for one in prompts],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": COMPARED,
            "return_tokens_as_token_ids": True,
        }
        unknown = not_served(self.server, "the server does not serve this adapter", entry.name, self._entries)
        answer = self.server.post(COMPLETIONS, body, unknown)
        require_model(self.server, COMPLETIONS, answer, entry.name)
        choices = listed(self.server, COMPLETIONS, answer, "choices")
        by_index = {dig(self.server, COMPLETIONS, one, "index"): one for one in choices}
        if len(choices) != len(prompts) or {*by_index} != {*range(len(prompts))}:
            raise self.server.garbled(COMPLETIONS, f"want {len(prompts)} choices", [*by_index])
        return [self._row(by_index[number]) for number in range(len(prompts))]

    def _row(self, choice: Any) -> dict[int, float]:
        top = dig(self.server, COMPLETIONS, choice, "logprobs", "top_logprobs", 0)
        if not isinstance(top, dict):
            raise self.server.garbled(COMPLETIONS, "want likeliest tokens", top)
        return row(self.server, COMPLETIONS, [(_number(token), logprob) for token, logprob in top.items()])


def _number(token: str) -> int | None:
    digits = token.removeprefix(_ID)
    return int(digits) if token.startswith(_ID) and digits.isdecimal() else None
