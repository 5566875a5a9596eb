"""Pairs of texts, labels that are given by hand, and heads that stand in the place of those of the base's files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import refused, say, tree

import hubkit

LABELS = ("no", "perhaps", "yes")
WORDS = [*LABELS, *(f"w{n}" for n in range(20)), "\n"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def whole_words(marks: bool) -> Any:
    """A tokenizer of whole words and line breaks; with marks around and between texts as BERT has them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if marks:
        plain.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_input_names=inputs
    )


def saved(folder: Path, kind: str, **change: Any) -> Path:
    """A tiny base of that class."""
    import transformers

    made, marks = getattr(transformers, kind), not kind.startswith("Llama")
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        **change,
    }
    if kind.startswith("Roberta"):
        sizes["type_vocab_size"] = 1
    torch.manual_seed(0)
    made(made.config_class(**sizes)).save_pretrained(folder)
    whole_words(marks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / str(request.param), request.param)


def written(
    path: Path, count: int, seed: int, names: tuple[str, str] = ("premise", "hypothesis"), **change: Any
) -> Path:
    """Pairs of texts."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        texts = [" ".join(f"w{draw.randrange(20)}" for _ in range(draw.randrange(2, 7))) for _ in names]
        rows.append({**dict(zip(names, texts, strict=True)), "label": draw.choice(LABELS)} | change)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(base: Path, data: Path, out: Path, **options: Any) -> hubkit.Trained:
    """Three steps."""
    given = {"task": "classification", "steps": 3, "batch_size": 8, "learning_rate": 0.01, **options}
    return hubkit.train(base, data, out, **given)


def test_a_pair_is_put_together_as_the_tokenizer_does(base: Path, tmp_path: Path) -> None:
    """PEFT gives the same of what the tokenizer makes of two texts, kinds of tokens among it where the base has some;
    of a tokenizer that puts nothing between them, of both with a line break between."""
    import peft
    import transformers

    rows = written(tmp_path / "rows.jsonl", 24, 0)
    done = quick(base, rows, tmp_path / "out")
    assert json.loads((done.path / "hubkit.json").read_text())["task"]["pair"] is True
    assert hubkit.verify(done.path, base=base)
    found = hubkit.predict(done.path, rows, base=base).rows
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(model, str(done.path)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for row, line in zip(found, rows.read_text().splitlines(), strict=True):
        texts = [json.loads(line)[name] for name in ("premise", "hypothesis")]
        texts = ["\n".join(texts)] if base.name.startswith("Llama") else texts
        coded = tokenizer(*texts, return_tensors="pt")
        if not base.name.startswith("Bert"):
            coded.pop("token_type_ids")
        with torch.no_grad():
            want = theirs(**coded).logits.float().softmax(-1)[0].tolist()
        assert list(row["probabilities"].values()) == pytest.approx(want, abs=1e-5)


def test_which_text_is_which_is_in_the_digest(base: Path, tmp_path: Path) -> None:
    """The columns are found by their names, or named; the other way round they are other rows."""
    rows = written(tmp_path / "rows.jsonl", 24, 0)
    found = quick(base, rows, tmp_path / "a" / "x")
    assert quick(base, rows, tmp_path / "b" / "x", columns=hubkit.Columns(text="premise"), text_pair="hypothesis")
    assert tree(tmp_path / "a" / "x") == tree(tmp_path / "b" / "x")
    turned = quick(base, rows, tmp_path / "c" / "x", columns=hubkit.Columns(text="hypothesis"), text_pair="premise")
    alone = quick(base, rows, tmp_path / "d" / "x", columns=hubkit.Columns(text="premise"))
    digests = [json.loads((one.path / "hubkit.json").read_text())["training"]["data"] for one in (found, turned, alone)]
    assert len({*digests}) == 3


def test_what_goes_not_with_pairs_is_refused(base: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 24, 0)
    out = tmp_path / "out"
    refused("HK-COLUMNS", quick, base, rows, out, text_pair="other")
    refused("HK-COLUMNS", quick, base, rows, out, columns=hubkit.Columns(text="premise"), text_pair="premise")
    refused("HK-DATA", quick, base, written(tmp_path / "empty.jsonl", 24, 0, hypothesis=" "), out)
    refused("HK-ROW-TOO-LONG", quick, base, rows, out, max_length=4)
    refused("HK-OPTIONS", hubkit.train, base, rows, out, text_pair="premise")
    assert not out.exists()
    done = quick(base, rows, out, max_length=6, truncate=True)
    refused("HK-COLUMNS", hubkit.predict, done.path, "w1 w2", base=base)
    single = written(tmp_path / "single.jsonl", 4, 0, names=("premise", "other"))
    refused("HK-COLUMNS", hubkit.predict, done.path, single, base=base)
    alone = quick(base, rows, tmp_path / "alone", columns=hubkit.Columns(text="premise"))
    refused("HK-OPTIONS", hubkit.predict, alone.path, rows, base=base, text_pair="hypothesis")


def test_labels_are_taken_in_the_order_that_is_given(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Whole numbers count into them; one that no row holds is said, one that is not among them refused."""
    rows, out = written(tmp_path / "rows.jsonl", 24, 0), tmp_path / "out"
    given = ("--task", "classification", "--steps", 1, "--batch-size", 8, "--labels", "yes, never,no,perhaps")
    said = say(capsys, "train", base, rows, "--out", out, *given)
    assert said.status == 0, said.err
    assert "labels that no row holds: never" in said.err
    document = json.loads((out / "hubkit.json").read_text())["task"]
    assert document["labels"] == ["yes", "never", "no", "perhaps"]
    assert [*hubkit.predict(out, rows, base=base).rows[0]["probabilities"]] == document["labels"]
    numbers = [json.loads(line) for line in rows.read_text().splitlines()]
    numbered = [row | {"label": document["labels"].index(row["label"])} for row in numbers]
    (tmp_path / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    again = quick(base, tmp_path / "numbered.jsonl", tmp_path / "n" / "x", labels=document["labels"])
    assert tree(again.path) == tree(quick(base, rows, tmp_path / "w" / "x", labels=document["labels"]).path)
    for labels, code in (
        (["yes", "no"], "HK-LABELS"),
        (["yes"], "HK-LABELS"),
        (["yes", "no", "perhaps", "no"], "HK-LABELS"),
        (["yes", "no", "perhaps", ""], "HK-LABELS"),
    ):
        refused(code, quick, base, rows, tmp_path / "no", labels=labels)
    refused("HK-OPTIONS", hubkit.train, base, rows, tmp_path / "no", labels=["yes", "no", "perhaps"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "kind", ["BertForSequenceClassification", "RobertaForSequenceClassification", "LlamaForSequenceClassification"]
)
@pytest.mark.parametrize("count", [3, 5])
def test_labels_that_are_given_put_a_new_head_in_the_place_of_the_old(kind: str, count: int, tmp_path: Path) -> None:
    """Of as many labels with other names, too. What does not depend on the labels is kept; the old head goes with the
    base's files, whose digest it is part of, and PEFT says the same on a model that is given as many labels."""
    import peft
    import transformers

    names = dict(enumerate("abcde"[:count]))
    base = saved(tmp_path / "base", kind, num_labels=count, id2label=names)
    rows = written(tmp_path / "rows.jsonl", 24, 0, names=("text", "other"))
    refused("HK-LABELS", quick, base, rows, tmp_path / "no")
    done = quick(base, rows, tmp_path / "out", labels=LABELS)
    again = quick(base, rows, tmp_path / "again" / "out", labels=LABELS)
    assert tree(again.path) == tree(done.path)
    document = json.loads((done.path / "hubkit.json").read_text())["task"]
    (name,) = document["made"]
    assert document["without"] == [name]
    assert document["made"][name]["shape"] == [3, 32]
    assert hubkit.verify(done.path, base=base)
    text = "w1 w2 w3"
    (ours,) = hubkit.predict(done.path, text, base=base).rows
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True
    )
    theirs = peft.PeftModel.from_pretrained(model, str(done.path)).eval()
    coded = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    with torch.no_grad():
        want = theirs(input_ids=coded["input_ids"]).logits.float().softmax(-1)[0].tolist()
    assert list(ours["probabilities"].values()) == pytest.approx(want, abs=1e-5)


def test_a_head_of_the_files_is_taken_where_its_labels_are_given(tmp_path: Path) -> None:
    names = dict(enumerate(LABELS))
    base = saved(tmp_path / "base", "BertForSequenceClassification", num_labels=3, id2label=names)
    rows = written(tmp_path / "rows.jsonl", 24, 0)
    plain = quick(base, rows, tmp_path / "a" / "x")
    assert tree(quick(base, rows, tmp_path / "b" / "x", labels=LABELS).path) == tree(plain.path)
    assert "made" not in json.loads((plain.path / "hubkit.json").read_text())["task"]
    error = refused("HK-LABELS", quick, base, rows, tmp_path / "no", labels=LABELS[::-1])
    assert error.want == [f"--labels {','.join(LABELS)}"]


def test_a_head_of_another_task_is_not_taken(tmp_path: Path) -> None:
    """A classifier of rows and one of words are called alike, and have the same shape."""
    base = saved(tmp_path / "base", "BertForSequenceClassification", num_labels=3)
    words = [{"tokens": ["w1", "w2"], "tags": draw} for draw in (["no", "yes"], ["perhaps", "no"], ["yes", "yes"])]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in words))
    done = quick(base, rows, tmp_path / "out", task="token-classification")
    document = json.loads((done.path / "hubkit.json").read_text())["task"]
    assert [*document["made"]] == ["classifier"]
    assert {"classifier"} <= {*document["without"]}
    assert hubkit.verify(done.path, base=base)
    assert len(hubkit.predict(done.path, rows, base=base).rows[0]["labels"]) == 2
