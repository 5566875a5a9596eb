"""Heads for labels: PEFT's ``task_type`` both ways, on bases whose files have no head, with real PEFT as the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from classifiers import LABELS, TEXT, classifier, headless, logits, shares
from safetensors.torch import load_file, save_file
from variants import refused, tree

import hubkit
from hubkit.artifact.task_types import TASK_TYPES, kind_of
from hubkit.methods.foreign import TASKS
from hubkit.training.tasks.kinds import KINDS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = "adapter_model.safetensors"
# class of the base -> modules that PEFT has to save beside the head that it adds by itself
BASES: dict[str, list[str]] = {
    "BertModel": [],
    "BertForMaskedLM": ["pooler"],
    "RobertaForMaskedLM": [],
    "DistilBertForMaskedLM": [],
    "LlamaForCausalLM": [],
    "GPT2LMHeadModel": [],
}
TARGETS = {
    "Bert": ["query", "value"],
    "Robe": ["query"],
    "Dist": ["q_lin", "v_lin"],
    "Llam": ["q_proj"],
    "GPT2": ["c_attn"],
}


def by_peft(base: Path, folder: Path, saved: list[str], **options: Any) -> torch.Tensor:
    """What an adapter with random values says, that PEFT made on a classifier and saved in `folder`."""
    kind = next(found for found in TARGETS if base.name.startswith(found))
    given = {"task_type": "SEQ_CLS", "target_modules": TARGETS[kind], "modules_to_save": saved or None, **options}
    made = peft.get_peft_model(classifier(base, 1), peft.LoraConfig(r=4, **given)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder)
    return logits(made, base)


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return headless(str(request.param), tmp_path_factory.mktemp("bases") / str(request.param))


def test_a_classifier_of_peft_goes_round(base: Path, tmp_path: Path) -> None:
    """Adopted, used, given back: the same probabilities, and the very tensors that PEFT trained."""
    want = by_peft(base, tmp_path / "theirs", BASES[base.name])
    done = hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "mine", labels=LABELS)
    task = done.manifest.task
    assert task is not None
    assert (task["kind"], task["labels"]) == ("classification", LABELS)
    assert hubkit.verify(tmp_path / "mine", base=base)
    assert shares(tmp_path / "mine", base) == pytest.approx(want.softmax(-1).tolist(), abs=1e-6)
    said = hubkit.predict(tmp_path / "mine", TEXT, base=base).rows[0]
    assert said["label"] == LABELS[int(want.argmax())]
    hubkit.export(tmp_path / "mine", tmp_path / "again")
    before, after = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    for folder in ("mine", "again"):
        theirs = peft.PeftModel.from_pretrained(classifier(base, 2), tmp_path / folder).eval()
        assert type(theirs).__name__ == "PeftModelForSequenceClassification"
        assert torch.equal(logits(theirs, base), want)
    # labels travel in a file of their own
    again = hubkit.pack(tmp_path / "again", base=base, out=tmp_path / "third")
    assert again.manifest.task == task
    assert "`hot`" in (tmp_path / "again" / "README.md").read_text()


def test_what_peft_would_draw_by_chance_is_refused(tmp_path: Path) -> None:
    """PEFT saves the module that it calls the head; what else belongs to it comes from the base, or from nowhere."""
    base = headless("BertForMaskedLM", tmp_path / "BertForMaskedLM")
    want = by_peft(base, tmp_path / "theirs", [])
    theirs = peft.PeftModel.from_pretrained(classifier(base, 2), tmp_path / "theirs").eval()
    assert (logits(theirs, base) - want).abs().max() > 1e-3, "or nothing is lost"
    error = refused("HK-HEAD", hubkit.pack, tmp_path / "theirs", base=base, out=tmp_path / "out")
    assert error.have == ["bert.pooler.dense: not in the file"]
    assert "modules_to_save=['pooler']" in error.fix
    assert not (tmp_path / "out").exists()
    classifier(base, 1).save_pretrained(tmp_path / "whole")  # with the very head that it was trained on
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "whole")
    done = hubkit.pack(tmp_path / "theirs", base=tmp_path / "whole", out=tmp_path / "out")
    assert done.manifest.task == {"kind": "classification", "labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}
    assert shares(done.path, tmp_path / "whole") == pytest.approx(want.softmax(-1).tolist(), abs=1e-6)


def test_a_head_that_is_not_the_class_is_refused_by_name(tmp_path: Path) -> None:
    base = headless("BertModel", tmp_path / "BertModel")
    by_peft(base, tmp_path / "theirs", [])
    file, config = tmp_path / "theirs" / WEIGHTS, tmp_path / "theirs" / "adapter_config.json"
    good, document = load_file(file), json.loads(config.read_text())
    head = "base_model.model.classifier"
    before = tree(base)

    def fails(code: str, **options: Any) -> Any:
        error = refused(code, hubkit.pack, tmp_path / "theirs", base=base, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert tree(base) == before
        return error

    for labels in (["a", "b"], ["a", "a", "b"], ["a", "b", ""], []):
        assert fails("HK-LABELS", labels=labels).have == labels
    save_file({**good, f"{head}.weight": torch.zeros(3, 16)}, file)
    assert fails("HK-HEAD").have == ["classifier: (3, 16), not (3, 32)"]
    save_file({**good, f"{head}.weight": torch.zeros(1, 32), f"{head}.bias": torch.zeros(1)}, file)
    assert "a number, not a label" in fails("HK-HEAD").have[0]
    save_file({**good, f"{head}.bias": torch.zeros(2)}, file)
    fails("HK-SHAPE")
    save_file({name: value for name, value in good.items() if name != f"{head}.bias"}, file)
    fails("HK-KEYS")
    deep = {f"{head}.dense.weight": torch.zeros(32, 32), f"{head}.dense.bias": torch.zeros(32)}
    save_file({name: value for name, value in good.items() if head not in name} | deep, file)
    assert "classifier.dense: the class has no such module" in fails("HK-HEAD").have
    save_file({name: value for name, value in good.items() if head not in name}, file)
    assert fails("HK-HEAD").have == ["classifier: not in the file"]
    save_file(good, file)
    (tmp_path / "theirs" / "labels.json").write_text('{"id2label": {"0": "a", "2": "b"}}')
    fails("HK-LABELS")
    (tmp_path / "theirs" / "labels.json").unlink()
    config.write_text(json.dumps({**document, "task_type": None}))
    fails("HK-HEAD")  # nothing says that it is a classifier
    named = {"base_model_class": "BertForSequenceClassification", "parent_library": "transformers.models.bert"}
    config.write_text(json.dumps({**document, "task_type": None, "auto_mapping": named}))
    done = hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "out")
    assert (done.manifest.task or {})["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    error = refused("HK-OPTIONS", hubkit.pack, tmp_path / "out", labels=LABELS)
    assert error.have == ["labels"]
    refused("HK-OPTIONS", hubkit.pack, tmp_path / "theirs", base=base, out=tmp_path / "no", without_head=True)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM"])
def test_tags_of_peft_go_round(kind: str, tmp_path: Path) -> None:
    """``TOKEN_CLS``: the same probabilities of the best tag of each word, and the same tensors back."""
    base = headless(kind, tmp_path / kind)

    def tagger(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=3).eval()

    targets = next(names for start, names in TARGETS.items() if kind.startswith(start))
    made = peft.get_peft_model(tagger(1), peft.LoraConfig(r=4, task_type="TOKEN_CLS", target_modules=targets)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in made.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    made.save_pretrained(tmp_path / "theirs")
    want = logits(made, base).softmax(-1)
    done = hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "mine", labels=LABELS)
    assert hubkit.verify(done.path, base=base)
    said = hubkit.predict(done.path, TEXT, base=base).rows[0]
    assert said["labels"] == [LABELS[n] for n in want.argmax(-1).tolist()]
    assert said["probabilities"] == pytest.approx(want.max(-1).values.tolist(), abs=1e-6)
    hubkit.export(done.path, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    before, after = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = peft.PeftModel.from_pretrained(tagger(2), tmp_path / "again").eval()
    assert torch.equal(logits(theirs, base).softmax(-1), want)


def test_labels_of_an_adapter_without_a_head_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from hubkit.tensors.live.loading import load_base

    made = peft.get_peft_model(load_base(tiny_llama), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "theirs")
    refused("HK-LABELS", hubkit.pack, tmp_path / "theirs", base=tiny_llama, out=tmp_path / "out", labels=LABELS)
    assert hubkit.pack(tmp_path / "theirs", base=tiny_llama, out=tmp_path / "out").manifest.task is None


def test_what_is_trained_here_is_exported_as_it_lies(tmp_path: Path) -> None:
    """An adapter's own folder is one of PEFT: the export says the same, and needs no base."""
    base, rows = headless("RobertaForMaskedLM", tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "w{n} {LABELS[n % 3]}", "label": "{LABELS[n % 3]}"}}\n' for n in range(18)))
    done = hubkit.train(base, rows, tmp_path / "mine", task="classification", steps=2, batch_size=4)
    hubkit.export(done.path, tmp_path / "theirs")
    for name in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "theirs" / name).read_bytes() == (done.path / name).read_bytes()
    assert json.loads((tmp_path / "theirs" / "labels.json").read_text())["label2id"] == {"cold": 0, "hot": 1, "mild": 2}
    theirs = peft.PeftModel.from_pretrained(classifier(base, 3), tmp_path / "theirs").eval()
    assert shares(done.path, base) == pytest.approx(logits(theirs, base).softmax(-1).tolist(), abs=1e-6)


def test_the_table_of_task_types_is_of_tasks_and_of_peft() -> None:
    assert KINDS.keys() <= TASK_TYPES.keys()
    for kind, one in TASK_TYPES.items():
        assert one.peft in peft.TaskType.__members__
        assert hasattr(transformers, one.loader)
        assert kind_of({"task_type": one.peft}) == (kind if one.heads else None)
    assert set(TASKS.values()) <= set(peft.TaskType.__members__)
    assert kind_of({"task_type": "CAUSAL_LM", "auto_mapping": None}) is None
