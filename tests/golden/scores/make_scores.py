"""Write scores.json beside this file: figures of scikit-learn and seqeval for labels of words drawn at random.

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install scikit-learn==1.9.1 seqeval==1.2.2
    /tmp/oracle/bin/python tests/golden/scores/make_scores.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from seqeval.metrics import f1_score as span_f1
from sklearn.metrics import accuracy_score, f1_score

BIO = ["O", "B-area", "I-area", "B-name", "I-name"]
PLAIN = ["noun", "verb", "other"]


def case(labels: list[str], seed: int, alike: float) -> dict[str, Any]:
    """Rows of words, of which the share `alike` is guessed right and the rest by chance."""
    draw = random.Random(seed)
    truth = [[draw.choice(labels) for _ in range(draw.randrange(1, 9))] for _ in range(12)]
    guessed = [[label if draw.random() < alike else draw.choice(labels) for label in row] for row in truth]
    flat, guess = [label for row in truth for label in row], [label for row in guessed for label in row]
    scored = sorted({*flat, *guess} - {"O"})
    found = {"accuracy": accuracy_score(flat, guess), "exact_match": sum(map(list.__eq__, truth, guessed)) / len(truth)}
    for mean in ("macro", "micro"):
        found[f"f1_{mean}"] = f1_score(flat, guess, labels=scored, average=mean, zero_division=0)
    if labels is BIO:
        found["span_f1"] = span_f1(truth, guessed)
    return {"labels": labels, "truth": truth, "guessed": guessed, "scores": {k: float(v) for k, v in found.items()}}


cases = [case(labels, seed, alike) for seed, alike in enumerate((0.0, 0.5, 0.9)) for labels in (BIO, PLAIN)]
lines = ",\n".join(json.dumps(one) for one in cases)
Path(__file__).with_name("scores.json").write_text(f"[\n{lines}\n]\n")
