"""How the row files beside this script were made: ``python select_rows.py E2E_DEVSET.csv GSM8K_TRAIN.jsonl``.

E2E: one sentence for each description; descriptions held out never occur in training. GSM8K: short problems only,
so that a small model on two cores gets through them in a minute or two.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
SEED = 7


def e2e(source: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, heldout): 360 and 32 rows, one for each distinct meaning representation."""
    sentences: dict[str, list[str]] = {}
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            sentences.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    pick = random.Random(SEED)
    rows = [
        {"prompt": f"Describe the restaurant in one sentence: {mr}", "completion": pick.choice(texts)}
        for mr, texts in sentences.items()
    ]
    pick.shuffle(rows)
    return rows[:360], rows[360:392]


def gsm8k(source: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, heldout): 120 and 30 problems of at most 400 characters with their answers."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if len(r["question"]) + len(r["answer"]) <= 400]
    random.Random(SEED).shuffle(rows)
    pairs = [{"prompt": r["question"], "completion": r["answer"]} for r in rows[:150]]
    return pairs[:120], pairs[120:]


def main() -> None:
    for name, (train, heldout) in {"e2e": e2e(Path(sys.argv[1])), "gsm8k": gsm8k(Path(sys.argv[2]))}.items():
        for part, rows in {"train": train, "heldout": heldout}.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (HERE / f"{name}_{part}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
