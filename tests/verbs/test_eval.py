"""eval, gates, going on from an adapter, what a run leaves behind: as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from every_method import METHODS
from making import make_adapter
from variants import other_weights, refused, rows_file, tree

from hubkit.artifact.folder import open_adapter
from hubkit.errors import HubkitError
from hubkit.training.events import Stepped
from hubkit.verbs.eval import eval
from hubkit.verbs.pack import pack
from hubkit.verbs.push import push
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return rows_file(tmp_path / "rows.jsonl")


def quick(base: Path, rows: Path, out: Path, **options: Any) -> Any:
    given = {} if "parent" in options else {"config": {"rank": 2}}
    return train(str(base), rows, out, **{"steps": 4, "learning_rate": 0.01, **given, **options})


def measure(folder: Any, base: Path, rows: Path, **options: Any) -> Any:
    return eval(folder, base=base, **{"data": rows, "samples": 100, **options})


def test_figures_are_those_of_one_model_beside_the_other(
    adapter: Path, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """The mean is transformers' own loss of the row, weighed by targets; a mix of weight 0 is the base itself."""
    from hubkit.named.measuring import _loss
    from hubkit.tensors.base.tokenizer import load_tokenizer
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.measuring.figures import rows_to_measure

    done = measure(adapter, tiny_llama, rows, out=tmp_path / "eval.json")
    figures = done.figures
    encoded = rows_to_measure(rows, load_tokenizer(tiny_llama), longest=256)
    own = _loss(load_base(tiny_llama, device="cpu"), encoded)
    assert figures["base"]["loss"] == pytest.approx(own, rel=1e-4)
    apart = figures["heldout"]["loss"] - figures["base"]["loss"]
    assert figures["difference"]["value"] == pytest.approx(apart, abs=1e-4)
    assert figures["data"]["rows"] == 24
    first = (tmp_path / "eval.json").read_bytes()
    measure(adapter, tiny_llama, rows, out=tmp_path / "eval.json")
    assert (tmp_path / "eval.json").read_bytes() == first
    nothing = measure(f"1.0*{adapter} + -1.0*{adapter}", tiny_llama, rows).figures
    assert nothing["difference"]["value"] == pytest.approx(0, abs=1e-4)
    assert nothing["forgetting"]["value"] == pytest.approx(0, abs=1e-4)
    alone = eval(adapter, base=tiny_llama, samples=100).figures
    assert "heldout" not in alone
    assert alone["forgetting"] == figures["forgetting"]


def test_recorded_pushed_and_stale(adapter: Path, tiny_llama: Path, rows: Path, registry: str, tmp_path: Path) -> None:
    tensors = tree(adapter)["adapter_model.safetensors"]
    refused("HK-GATE", push, adapter, "ana/chat", require="heldout.loss<99")
    out = tmp_path / "eval.json"
    measure(adapter, tiny_llama, rows, out=out)
    push(adapter, "ana/chat", require="heldout.loss<99", evaluation=out, dry_run=True)
    benchmark = "ana/rows:default=heldout.perplexity"
    done = measure(adapter, tiny_llama, rows, record_in=True, benchmarks=(benchmark,))
    opened = open_adapter(adapter)
    assert (opened.manifest.digest, opened.manifest.evaluation) == (done.digest, done.figures)
    assert tree(adapter)["adapter_model.safetensors"] == tensors
    error = refused("HK-GATE", push, adapter, "ana/chat", require="heldout.loss<99", evaluation=out)
    refused("HK-GATE", push, adapter, "ana/chat", evaluation=out)  # for no gate
    assert "not of this adapter" in error.what
    error = refused("HK-GATE", push, adapter, "ana/chat", require="heldout.loss<0.001, forgetting<99")
    assert list(error.want) == ["heldout.loss < 0.001"]
    made = push(adapter, "ana/chat", require="heldout.loss<99, forgetting<99")
    assert ".eval_results/ana--rows.yaml" in made.uploaded
    value = done.figures["heldout"]["perplexity"]
    entry = {"dataset": {"id": "ana/rows", "task_id": "default"}, "value": value, "notes": "hubkit eval"}
    assert yaml.safe_load((adapter / ".eval_results" / "ana--rows.yaml").read_text()) == [entry]
    assert measure(adapter, tiny_llama, rows, record_in=True, benchmarks=(benchmark,)).digest == done.digest
    _the_hub_reads_it(adapter, value)
    make_adapter(tmp_path / "other", tiny_llama, seed=3)
    (adapter / "adapter_model.safetensors").write_bytes(tree(tmp_path / "other")["adapter_model.safetensors"])
    packed = pack(adapter)
    assert packed.manifest.evaluation is None
    assert any("figures" in note for note in packed.notes)
    assert "model-index" not in (adapter / "README.md").read_text()
    assert not (adapter / ".eval_results").exists()
    assert verify(adapter, base=str(tiny_llama)).overrides == ()


