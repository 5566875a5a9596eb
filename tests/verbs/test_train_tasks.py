"""What goes with ``--task``: scores while it trains, gates, figures beside a baseline, --dry-run, --from."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import refused, say, tree

import hubkit
from hubkit.training.events import Prepared, Stepped, Validated
from hubkit.verbs.preview import preview

LABELS = ("cold", "hot", "mild")
WORDS = [*LABELS, *(f"w{n}" for n in range(20))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def made_base(folder: Path, kind: str, **change: Any) -> Path:
    """A tiny encoder with a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    more = {"vocab_size": len(WORDS) + len(SPECIAL), "max_position_embeddings": 16, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**sizes, **more, pad_token_id=0, **change))
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a head."""
    return made_base(tmp_path_factory.mktemp("base") / "bert", "BertForMaskedLM")


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own."""
    return made_base(tmp_path_factory.mktemp("headed") / "bert", "BertForSequenceClassification", num_labels=3)


def written(path: Path, count: int, labels: tuple[str, ...] = LABELS) -> Path:
    """Rows of other words around one that is the label; of another file other rows."""
    draw, rows = random.Random(path.name), []
    for _ in range(count):
        label = draw.choice(labels)
        words = [label, *(f"w{draw.randrange(20)}" for _ in range(draw.randrange(3, 8)))]
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(base: Path, data: Path, out: Path, held: Path | None = None, **options: Any) -> hubkit.Trained:
    """A few steps with a head."""
    given = {"task": "classification", "steps": 4, "batch_size": 8, "save_every": 1, "eval_every": 2, **options}
    return hubkit.train(base, data, out, validation_data=held, name="weather", **given)


