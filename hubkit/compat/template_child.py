"""A program: renders chat templates, which are programs of strangers, in a process that can be killed.

It reads pickled requests (template, special tokens, messages, generation prompt, tools) from its standard input, writes
a line of JSON for each, and ends with its input. It is run as a file and imports nothing of hubkit.

``PreTrainedTokenizerBase.apply_chat_template`` is public and is what tokenizers use; that it needs no tokenizer but the
three names of `Stub` when it does not tokenize is not promised. Read in transformers 4.57 and 5.23.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from typing import Any

MEMORY = 512 << 20
"""Bytes that all templates together may use, beside what the libraries need."""
LONGEST = 16 << 20
"""Characters of one text."""


def main() -> None:
    """Answer requests until there are no more."""
    from transformers import PreTrainedTokenizerBase

    class Stub:
        get_chat_template = PreTrainedTokenizerBase.get_chat_template

        def __init__(self, template: Any, tokens: dict[str, Any]) -> None:
            self.chat_template, self.special_tokens_map = template, tokens

    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is no answer
    _limit()
    _write(out, {"ready": True})
    while True:
        try:
            template, tokens, messages, prompt, tools = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            text = PreTrainedTokenizerBase.apply_chat_template(
                Stub(template, tokens), messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
            found = {"text": str(text)} if len(text) <= LONGEST else {"error": f"more than {LONGEST} characters"}
        except MemoryError:
            found = {"error": f"more than {MEMORY >> 20} MB of memory"}
        except Exception as error:  # a template may fail in any way
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        _write(out, found)


def _write(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def _limit() -> None:
    """Take no more memory than now and `MEMORY` on top, where the system can be told so."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))


if __name__ == "__main__":
    main()
