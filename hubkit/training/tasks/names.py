"""The names of the tasks: nothing else is imported, for a command line that starts quickly."""

CAUSAL_LM = "causal-lm"
"""The next token: what a training is without a task."""
SEQ2SEQ = "seq2seq"
NAMES = ("classification", SEQ2SEQ)
"""Of the tasks of `hubkit.training.tasks.kinds`, which a test compares."""