def _the_hub_reads_it(adapter: Path, value: float) -> None:
    """The card by the Hub's own library; what a person wrote under ``model-index`` is left alone."""
    from huggingface_hub import ModelCard

    from hubkit.artifact.card import render_card

    data: Any = ModelCard((adapter / "README.md").read_text()).data
    results = data.eval_results
    assert results is not None
    found = {one.metric_type: one.metric_value for one in results}
    assert found["perplexity"] == value
    assert "forgetting" in found
    own = "---\nmodel-index:\n- name: mine\n  results: [{source: {name: me}}]\n---\n# mine\n"
    assert "results: [{source: {name: me}}]" in render_card(open_adapter(adapter).manifest, own)


def test_a_training_is_judged_before_it_is_kept(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "chat", "heldout.loss<0.001, forgetting<99"
    error = refused("HK-GATE", quick, tiny_llama, rows, out, require=gate, validation=0.2)
    assert list(error.want) == ["heldout.loss < 0.001"]
    assert not out.exists()
    assert (tmp_path / "chat.run" / "checkpoint.safetensors").exists()
    steps: list[Any] = []
    again = {"require": "heldout.loss<99, forgetting<99", "validation": 0.2, "resume": True}
    kept = quick(tiny_llama, rows, out, report=lambda event: steps.append(isinstance(event, Stepped)), **again)
    assert not any(steps)
    plain = quick(tiny_llama, rows, tmp_path / "plain" / "chat", validation=0.2)
    assert tree(out)["adapter_model.safetensors"] == tree(plain.path)["adapter_model.safetensors"]
    figures = open_adapter(out).manifest.evaluation
    assert figures is not None
    assert kept.evaluation == figures
    assert figures["heldout"]["loss"] == pytest.approx(plain.metrics.validation_loss, rel=1e-4)
    assert figures["base"]["loss"] == pytest.approx(plain.metrics.untrained_loss, rel=1e-4)
    assert eval(out, base=tiny_llama).figures["forgetting"] == pytest.approx(figures["forgetting"], abs=2e-5)


@pytest.mark.parametrize("gate", ["heldout.loss", "heldout.loss<1.3", "nonsense<1"])
def test_gates_are_refused_before_the_first_step(gate: str, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert refused("HK-GATE", quick, tiny_llama, rows, tmp_path / "chat", require=gate).status == 2
    assert tree(tmp_path) == before


EXACT = [name for name in METHODS if name not in ("pissa", "olora")]


@pytest.mark.parametrize("name", EXACT)
def test_going_on(name: str, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """It begins where the parent stands: no step at a rate of nothing changes a value; same bytes twice."""
    method, config = METHODS[name]
    parent = train(str(tiny_llama), rows, tmp_path / "parent", method=method, config=config, steps=2, seed=5)
    how = {"parent": tmp_path / "parent", "steps": 1, "weight_decay": 0.0}
    quick(tiny_llama, rows, tmp_path / "same", **how, learning_rate=1e-30)
    key = "adapter_model.safetensors"
    assert tree(tmp_path / "same")[key] == tree(tmp_path / "parent")[key]
    made = [quick(tiny_llama, rows, tmp_path / side / "chat", **how, learning_rate=0.05) for side in "ab"]
    assert tree(made[0].path) == tree(made[1].path)
    assert tree(made[0].path)[key] != tree(tmp_path / "parent")[key]
    manifest, old = open_adapter(made[0].path).manifest, open_adapter(tmp_path / "parent").manifest
    assert [one.digest for one in manifest.parents] == [parent.digest]
    assert (manifest.method, manifest.config) == (old.method, old.config)
    assert verify(made[0].path, base=str(tiny_llama)).overrides == ()


def test_going_on_is_refused(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    quick(tiny_llama, rows, tmp_path / "parent")
    how = {"parent": tmp_path / "parent"}
    out = tmp_path / "chat"
    assert refused("HK-OPTIONS", quick, tiny_llama, rows, out, **how, method="dora").want
    error = refused("HK-OPTIONS", quick, tiny_llama, rows, out, **how, config={"rank": 4})
    assert (list(error.want), list(error.have)) == (["rank=2"], ["rank=4"])
    other = other_weights(tiny_llama, tmp_path / "other")
    refused("HK-BASE-MISMATCH", quick, other, rows, out, **how)
    config = {"rank": 2, "init": "pissa"}
    train(str(tiny_llama), rows, tmp_path / "pissa", config=config, steps=1)
    error = refused("HK-OPTIONS", quick, tiny_llama, rows, out, parent=tmp_path / "pissa")
    assert "pissa" in str(error.have)
    assert not out.exists()
    quick(tiny_llama, rows, out, **how, method="lora", config={"rank": 2})


def test_what_a_run_leaves_behind(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    memory: list[int] = []

    def report(event: object) -> None:
        if isinstance(event, Stepped):
            memory.append(event.memory)

    quick(tiny_llama, rows, tmp_path / "chat", report=report, validation=0.2)
    assert set(tree(tmp_path / "chat.run")) == {"metrics.jsonl", "metrics.json", "loss.svg"}
    # an interpreter with torch holds more than 100 MB, and no test here 100 GB
    assert all(100 << 20 < value < 100 << 30 for value in memory)
    lines = [json.loads(line) for line in (tmp_path / "chat.run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]

    def fail(event: object) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            raise HubkitError("HK-IO", "stopped")

    refused("HK-IO", quick, tiny_llama, rows, tmp_path / "stopped", report=fail)
    assert (tmp_path / "stopped.run" / "loss.svg").exists()


def test_extras(adapter: Path, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """A package that is not there is named, with the extra that brings it; one that is there works."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        error = refused("HK-EXTRA", quick, tiny_llama, rows, tmp_path / "new", tensorboard=tmp_path / "board")
        assert "[tensorboard]" in error.fix
        assert not (tmp_path / "new.run").exists()
    else:
        quick(tiny_llama, rows, tmp_path / "new", tensorboard=tmp_path / "board")
        assert [path.name.startswith("events.") for path in (tmp_path / "board").iterdir()] == [True]
    if importlib.util.find_spec("lm_eval") is None:
        assert "[eval]" in refused("HK-EXTRA", measure, adapter, tiny_llama, rows, tasks="arc_easy").fix


TASK = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: [" red", " blue"]
metric_list:
  - metric: acc
"""


@pytest.mark.oracle
def test_a_folder_of_tasks(adapter: Path, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness, offline; the base under the same harness is its own `hf` model of the folder."""
    harness = pytest.importorskip("lm_eval")
    data = tmp_path / "colours.jsonl"
    lines = [{"question": f"Box {n} is", "answer": n % 2} for n in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.replace("ROWS", str(data)))
    found = measure(adapter, tiny_llama, rows, tasks=str(tmp_path / "tasks")).figures["tasks"]["colours"]
    manager = harness.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    own = harness.simple_evaluate(
        model="hf", model_args=f"pretrained={tiny_llama}", tasks=["colours"], task_manager=manager, device="cpu"
    )
    assert found["base"]["acc"] == pytest.approx(own["results"]["colours"]["acc,none"])
    assert 0 <= found["acc"] <= 1


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("HK-OPTIONS", {"samples": 5}),
        ("HK-OPTIONS", {"seed": -1}),
        ("HK-OPTIONS", {"limit": 0}),
        ("HK-OPTIONS", {"benchmarks": ("a/b:c=heldout.loss",)}),
        ("HK-OPTIONS", {"benchmarks": ("nonsense",), "record_in": True}),
        ("HK-GATE", {"require": "heldout.los<1"}),
        ("HK-GATE", {"require": "heldout.loss<1", "data": None}),
        ("HK-GATE", {"require": "heldout.loss<0.001"}),
        ("HK-MISSING", {"data": "nowhere.jsonl"}),
        ("HK-MISSING", {"general": "nowhere.jsonl"}),
    ],
)
def test_refused(code: str, options: dict[str, Any], adapter: Path, tiny_llama: Path, rows: Path) -> None:
    before = tree(adapter)
    refused(code, measure, adapter, tiny_llama, rows, **options)
    assert tree(adapter) == before


def test_only_one_adapter_of_ones_own_is_recorded_in(adapter: Path, tiny_llama: Path, rows: Path) -> None:
    refused("HK-OPTIONS", measure, f"0.5*{adapter}", tiny_llama, rows, record_in=True)
    (adapter / "notes.txt").write_text("mine")
    refused("HK-EXTRA-FILES", measure, adapter, tiny_llama, rows, record_in=True)
