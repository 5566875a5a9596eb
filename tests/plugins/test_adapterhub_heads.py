"""AdapterHub's prediction heads: the logits of its library, both ways, and the same weights in real PEFT.

The golden files and the script that made them are in ``tests/golden/adapterhub``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import LABELS, TEXT, whole_words
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import refused, tree

import hubkit
from hubkit.artifact.adapterhub_heads import CLASSES, FORMS
from hubkit.artifact.folder import open_adapter
from hubkit.artifact.task_types import TASK_TYPES
from hubkit.methods.reading import read_adapter
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.training.tasks.kinds import KINDS

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
HEADS = GOLDEN / "heads"
# folder -> modules of the base's class that the head becomes
KNOWN = {
    "bert-deep": ["bert.pooler.dense", "classifier"],
    "bert-pooled": ["classifier"],
    "bert-static": ["classifier"],
    "roberta-deep": ["classifier.dense", "classifier.out_proj"],
    "roberta-static": ["classifier.dense", "classifier.out_proj"],
    "llama-plain": ["score"],
    "llama-static": ["score"],
    "gpt2-plain": ["score"],
    "bert-tags": ["classifier"],
    "roberta-tags": ["classifier"],
    "llama-tags": ["score"],
    "gpt2-tags": ["classifier"],
}
# folder -> what of its head has no place
UNKNOWN = {"bert-flat": "layers: 1", "bert-relu": 'activation_function: "relu"', "llama-bias": "bias: true"}
AGREE = 1e-5
"""Two versions of transformers in fp32."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(HEADS / "expected.safetensors")
    return found


def base_of(case: str) -> Path:
    return HEADS / case.partition("-")[0]


def packed(case: str, out: Path, **options: Any) -> hubkit.Packed:
    return hubkit.pack(HEADS / case, base=base_of(case), out=out, name="mood", **options)


def ids() -> Tensor:
    return torch.randint(1, 24, (2, 5), generator=torch.Generator().manual_seed(2))


