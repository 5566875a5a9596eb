"""The length of the context, from the configuration of a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hubkit.tensors.base.decoder import context_of_folder


def test_the_context_is_read_from_the_config(tiny_llama: Path, tiny_gpt2: Path) -> None:
    assert (context_of_folder(tiny_llama), context_of_folder(tiny_gpt2)) == (256, 256)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, None),
        ({"max_position_embeddings": True}, None),
        ({"model_type": "llama", "max_position_embeddings": 514, "pad_token_id": 1}, 514),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
    ],
)
def test_rows_of_the_table_of_positions_that_no_token_has(
    config: dict[str, Any], want: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of_folder(tmp_path) == want
