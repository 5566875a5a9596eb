"""The recipes that ship: every value is an option of training, every one has a source, and each learns on real rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hubkit.methods.host import host
from hubkit.training.options import TrainOptions
from hubkit.verbs.methods import methods
from hubkit.verbs.train import train

OURS = sorted(name for name, (offer, *_) in host().offers().items() if offer.entry.value.startswith("hubkit.plugins."))
DATA = Path(__file__).parent.parent.parent / "examples" / "data"


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_is_sourced_and_its_options_exist(name: str) -> None:
    said = methods(name)
    assert {"learning_rate"} <= set(said.recipe) <= {field.name for field in dataclasses.fields(TrainOptions)}
    assert TrainOptions(**said.recipe).learning_rate == said.recipe["learning_rate"]
    assert "https://" in said.sources
    assert "measured" in said.sources, "the rate was tried"
    assert all(option.help for option in said.options), "every option is explained"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", OURS)
def test_a_few_steps_at_the_shipped_recipe_beat_the_base(name: str, smol: Path, tmp_path: Path) -> None:
    rows = (DATA / "e2e_heldout.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(rows[:4]), "utf-8")
    run = train(
        str(smol),
        DATA / "e2e_train.jsonl",
        tmp_path / name,
        method=name,
        steps=4,
        eval_every=4,
        batch_size=2,
        validation_data=tmp_path / "held.jsonl",
    )
    assert run.metrics.untrained_loss is not None
    assert run.metrics.validation_loss is not None
    assert run.metrics.validation_loss < run.metrics.untrained_loss - 0.02
