"""Token classification from rows to predictions, on encoders and decoders, with a head in the files and without one."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from variants import refused, say, tree

import hubkit
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.training.events import Stepped
from hubkit.training.tasks.metrics import spans_of

LABELS = ["B-city", "B-name", "I-city", "I-name", "O"]
FIRST = {"name": ("mill", "eagle"), "city": ("york", "bath")}
WORDS = ["inn", "old", *FIRST["name"], *FIRST["city"], *(f"w{n}" for n in range(12)), ",", "'", "s"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
BASES = ("BertForTokenClassification", "BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel")


def whole_words(marks: bool) -> Any:
    """A tokenizer of whole words; with marks around a text as BERT has them."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer = normalizers.Replace("\u200b", "")  # dropped, as tokenizers of BERT do
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        plain.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base; the decoders put no mark before a text, so that the first token has a label, too."""
    import transformers

    kind, bert = getattr(transformers, request.param), "Bert" in request.param
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "pad_token_id": 0 if bert else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": request.param != "LlamaForCausalLM",
    }
    if request.param == BASES[0]:
        sizes |= {"num_labels": 5, "id2label": dict(enumerate(LABELS))}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / str(request.param)
    kind(kind.config_class(**sizes)).save_pretrained(folder)
    whole_words(bert).save_pretrained(folder)
    return folder


def drawn(count: int, seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """Words and labels: a span is one of four words, and what stands behind it of "inn" and "old"."""
    draw = random.Random(seed)
    for _ in range(count):
        words, tags = list[str](), list[str]()
        while len(words) < draw.randrange(3, 12) or len(words) < 3:
            name = draw.choice(["", "", "name", "city"])
            inside = [draw.choice(["inn", "old"]) for _ in range(draw.randrange(2))] if name else []
            words += [draw.choice(FIRST[name]), *inside] if name else [f"w{draw.randrange(12)}"]
            tags += [f"B-{name}", *[f"I-{name}"] * len(inside)] if name else ["O"]
        yield words, tags


def written(path: Path, count: int, seed: int, **change: object) -> Path:
    """Rows of words."""
    rows = [{"tokens": words, "tags": tags} | change for words, tags in drawn(count, seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spanned(path: Path, count: int, seed: int) -> Path:
    """The same rows as texts with spans."""
    lines = []
    for words, tags in drawn(count, seed):
        places = [(sum(map(len, words[:n])) + n, sum(map(len, words[: n + 1])) + n) for n in range(len(words))]
        spans = [{"start": places[a][0], "end": places[b - 1][1], "label": name} for name, a, b in spans_of(tags)]
        lines.append(json.dumps({"text": " ".join(words), "spans": spans}) + "\n")
    path.write_text("".join(lines))
    return path


def quick(base: Path, data: Path, out: Path, **options: Any) -> hubkit.Trained:
    """Six steps."""
    given = {"task": "token-classification", "steps": 6, "batch_size": 8, "save_every": 2, "validation": 0.2, **options}
    return hubkit.train(base, data, out, **given)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hubkit.Trained:
    folder = tmp_path_factory.mktemp("trained")
    held = written(folder / "held.jsonl", 60, 1)
    more = {"validation": None, "validation_data": held, "overlap": "drop", "save_every": 100, "steps": 150}
    rows = written(folder / "rows.jsonl", 300, 0)
    return quick(base, rows, folder / "places", batch_size=16, learning_rate=0.01, **more)


def test_labels_are_learnt(trained: hubkit.Trained) -> None:
    """Outside of spans throughout, the commonest label, has no F1 at all."""
    assert trained.scores["span_f1"] > 0.7
    assert trained.scores["f1_macro"] > 0.7
    document = json.loads((trained.path / "hubkit.json").read_text())["task"]
    assert (document["kind"], document["labels"]) == ("token-classification", LABELS)
    assert document["scores"] == dict(trained.scores)
    assert json.loads((trained.path / "metrics.json").read_text())["span_f1"] == trained.scores["span_f1"]


def test_what_is_predicted_is_what_was_measured(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    """Of rows of words the labels, of the same rows as texts the spans; padding changes neither."""
    words = hubkit.predict(trained.path, written(tmp_path / "w.jsonl", 60, 1), base=base, batch_size=16).rows
    assert hubkit.predict(trained.path, tmp_path / "w.jsonl", base=base, batch_size=1).rows == tuple(
        {**row, "probabilities": pytest.approx(row["probabilities"], abs=1e-5)} for row in words
    )
    truth = [tags for _, tags in drawn(60, 1)]
    pairs = [(t, g) for tags, row in zip(truth, words, strict=True) for t, g in zip(tags, row["labels"], strict=True)]
    # rows that stand among the training rows, too, were dropped there, not here
    right = sum(t == g for t, g in pairs) / len(pairs)
    assert right == pytest.approx(trained.scores["accuracy"], rel=1e-5)  # written with six digits
    texts = hubkit.predict(trained.path, spanned(tmp_path / "t.jsonl", 60, 1), base=base).rows
    for row, other, line in zip(words, texts, (tmp_path / "t.jsonl").read_text().splitlines(), strict=True):
        text, found = json.loads(line)["text"], spans_of(row["labels"])
        assert [span["label"] for span in other["spans"]] == [name for name, _, _ in found]
        for span, (_, first, end) in zip(other["spans"], found, strict=True):
            assert span["text"] == text[span["start"] : span["end"]] == " ".join(text.split()[first:end])
            share = torch.tensor(row["probabilities"][first:end]).prod().item()
            assert span["probability"] == pytest.approx(share, abs=1e-5)


def test_peft_says_the_same_of_the_same_files(trained: hubkit.Trained, base: Path) -> None:
    import peft
    import transformers

    assert json.loads((trained.path / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(base), "w1 mill inn w2 bath"
    model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    theirs = peft.PeftModel.from_pretrained(model, str(trained.path)).eval()
    coded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        shares = theirs(input_ids=coded["input_ids"]).logits.float().softmax(-1)[0]
    want = [shares[at].max().item() for at, word in enumerate(coded.word_ids()) if word is not None]
    (row,) = hubkit.predict(trained.path, _listed(trained.path.parent, text), base=base).rows
    assert row["probabilities"] == pytest.approx(want, abs=1e-5)


def _listed(folder: Path, text: str) -> Path:
    (folder / "one.jsonl").write_text(json.dumps({"words": text.split()}) + "\n")
    return folder / "one.jsonl"


def test_it_is_sound_twice_the_same_and_bound_to_its_base(base: Path, tmp_path: Path) -> None:
    """With spans: label set, bytes and digest follow from rows and seed; what is made is named."""
    rows = spanned(tmp_path / "rows.jsonl", 60, 5)
    torch.manual_seed(1)
    done = quick(base, rows, tmp_path / "a" / "made")
    torch.manual_seed(2)
    assert quick(base, rows, tmp_path / "b" / "made").digest == done.digest
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert hubkit.verify(done.path, base=base)
    manifest = json.loads((done.path / "hubkit.json").read_text())
    assert manifest["base"]["weights"] == fingerprint_folder(base).fingerprint.weights
    made = manifest["task"].get("made", {})
    assert [one["shape"] for one in made.values()] == ([] if base.name == BASES[0] else [[5, 32]])
    with safe_open(done.path / "adapter_model.safetensors", "pt") as file:
        assert any(file.get_slice(key).get_shape() == [5, 32] for key in file.keys())  # noqa: SIM118
    other = shutil.copytree(base, tmp_path / "other")
    values = load_file(other / "model.safetensors")
    values[min(values)].view(-1)[0] += 1
    save_file(values, other / "model.safetensors", metadata={"format": "pt"})
    refused("HK-BASE-MISMATCH", hubkit.predict, done.path, "mill", base=other)


@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_goes_on_to_the_same_bytes(base: Path, stop: int, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 60, 5)
    whole = quick(base, rows, tmp_path / "whole" / "made")

    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == stop:
            raise KeyError

    out = tmp_path / "stopped" / "made"
    with pytest.raises(KeyError):
        quick(base, rows, out, report=report)
    refused("HK-RESUME", quick, base, written(tmp_path / "other.jsonl", 60, 8), out, resume=True)
    assert quick(base, rows, out, resume=True).digest == whole.digest
    assert tree(out) == tree(whole.path)


def test_bad_rows_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fails(code: str, data: Path, **options: Any) -> Any:
        error = refused(code, quick, base, data, out, **options)
        assert not out.exists()
        assert not (tmp_path / "out.run").exists()
        return error

    good = written(tmp_path / "good.jsonl", 20, 3)
    fails("HK-DATA", written(tmp_path / "length.jsonl", 5, 0, tags=["O"]))
    fails("HK-DATA", written(tmp_path / "empty.jsonl", 5, 0, tokens=[]))
    assert "one label only" in fails("HK-LABELS", written(tmp_path / "one.jsonl", 5, 0, tokens=["w1"], tags=["O"])).what
    strange = written(tmp_path / "strange.jsonl", 2, 4, tokens=["w1"], tags=["B-river"])
    assert "'B-river'" in fails("HK-LABELS", good, validation=None, validation_data=strange).have[0]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(good.read_text() + json.dumps({"text": "mill", "spans": []}) + "\n")
    assert "is not there" in fails("HK-DATA", mixed).have[0]
    fails("HK-DATA", good, validation=None, validation_data=spanned(tmp_path / "spans.jsonl", 5, 0))
    gone = written(tmp_path / "gone.jsonl", 20, 3, tokens=["w1", "\u200b"], tags=["O", "B-name"])
    assert "\\u200b" in fails("HK-DATA", gone).have[0]
    fails("HK-COLUMNS", good, label="mood")
    fails("HK-HEAD", good, method="prompt")
    fails("HK-OPTIONS", good, text_pair="tags")
    long = written(tmp_path / "long.jsonl", 1, 0, tokens=["w1"] * 60, tags=["O"] * 59 + ["B-name"])
    long.write_text(long.read_text() + good.read_text())
    assert "--truncate" in fails("HK-ROW-TOO-LONG", long).fix
    fails("HK-ROW-TOO-LONG", long, truncate=True, max_length=2) if "Bert" in base.name else None
    events: list[Any] = []
    quick(base, long, out, truncate=True, validation=None, report=events.append)
    assert next(event for event in events if hasattr(event, "truncated")).truncated == 1


def test_a_tokenizer_that_does_not_say_where_words_are_is_refused() -> None:
    from hubkit.training.tasks.tokens import TokenClassification

    class Slow:
        is_fast = False

    from hubkit.tensors.parts.heads import TaskModel

    task = TokenClassification(TaskModel("token-classification"), (), {}, ("O", "B-x"), 0)
    assert "Slow" in refused("HK-LABELS", task.encode, [], Slow(), 10, False).have[0]


def test_the_command_line_shows_spans_and_writes_a_file(
    trained: hubkit.Trained, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = say(capsys, "predict", trained.path, "w1 mill inn w2", "--base", base)
    (row,) = hubkit.predict(trained.path, "w1 mill inn w2", base=base).rows
    lines = [
        f"{one['label']}  {one['probability']:.4f}  {one['start']}-{one['end']}  {one['text']}" for one in row["spans"]
    ]
    assert said.out.splitlines() == (lines or ["no spans"])
    rows, out = written(tmp_path / "rows.jsonl", 7, 2), tmp_path / "said.jsonl"
    given = ("predict", trained.path, rows, "--base", base, "--out", out)
    assert say(capsys, *given).out == f"wrote {out}: 7 rows\n"
    want = hubkit.predict(trained.path, rows, base=base).rows
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(want)
    before = out.read_bytes()
    again = say(capsys, *given)
    assert (again.status, "HK-EXISTS" in again.err, out.read_bytes()) == (1, True, before)
    assert say(capsys, *given, "--replace").status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "said.jsonl"}
    refused("HK-OPTIONS", hubkit.predict, trained.path, rows, base=base, out=tmp_path / "said.csv")
    refused("HK-IO", hubkit.predict, trained.path, rows, base=base, out=tmp_path / "no" / "said.jsonl")


EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "data"
SLOT = re.compile(r"(name|food|near)\[([^\]]+)\]")


def slots(source: Path, path: Path) -> Path:
    """Sentences of E2E with the values of their slots as spans, where they stand there word by word."""
    lines = []
    for row in map(json.loads, source.read_text().splitlines()):
        text, spans = row["completion"], list[dict[str, object]]()
        for name, value in SLOT.findall(row["prompt"]):
            found = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)
            if found and not any(
                found.start() < int(str(s["end"])) and int(str(s["start"])) < found.end() for s in spans
            ):
                spans.append({"start": found.start(), "end": found.end(), "label": name})
        lines.append(json.dumps({"text": text, "spans": spans}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.model
def test_slots_are_found_by_a_real_encoder(minilm: Path, tmp_path: Path) -> None:
    """Names, foods and neighbours of restaurants; without any span the F1 is 0."""
    held = slots(EXAMPLES / "e2e_heldout.jsonl", tmp_path / "held.jsonl")
    rows = slots(EXAMPLES / "e2e_train.jsonl", tmp_path / "rows.jsonl")
    more = {"validation": None, "validation_data": held, "overlap": "drop", "save_every": 0}
    done = quick(minilm, rows, tmp_path / "slots", steps=60, batch_size=16, learning_rate=1e-3, **more)
    assert done.scores["span_f1"] > 0.6
    (row,) = hubkit.predict(done.path, "The Mill serves Chinese food.", base=minilm).rows
    assert {"label": "food", "text": "Chinese"} in [{key: s[key] for key in ("label", "text")} for s in row["spans"]]
