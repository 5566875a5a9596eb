"""A base whose files and model differ is refused before anything is made, in a few lines whatever its size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from bases.architectures import save
from variants import refused, rows_file

import hubkit
from hubkit.tensors.base.agreement import outline, require_weights
from hubkit.tensors.base.base import Base


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "mixtral"
    save("mixtral", folder)
    return folder


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="there experts are modules, and train")
def test_experts_are_refused_in_a_line_each_and_the_rest_trains(mixtral: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    error = refused("HK-BASE-MODULES", hubkit.train, mixtral, rows, tmp_path / "a", steps=1)
    stem, linear = "model.layers.*.block_sparse_moe.experts.*", "in the files, nothing in the model (8 times)"
    assert error.have == [
        f"{stem}.w1: linear (48, 32) {linear}",
        f"{stem}.w2: linear (32, 48) {linear}",
        f"{stem}.w3: linear (48, 32) {linear}",
    ]
    assert not (tmp_path / "a").exists()
    targets = error.fix.removeprefix("--set targets=").split(",")
    hubkit.train(mixtral, rows, tmp_path / "a", steps=1, config={"targets": targets})


def test_a_live_model_of_fused_experts_is_known_by_its_files(mixtral: Path, tmp_path: Path) -> None:
    """One expert's values changed, and it is another base: fused tensors are taken apart, not left out."""
    from transformers import AutoModelForCausalLM

    config = {"targets": ["q_proj"]}
    hubkit.train(mixtral, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", steps=1, config=config)
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    hubkit.attach(model, tmp_path / "a").detach()
    fused = [parameter for name, parameter in model.named_parameters() if "experts" in name]
    with torch.no_grad():
        first = fused[0][0].clone()
        fused[0][0].copy_(fused[0][1])  # the first expert is now the second
    refused("HK-BASE-MISMATCH", hubkit.attach, model, tmp_path / "a")
    with torch.no_grad():
        fused[0][0].copy_(first)
    hubkit.attach(model, tmp_path / "a")


def test_what_the_files_lack_is_found_on_the_outline(mixtral: Path) -> None:
    model, base = outline(mixtral), Base.from_folder(mixtral)
    shapes = {site.tensor: (site.shape[0],) if site.kind == "norm" else site.shape for site in base.sites.values()}
    shapes["model.embed_tokens.weight"] = shapes["model.embed_tokens.weight"][::-1]
    shapes |= {f"model.layers.{n}.block_sparse_moe.gate.weight": (4, 32) for n in range(2)}
    require_weights(model, mixtral, shapes, "")
    name = "model.layers.1.self_attn.q_proj.weight"
    lacking = {key: shape for key, shape in shapes.items() if key != name}
    assert refused("HK-BASE-INCOMPLETE", require_weights, model, mixtral, lacking, "").have[0].startswith(name)
    error = refused("HK-BASE-INCOMPLETE", require_weights, model, mixtral, {**shapes, name: (8, 8)}, "")
    assert error.have == [f"{name}: of another shape in the files: transformers makes it up"]
