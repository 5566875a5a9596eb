"""What tasks are called: known without torch, for commands that only list them."""

from __future__ import annotations

LANGUAGE = "causal-lm"
"""No task of its own: the next token, as hubkit trains unless it is told otherwise."""
TASKS = (LANGUAGE, "classification", "token-classification", "embedding")
