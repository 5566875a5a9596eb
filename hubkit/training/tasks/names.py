"""What tasks are called: known without torch, for commands that only list them."""

from __future__ import annotations

CAUSAL_LM = "causal-lm"
"""The next token: what the training of a decoder is without a task."""
SEQ2SEQ = "seq2seq"
TASKS = (CAUSAL_LM, SEQ2SEQ, "classification", "token-classification", "embedding")
