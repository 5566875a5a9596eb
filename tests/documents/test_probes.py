"""``probes.json``: written, read again, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hubkit.documents.probes import Probes, Prompt
from hubkit.errors import HubkitError

TOKENS = tuple(range(12))
ROWS = tuple(tuple(-0.5 - token - scale for token in TOKENS) for scale in range(3))
MADE = Probes((0.0, 0.5, 1.0), 10, (Prompt("人工智能是", (5, 6), TOKENS, ROWS, ROWS[0]),), {"torch": "2"})


def test_probes_survive_writing_and_reading(tmp_path: Path) -> None:
    with pytest.raises(HubkitError, match="HK-MISSING"):
        Probes.read(tmp_path)
    (tmp_path / "probes.json").write_bytes(MADE.to_bytes())
    assert Probes.read(tmp_path) == Probes.read(tmp_path / "probes.json") == MADE
    assert Probes.read(tmp_path).to_bytes() == MADE.to_bytes()


def test_fields_of_a_later_hubkit_are_no_fault() -> None:
    document = MADE.to_document()
    document["prompts"][0]["later"] = document["later"] = 1
    assert Probes.from_bytes(json.dumps(document).encode()) == MADE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scales": [0, 1, 0.5]}, "not ascending"),
        ({"scales": [0, 0.5, 2]}, "without 0 and 1"),
        ({"scales": [0, 1]}, "3 rows for 2 scales"),
        ({"likeliest": 5}, "#/likeliest"),
        ({"prompts": []}, "#/prompts"),
        ({"made": {"torch": 2}}, "#/made/torch"),
    ],
)
def test_wrong_probes_are_refused_with_the_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(HubkitError, match="HK-SCHEMA") as refusal:
        Probes.from_bytes(json.dumps({**MADE.to_document(), **change}).encode())
    assert any(said in line for line in refusal.value.have)


def test_rows_of_other_lengths_and_log_probabilities_above_zero_are_refused() -> None:
    document = MADE.to_document()
    document["prompts"][0]["null"] = [-1.0]
    with pytest.raises(HubkitError, match="HK-SCHEMA"):
        Probes.from_bytes(json.dumps(document).encode())
    document = MADE.to_document()
    document["prompts"][0]["logprobs"][0][0] = 0.1
    with pytest.raises(HubkitError, match="HK-SCHEMA"):
        Probes.from_bytes(json.dumps(document).encode())


def test_a_newer_major_and_a_token_are_refused() -> None:
    newer = {**MADE.to_document(), "schema": "hubkit/probes/2"}
    with pytest.raises(HubkitError, match="HK-NEWER"):
        Probes.from_bytes(json.dumps(newer).encode())
    secret = dataclasses.replace(MADE.prompts[0], text="key hf_" + "a" * 34)
    with pytest.raises(HubkitError, match="HK-SECRET"):
        dataclasses.replace(MADE, prompts=(secret,)).to_bytes()


def test_more_than_64_kib_are_never_written() -> None:
    long = dataclasses.replace(MADE.prompts[0], text="x" * 65_000)
    with pytest.raises(HubkitError, match="HK-PROBES"):
        dataclasses.replace(MADE, prompts=(long, MADE.prompts[0])).to_bytes()
