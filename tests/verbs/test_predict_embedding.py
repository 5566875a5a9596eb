"""Embedding from pairs of texts to vectors, on encoders and decoders, with the files that others read."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from variants import refused, tree

import hubkit
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.tensors.live.attached import Attached
from hubkit.training.events import Stepped
from hubkit.training.tasks.embedding import Embedding

FILL = [f"w{n}" for n in range(20)]
WORDS = ["[PAD]", "[UNK]", "cold", "hot", "mild", *FILL]


def whole_words() -> Any:
    """A tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def written(path: Path, count: int, seed: int, **change: object) -> Path:
    """Pairs of texts: three words, and in another order the three that stand for them, ten further on."""
    draw = random.Random(seed)
    rows = []
    for numbers in draw.sample([*itertools.combinations(range(20), 3)], count):
        other = draw.sample(numbers, 3)
        texts = [" ".join(f"w{n}" for n in numbers), " ".join(f"w{(n + 10) % 20}" for n in other)]
        rows.append({"anchor": texts[0], "positive": texts[1]} | change)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BASES = ("BertModel", "LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel", "MPNetModel", "Qwen3Model")


def made(name: str, folder: Path) -> Path:
    """A tiny base with random weights: encoders and decoders, bodies alone and below a head."""
    import transformers

    kind = getattr(transformers, name)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 1 if name == "MPNetModel" else 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": name != "LlamaForCausalLM",
    }
    torch.manual_seed(0)
    kind(kind.config_class(**sizes)).save_pretrained(folder)
    whole_words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BASES)
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(str(request.param), tmp_path_factory.mktemp("bases") / str(request.param))


