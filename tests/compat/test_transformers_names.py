"""transformers still renames, fuses and splits tensors as `hubkit.compat.transformers_names` takes it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from zoo import model_of

from hubkit.compat.transformers_names import as_in_files, file_naming, fused_rows, may_be_missing, whole_tensors

OLD = transformers.__version__.startswith("4.")


def loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_model_says_how_its_files_became_its_tensors(kind: str, tmp_path: Path) -> None:
    """Told by the files: under the names given back lies what was written, bit by bit."""
    model = loaded(model_of("mixtral", num_local_experts=2) if kind == "mixtral" else model_of(kind), tmp_path)
    stored, made = load_file(tmp_path / "model.safetensors"), as_in_files(model, model.state_dict())
    assert {*stored} <= {*made}
    assert all(torch.equal(made[name], value) for name, value in stored.items())
    named = {file_naming(model)(name) for name in model.state_dict()} - {None}
    assert named <= {*made}
    assert ({*stored} <= named) is (kind != "mixtral" or OLD), (
        "experts are made of others, and have no name of their own"
    )


@pytest.mark.skipif(OLD, reason="transformers 5 writes down what it did")
def test_what_was_done_is_on_the_model_that_was_loaded(tmp_path: Path) -> None:
    made = model_of("mixtral", num_local_experts=2)
    conversions = loaded(made, tmp_path)._weight_conversions
    assert any("experts" in target for one in conversions for target in one.target_patterns)
    assert not hasattr(made, "_weight_conversions")


@pytest.mark.skipif(OLD, reason="there experts are modules")
def test_a_tensor_of_all_experts_is_one_of_the_files_or_made_of_theirs() -> None:
    stem = "model.layers.0.block_sparse_moe"
    with torch.device("meta"):  # where nothing has values
        mixtral, granite = model_of("mixtral", num_local_experts=2), model_of("granitemoe", num_local_experts=2)
    whole = whole_tensors(granite)
    assert whole[f"{stem}.input_linear.weight"] == f"{stem}.experts.gate_up_proj"
    assert fused_rows(granite) == {}
    assert whole_tensors(mixtral) == {}
    size = mixtral.config.intermediate_size
    name, number, rows = fused_rows(mixtral)[f"{stem}.experts.1.w3.weight"]
    assert (name.rpartition(".")[2], number, rows) == ("gate_up_proj", 1, slice(size, 2 * size))


@pytest.mark.skipif(not OLD, reason="transformers 5 has another table")
def test_what_a_class_of_transformers_4_says() -> None:
    table = transformers.LlavaForConditionalGeneration._checkpoint_conversion_mapping
    assert table["^language_model.lm_head"] == "lm_head"


def test_what_a_class_makes_itself_is_not_reported_missing(tmp_path: Path) -> None:
    class Making(transformers.LlamaForCausalLM):  # type: ignore[misc]
        _keys_to_ignore_on_load_missing = (r"up_proj",)

    Making.__name__ = "LlamaForCausalLM"
    model_of("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    lacking = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    save_file({n: t for n, t in load_file(path).items() if n not in lacking}, path, {"format": "pt"})
    model, found = Making.from_pretrained(tmp_path, output_loading_info=True)
    assert {*found["missing_keys"]} == {"model.layers.1.mlp.down_proj.weight"}
    assert [*may_be_missing(model)] == ["up_proj"]
    assert [*may_be_missing(model_of("llama"))] == []
