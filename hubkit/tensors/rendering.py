"""Chat templates rendered in one child process for the whole run: what does not come to an end is killed.

A template comes with the base, from a stranger; transformers runs it in a sandbox that bounds neither time nor memory.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hubkit.documents.threads import Late, within

SECONDS = 5.0
"""How long one conversation may take."""
START = 120.0
"""How long the child may take to begin: it imports transformers."""
PROGRAM = Path(__file__).parent.parent / "compat" / "template_child.py"


class TemplateFailed(Exception):
    """A template refused, broke, or was killed; the words say how."""


def rendered(tokenizer: Any, messages: Sequence[Any], prompt: bool, tools: list[Any] | None = None) -> str:
    """What ``tokenizer.apply_chat_template`` makes of a conversation as text.

    A tokenizer that has its own way with conversations, and thus no template of the base, is called as it is.

    Args:
        prompt: end with what the template lets the assistant's answer begin with.
        tools: what the assistant may call, as JSON schemas; None: nothing is said of tools.

    Raises:
        TemplateFailed: it fails, or takes more than `SECONDS` or the child's memory.
    """
    if not _by_template(tokenizer):
        try:
            more = {"tools": tools} if tools else {}
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more))
        except Exception as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None
    return _CHILD.ask((tokenizer.chat_template, dict(tokenizer.special_tokens_map), messages, prompt, tools))


def begin(base: Path) -> None:
    """Start the child now, where the base in a folder has a chat template: it is ready when the model is loaded."""
    config = base / "tokenizer_config.json"
    with suppress(OSError):
        if (base / "chat_template.jinja").is_file() or b'"chat_template"' in config.read_bytes():
            _CHILD.begin()


def _by_template(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


class _Child:
    """The process, started when it is first asked, and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def begin(self) -> None:
        with self._lock:
            self._spawned()

    def ask(self, request: tuple[Any, ...]) -> str:
        with self._lock:
            process = self._started()
            answer = self._exchange(process, pickle.dumps(request), SECONDS)
        if "text" not in answer:
            raise TemplateFailed(str(answer.get("error", "no text")))
        return str(answer["text"])

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._spawned()
        if not self._ready:
            self._exchange(process, b"", START)
            self._ready = True
        return process

    def _spawned(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        path = os.pathsep.join(place for place in sys.path if place)
        process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, whose end is its own
        )
        self._process, self._ready = process, False
        return process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(data)
            process.stdin.flush()
            found = json.loads(within(seconds, process.stdout.readline))
        except Late:
            self.end()
            raise TemplateFailed(f"it does not come to an end within {seconds:g} s") from None
        except (OSError, ValueError):
            self.end()
            raise TemplateFailed("the process that renders it ended") from None
        except BaseException:
            self.end()  # half an exchange would answer the next request
            raise
        return found if isinstance(found, dict) else {}

    def end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                with suppress(OSError):
                    stream.close()

    def forget(self) -> None:
        """In a fork: the process belongs to the parent."""
        self._lock, self._process = threading.Lock(), None


_CHILD = _Child()
atexit.register(_CHILD.end)
os.register_at_fork(after_in_child=_CHILD.forget)