@pytest.fixture(scope="module", params=["BertModel", "LlamaForCausalLM"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(str(request.param), tmp_path_factory.mktemp("base") / str(request.param))


def quick(base: Path, data: Path, out: Path, **options: Any) -> hubkit.Trained:
    """Six steps."""
    given = {"task": "embedding", "steps": 6, "batch_size": 8, "save_every": 2, "learning_rate": 0.01, **options}
    return hubkit.train(base, data, out, **given)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hubkit.Trained:
    folder = tmp_path_factory.mktemp("trained")
    rows, held = written(folder / "rows.jsonl", 300, 0), written(folder / "held.jsonl", 20, 1)
    more = {"validation_data": held, "overlap": "drop", "save_every": 1000}
    return quick(base, rows, folder / "near", steps=160, batch_size=16, learning_rate=4e-3, **more)


def pooled(model: Any, base: Path, text: str) -> list[float]:
    """The mean over the hidden states of a text by hand, of length 1."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**{n: tokens[n] for n in ("input_ids", "attention_mask")}).last_hidden_state[0]
    mean = hidden.double().mean(0)
    found: list[float] = (mean / mean.norm()).tolist()
    return found


def test_what_belongs_together_is_found(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    """By chance the right one of 20 is first once in 20 times, and one over its rank is 0.18 in the mean."""
    held = written(tmp_path / "held.jsonl", 20, 1)
    rows = written(tmp_path / "rows.jsonl", 300, 0)
    before = quick(base, rows, tmp_path / "o", steps=1, learning_rate=1e-12, validation_data=held, overlap="drop")
    assert before.scores["mrr_at_10"] < 0.4
    assert trained.scores["mrr_at_10"] > 0.6
    assert trained.scores["mrr_at_10"] >= trained.scores["accuracy_at_1"]
    task = json.loads((trained.path / "hubkit.json").read_text())["task"]
    assert (task["kind"], task["pooling"], task["scale"], task["normalize"]) == ("embedding", "mean", 20, True)
    assert "made" not in task
    assert json.loads((trained.path / "metrics.json").read_text())["mrr_at_10"] == trained.scores["mrr_at_10"]
    assert trained.metrics.validation_loss is not None
    assert trained.metrics.validation_loss < (trained.metrics.untrained_loss or 0) / 2


def test_texts_together_are_as_each_alone(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 12, 2)
    together = hubkit.predict(trained.path, rows, base=base, batch_size=12)
    alone = hubkit.predict(trained.path, rows, base=base, batch_size=1)
    for one, other in zip(together.rows, alone.rows, strict=True):
        assert one["vector"] == pytest.approx(other["vector"], abs=1e-5)
        assert sum(value**2 for value in one["vector"]) == pytest.approx(1, abs=1e-5)
        assert one["where"]
    second = hubkit.predict(trained.path, rows, column="positive", base=base).rows[0]["vector"]
    assert second != pytest.approx(together.rows[0]["vector"], abs=1e-3)


def test_it_is_sound_and_bound_to_its_base(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    assert hubkit.verify(trained.path, base=base)
    other = made("BertModel" if "Llama" in base.name else "LlamaForCausalLM", tmp_path / "other")
    refused("HK-BASE-MISMATCH", hubkit.predict, trained.path, "w1 w2", base=other)


def test_any_base_gives_the_vectors_that_peft_gives(any_base: Path, tmp_path: Path) -> None:
    """The adapter's own folder, read by PEFT on the model of AutoModel, whose modules have shorter names."""
    import peft
    import transformers

    before = tree(any_base)
    rows = written(tmp_path / "rows.jsonl", 33, 0)
    done = quick(any_base, rows, tmp_path / "out", learning_rate=0.05)
    assert tree(any_base) == before
    manifest = json.loads((done.path / "hubkit.json").read_text())
    assert manifest["base"]["weights"] == fingerprint_folder(any_base).fingerprint.weights
    assert json.loads((done.path / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    assert hubkit.verify(done.path, base=any_base)
    text = "w1 hot w2"
    ours = hubkit.predict(done.path, text, base=any_base).rows[0]["vector"]
    bare = transformers.AutoModel.from_pretrained(any_base)
    assert ours != pytest.approx(pooled(bare, any_base, text), abs=1e-3), "an adapter that does something"
    hubkit.export(done.path, tmp_path / "peft", to="peft")
    for folder in (done.path, tmp_path / "peft"):
        model = transformers.AutoModel.from_pretrained(any_base)
        theirs = peft.PeftModel.from_pretrained(model, str(folder))
        assert ours == pytest.approx(pooled(theirs, any_base, text), abs=1e-5)
        held = {name for name, _ in theirs.named_parameters() if "lora_" in name}
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        assert {name.replace(".default", "") for name in held} == stored, "none more, none less"


def test_the_same_bytes_twice_and_resumed(base: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", 33, 5)
    whole = quick(base, rows, tmp_path / "a" / "one", validation=0.2)
    assert quick(base, rows, tmp_path / "b" / "one", validation=0.2).digest == whole.digest
    assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyError

    out = tmp_path / "stopped" / "one"
    with pytest.raises(KeyError):
        quick(base, rows, out, validation=0.2, report=report)
    refused("HK-RESUME", quick, base, written(tmp_path / "other.jsonl", 33, 8), out, validation=0.2, resume=True)
    assert quick(base, rows, out, validation=0.2, resume=True).digest == whole.digest
    assert tree(out) == tree(whole.path)


@pytest.mark.parametrize("method", ["prefix", "prompt", "full"])
def test_every_kind_of_part_acts(method: str, base: Path, tmp_path: Path) -> None:
    """Virtual tokens in front of the texts, and weights trained as a whole; behind padding they act as in front."""
    rows = written(tmp_path / "rows.jsonl", 17, 0)
    config = {"full": {}, "prefix": {"num_virtual_tokens": 3}, "prompt": {"num_virtual_tokens": 3}}[method]
    done = quick(base, rows, tmp_path / "out", method=method, config=config, learning_rate=0.05)
    hidden = Embedding.known(json.loads((done.path / "hubkit.json").read_text())["task"], base)
    ours = hubkit.predict(done.path, rows, base=base, batch_size=17).rows
    alone = hubkit.predict(done.path, rows, base=base, batch_size=1).rows
    import transformers

    model = transformers.AutoModel.from_pretrained(base)
    for one, other in zip(ours, alone, strict=True):
        assert one["vector"] == pytest.approx(other["vector"], abs=1e-5)
    first = json.loads(rows.read_text().splitlines()[0])["anchor"]
    assert ours[0]["vector"] != pytest.approx(pooled(model, base, first), abs=1e-3)
    assert hidden.pooling == "mean"


def test_a_sum_of_two_gives_vectors_and_no_text(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    hubkit.compose([trained.path, f"0.5*{trained.path}"], out=both, base=base)
    task = hubkit.inspect(both).manifest.task or {}
    assert task == {k: v for k, v in (hubkit.inspect(trained.path).manifest.task or {}).items() if k != "scores"}
    assert len(hubkit.predict(both, "w1 w2", base=base).rows[0]["vector"]) == 32
    assert "hubkit predict" in refused("HK-HEAD", hubkit.generate, "w1", base=base, terms=[trained.path]).fix


def test_a_task_is_not_added_to_another(tmp_path: Path) -> None:
    base = made("LlamaForCausalLM", tmp_path / "llama")
    vectors = quick(base, written(tmp_path / "pairs.jsonl", 16, 0), tmp_path / "vectors", steps=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{n} w{n + 1}"}) + "\n" for n in range(8)))
    words = hubkit.train(base, rows, tmp_path / "words", steps=1)
    error = refused("HK-COMPOSE", hubkit.compose, [vectors.path, words.path], out=tmp_path / "both", base=base)
    assert [one.partition(": ")[2] for one in error.have] == ["embedding", "no task"]
    assert not (tmp_path / "both").exists()


def test_mixes_act_on_vectors(trained: hubkit.Trained, base: Path) -> None:
    """The mix of a call, and of each of its rows."""
    from hubkit.methods.reading import read_adapter
    from hubkit.named.terms import open_terms
    from hubkit.registry.opening import Where
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.rows.contrast import stacked
    from hubkit.training.tasks.pooling import vectors

    (member,) = open_terms({str(trained.path): 1.0}, Where(None, True, None))
    task = Embedding.known(member.folder.manifest.task or {}, base)
    model = Attached(load_base(base, task=task.model))
    model.add("near", read_adapter(member.folder, model.sites, dtype="base"))
    batch = stacked([(5, 6, 7), (5, 6, 7)], 0, "cpu")
    with torch.no_grad():
        plain = vectors(model, batch, "mean")
        model.set_mix("near")
        full = vectors(model, batch, "mean")
        model.set_mix(hubkit.Sum({"near": 0.5}))
        half = vectors(model, batch, "mean")
        one = model(**batch, route=["near", None]).last_hidden_state.mean(1)
    assert (full - plain).abs().max() > 1e-2
    assert (half - plain).abs().max() > 1e-2
    assert (half - full).abs().max() > 1e-2
    routed = torch.nn.functional.normalize(one[:, :], dim=-1)
    alone = torch.stack([full[0], plain[1]])
    unpadded = torch.allclose(routed, alone, atol=1e-5)
    assert unpadded


def test_merged_it_is_a_model_that_gives_the_same_vectors(trained: hubkit.Trained, base: Path, tmp_path: Path) -> None:
    import transformers

    hubkit.merge(base, [trained.path], tmp_path / "merged")
    model = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    ours = hubkit.predict(trained.path, "w1 hot w2", base=base).rows[0]["vector"]
    assert ours == pytest.approx(pooled(model, base, "w1 hot w2"), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
    ],
)
def test_pooling_is_the_base_s_own(config: dict[str, Any], pooling: str | None, tmp_path: Path) -> None:
    base = made("BertModel", tmp_path / "base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps(config))
    rows = written(tmp_path / "rows.jsonl", 16, 0)
    if pooling is None:
        error = refused("HK-HEAD", quick, base, rows, tmp_path / "out")
        assert "pooling" in error.have[0]
        assert not (tmp_path / "out.run").exists()
        return
    done = quick(base, rows, tmp_path / "out", steps=1, learning_rate=1e-12)
    assert json.loads((done.path / "hubkit.json").read_text())["task"]["pooling"] == pooling
    import transformers

    text = "w1 hot w2"
    tokens = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    hidden = transformers.AutoModel.from_pretrained(base).eval()(input_ids=tokens["input_ids"]).last_hidden_state[0]
    want = {"cls": hidden[0], "lasttoken": hidden[-1], "mean": hidden.mean(0)}[pooling]
    (base / "1_Pooling" / "config.json").unlink()  # the adapter knows
    ours = hubkit.predict(done.path, text, base=base).rows[0]["vector"]
    assert ours == pytest.approx((want / want.norm()).tolist(), abs=1e-5)


def test_a_further_module_of_the_base_is_refused(tmp_path: Path) -> None:
    base = made("BertModel", tmp_path / "base")
    kinds = ("Transformer", "Pooling", "Dense")
    modules = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (base / "modules.json").write_text(json.dumps(modules))
    error = refused("HK-HEAD", quick, base, written(tmp_path / "rows.jsonl", 16, 0), tmp_path / "out")
    assert error.have == ["Dense"]


def test_columns_are_found_or_named(base: Path, tmp_path: Path) -> None:
    from hubkit.training.rows.data import Columns

    rows = [{"query": f"w{n}", "document": f"w{n + 1}", "negative": [f"w{n + 2}", "hot"]} for n in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert quick(base, path, tmp_path / "a", steps=3, batch_size=4).metrics.rows == 9  # 4 and 5
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"a": row["query"], "b": row["document"]}) + "\n" for row in rows))
    named = {"columns": Columns(text="a"), "text_pair": "b"}
    assert quick(base, other, tmp_path / "b", steps=3, **named).metrics.rows == 9
    refused("HK-COLUMNS", quick, base, other, tmp_path / "c")


def test_bad_rows_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    def fails(code: str, rows: list[dict[str, Any]] | Path, **options: Any) -> Any:
        path = rows if isinstance(rows, Path) else tmp_path / "bad.jsonl"
        if not isinstance(rows, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        error = refused(code, quick, base, path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()
        return error

    good = [{"anchor": f"w{n}", "positive": f"w{n + 1}"} for n in range(6)]
    assert "positive" in fails("HK-COLUMNS", [{"anchor": "w1"}, {"anchor": "w2"}]).want[0]
    fails("HK-DATA", [*good, {"anchor": "w1", "positive": "  "}])
    fails("HK-DATA", [*good, {"anchor": "w1"}])
    fails("HK-DATA", [*good, {"anchor": ["w1"], "positive": "w2"}])
    fails("HK-DATA", [{**row, "negative": "hot"} for row in good] + good[:1])
    fails("HK-DATA", [{**row, "negative": []} for row in good])
    same = fails("HK-DATA", [{"anchor": f"w{n}", "positive": "hot"} for n in range(4)])
    assert "same positive" in same.what
    long = [*good, {"anchor": "w1 " * 80, "positive": "w2"}]
    assert "at most 64 tokens" in fails("HK-ROW-TOO-LONG", long).want[0]
    assert "batch-size" in fails("HK-OPTIONS", good, batch_size=1).want[0]
    assert fails("HK-OPTIONS", good, label="anchor").have == ["--label"]
    fails("HK-COLUMNS", good, text_pair="anchor")
    fails("HK-NO-ROWS", good[:1])
    fails("HK-NO-ROWS", good, validation=0.1)  # one row is held out
    both = written(tmp_path / "both.jsonl", 16, 0)
    fails("HK-DATA", both, validation_data=both)
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    done = quick(base, tmp_path / "long.jsonl", tmp_path / "cut", truncate=True, steps=1)
    assert done.metrics.rows == 7
    refused("HK-OPTIONS", hubkit.train, base, both, tmp_path / "out", text_pair="positive")


def test_a_base_that_gives_no_hidden_states_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    base = tmp_path / "t5"
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(base)
    whole_words().save_pretrained(base)
    error = refused("HK-HEAD", quick, base, written(tmp_path / "rows.jsonl", 16, 0), tmp_path / "out")
    assert "encoder-decoder" in error.have[0]
    assert not (tmp_path / "out").exists()


def test_a_decoder_s_vectors_are_of_its_last_layer(tmp_path: Path) -> None:
    """The language model's own output, asked for the official way, before the head."""
    import transformers

    base = made("LlamaForCausalLM", tmp_path / "base")
    done = quick(base, written(tmp_path / "rows.jsonl", 16, 0), tmp_path / "out", steps=1, learning_rate=1e-12)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(base)("w1 hot w2", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0].mean(0)
    ours = hubkit.predict(done.path, "w1 hot w2", base=base).rows[0]["vector"]
    assert ours == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.model
def test_sentence_transformers_gives_the_same_vectors_and_the_same_loss(minilm: Path, tmp_path: Path) -> None:
    """The real library on the base's folder and the adapter's; and the real model learns from 64 pairs."""
    theirs = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from hubkit.named.terms import attached, open_terms
    from hubkit.registry.opening import Where
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.rows.batching import collate
    from hubkit.training.rows.data import read_rows
    from hubkit.training.tasks.task import Asked

    rows = written(tmp_path / "rows.jsonl", 66, 0)
    done = quick(minilm, rows, tmp_path / "out", steps=8, batch_size=11, learning_rate=1e-3)
    pairs = [json.loads(line) for line in rows.read_text().splitlines()][:11]
    model = theirs.SentenceTransformer(str(minilm), device="cpu")
    plain = model.encode([pair["anchor"] for pair in pairs])
    model.load_adapter(str(done.path))
    want = model.eval().encode([pair["anchor"] for pair in pairs])
    have = [row["vector"] for row in hubkit.predict(done.path, rows, base=minilm).rows][:11]
    assert abs(want - plain).max() > 1e-3
    assert want.flatten().tolist() == pytest.approx([value for one in have for value in one], abs=1e-5)
    said = [model.preprocess([pair[name] for pair in pairs]) for name in ("anchor", "positive")]
    with torch.no_grad():
        loss = float(losses.MultipleNegativesRankingLoss(model)(said, None))
    (member,) = open_terms({str(done.path): 1.0}, Where(None, True, None))
    records = read_rows(rows)[:11]
    task = Embedding.of(records, Asked(), minilm)
    encoded = task.encode(records, hubkit.load_tokenizer(minilm), 512, False)
    mine = attached(load_base(minilm, task=task.model), [member], "sum")
    with torch.no_grad():
        ours = float(task.train_step(lambda model, batch: model(**batch).loss)(mine, collate(encoded)))
    assert ours == pytest.approx(loss, abs=1e-5)
