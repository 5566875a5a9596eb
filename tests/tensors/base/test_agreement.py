"""A base whose files and model differ is refused before anything is made, in a few lines whatever its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases.architectures import save
from variants import refused, rows_file, say

import hubkit
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.reading import planned
from hubkit.tensors.base.agreement import left_alone, outline, require_weights
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.loading import load_base


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "mixtral"
    save("mixtral", folder)
    return folder


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


def test_of_a_mixture_only_the_routers_stay_as_they_are(mixtral: Path, tmp_path: Path) -> None:
    done = hubkit.train(mixtral, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", method="full", steps=1)
    assert done.untrained == ("model.layers.*.block_sparse_moe.gate.weight: (4, 32) (2 times)",)


def test_what_no_method_trains_is_said_by_full_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its output, its result and its manifest; the other parameters of the base all change."""
    save("mamba", tmp_path / "base")
    rows, out = rows_file(tmp_path / "rows.jsonl"), tmp_path / "a"
    said = say(
        capsys, "train", tmp_path / "base", rows, "--out", out, "--method", "full", "--steps", "2", "--lr", "0.1"
    )
    lines = [line.removeprefix("stays as it is: ") for line in said.out.splitlines() if line.startswith("stays")]
    names = {line.partition(":")[0].rpartition(".mixer.")[2] for line in lines}
    assert names == {"A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"}
    manifest = json.loads((out / "hubkit.json").read_text())
    assert manifest["training"]["untrained"] == lines
    attached = hubkit.attach(load_base(tmp_path / "base"), str(out), base=tmp_path / "base")
    before = {name: p.clone() for name, p in attached.model.named_parameters() if "hubkit" not in name}
    attached.merge()
    kept = {name for name, p in attached.model.named_parameters() if name in before and torch.equal(before[name], p)}
    assert {name.partition(".mixer.")[2] for name in kept} == names


@pytest.mark.parametrize(
    ("kind", "method", "config", "want"),
    [
        ("llama", "full", {}, set()),
        ("gpt_oss", "full", {"targets": "q_proj"}, set()),
        ("gpt_oss", "lora", {}, {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias", "weight"}),
        ("gpt_oss", "lora", {"targets": ["q_proj"]}, set()),
        ("bamba", "selective", {}, {"dt_bias", "A_log", "D", "bias", "weight"}),
        ("bamba", "selective", {"weights": "final_layernorm", "biases": ()}, set()),
    ],
)
def test_it_is_said_where_all_of_a_kind_is_trained(
    kind: str, method: str, config: dict[str, Any], want: set[str], tmp_path: Path
) -> None:
    save(kind, tmp_path)
    base, chosen = Base.from_model(outline(tmp_path)), host().load(method)
    sites = planned(chosen, parse_config(chosen.info.config, config, "here"), base).sites
    assert {line.partition(":")[0].rpartition(".")[2] for line in left_alone(sites, base)} == want
