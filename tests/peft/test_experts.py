"""Real PEFT as the judge of experts and of renamed modules, both ways: what it trained, and what hubkit did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases.architectures import save
from bases.cells import loaded, logits
from safetensors.torch import load_file
from theirs import made_by_peft, rewrite, set_options, tensors_of
from torch import Tensor
from variants import refused, rows_file

import hubkit
from hubkit.adopting.live_names import live_names

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="there experts are modules")

KINDS = ["mixtral", "qwen2_moe", "jamba", "nemotron_h"]
"""w1, w3 and w2; shared experts; dense layers beside; no gates."""
WHOLE = ["gpt_oss", "llama4_text", "granitemoe", "granitemoehybrid"]
"""In one tensor in the files, too: turned, and PEFT knows; turned, and it does not; as PEFT takes them, renamed."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in [*KINDS, *WHOLE, "qwen2_vl", "llava"]:
        found[kind] = tmp_path_factory.mktemp(kind)
        save(kind, found[kind])
    return found


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def trained_by_peft(base: Path, folder: Path, parameters: list[str], **options: Any) -> Tensor:
    """A folder of PEFT with random factors at q_proj and at tensors of experts; its logits."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False, **options
    )
    model = peft.get_peft_model(loaded(base), config)
    model.save_pretrained(folder)
    set_options(folder, base_model_name_or_path=str(base))
    made: Tensor = logits(model.eval())
    return made


@pytest.mark.parametrize("kind", KINDS + WHOLE)
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_what_peft_trained_at_experts_comes_and_goes_exactly(
    kind: str, which: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, tensors = bases[kind], list(dict.fromkeys(one.name for one in live_names(bases[kind]).experts))
    chosen = {"all": tensors, "first": tensors[:1], "last": tensors[-1:]}[which]
    theirs = trained_by_peft(base, tmp_path / "theirs", [f"experts.{name}" for name in chosen])
    hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "ours")
    assert ".experts.1." in " ".join(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    near(logits(hubkit.attach(loaded(base), tmp_path / "ours")), theirs)
    hubkit.merge(base, tmp_path / "ours", tmp_path / "merged")
    near(logits(loaded(tmp_path / "merged")), theirs)
    hubkit.export(tmp_path / "ours", tmp_path / "back", base=base)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "both ways are exact"
    near(logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "back").eval()), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_of_single_experts_become_diagonal_blocks_and_are_known_again(
    kind: str, rslora: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[kind]
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    config: dict[str, Any] = {"rank": 2, "alpha": 3, "rslora": rslora}
    if kind == "nemotron_h":  # PEFT refuses out_proj there
        config["targets"] = r".*\.experts\..*|.*q_proj"
    hubkit.train(base, rows, tmp_path / "ours", steps=2, learning_rate=0.05, dtype="float32", config=config)
    hubkit.export(tmp_path / "ours", tmp_path / "theirs", base=base)
    set_options(tmp_path / "theirs", base_model_name_or_path=str(base))
    hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "back")
    before, after = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    near(logits(hubkit.attach(loaded(base), tmp_path / "back")), logits(hubkit.attach(loaded(base), tmp_path / "ours")))
    if not rslora:  # with patterns PEFT scales by something else, and says so
        near(
            logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "theirs").eval()),
            logits(hubkit.attach(loaded(base), tmp_path / "ours")),
        )


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_at_matrices_of_one_tensor_are_peft_s(
    kind: str, rslora: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, rows = bases[kind], rows_file(tmp_path / "rows.jsonl", 8)
    config = {"rank": 2, "alpha": 3, "rslora": rslora, "targets": r".*\.experts\..*|.*q_proj"}
    hubkit.train(base, rows, tmp_path / "ours", steps=2, learning_rate=0.05, dtype="float32", config=config)
    hubkit.export(tmp_path / "ours", tmp_path / "theirs", base=base)
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj"]
    assert written["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    ours = logits(hubkit.attach(loaded(base), tmp_path / "ours"))
    near(logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "theirs").eval()), ours)
    set_options(tmp_path / "theirs", base_model_name_or_path=str(base))
    hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "back")
    before, after = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(hubkit.attach(loaded(base), tmp_path / "back")), ours)


def test_one_expert_of_a_tensor_is_zeros_beside_the_others_in_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = bases["llama4_text"], rows_file(tmp_path / "rows.jsonl", 8)
    config = {"rank": 2, "targets": ["experts.1.down_proj", "experts.gate_up_proj"], "rank_pattern": {".*down_proj": 3}}
    hubkit.train(base, rows, tmp_path / "ours", steps=2, learning_rate=0.05, dtype="float32", config=config)
    ours = logits(hubkit.attach(loaded(base), tmp_path / "ours"))
    hubkit.export(tmp_path / "ours", tmp_path / "theirs", base=base)
    near(logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "theirs").eval()), ours)
    (tmp_path / "ours" / "hubkit.json").unlink()
    hubkit.pack(tmp_path / "ours", base=base, out=tmp_path / "again")
    assert torch.equal(logits(hubkit.attach(loaded(base), tmp_path / "again")), ours)


def test_experts_of_ranks_of_their_own(bases: dict[str, Path], tmp_path: Path) -> None:
    """One expert of another rank, one not at all: filled up with zeros, which change nothing."""
    base, rows = bases["mixtral"], rows_file(tmp_path / "rows.jsonl", 8)
    config = {
        "targets": r".*experts\.[012]\.w1|.*experts\.2\.w[23]",
        "rank": 2,
        "rank_pattern": {r"experts\.1\.w1": 5},
        "alpha_pattern": {r"experts\.1\.w1": 80.0},
    }
    hubkit.train(base, rows, tmp_path / "ours", steps=2, learning_rate=0.05, dtype="float32", config=config)
    hubkit.export(tmp_path / "ours", tmp_path / "theirs", base=base)
    near(
        logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "theirs").eval()),
        logits(hubkit.attach(loaded(base), tmp_path / "ours")),
    )


def test_what_the_form_cannot_say_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = bases["mixtral"], rows_file(tmp_path / "rows.jsonl", 8)
    cases: dict[str, dict[str, Any]] = {
        "lora_dropout: 0.5": {"dropout": 0.5},
        "use_dora: true": {},
        "gate_up_proj: 4.0, 16.0": {"alpha_pattern": {"w1": 8.0, "w3": 32.0}},
    }
    for have, config in cases.items():
        out = tmp_path / have[:4]
        method = "dora" if "dora" in have else "lora"
        hubkit.train(base, rows, out, steps=1, method=method, config={"rank": 2, "targets": ["w1", "w3"], **config})
        error = refused("HK-EXPORT", hubkit.export, out, tmp_path / "theirs", base=base)
        assert any(have in line for line in error.have) if isinstance(error.have, list) else have in error.have
        assert not (tmp_path / "theirs").exists()
    assert refused("HK-BASE-NEEDED", hubkit.export, tmp_path / "lora", tmp_path / "theirs").fix


def test_factors_of_another_number_of_experts_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["mixtral"], tmp_path / "theirs"
    trained_by_peft(base, folder, ["experts.down_proj"])
    whole = tensors_of(folder)
    rewrite(folder, {key: t[:-1].contiguous() if "experts.lora_A" in key else t for key, t in whole.items()})
    assert "4 experts" in refused("HK-SHAPE", hubkit.pack, folder, base=base, out=tmp_path / "o").what
    rewrite(folder, {key: tensor for key, tensor in whole.items() if "layers.1.mlp.experts" not in key})
    lacking = refused("HK-KEYS", hubkit.pack, folder, base=base, out=tmp_path / "o")
    assert "missing: model.layers.1.block_sparse_moe.experts.0.w2" in lacking.want
    rewrite(folder, whole)
    set_options(folder, target_parameters=["experts.up_down_proj"])
    assert "experts.up_down_proj" in refused("HK-TARGET", hubkit.pack, folder, base=base, out=tmp_path / "o").have
    assert not (tmp_path / "o").exists()


def test_shared_experts_and_dense_layers_are_targets_by_their_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT takes a module of an expert's last name for the experts: what is beside them is listed otherwise."""
    base, rows = bases["qwen2_moe"], rows_file(tmp_path / "rows.jsonl", 8)
    config = {"rank": 2, "targets": r".*shared_expert\..*_proj|.*q_proj"}
    hubkit.train(base, rows, tmp_path / "ours", steps=2, learning_rate=0.05, dtype="float32", config=config)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj"]
    assert len(written["target_parameters"]) == 6
    near(
        logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "ours").eval()),
        logits(hubkit.attach(loaded(base), tmp_path / "ours")),
    )
    (tmp_path / "ours" / "hubkit.json").unlink()
    hubkit.pack(tmp_path / "ours", base=base, out=tmp_path / "again")
    near(
        logits(hubkit.attach(loaded(base), tmp_path / "again")),
        logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "ours").eval()),
    )


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
def test_modules_that_the_model_names_otherwise_come_and_go(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Text and tower: the model's names are PEFT's, the files' are hubkit's."""
    base = bases[kind]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "fc1", "model.language_model.layers.1.mlp.down_proj"],
        rank_pattern={"model.language_model.layers.1.mlp.down_proj": 2},
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = made_by_peft(loaded(base), tmp_path / "theirs", config)
    set_options(tmp_path / "theirs", base_model_name_or_path=str(base))
    theirs = logits(model.eval())
    hubkit.pack(tmp_path / "theirs", base=base, out=tmp_path / "ours")
    near(logits(hubkit.attach(loaded(base), tmp_path / "ours")), theirs)
    hubkit.merge(base, tmp_path / "ours", tmp_path / "merged")
    near(logits(loaded(tmp_path / "merged")), theirs)
    hubkit.export(tmp_path / "ours", tmp_path / "back", base=base)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    near(logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "back").eval()), theirs)