def history(out: Path) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    lines = out.with_name(out.name + ".run").joinpath("metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if "validation_loss" in (entry := json.loads(line))]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[hubkit.Trained, Path, list[Any]]:
    """A training that has learnt something, its held-out rows, and what it told."""
    folder, told = tmp_path_factory.mktemp("run"), list[Any]()
    held = written(folder / "held.jsonl", 40)
    more = {"steps": 120, "eval_every": 60, "batch_size": 16, "learning_rate": 0.01, "save_every": 0}
    rows = written(folder / "rows.jsonl", 200)
    return quick(base, rows, folder / "weather", held, report=told.append, **more), held, told


def right(adapter: Path, base: Path, rows: Path) -> float:
    """The share of rows that `predict` labels as they are."""
    found = hubkit.predict(adapter, rows, base=base).rows
    labels = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    return float(sum(row["label"] == label for row, label in zip(found, labels, strict=True)) / len(labels))


def test_scores_stand_beside_the_loss_of_each_evaluation(run: Any, base: Path) -> None:
    done, held, told = run
    evaluations = history(done.path)
    validated = [event for event in told if isinstance(event, Validated)]
    assert [one["step"] for one in evaluations] == [event.step for event in validated] == [60, 120]
    for entry, event in zip(evaluations, validated, strict=True):
        assert {name: entry[name] for name in event.scores} == event.scores
        assert event.scores.keys() == {"accuracy", "f1_macro", "f1_micro"}
    share = right(done.path, base, held)
    assert share > 0.6
    assert evaluations[-1]["accuracy"] == pytest.approx(share, abs=1.5 / 40)  # near a tie rounding may decide
    before = json.loads((done.path / "metrics.json").read_text())["untrained_scores"]
    assert before == done.metrics.untrained_scores
    assert before["accuracy"] < 0.7


def test_figures_are_recorded_with_their_intervals(run: Any) -> None:
    done, held, _ = run
    manifest = json.loads((done.path / "hubkit.json").read_text())
    figures = manifest["evaluation"]
    assert figures["task"] == "classification"
    for name, value in done.scores.items():
        assert figures["heldout"][name] == value
        assert figures["heldout"][f"{name}_low"] <= value <= figures["heldout"][f"{name}_high"]
    counts = Counter(json.loads(line)["label"] for line in held.read_text().splitlines())
    assert figures["constant"]["accuracy"] == pytest.approx(max(counts.values()) / 40)
    gain = figures["difference"]["accuracy"]
    assert gain["value"] == pytest.approx(done.scores["accuracy"] - max(counts.values()) / 40, abs=1e-5)
    assert 0 < gain["low"] <= gain["value"] <= gain["high"]
    card = (done.path / "README.md").read_text()
    assert "text-classification" in card


def test_eval_finds_what_training_found(run: Any, base: Path, tmp_path: Path) -> None:
    done, held, _ = run
    found = hubkit.eval(done.path, data=held, base=base, out=tmp_path / "eval.json")
    recorded = json.loads((done.path / "hubkit.json").read_text())["evaluation"]
    assert found.figures["heldout"]["loss"] == pytest.approx(recorded["heldout"]["loss"], rel=1e-4)
    assert found.figures["heldout"]["accuracy"] == pytest.approx(recorded["heldout"]["accuracy"], abs=1.5 / 40)
    assert found.figures["constant"] == recorded["constant"]
    assert found.figures["data"]["digest"] == recorded["data"]["digest"]
    again = hubkit.eval(done.path, data=held, base=base, samples=200, seed=1, label="label")
    assert again.figures["heldout"]["loss"] == found.figures["heldout"]["loss"]


def test_a_head_of_the_files_is_held_against_the_base(headed: Path, tmp_path: Path) -> None:
    rows, held = written(tmp_path / "rows.jsonl", 60), written(tmp_path / "held.jsonl", 20)
    done = quick(headed, rows, tmp_path / "out", held, learning_rate=0.01)
    figures = hubkit.eval(done.path, data=held, base=headed).figures
    assert "constant" not in figures
    assert figures["base"]["loss"] == pytest.approx(done.metrics.untrained_loss, rel=1e-4)
    assert figures["base"]["accuracy"] == pytest.approx((done.metrics.untrained_scores or {})["accuracy"], abs=0.08)


def test_eval_refuses_by_name_what_is_of_language_models(run: Any, base: Path) -> None:
    done, held, _ = run

    def fails(code: str, **options: Any) -> Any:
        return refused(code, hubkit.eval, done.path, base=base, **options)

    assert fails("HK-OPTIONS").have == ["no --data"]
    assert fails("HK-OPTIONS", data=held, general=held, raw=True).have == ["--general", "--raw"]
    assert fails("HK-GATE", data=held, require="forgetting<1").have == ["forgetting"]
    assert fails("HK-GATE", data=held, require="heldout.accuracy>1").have == [
        f"heldout.accuracy = {done.scores['accuracy']:g}"
    ]
    both = [str(done.path), "+", str(done.path)]
    assert refused("HK-OPTIONS", hubkit.eval, both, base=base, data=held).have == ["2 adapters"]
    assert fails("HK-LABELS", data=written(held.with_name("strange.jsonl"), 4, ("windy", "cold"))).have


def test_a_gate_on_a_score_decides_what_is_kept(base: Path, tmp_path: Path) -> None:
    rows, held, out = written(tmp_path / "rows.jsonl", 40), written(tmp_path / "held.jsonl", 20), tmp_path / "out"
    error = refused("HK-GATE", quick, base, rows, out, held, require="heldout.accuracy>1, heldout.loss<100")
    assert error.want == ["heldout.accuracy > 1"]
    assert not out.exists()
    done = quick(base, rows, out, held, require="heldout.accuracy>=0, heldout.loss<100", resume=True)
    assert done.digest == quick(base, rows, tmp_path / "plain" / "out", held).digest
    refused("HK-GATE", hubkit.push, done.path, "ana/out", require="heldout.accuracy>1", registry=str(tmp_path / "reg"))
    hubkit.push(done.path, "ana/out", require="heldout.accuracy>=0", registry=str(tmp_path / "reg"))


@pytest.mark.parametrize(
    ("gate", "named"),
    [("heldout.acc>0.5", "heldout.accuracy"), ("forgetting<0.05", "heldout.loss"), ("tasks.x.y>1", "heldout.loss")],
)
def test_a_gate_that_names_no_figure_is_refused_with_those_there_are(
    gate: str, named: str, base: Path, tmp_path: Path
) -> None:
    rows, out = written(tmp_path / "rows.jsonl", 40), tmp_path / "out"
    error = refused("HK-GATE", quick, base, rows, out, require=gate, validation=0.3)
    assert named in error.want[0].split(", ")
    assert "held-out rows" in refused("HK-GATE", quick, base, rows, out, require="heldout.accuracy>0").what
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_task_of_a_decoder_by_name_is_as_none(tiny_llama: Path, tmp_path: Path) -> None:
    """Gates on what will not be measured are refused before anything is read; labels point to their task."""
    rows = tmp_path / "missing.jsonl"
    for task in (None, "causal-lm"):
        refused("HK-GATE", hubkit.train, tiny_llama, rows, tmp_path / "out", task=task, require="no_such<1")
        refused("HK-GATE", hubkit.train, tiny_llama, rows, tmp_path / "out", task=task, require="heldout.loss<1")
        error = refused("HK-OPTIONS", hubkit.train, tiny_llama, rows, tmp_path / "out", task=task, label="x")
        assert error.fix == "--task classification"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_scores_are_the_same_when_a_run_goes_on(stop: int, base: Path, tmp_path: Path) -> None:
    rows, held = written(tmp_path / "rows.jsonl", 40), written(tmp_path / "held.jsonl", 20)
    whole = quick(base, rows, tmp_path / "whole" / "out", held)

    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == stop:
            raise KeyError

    out = tmp_path / "stopped" / "out"
    with pytest.raises(KeyError):
        quick(base, rows, out, held, report=report)
    assert quick(base, rows, out, held, resume=True).digest == whole.digest
    assert tree(out) == tree(whole.path)
    assert history(out) == history(whole.path)


def test_a_dry_run_shows_rows_with_their_labels(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, told = written(tmp_path / "rows.jsonl", 40), list[Any]()
    shown = preview(base, rows, rows=2, task="classification", validation=0.2, batch_size=8, steps=4)
    quick(base, rows, tmp_path / "out", validation=0.2, report=told.append)
    assert [event for event in told if isinstance(event, Prepared)] == [shown.figures]
    assert sum(shown.figures.labels.values()) == shown.figures.rows == 32
    assert shown.figures.labels.keys() == set(LABELS)
    for row in shown.rows:
        record = json.loads(rows.read_text().splitlines()[int(row.where.rpartition(":")[2]) - 1])
        assert (row.text(), row.answer) == (record["text"], record["label"])
    before = tree(tmp_path)
    said = say(capsys, "train", base, rows, "--task", "classification", "--dry-run", "1", "--label", "label")
    assert said.status == 0
    text = said.out
    counts = Counter(json.loads(line)["label"] for line in rows.read_text().splitlines())
    assert f"labels: {', '.join(f'{name} {count}' for name, count in counts.most_common())}" in text
    assert f"-> {json.loads(rows.read_text().splitlines()[0])['label']}" in text
    assert tree(tmp_path) == before
    refused("HK-OPTIONS", preview, base, rows, task="classification", raw=True)
    refused("HK-LABELS", preview, base, written(tmp_path / "one.jsonl", 8, ("hot",)), task="classification")


def test_going_on_begins_where_the_parent_is(run: Any, base: Path, tmp_path: Path) -> None:
    """Head and parts are its own: the loss before the first step is the parent's; two of its labels are enough."""
    parent, held, _ = run
    rows = written(tmp_path / "more.jsonl", 40, ("hot", "mild"))
    done = quick(base, rows, tmp_path / "out", held, parent=parent.path)
    assert done.metrics.untrained_loss == pytest.approx(parent.metrics.validation_loss, rel=1e-6)
    assert (done.metrics.untrained_scores or {})["accuracy"] == pytest.approx(parent.scores["accuracy"], abs=1e-6)
    manifest = json.loads((done.path / "hubkit.json").read_text())
    assert [one["digest"] for one in manifest["parents"]] == [parent.digest]
    assert manifest["task"]["labels"] == list(LABELS)
    assert hubkit.verify(done.path, base=base)
    assert right(done.path, base, held) > 0.5


def test_going_on_refuses_another_task_and_other_labels(run: Any, base: Path, headed: Path, tmp_path: Path) -> None:
    parent, _, _ = run

    def fails(code: str, data: Path, on: Path = base, **options: Any) -> Any:
        error = refused(code, quick, on, data, tmp_path / "out", parent=parent.path, **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()
        return error

    rows = written(tmp_path / "rows.jsonl", 20)
    assert fails("HK-OPTIONS", rows, task=None).want == ["--task classification"]
    assert "'windy'" in fails("HK-LABELS", written(tmp_path / "windy.jsonl", 20, ("windy", "hot"))).have[0]
    assert "one label only" in fails("HK-LABELS", written(tmp_path / "one.jsonl", 20, ("hot",))).what
    fails("HK-BASE-MISMATCH", rows, on=headed)


def test_a_model_of_the_user_s_own_gets_parts_and_head(run: Any, base: Path) -> None:
    """Whatever transformers has drawn for its head."""
    import transformers

    done, held, _ = run
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    refused("HK-BASE-MISMATCH", hubkit.attach, model, done.path)
    ours = hubkit.predict(done.path, held, base=base, batch_size=1).rows
    live = hubkit.attach(model, done.path, base=base)
    words = transformers.AutoTokenizer.from_pretrained(base)
    for line, one in zip(held.read_text().splitlines()[:5], ours, strict=False):
        with torch.no_grad():
            said = live(**words(json.loads(line)["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert said.tolist() == pytest.approx([*one["probabilities"].values()], abs=1e-6)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    refused("HK-SHAPE", hubkit.attach, other, done.path, base=base)


@pytest.mark.parametrize("which", ["base", "headed"])
def test_a_head_stands_beside_layers_in_four_bits(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Training, predict, eval, --from and attach compute with the same weights."""
    import transformers

    base: Path = request.getfixturevalue(which)
    rows, held = written(tmp_path / "rows.jsonl", 40), written(tmp_path / "held.jsonl", 20)
    done = quick(base, rows, tmp_path / "out", held, method="qlora", learning_rate=0.01)
    assert hubkit.verify(done.path, base=base)
    figures = hubkit.eval(done.path, data=held, base=base).figures["heldout"]
    assert figures["loss"] == pytest.approx(done.metrics.validation_loss, rel=1e-4)
    assert right(done.path, base, held) == pytest.approx(done.scores["accuracy"], abs=1.5 / 20)
    more = quick(base, rows, tmp_path / "more", held, parent=done.path, steps=1)
    assert more.metrics.untrained_loss == pytest.approx(done.metrics.validation_loss, rel=1e-5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    live = hubkit.attach(model, done.path, base=base)
    text = json.loads(held.read_text().splitlines()[0])["text"]
    ids = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    with torch.no_grad():
        said = live(**ids).logits.softmax(-1)[0].tolist()
    one = hubkit.predict(done.path, text, base=base).rows[0]["probabilities"]
    assert said == pytest.approx([*one.values()], abs=1e-5)


def test_words_with_labels_go_the_same_ways(base: Path, tmp_path: Path) -> None:
    """Scores by words, a gate on one of them, a dry run, going on, figures on other rows."""

    def tagged(name: str, count: int) -> Path:
        draw, path = random.Random(name), tmp_path / name
        rows = [draw.choices(WORDS, k=6) for _ in range(count)]
        tags = [["B-sky" if word in LABELS else "O" for word in words] for words in rows]
        lines = [json.dumps({"tokens": one, "tags": two}) for one, two in zip(rows, tags, strict=True)]
        path.write_text("\n".join(lines))
        return path

    rows, held = tagged("rows.jsonl", 60), tagged("held.jsonl", 20)
    kind: dict[str, Any] = {"task": "token-classification"}
    shown = preview(base, rows, rows=1, **kind)
    assert shown.rows[0].answer.split() == json.loads(rows.read_text().splitlines()[0])["tags"]
    assert sum(shown.figures.labels.values()) == 360
    refused("HK-GATE", quick, base, rows, tmp_path / "out", held, require="heldout.span_f>0", **kind)
    refused("HK-GATE", quick, base, rows, tmp_path / "out", held, require="heldout.span_f1>1", **kind)
    done = quick(base, rows, tmp_path / "out", held, require="heldout.span_f1>=0", resume=True, **kind)
    assert history(done.path)[-1].keys() >= {"accuracy", "exact_match", "span_f1"}
    more = quick(base, rows, tmp_path / "more", held, parent=done.path, steps=1, **kind)
    assert more.metrics.untrained_loss == pytest.approx(done.metrics.validation_loss, rel=1e-6)
    figures = hubkit.eval(done.path, data=held, base=base).figures
    assert figures["heldout"]["loss"] == pytest.approx(done.metrics.validation_loss, rel=1e-4)
    assert figures["difference"].keys() == done.scores.keys()
    refused("HK-OPTIONS", quick, base, rows, tmp_path / "other", held, parent=done.path)
