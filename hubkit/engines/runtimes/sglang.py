"""SGLang's server, read at 0.5.23, never run here: its own ``/generate``.

| | |
|---|---|
| asked | ``/generate`` with all prompts as ids in one request, one token each; ``top_logprobs_num`` |
| adapters | models of ``/v1/models`` with a ``parent``; ``lora_path`` of the request is the adapter's name |
| base | ``lora_path`` null |
"""

from __future__ import annotations

from collections.abc import Sequence

from hubkit.documents.probes import Prompt
from hubkit.engines.runtimes.fit import COMPARED, Answers
from hubkit.engines.runtimes.runtime import Entry, WithParents, dig, listed, row

GENERATE = "generate"


class SglangRuntime(WithParents):
    """SGLang, asked by its own protocol."""

    engine = "sglang"
    proven = False

    def named(self, key: str) -> Entry | None:
        """None: it loads nothing by a request."""
        return None

    def likeliest(self, prompts: Sequence[Prompt], entry: Entry) -> Answers:
        """See `Runtime.likeliest`."""
        body = {
            "input_ids": [list(one.ids) for one in prompts],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "top_logprobs_num": COMPARED,
            "lora_path": [None if entry.bare else entry.name] * len(prompts),
        }
        answer = self.server.post(GENERATE, body)
        if not isinstance(answer, list) or len(answer) != len(prompts):
            raise self.server.garbled(GENERATE, f"want {len(prompts)} answers", answer)
        tops = [listed(self.server, GENERATE, one, "meta_info", "output_top_logprobs", 0) for one in answer]
        return [
            row(
                self.server,
                GENERATE,
                [(dig(self.server, GENERATE, t, 1), dig(self.server, GENERATE, t, 0)) for t in top],
            )
            for top in tops
        ]
