"""Encoder-decoders: a text for a text, from rows to answers, live, merged and in PEFT."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pairs import logits
from safetensors import safe_open
from variants import refused, tree

import hubkit
from hubkit.named.terms import attached, open_terms
from hubkit.registry.opening import Where
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.loading import load_base
from hubkit.training.events import Stepped

NEAR: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
"""float32 of logits of size 1, a few hundred sums: 1e-6, with room for another order."""


@pytest.fixture(scope="module", params=[kind for kind in pairs.SIZES if kind != "BartForCausalLM"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.saved(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.saved("T5ForConditionalGeneration", tmp_path_factory.mktemp("base") / "t5")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.written(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60, 0)


def quick(base: Path, rows: Path, out: Path, **options: Any) -> hubkit.Trained:
    """Four large steps."""
    given = {"steps": 4, "batch_size": 8, "learning_rate": 0.02, "save_every": 2, **options}
    return hubkit.train(base, rows, out, **given)


@pytest.fixture(scope="module")
def trained(t5: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> hubkit.Trained:
    return quick(t5, rows, tmp_path_factory.mktemp("trained") / "pairs", validation=0.2)


def live(base: Path, adapter: Path) -> Any:
    return attached(load_base(base), open_terms({str(adapter): 1.0}, Where()), "sum")


def test_files_and_model_have_the_same_places(base: Path) -> None:
    """And none at a table that encoder, decoder and head share."""
    files, model = Base.from_folder(base), Base.from_model(outline(base))
    facts = [{n: (s.kind, s.shape, s.tensor) for n, s in one.sites.items()} for one in (files, model)]
    assert facts[0] == facts[1]
    assert files.encodes
    assert model.encodes
    assert not files.rows
    assert not any(name.endswith(("shared", "embed_tokens", "lm_head")) for name in facts[0])


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_live_and_merged_agree_and_peft_does(base: Path, rows: Path, method: str, tmp_path: Path) -> None:
    import peft
    import transformers

    done = quick(base, rows, tmp_path / "pairs", method=method)
    bare, want = logits(load_base(base)), logits(live(base, done.path))
    assert float((want - bare).abs().max()) > 0.01
    hubkit.merge(base, [done.path], tmp_path / "merged")
    kind = transformers.AutoModelForSeq2SeqLM
    torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / "merged").eval()), want, **NEAR)
    assert hubkit.verify(done.path, base=base)
    if method != "full":
        theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), str(done.path)).eval()
        assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
        torch.testing.assert_close(logits(theirs), want, **NEAR)


def test_bottlenecks_act_in_t5(t5: Path, rows: Path, tmp_path: Path) -> None:
    done = quick(t5, rows, tmp_path / "pairs", method="adapters")
    assert float((logits(live(t5, done.path)) - logits(load_base(t5))).abs().max()) > 0.01


def test_a_folder_of_peft_is_taken_and_given(t5: Path, trained: hubkit.Trained, tmp_path: Path) -> None:
    hubkit.export(trained.path, tmp_path / "theirs", to="peft")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    hubkit.pack(tmp_path / "theirs", base=str(t5), out=tmp_path / "mine")
    assert torch.equal(logits(live(t5, tmp_path / "mine")), logits(live(t5, trained.path)))
    assert hubkit.inspect(tmp_path / "mine").manifest.task == {"kind": "seq2seq"}


def test_what_the_base_is_is_learnt_and_named(t5: Path, trained: hubkit.Trained) -> None:
    """Without --task, too."""
    task = json.loads((trained.path / "hubkit.json").read_text())["task"]
    assert task == {"kind": "seq2seq", "scores": dict(trained.scores)}
    assert "exact_match" in trained.scores
    assert trained.metrics.validation_loss is not None
    # of the values that are stored, the other of those that were trained: the same in float32
    assert math.log(trained.scores["perplexity"]) == pytest.approx(trained.metrics.validation_loss, abs=1e-5)
    card = (trained.path / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card


def test_a_word_is_learnt(tmp_path: Path) -> None:
    """The commonest answer is right in a quarter of the held-out rows at most."""
    base = pairs.saved("T5ForConditionalGeneration", tmp_path / "base")
    rows, held = pairs.written(tmp_path / "rows.jsonl", 300, 1), pairs.written(tmp_path / "held.jsonl", 40, 2)
    options: dict[str, Any] = {"validation_data": held, "overlap": "drop", "steps": 120, "batch_size": 16}
    done = quick(base, rows, tmp_path / "out", method="full", learning_rate=0.01, save_every=0, **options)
    assert done.metrics.untrained_loss is not None
    assert done.metrics.validation_loss is not None
    assert done.metrics.validation_loss < 0.5 * done.metrics.untrained_loss
    assert done.scores["exact_match"] > 0.6
    found = 0
    some = [json.loads(line) for line in held.read_text().splitlines()][:8]
    for row in some:
        answer = hubkit.generate(row["prompt"], base=base, terms=[done.path], max_new_tokens=4)
        found += answer.text == row["completion"]
    assert found >= 3


def test_the_same_bytes_twice_and_after_a_stop(t5: Path, rows: Path, trained: hubkit.Trained, tmp_path: Path) -> None:
    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyError

    out = tmp_path / "stopped" / "pairs"
    with pytest.raises(KeyError):
        quick(t5, rows, out, validation=0.2, report=report)
    other = pairs.written(tmp_path / "other.jsonl", 60, 5)
    refused("HK-RESUME", quick, t5, other, out, validation=0.2, resume=True)
    assert quick(t5, rows, out, validation=0.2, resume=True).digest == trained.digest
    assert tree(out) == tree(trained.path)
    assert quick(t5, rows, tmp_path / "again" / "pairs", task="seq2seq", validation=0.2).digest == trained.digest
    assert tree(tmp_path / "again" / "pairs") == tree(trained.path)


def test_another_base_is_refused(trained: hubkit.Trained, tmp_path: Path) -> None:
    other = pairs.saved("T5ForConditionalGeneration", tmp_path / "other", initializer_factor=2.0)
    refused("HK-BASE-MISMATCH", hubkit.generate, "w1", base=other, terms=[trained.path])


def test_it_goes_through_a_registry(t5: Path, trained: hubkit.Trained, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "registry").mkdir()
    hubkit.push(trained.path, "me/pairs", registry=str(tmp_path / "registry"))
    pulled = hubkit.pull("me/pairs", registry=str(tmp_path / "registry"))
    with safe_open(Path(pulled.path) / "adapter_model.safetensors", "pt") as one:
        assert len(one.keys()) == 2 * len(Base.from_folder(t5).linear())


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_in_half_precision_the_loss_is_in_float32(kind: str, rows: Path, tmp_path: Path) -> None:
    """Of one batch it is no number of 8 bits, and it is that of the logits."""
    base = pairs.saved(kind, tmp_path / "base")
    options: dict[str, Any] = {"dtype": "bfloat16", "steps": 1, "learning_rate": 1e-9, "batch_size": 64}
    done = quick(base, rows, tmp_path / "out", validation=0.2, **options)
    loss = done.metrics.untrained_loss
    assert loss is not None
    assert float(torch.tensor(loss, dtype=torch.bfloat16)) != loss
    assert math.log(done.scores["perplexity"]) == pytest.approx(loss, abs=1e-3)


def test_what_does_not_go_together_is_refused_by_name(
    t5: Path, rows: Path, trained: hubkit.Trained, tiny_llama: Path, tmp_path: Path
) -> None:
    def fails(code: str, base: Path = t5, data: Path = rows, **options: Any) -> Any:
        error = refused(code, quick, base, data, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()
        return error

    assert fails("HK-HEAD", task="causal-lm").fix == "--task seq2seq"
    assert "leave --task out" in fails("HK-HEAD", tiny_llama, task="seq2seq").fix
    bart = pairs.saved("BartForCausalLM", tmp_path / "bart")
    assert fails("HK-HEAD", bart, task="seq2seq").have == ["BartForCausalLM"]
    assert fails("HK-OPTIONS", raw=True).have == ["--raw"]
    assert "encoder-decoder" in str(fails("HK-ARCH", method="prefix").have)
    assert "encoder-decoder" in str(fails("HK-ARCH", method="prompt").have)
    fails("HK-CODEC", method="qlora")
    for targets in ("shared", "lm_head"):
        fails("HK-TARGET", config={"targets": targets})
    assert "share one table" in fails("HK-TARGET", config={"targets": "shared"}).fix
    unsaid = tmp_path / "unsaid"
    shutil.copytree(t5, unsaid)
    config = json.loads((unsaid / "config.json").read_text())
    (unsaid / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    assert fails("HK-BASE-LOAD", unsaid).want == ["decoder_start_token_id"]
    assert "hubkit generate" in refused("HK-HEAD", hubkit.predict, trained.path, "w1 x1", base=t5).fix
    refused("HK-ARCH", hubkit.merge, t5, [trained.path], tmp_path / "merged", check=True)

    for form in ("vllm", "gguf"):
        refused("HK-EXPORT", hubkit.export, trained.path, tmp_path / "served", to=form, base=t5)


def test_it_is_measured_and_shown_like_any_task(t5: Path, rows: Path, trained: hubkit.Trained) -> None:
    found = hubkit.eval([trained.path], base=t5, data=rows).figures
    assert found["heldout"]["loss"] < found["base"]["loss"]
    assert found["heldout"]["exact_match"] >= found["base"]["exact_match"]
    first = json.loads(rows.read_text().partition("\n")[0])
    assert hubkit.preview(t5, rows, rows=1).rows[0].answer == first["completion"]


def test_rows_that_cannot_be_used_are_refused(t5: Path, tmp_path: Path) -> None:
    good = {"prompt": "w1 x1", "completion": "v1"}

    def fails(code: str, *rows: dict[str, Any], **options: Any) -> Any:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        error = refused(code, quick, t5, data, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()
        return error

    fails("HK-COLUMNS", {"text": "w1"})
    fails("HK-COLUMNS", good, {"source": "w1", "target": "v1"})
    fails("HK-COLUMNS", {"source": "w1", "target": "v1"}, good)
    fails("HK-DATA", good, {"prompt": [{"role": "user", "content": "w1"}], "completion": "v1"})
    fails("HK-DATA", good, {"prompt": "w1", "completion": 3})
    assert fails("HK-NO-TARGETS", good, {**good, "completion": " "}).have == ["rows.jsonl:2: no completion"]
    assert fails("HK-NO-TARGETS", {**good, "prompt": ""}, good).have == ["rows.jsonl:1: no prompt"]
    long = {"prompt": "w1 " * 9, "completion": "v1"}
    assert fails("HK-ROW-TOO-LONG", good, long, max_length=4).have == ["rows.jsonl:2: 10 tokens to read, 2 to write"]
    held = pairs.written(tmp_path / "held.jsonl", 5, 0)
    first = json.loads(held.read_text().splitlines()[0])
    fails("HK-DATA", good, {**first, "completion": "v0 v0"}, validation_data=held)
