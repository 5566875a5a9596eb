"""Classification from rows to predictions, on encoders and decoders that were saved with a head and without one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from variants import refused, tree

import hubkit
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.training.events import Stepped
from hubkit.training.tasks.metrics import scores

LABELS = ("cold", "hot", "mild")
WORDS = [*LABELS, *(f"w{n}" for n in range(20))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def whole_words() -> Any:
    """A tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def said_by_peft(model: Any, adapter: Path, base: Path, text: str) -> list[float]:
    """The probabilities that PEFT gives."""
    import peft
    import transformers

    theirs = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found: list[float] = theirs(input_ids=ids).logits.float().softmax(-1)[0].tolist()
    return found


@pytest.fixture(scope="module", params=["bert", "llama"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a random head for three labels, and its tokenizer of whole words."""
    import transformers

    tokenizer = whole_words()
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "num_labels": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    if request.param == "bert":
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    else:
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    folder = tmp_path_factory.mktemp("base") / str(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(path: Path, count: int, seed: int, **change: object) -> Path:
    """Rows of other words around one that is the label."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(LABELS)
        words = [f"w{draw.randrange(20)}" for _ in range(draw.randrange(2, 9))]
        words.insert(draw.randrange(len(words) + 1), label)
        rows.append({"text": " ".join(words), "label": label} | change)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> hubkit.Trained:
    folder = tmp_path_factory.mktemp("trained")
    rows, held = written(folder / "rows.jsonl", 300, 0), written(folder / "held.jsonl", 60, 1)
    return hubkit.train(
        classifier,
        rows,
        folder / "weather",
        task="classification",
        validation_data=held,
        overlap="drop",
        steps=120,
        batch_size=16,
        learning_rate=0.01,
    )


def test_the_label_is_learnt_and_its_names_are_kept(trained: hubkit.Trained) -> None:
    """The commonest label alone is right in less than half of the held-out rows."""
    assert trained.scores["accuracy"] > 0.8
    manifest = json.loads((trained.path / "hubkit.json").read_text())
    assert manifest["task"] == {"kind": "classification", "labels": list(LABELS), "scores": dict(trained.scores)}
    metrics = json.loads((trained.path / "metrics.json").read_text())
    assert metrics["f1_macro"] == trained.scores["f1_macro"]


def test_rows_together_are_labelled_as_each_alone(trained: hubkit.Trained, classifier: Path, tmp_path: Path) -> None:
    """What pads a row does not count: a decoder looks at the last real token."""
    rows = written(tmp_path / "rows.jsonl", 12, 2)
    together = hubkit.predict(trained.path, rows, base=classifier, batch_size=12)
    alone = hubkit.predict(trained.path, rows, base=classifier, batch_size=1)
    for one, other in zip(together.rows, alone.rows, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_peft_says_the_same_of_the_same_files(trained: hubkit.Trained, classifier: Path) -> None:
    import transformers

    assert json.loads((trained.path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    text = "w1 hot w2 w3"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    want = said_by_peft(model, trained.path, classifier, text)
    ours = hubkit.predict(trained.path, text, base=classifier).rows[0]["probabilities"]
    assert list(ours.values()) == pytest.approx(want, abs=1e-5)
    assert max(ours, key=ours.__getitem__) == LABELS[max(range(3), key=want.__getitem__)]


def test_it_is_sound(trained: hubkit.Trained, classifier: Path) -> None:
    assert hubkit.verify(trained.path, base=classifier)


def test_bad_labels_are_refused_before_anything_is_written(classifier: Path, tmp_path: Path) -> None:
    def fails(code: str, data: Path, **options: Any) -> Any:
        error = refused(code, hubkit.train, classifier, data, tmp_path / "out", task="classification", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()
        return error

    good = written(tmp_path / "good.jsonl", 20, 3)
    assert "one label only" in fails("HK-LABELS", written(tmp_path / "one.jsonl", 5, 0, label="hot")).what
    assert "no label" in fails("HK-LABELS", written(tmp_path / "none.jsonl", 5, 0, label=1.5)).what
    strange = written(tmp_path / "strange.jsonl", 2, 4, label="windy")
    assert "'windy'" in fails("HK-LABELS", good, validation_data=strange).have[0]
    fails("HK-COLUMNS", good, label="mood")
    fails("HK-HEAD", good, method="prompt")
    refused("HK-OPTIONS", hubkit.train, classifier, good, tmp_path / "out", label="label")


HEADLESS = ("BertForMaskedLM", "LlamaForCausalLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "GPT2LMHeadModel")


@pytest.fixture(scope="module", params=HEADLESS)
def headless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model of which no file has a head for labels; the decoders name no padding."""
    import transformers

    kind = getattr(transformers, request.param)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0 if "Masked" in request.param else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": request.param != "LlamaForCausalLM",
    }
    if request.param == "DistilBertForMaskedLM":
        sizes |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("headless") / str(request.param)
    kind(kind.config_class(**sizes)).save_pretrained(folder)
    whole_words().save_pretrained(folder)
    return folder


def quick(base: Path, data: Path, out: Path, **options: Any) -> hubkit.Trained:
    """Six steps with a head."""
    given = {"task": "classification", "steps": 6, "batch_size": 8, "save_every": 2, "validation": 0.2, **options}
    return hubkit.train(base, data, out, **given)


def test_a_head_is_made_where_the_files_have_none(headless: Path, tmp_path: Path) -> None:
    """It is stored in the adapter, and the base is that of its files, as for any other training."""
    import transformers

    rows = written(tmp_path / "rows.jsonl", 60, 5)
    before = tree(headless)
    torch.manual_seed(1)
    done = quick(headless, rows, tmp_path / "a" / "made")
    torch.manual_seed(2)
    assert quick(headless, rows, tmp_path / "b" / "made").digest == done.digest
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(headless) == before
    manifest = json.loads((done.path / "hubkit.json").read_text())
    assert manifest["base"]["weights"] == fingerprint_folder(headless).fingerprint.weights
    assert manifest["base"]["files"] == dict(fingerprint_folder(headless).fingerprint.files)
    made = manifest["task"]["made"]
    with safe_open(done.path / "adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, one in made.items():
        values = next(value for key, value in stored.items() if key.endswith(f".{name}.weight"))
        assert tuple(values.shape) == tuple(one["shape"])
    assert [3, 32] in [one["shape"] for one in made.values()]
    assert hubkit.verify(done.path, base=headless)
    torch.manual_seed(3)
    one = hubkit.predict(done.path, "w1 hot w2", base=headless)
    torch.manual_seed(4)
    assert hubkit.predict(done.path, "w1 hot w2", base=headless) == one
    model = transformers.AutoModelForSequenceClassification.from_pretrained(headless, num_labels=3)
    model.config.pad_token_id = 0
    want = said_by_peft(model, done.path, headless, "w1 hot w2")
    assert list(one.rows[0]["probabilities"].values()) == pytest.approx(want, abs=1e-5)


def test_a_head_that_was_made_learns(tmp_path: Path, headless: Path) -> None:
    """The commonest label alone is right in less than half of the held-out rows."""
    held = written(tmp_path / "held.jsonl", 60, 7)
    more = {"validation": None, "validation_data": held, "overlap": "drop", "save_every": 100}
    rows = written(tmp_path / "rows.jsonl", 300, 6)
    done = quick(headless, rows, tmp_path / "out", steps=150, batch_size=16, learning_rate=0.01, **more)
    assert done.scores["accuracy"] > 0.75
    found = hubkit.predict(done.path, held, base=headless, batch_size=16).rows
    labels = [json.loads(line)["label"] for line in held.read_text().splitlines()]
    right = sum(row["label"] == label for row, label in zip(found, labels, strict=True)) / len(labels)
    assert right == pytest.approx(done.scores["accuracy"], abs=1.5 / len(labels))


def test_the_head_is_that_of_the_seed(headless: Path, tmp_path: Path) -> None:
    """Without a step that moves it the head is drawn by the seed: spread as the configuration says, biases zero."""
    rows = written(tmp_path / "rows.jsonl", 60, 5)
    heads: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(heads))
        quick(headless, rows, out, steps=1, learning_rate=1e-12, seed=seed)
        with safe_open(out / "adapter_model.safetensors", "pt") as file:
            names = [*json.loads((out / "hubkit.json").read_text())["task"]["made"]]
            keys = {name: key for key in file.keys() for name in names if f".{name}." in key}  # noqa: SIM118
            heads.append({name: file.get_tensor(key.rpartition(".")[0] + ".weight") for name, key in keys.items()})
    for name, values in heads[0].items():
        assert torch.equal(values, heads[1][name])
        assert not torch.equal(values, heads[2][name])
        assert 0.1 < float(values.std()) < 0.3  # 0.2, of 96 values and more


@pytest.mark.parametrize("stop", [3, 6])
def test_a_head_is_made_again_when_a_run_goes_on(headless: Path, stop: int, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 60, 5)
    whole = quick(headless, rows, tmp_path / "whole" / "made")

    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == stop:
            raise KeyError

    out = tmp_path / "stopped" / "made"
    with pytest.raises(KeyError):
        quick(headless, rows, out, report=report)
    error = refused("HK-RESUME", quick, headless, written(tmp_path / "other.jsonl", 60, 8), out, resume=True)
    assert error
    assert quick(headless, rows, out, resume=True).digest == whole.digest
    assert tree(out) == tree(whole.path)


def test_what_does_not_apply_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 20, 3)
    for options, named in (
        ({"raw": True}, "--raw"),
        ({"packing": True}, "--packing"),
        ({"compile": True}, "--compile"),
        ({"chunked_loss": True}, "--chunked-loss"),
        ({"general": rows}, "--general"),
        ({"allow_incomplete_base": True}, "--allow-incomplete-base"),
    ):
        error = refused("HK-OPTIONS", quick, tiny_llama, rows, tmp_path / "out", **options)
        assert error.have == [named]
    refused("HK-OPTIONS", quick, tiny_llama, rows, tmp_path / "out", task="regression")
    assert not (tmp_path / "out").exists()


def test_a_base_that_no_classifier_is_known_of_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 27, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "state_size": 4}
    base = tmp_path / "mamba"
    transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(base)
    whole_words().save_pretrained(base)
    refused("HK-HEAD", quick, base, written(tmp_path / "rows.jsonl", 20, 3), tmp_path / "out")


def test_a_file_that_lacks_more_than_a_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (weights,) = base.glob("*.safetensors")
    values = load_file(weights)
    del values["model.layers.1.mlp.up_proj.weight"]
    save_file(values, weights, metadata={"format": "pt"})
    error = refused("HK-BASE-INCOMPLETE", quick, base, written(tmp_path / "rows.jsonl", 20, 3), tmp_path / "out")
    assert [line.partition(":")[0] for line in error.have] == ["model.layers.1.mlp.up_proj.weight"]


def test_without_its_head_the_adapter_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    """A language model has no place for it."""
    quick(tiny_llama, written(tmp_path / "rows.jsonl", 20, 3), tmp_path / "out")
    error = refused("HK-HEAD", hubkit.generate, "hello", base=tiny_llama, terms=[tmp_path / "out"])
    assert "hubkit predict" in error.fix
    with pytest.raises(hubkit.HubkitError, match="HK-HEAD"):
        hubkit.export(tmp_path / "out", tmp_path / "mlx", to="mlx", base=tiny_llama)
    with pytest.raises(hubkit.HubkitError, match="HK-HEAD"):
        hubkit.merge(tiny_llama, [tmp_path / "out"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_scores_are_those_of_scikit_learn() -> None:
    """The example of its documentation of ``f1_score``: macro 0.26..., micro 0.33..."""
    found = scores([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1])
    assert found["f1_macro"] == pytest.approx(0.8 / 3)
    assert found["f1_micro"] == found["accuracy"] == pytest.approx(2 / 6)
