"""Losses, intervals, gates, the curve: laws, and transformers' own loss as the oracle."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from hubkit.artifact.gates import FIGURES, Gate, parse_gates, require_measured, require_passed
from hubkit.errors import HubkitError
from hubkit.training.measuring.curve import PICTURE, draw, picture
from hubkit.training.measuring.figures import GENERAL
from hubkit.training.measuring.intervals import difference, interval
from hubkit.training.measuring.losses import Losses, losses_of
from hubkit.training.rows.data import read_rows
from hubkit.training.rows.encode import IGNORED, Row

SEED = 7


def rows(count: int, longest: int = 12) -> list[Row]:
    generator = random.Random(SEED)
    made = []
    for _ in range(count):
        ids = [generator.randrange(1, 300) for _ in range(generator.randrange(3, longest))]
        learnt = generator.randrange(1, len(ids))
        made.append(Row(ids, [IGNORED] * learnt + ids[learnt:]))
    return made


def test_losses_are_those_of_transformers(tiny_llama: Path) -> None:
    """Row by row, whatever row stands beside it in a batch."""
    from hubkit.tensors.live.loading import load_base

    model = load_base(tiny_llama, "float32", device="cpu")
    some = rows(9)
    found = losses_of(model, some)
    for row, nats, targets in zip(some, found.nats, found.targets, strict=True):
        ids, labels = torch.tensor([list(row.ids)]), torch.tensor([list(row.labels)])
        with torch.no_grad():
            own = float(model(input_ids=ids, labels=labels).loss)
        assert targets == row.targets()
        assert nats == pytest.approx(own * targets, rel=1e-4)
    assert found.mean == pytest.approx(sum(found.nats) / sum(found.targets))


def measured(count: int, spread: float, shift: float = 0.0) -> Losses:
    generator = random.Random(SEED)
    targets = tuple(generator.randrange(5, 40) for _ in range(count))
    nats = tuple(n * (2 + shift + generator.gauss(0, spread)) for n in targets)
    return Losses(nats, targets)


def test_an_interval_holds_the_mean_and_narrows_with_rows() -> None:
    few, many = (interval(measured(count, 0.5), 1000, 0) for count in (20, 500))
    for one in (few, many):
        assert one.low < one.value < one.high
    assert many.high - many.low < (few.high - few.low) / 3  # sqrt(25) = 5 in the limit
    assert interval(measured(20, 0.5), 1000, 0) == few
    assert interval(measured(20, 0.5), 1000, 1) != few


def test_an_interval_is_that_of_the_normal_law() -> None:
    """The bootstrap of a mean of many equal rows: 1.96 standard errors to each side."""
    generator = random.Random(SEED)
    values = [generator.gauss(3, 1) for _ in range(400)]
    found = interval(Losses(tuple(values), (1,) * len(values)), 4000, 0)
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    assert found.value == pytest.approx(mean)
    # the ends of 4000 draws lie within 0.1 standard errors of their own
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_what_makes_rows_hard_for_both_falls_out_of_the_difference() -> None:
    before = measured(30, 1.0)
    after = Losses(tuple(n + 0.25 * t for n, t in zip(before.nats, before.targets, strict=True)), before.targets)
    found = difference(after, before, 1000, 0)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert interval(before, 1000, 0).high - interval(before, 1000, 0).low > 0.2


def test_gates_are_read() -> None:
    assert parse_gates(None) == ()
    assert parse_gates(" heldout.loss<1.3,forgetting <= -5e-2 ,tasks.a-b.acc>.5") == (
        Gate("heldout.loss", "<", 1.3),
        Gate("forgetting", "<=", -0.05),
        Gate("tasks.a-b.acc", ">", 0.5),
    )


@pytest.mark.parametrize(
    "text", ["", " ", "heldout.loss", "heldout.loss<", "<1", "a<1,", "a<1 b<2", "a=1", "a<x", "a<1e999", "a<1,,b<2"]
)
def test_gates_that_cannot_be_read(text: str) -> None:
    with pytest.raises(HubkitError) as caught:
        parse_gates(text)
    assert (caught.value.code, caught.value.status) == ("HK-GATE", 2)


def test_gates_on_what_is_not_measured() -> None:
    ok: dict[str, Any] = {"tasks": False, "fix": "rows"}
    require_measured(parse_gates(",".join(f"{name}<9" for name in FIGURES)), heldout=True, **ok)
    require_measured(parse_gates("forgetting<1"), heldout=False, **ok)
    for text in ("forgeting<1", "tasks.a.acc>1"):
        with pytest.raises(HubkitError, match="names no figure"):
            require_measured(parse_gates(text), heldout=True, **ok)
    with pytest.raises(HubkitError, match="held-out rows"):
        require_measured(parse_gates("difference<0"), heldout=False, **ok)


def test_gates_hold_or_say_what_does_not() -> None:
    figures = {"heldout": {"loss": 1.25}, "forgetting": {"value": 0.04, "low": -0.1}}
    require_passed(parse_gates("heldout.loss<1.3, forgetting<0.05, forgetting.low>-1"), figures, "here", "")
    with pytest.raises(HubkitError) as caught:
        require_passed(parse_gates("heldout.loss<1.25, forgetting<0.05, base.loss>0"), figures, "here", "")
    error = caught.value
    assert error.status == 1
    assert list(error.want) == ["heldout.loss < 1.25", "base.loss > 0"]
    assert list(error.have) == ["heldout.loss = 1.25", "base.loss is not recorded"]
    assert not Gate("a", ">", 0).holds(math.nan)


def test_the_general_rows_are_forty_texts() -> None:
    records = read_rows(GENERAL)
    texts = [str(record.values["text"]) for record in records]
    assert len(set(texts)) == len(texts) == 40
    assert all(80 < len(text) < 300 for text in texts)


def test_the_curve_is_a_picture_of_the_run(tmp_path: Path) -> None:
    draw(tmp_path)
    assert not (tmp_path / PICTURE).exists()
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 2001)] + [
        {"step": 1000, "validation_loss": 1.0, "best": True}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20')
    draw(tmp_path)
    root = ElementTree.fromstring((tmp_path / PICTURE).read_text())
    name = "{http://www.w3.org/2000/svg}"
    training, smooth, held = root.findall(f"{name}polyline")
    points = [tuple(map(float, point.split(","))) for point in training.attrib["points"].split()]
    assert len(points) <= 601
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # down on paper is down in loss
    assert len(root.findall(f"{name}circle")) == 1 == len(held.attrib["points"].split()) - 1
    assert smooth.attrib["points"] != training.attrib["points"]
    assert picture([(1.0, 2.0)], []) == picture([(1.0, 2.0)], [])  # one step, one loss: still a picture
