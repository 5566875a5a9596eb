"""Recipes fitted to base and rows: rates against the published figures, ranks against what the rows hold."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from variants import rows_file

from hubkit.artifact.folder import open_adapter
from hubkit.errors import Notice
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.recipes import MOST_RANK, BaseFacts, doubled_rank, width_rate
from hubkit.tensors.base.base import Base
from hubkit.training.advice.fitting import fitted_options, grown_config, parameters_of
from hubkit.training.events import Event, Fitted, Started
from hubkit.verbs.train import train


@pytest.mark.parametrize(
    ("family", "hidden", "rate"),
    [
        ("llama", 576, 1.32e-3),
        ("llama", 2048, 4.9e-4),
        ("llama", 3072, 3.6e-4),
        ("mistral", 4096, 2.9e-4),
        ("smollm3", 5120, 2.4e-4),
        ("llama", 8192, 1.7e-4),
        ("qwen2", 1024, 5.3e-4),
        ("qwen3_moe", 8192, 4.5e-4),
        ("gpt2", 768, 5e-4),
        ("gemma3_text", 5120, 2.4e-4),
    ],
)
def test_the_rate_is_that_of_the_published_formula(family: str, hidden: int, rate: float) -> None:
    found = width_rate(BaseFacts(hidden, family))
    assert f"{found:.1e}" == f"{rate:.1e}", "the figures are given with two digits"


def test_without_a_width_the_recipe_of_the_method_stays() -> None:
    assert width_rate(BaseFacts(None, "llama")) is None
    method = host().load("lora")
    assert method.recipe_for(BaseFacts(None, ""), method.info.config())[0] == method.info.recipe


def test_facts_are_read_from_configurations_of_one_and_several_parts() -> None:
    assert BaseFacts.of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12}) == BaseFacts(768, "gpt2")
    inner = {"model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 3}
    assert BaseFacts.of({"model_type": "qwen3_vl", "text_config": inner}) == BaseFacts(2048, "qwen3")


@pytest.mark.parametrize(
    ("name", "config", "share"),
    [
        ("lora", {}, 1.0),
        ("dora", {}, 1.0),
        ("qlora", {}, 1.0),
        ("full", {}, 0.1),
        ("lora", {"init": "pissa"}, None),
        ("lora", {"init": "olora"}, None),
        ("adapters", {}, None),
        ("prefix", {}, None),
        ("prompt", {}, None),
        ("selective", {}, None),
    ],
)
def test_who_follows_the_width_and_who_keeps_a_measured_rate(
    name: str, config: dict[str, Any], share: float | None
) -> None:
    method = host().load(name)
    settings = parse_config(method.info.config, config, "--set")
    at = {n: method.recipe_for(BaseFacts(n, "llama"), settings)[0]["learning_rate"] for n in (576, 8192)}
    if share is None:
        assert at[576] == at[8192] == method.info.recipe["learning_rate"]
    else:
        assert at[576] == pytest.approx(1.32e-3 * share, rel=0.01)
        assert at[8192] == pytest.approx(1.66e-4 * share, rel=0.01)


def test_a_rank_is_doubled_until_it_is_named_large_or_full() -> None:
    assert doubled_rank(16, frozenset(), [4096]) == 32
    assert doubled_rank(128, frozenset(), [4096]) == MOST_RANK
    assert doubled_rank(MOST_RANK, frozenset(), [4096]) is None
    assert doubled_rank(16, frozenset({"rank"}), [4096]) is None
    assert doubled_rank(16, frozenset({"rank_pattern"}), [4096]) is None
    assert doubled_rank(16, frozenset(), [24, 16]) is None, "a rank above the weight's own adds nothing"
    assert doubled_rank(16, frozenset(), [64, 16], min) is None
    assert doubled_rank(16, frozenset(), []) is None


def _grown(base: Path, targets: int, **given: Any) -> tuple[Any, list[Event]]:
    method, said = host().load("lora"), list[Event]()
    settings = parse_config(method.info.config, {"rank": 2, **given}, "--set")
    return grown_config(method, settings, given, Base.from_folder(base), targets, said.append), said


def test_a_rank_grows_to_the_first_that_holds_the_targets(tiny_llama: Path) -> None:
    method, base = host().load("lora"), Base.from_folder(tiny_llama)

    def parameters(rank: int) -> int:
        return parameters_of(method.inject(base, method.info.config(rank=rank)))

    for targets, rank in ((1, 2), (parameters(2), 2), (parameters(2) + 1, 4), (parameters(4) + 1, 8)):
        config, said = _grown(tiny_llama, targets)
        assert (config.rank, config.alpha) == (rank, method.info.config().alpha)
        assert said == [Fitted({"rank": rank}, parameters(rank), targets)]


def test_a_named_rank_stays_and_nothing_is_said(tiny_llama: Path) -> None:
    config, said = _grown(tiny_llama, 1 << 40, rank=2)
    assert (config.rank, said) == (2, [])


def _notices(base: Path, name: str, **given: Any) -> list[str]:
    method = host().load(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        fitted_options(given, method, method.info.config(), base)  # type: ignore[arg-type]
    return [str(one.message) for one in caught]


def test_what_looks_wrong_is_said_with_figures(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert _notices(tmp_path, "lora") == []
    assert _notices(tmp_path, "lora", learning_rate=8e-4, batch_size=31) == []
    (rate,) = _notices(tmp_path, "lora", learning_rate=9e-4)
    assert "0.0009 is 3.1 times" in rate
    assert "4096 hidden units, 0.000286" in rate
    (batch,) = _notices(tmp_path, "lora", batch_size=8, accumulate=4)
    assert batch.startswith("32 rows a step")
    assert _notices(tmp_path, "full", batch_size=32) == [], "whole weights lose nothing by it"
    assert _notices(tmp_path, "prompt", learning_rate=1.0) == [], "nobody knows how its rate goes with the width"


def test_the_manifest_records_what_was_fitted(tiny_llama: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    method, said = host().load("lora"), list[Event]()
    with pytest.warns(Notice, match="24 rows to learn from"):
        train(str(tiny_llama), rows, tmp_path / "a", steps=1, report=said.append)
    manifest = open_adapter(tmp_path / "a").manifest
    (started,) = [event for event in said if isinstance(event, Started)]
    hidden = json.loads((tiny_llama / "config.json").read_text("utf-8"))["hidden_size"]
    grown = grown_config(method, method.info.config(), (), Base.from_folder(tiny_llama), started.targets)
    assert manifest.training is not None
    assert manifest.training["options"]["learning_rate"] == width_rate(BaseFacts(hidden, "llama"))
    assert manifest.config["rank"] == grown.rank
