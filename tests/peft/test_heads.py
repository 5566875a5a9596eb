"""Modules trained as a whole, and tied embeddings: real PEFT computes the same, in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from making import make_adapter
from safetensors.torch import load_file, save_file
from variants import logits, refused

from hubkit.artifact.folder import open_adapter
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.weights.merging import plan_merge, write_merged
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.export import export
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = "adapter_model.safetensors"


def saved_by_peft(model: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Logits of an adapter with random values that PEFT made on `model` and saved in `folder`."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder)
    want: torch.Tensor = logits(made)
    return want


@pytest.fixture(scope="module")
def tied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with one tensor for embeddings and head."""
    folder = tmp_path_factory.mktemp("tied") / "llama"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def near(have: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


# name -> base, options, what PEFT's adapter does to the tie of embeddings and head
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("tiny_llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "many": ("tiny_llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "norms": ("tiny_llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]}),
    "dora": ("tiny_llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}),
    "biased": ("tiny_gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "ln_f"]}),
    "head breaks the tie": ("tiny_gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "table breaks the tie": ("tiny_gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "factors break the tie": ("tiny_gpt2", {"target_modules": ["c_attn", "wte"]}),
    "whole, tied": (
        "tied_llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "head, tied": (
        "tied_llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "factors, tied": ("tied_llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "factors of the head, tied": ("tied_llama", {"target_modules": ["o_proj", "lm_head"], "ensure_weight_tying": True}),
    "without effect": ("tied_llama", {"target_modules": ["q_proj"], "ensure_weight_tying": True}),
    "a table that PEFT does not know breaks the tie": (
        "tiny_gpt2",
        {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_goes_round(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Adopted, attached, exported, merged: the same logits; what PEFT trained comes back bit for bit."""
    fixture, options = CASES[case]
    base: Path = request.getfixturevalue(fixture)
    want = saved_by_peft(load_base(base), tmp_path / "theirs", **options)
    done = pack(tmp_path / "theirs", base=str(base), out=tmp_path / "mine" / "chat")
    assert done.manifest.config["tied"] == ("keep" if ", tied" in case else "break")
    near(logits(attach(load_base(base), str(tmp_path / "mine" / "chat"), base=str(base))), want)
    export(str(tmp_path / "mine" / "chat"), tmp_path / "again")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again"))
    kept = {name: value for name, value in before.items() if "base_layer" not in name}
    assert set(after) == set(kept)
    assert all(torch.equal(value, kept[name]) for name, value in after.items())
    near(logits(peft.PeftModel.from_pretrained(load_base(base), str(tmp_path / "again"))), want)
    result = merge(str(base), str(tmp_path / "mine" / "chat"), tmp_path / "merged")
    merged: Any = load_base(tmp_path / "merged")
    near(logits(merged), want)
    assert result.unties == ("break" in case)
    if fixture != "tiny_llama":
        assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is not result.unties


def classifier(base: Path, seed: int = 0) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    model: Any = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    return model.eval()


def test_a_classifier_is_adopted_merged_and_given_back(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    def fresh() -> Any:
        return LlamaForSequenceClassification.from_pretrained(tmp_path / "base").eval()

    classifier(tiny_llama).save_pretrained(tmp_path / "base")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "base")
    want = saved_by_peft(fresh(), tmp_path / "theirs", target_modules=["q_proj"], task_type="SEQ_CLS")
    task = pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "made").manifest.task
    assert task is not None
    assert [*task["made"]] == ["score"]
    pack(tmp_path / "theirs", base=str(tmp_path / "base"), out=tmp_path / "mine")
    near(logits(attach(fresh(), str(tmp_path / "mine"), base=str(tmp_path / "base"))), want)
    near(logits(peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "mine"))), want)
    merge(str(tmp_path / "base"), str(tmp_path / "mine"), tmp_path / "merged")
    near(logits(LlamaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()), want)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "score" not in n}, tmp_path / "theirs" / WEIGHTS)
    refused("HK-HEAD", pack, tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "lost")
    save_file({n: t[:2].clone() if "score" in n else t for n, t in tensors.items()}, tmp_path / "theirs" / WEIGHTS)
    refused("HK-SHAPE", pack, tmp_path / "theirs", base=str(tmp_path / "base"), out=tmp_path / "lost")
    save_file({**tensors, "base_model.model.score.gain": torch.ones(3)}, tmp_path / "theirs" / WEIGHTS)
    refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tmp_path / "base"), out=tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


TASKS: dict[str, tuple[str, str]] = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "score"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "score"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "qa_outputs"),
    "CAUSAL_LM": ("AutoModelForCausalLM", ""),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_of_a_task_stays_one(task: str, tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT makes another class of another task; a head is stored with the adapter, or was not trained."""
    loader, head = TASKS[task]
    getattr(transformers, loader).from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "base")

    def fresh() -> Any:
        return getattr(transformers, loader).from_pretrained(tmp_path / "base").eval()

    made = peft.get_peft_model(fresh(), peft.LoraConfig(task_type=task, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(tmp_path / "base"), out=tmp_path / "mine")
    export(str(tmp_path / "mine"), tmp_path / "again")
    for name in ("mine", "again"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["task_type"] == task
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "again")
    assert type(again) is type(made)
    have, want = (model.state_dict() for model in (again, made))
    assert have.keys() == want.keys()
    assert all(torch.equal(have[key], want[key]) for key in want)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if not head or head not in n}, tmp_path / "theirs" / WEIGHTS)
    if head:
        refused("HK-HEAD", pack, tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "lost")
    else:
        pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "lost")


def test_an_adapter_of_t5_is_of_its_task(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    made.save_pretrained(tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(tmp_path / "base"), out=tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_in_half_precision_the_merged_module_is_the_stored_one(tiny_llama: Path, tmp_path: Path) -> None:
    model: Any = load_base(tiny_llama, "bfloat16")
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "base")
    make_adapter(tmp_path / "chat", tmp_path / "base", targets=["q_proj"], modules_to_save=["lm_head", "norm"])
    adapter = read_adapter(open_adapter(tmp_path / "chat"), Base.from_folder(tmp_path / "base"), dtype="base")
    (tmp_path / "merged").mkdir()
    plan = plan_merge(adapter.base, "a", {"a": adapter})
    write_merged(plan, open_shards(tmp_path / "base"), tmp_path / "merged")
    stored = load_file(tmp_path / "chat" / WEIGHTS)
    assert torch.equal(
        open_shards(tmp_path / "merged").read("lm_head.weight"), stored["base_model.model.lm_head.weight"]
    )
    attached = Attached(load_base(tmp_path / "base"))
    attached.add("a", read_adapter(open_adapter(tmp_path / "chat"), attached.sites, dtype="base"))
    attached.set_mix("a")
    theirs = peft.PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "chat"))
    hidden: list[torch.Tensor] = []
    handle = attached.model.get_submodule("lm_head").register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    have = logits(attached)
    handle.remove()
    assert torch.equal(have, torch.nn.functional.linear(hidden[0], stored["base_model.model.lm_head.weight"]))
    torch.testing.assert_close(have.float(), logits(theirs).float(), rtol=0.05, atol=0.05 * float(have.abs().max()))


@pytest.mark.parametrize(
    ("base", "options", "code"),
    [
        ("tiny_llama", {"modules_to_save": ["score"]}, "HK-HEAD"),
        ("tiny_llama", {"modules_to_save": ["mlp"]}, "HK-HEAD"),
        ("tiny_llama", {"targets": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "HK-CONFIG"),
        ("tiny_gpt2", {"targets": ["wte"], "modules_to_save": ["lm_head"], "tied": "keep"}, "HK-CONFIG"),
        ("tiny_gpt2", {"targets": ["wte"], "tied": "keep", "rank_pattern": {"lm_head": 8}}, "HK-CONFIG"),
        ("tiny_gpt2", {"targets": ["wte"], "tied": "perhaps"}, "HK-CONFIG"),
    ],
)
def test_refusals(
    base: str, options: dict[str, Any], code: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    refused(code, make_adapter, tmp_path / "chat", request.getfixturevalue(base), **options)


def test_all_linear_leaves_out_what_is_trained_as_a_whole(tiny_llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "chat", tiny_llama, modules_to_save=["down_proj"])
    keys = set(load_file(folder / WEIGHTS))
    assert {key.rpartition("down_proj.")[2] for key in keys if "down_proj" in key} == {"weight"}
    refused("HK-BASE-NEEDED", compose, f"{folder} + {folder}", tmp_path / "both")
    assert compose(f"{folder} + {folder}", tmp_path / "both", base=str(tiny_llama)).rank == 0


def test_a_tied_file_whose_halves_differ_is_refused(tied_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(tied_llama), tmp_path / "theirs", **CASES["factors, tied"][1])
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    assert "lm_head.lora_A" in str(refused("HK-TIED", pack, tmp_path / "theirs", base=str(tied_llama)))