def said(folder: Path, base: Path) -> Tensor:
    """The logits of an adapter with a head, on the model that its task makes of the base."""
    opened = open_adapter(folder)
    document = opened.manifest.task or {}
    task = KINDS[document["kind"]].known(document, base)
    model = load_base(base, task=task.model)
    task.clear(model)
    attached = Attached(model)
    attached.add("mood", read_adapter(opened, attached.sites))
    attached.set_mix("mood")
    with torch.no_grad():
        found: Tensor = attached(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return found


@pytest.mark.parametrize("case", KNOWN)
def test_a_head_computes_what_the_library_computes(case: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    done = packed(case, tmp_path / "mine")
    task = done.manifest.task
    assert task is not None
    assert task["kind"] == ("token-classification" if case.endswith("tags") else "classification")
    assert task["labels"] == LABELS
    assert done.manifest.config["modules_to_save"] == KNOWN[case]
    want = expected[case.replace("-", "/")]
    assert (said(done.path, base_of(case)) - want).abs().max() <= AGREE
    assert (want[0] - want[1]).abs().max() > 1e-2, "or nothing is compared"
    assert hubkit.verify(done.path, base=base_of(case))


@pytest.mark.parametrize("case", KNOWN)
def test_a_head_is_exported_as_the_library_wrote_it(case: str, tmp_path: Path) -> None:
    """That of a class of transformers becomes one of the library's own, with the same tensors."""
    theirs = HEADS / case
    hubkit.export(packed(case, tmp_path / "mine").path, tmp_path / "out", to="adapterhub")
    have, want = (json.loads((folder / "head_config.json").read_text()) for folder in (tmp_path / "out", theirs))
    pickled = theirs / "pytorch_model_head.bin"
    tensors = load_file(tmp_path / "out" / "model_head.safetensors")
    wanted = torch.load(pickled) if pickled.exists() else load_file(theirs / "model_head.safetensors")
    if want["config"] is None:
        assert sorted(map(torch.Tensor.tolist, tensors.values()), key=str) == sorted(
            map(torch.Tensor.tolist, wanted.values()), key=str
        )
    else:
        assert {**have, "model_name": want["model_name"]} == want
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    again = hubkit.pack(tmp_path / "out", base=base_of(case), out=tmp_path / "again", name="mood")
    assert again.manifest.task == open_adapter(tmp_path / "mine").manifest.task


@pytest.mark.parametrize("case", ["bert-still", "roberta-still", "llama-still"])
def test_peft_says_the_same_of_the_same_head(case: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """Beside an adapter that changes nothing, in AdapterHub as in PEFT."""
    peft = pytest.importorskip("peft")
    import transformers

    base = base_of(case)
    head = load_file(packed(case, tmp_path / "mine").path / "adapter_model.safetensors")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    targets = ["q_proj"] if case.startswith("llama") else ["query"]
    saved = ["pooler"] if case.startswith("bert") else None
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=saved)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in head.items():
            for key, parameter in theirs.named_parameters():
                module, _, last = name.rpartition(".")
                steps = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
                if parameter.requires_grad and steps.replace(".modules_to_save.default", "") == f"{module}.{last}":
                    parameter.copy_(value)
        have = theirs(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    assert (have - expected[case.replace("-", "/")]).abs().max() <= AGREE
    theirs.save_pretrained(tmp_path / "theirs")
    again = hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "again", labels=LABELS)
    assert (said(again.path, base) - expected[case.replace("-", "/")]).abs().max() <= AGREE


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_head_that_no_class_computes_is_refused_by_name(case: str, tmp_path: Path) -> None:
    error = refused("HK-HEAD", packed, case, tmp_path / "mine")
    assert UNKNOWN[case] in error.have
    assert "--without-head" in error.fix
    assert not (tmp_path / "mine").exists()
    done = packed(case, tmp_path / "mine", without_head=True)
    assert done.manifest.task is None
    assert "modules_to_save" not in done.manifest.config
    assert done.left_out == ("model_head.safetensors",)
    refused("HK-LABELS", packed, case, tmp_path / "other", without_head=True, labels=LABELS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HEADS / "bert-deep", tmp_path / "theirs"))


def test_a_head_that_does_not_fit_is_refused(folder: Path) -> None:
    config, weights = folder / "head_config.json", folder / "model_head.safetensors"
    document, good = json.loads(config.read_text()), load_file(weights)

    def fails(code: str, options: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        config.write_text(json.dumps({**document, "config": {**document["config"], **options}}))
        save_file(tensors, weights)
        before = tree(folder.parent)
        error = refused(code, hubkit.pack, folder, base=HEADS / "bert")
        assert tree(folder.parent) == before
        return error

    fails("HK-HEAD", {"head_type": "multilabel_classification"}, good)
    fails("HK-HEAD", {"head_type": "question_answering"}, good)
    fails("HK-HEAD", {"layers": "two"}, good)
    assert fails("HK-HEAD", {"gated": True}, good).have == ["gated: true"]
    fails("HK-KEYS", {}, {**good, "heads.mood.7.weight": torch.zeros(3, 16)})
    error = fails("HK-KEYS", {}, {k: v for k, v in good.items() if ".1." not in k})
    assert error.have == ["missing: heads.mood.1.weight"]
    fails("HK-HEAD", {}, {**good, "heads.mood.4.weight": torch.zeros(3, 8)})
    fails("HK-SHAPE", {}, {**good, "heads.mood.4.bias": torch.zeros(2)})
    fails("HK-NAN", {}, {**good, "heads.mood.4.bias": torch.full((3,), float("nan"))})
    save_file(good, weights)
    config.unlink()
    assert refused("HK-HEAD", hubkit.pack, folder, base=HEADS / "bert").want == ["head_config.json"]


def test_labels_that_the_head_does_not_name(folder: Path) -> None:
    config = folder / "head_config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "config": {**document["config"], "label2id": None}}))
    assert refused("HK-LABELS", hubkit.pack, folder, base=HEADS / "bert", labels=["a", "b"]).have == ["a", "b"]
    task = hubkit.pack(folder, base=HEADS / "bert", labels=["a", "b", "c"]).manifest.task
    assert task is not None
    assert task["labels"] == ["a", "b", "c"]


def test_the_head_of_the_language_model_itself(tmp_path: Path) -> None:
    """Unchanged it is the base's, and nothing is lost; changed it is refused."""
    folder = Path(shutil.copytree(HEADS / "llama-plain", tmp_path / "theirs"))
    document = json.loads((folder / "head_config.json").read_text())
    other = {**document, "config": None, "model_class": "LlamaForCausalLM", "num_labels": 2}
    (folder / "head_config.json").write_text(json.dumps(other))
    head = load_file(HEADS / "llama" / "model.safetensors")["lm_head.weight"]
    save_file({"lm_head.weight": head + 1}, folder / "model_head.safetensors")
    error = refused("HK-HEAD", hubkit.pack, folder, base=HEADS / "llama", out=tmp_path / "out")
    assert error.have == ["LlamaForCausalLM: lm_head.weight"]
    save_file({"lm_head.weight": head}, folder / "model_head.safetensors")
    assert hubkit.pack(folder, base=HEADS / "llama", out=tmp_path / "out").manifest.task is None


def test_a_head_trained_here_is_exported_and_says_the_same(tmp_path: Path) -> None:
    """Bottlenecks and a head that was made, from rows to AdapterHub's folder and back, to the same prediction."""
    base, rows = Path(shutil.copytree(HEADS / "bert", tmp_path / "base")), tmp_path / "rows.jsonl"
    whole_words().save_pretrained(base)
    texts = [f"w{n} {LABELS[n % 3]}" for n in range(18)]
    rows.write_text("".join(json.dumps({"text": t, "label": t.split()[1]}) + "\n" for t in texts))
    done = hubkit.train(base, rows, tmp_path / "mine", method="adapters", task="classification", steps=3, batch_size=4)
    want = hubkit.predict(done.path, TEXT, base=base).rows
    hubkit.export(done.path, tmp_path / "theirs", to="adapterhub")
    assert json.loads((tmp_path / "theirs" / "head_config.json").read_text())["config"]["use_pooler"]
    again = hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "again")
    assert hubkit.predict(again.path, TEXT, base=base).rows == want
    refused("HK-EXPORT", hubkit.export, done.path, tmp_path / "peft")
    shutil.rmtree(tmp_path / "theirs")
    both = {"modules_to_save": "LayerNorm"}
    odd = hubkit.train(
        base, rows, tmp_path / "odd", method="adapters", config=both, task="classification", steps=1, batch_size=4
    )
    error = refused("HK-EXPORT", hubkit.export, odd.path, tmp_path / "theirs", to="adapterhub")
    assert "LayerNorm" in str(error.have)
    assert not (tmp_path / "theirs").exists()


def test_the_table_of_heads_is_of_classes_of_transformers() -> None:
    """Each module is a layer of the class that transformers makes for the task."""
    import transformers

    assert CLASSES.keys() == FORMS.keys()
    for name, forms in FORMS.items():
        config = transformers.AutoConfig.for_model(name, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
        for form in forms:
            loader = TASK_TYPES[form.kind].loader
            with torch.device("meta"):
                model = getattr(transformers, loader).from_config(config)
            assert [type(model.get_submodule(module)).__name__ for module in form.modules] == ["Linear"] * len(
                form.modules
            )
            assert (model.get_submodule(form.modules[-1]).bias is not None) is form.bias


@pytest.mark.oracle
@pytest.mark.parametrize("case", KNOWN)
def test_the_library_computes_what_is_exported(case: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """With the library itself: ``HUBKIT_ADAPTERS_PYTHON`` is the interpreter of the environment of `make.py`."""
    python = os.environ.get("HUBKIT_ADAPTERS_PYTHON")
    if not python:
        pytest.skip("HUBKIT_ADAPTERS_PYTHON names no interpreter")
    hubkit.export(packed(case, tmp_path / "mine").path, tmp_path / "out", to="adapterhub")
    out = tmp_path / "theirs.safetensors"
    arguments = [base_of(case), "AutoAdapterModel", out, tmp_path / "out"]
    done = subprocess.run([python, GOLDEN / "oracle.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (load_file(out)["0"] - expected[case.replace("-", "/")]).abs().max() <= AGREE
