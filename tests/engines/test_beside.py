"""Engines that serve adapters beside their base: what they write and refuse, and that nothing is lost on the way."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from engines.reader import mlx_deltas, peft_deltas
from every_method import METHODS
from making import make_adapter
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hubkit.documents.deployment import Deployment
from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.registry.store.store import digest_files
from hubkit.verbs.deploy import deploy
from hubkit.verbs.lock import lock

Deltas = dict[str, NDArray[np.float64]]
SERVERS = ("vllm", "sglang", "mlx", "kubernetes")
PLACE = "pvc://models/hubkit"
STABLE: dict[str, Any] = {"rank": 4, "alpha": 32.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}
PATTERNS: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r".*\.1\.self_attn\.q_proj": 8.0}}
RECIPE = '[base]\nsource = "./model"\n[targets.{engine}]\n{settings}\n'


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path) -> Path:
    """Adapters of different ranks, scales, patterns and targets, on a base in a folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_llama)
    make_adapter(folder / "chat", tiny_llama, seed=1, targets="all-linear")
    make_adapter(folder / "sql", tiny_llama, seed=2, **STABLE, **PATTERNS)
    return folder


def deployed(project: Path, out: Path, engine: str, weights: dict[str, float], **settings: Any) -> Path:
    """A deployment of a sum of the project's adapters."""
    if engine == "kubernetes":
        settings = {"storage": PLACE, **settings}
    written = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    text = RECIPE.format(engine=engine, settings=written)
    text += "".join(f'[adapters.{n}]\nsource = "./{n}"\nweight = {float(w)}\n' for n, w in weights.items())
    (project / "hubkit.toml").write_text(text)
    lock(project)
    return deploy(out, engine=engine, lock=project).path


def stored_deltas(folder: Path, scale: Callable[[str], float]) -> Deltas:
    """What an adapter of the project adds, from its own factors and the scale that its options mean."""
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {key.removesuffix(".lora_A.weight"): key for key in tensors if key.endswith(".lora_A.weight")}
    return {
        (site := stem.removeprefix("base_model.model.")): scale(site)
        * (tensors[f"{stem}.lora_B.weight"].astype(np.float64) @ tensors[key].astype(np.float64))
        for stem, key in pairs.items()
    }


def sql_scale(site: str) -> float:
    """alpha / sqrt(r), both by pattern."""
    alpha, rank = 8.0 if ".1.self_attn.q_proj" in site else 32.0, 2 if site.endswith("v_proj") else 4
    return alpha / math.sqrt(rank)


def summed(project: Path, weights: dict[str, float]) -> Deltas:
    """The deltas of the whole mix; chat has rank 2 and alpha 32."""
    total: Deltas = {}
    for name, weight in weights.items():
        scale = sql_scale if name == "sql" else lambda site: 32.0 / 2
        for site, delta in stored_deltas(project / name, scale).items():
            total[site] = total.get(site, 0) + weight * delta
    return total


def read(engine: str, folder: Path) -> Deltas:
    (adapter,) = (folder / "adapters").iterdir()
    return mlx_deltas(adapter) if engine == "mlx" else peft_deltas(adapter)


@pytest.mark.parametrize("weights", [{"chat": 1.0}, {"sql": 1.0}, {"sql": -0.5}, {"chat": 1.0, "sql": -0.25}], ids=str)
@pytest.mark.parametrize("engine", SERVERS)
def test_a_reader_of_alpha_and_rank_alone_finds_every_delta(
    project: Path, tmp_path: Path, engine: str, weights: dict[str, float]
) -> None:
    want = summed(project, weights)
    for dtype, tolerance in (("float32", 1e-6), ("float16", 1e-3)):
        have = read(engine, deployed(project, tmp_path / dtype, engine, weights, adapter_dtype=dtype))
        assert want.keys() <= have.keys()
        for site, delta in have.items():
            expected = want.get(site, np.zeros_like(delta))
            assert np.linalg.norm(delta - expected) <= tolerance * np.linalg.norm(expected), (engine, dtype, site)


@pytest.mark.parametrize("engine", SERVERS)
def test_two_folders_get_the_same_bytes(project: Path, tmp_path: Path, engine: str) -> None:
    made = []
    for name in ("one", "two"):
        out = deployed(project, tmp_path / name / "run", engine, {"chat": 1.0, "sql": -0.5})
        made.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert made[0] == made[1]


@pytest.mark.slow
def test_hash_seeds_change_no_byte(project: Path, tmp_path: Path) -> None:
    """In a process of its own, with other seeds of Python's hashes."""
    deployed(project, tmp_path / "here", "vllm", {"chat": 1.0, "sql": 1.0})
    code = "import sys, hubkit; print(hubkit.deploy(sys.argv[1], engine='vllm', lock=sys.argv[2]).digest)"
    line = [sys.executable, "-c", code, str(tmp_path / "there"), str(project)]
    done = subprocess.run(line, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == deploy(tmp_path / "here", check=True).digest


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_path_and_name_carries_the_digest(project: Path, tmp_path: Path, engine: str) -> None:
    out = deployed(project, tmp_path / "run", engine, {"chat": 1.0, "sql": 1.0}, serve="each")
    made = Deployment.read(out)
    (line,) = re.findall(r"--lora-(?:modules|paths) (.+?) \\", (out / "serve.sh").read_text())
    pairs = dict(word.split("=") for word in shlex.split(line))
    digests = {name: digest.removeprefix("sha256:")[:12] for name, digest in made.adapters.items()}
    assert pairs == {f"{name}@{digest}": f"adapters/{name}-{digest}" for name, digest in digests.items()}
    assert all((out / path / "adapter_config.json").is_file() for path in pairs.values())


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_allows(rank: int, allowed: int) -> None:
    from hubkit.engines.vllm import allowed_rank

    assert allowed_rank(rank) == allowed


def test_the_script_is_one_command_that_a_shell_reads(project: Path, tmp_path: Path) -> None:
    """The words that reach the program are those meant, the user's own among them, wherever it is called from."""
    out = deployed(project, tmp_path / "run", "vllm", {"chat": 1.0}, dtype="float32", max_model_len=64, max_loras=2)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\npwd\nfor word; do echo "$word"; done\n')
    fake.chmod(0o755)
    path = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    line = ["sh", str(out / "serve.sh"), "--port", "8001", "two words"]
    done = subprocess.run(line, cwd="/", env=path, capture_output=True, text=True, check=True)
    place, *words = done.stdout.splitlines()
    digest = Deployment.read(out).adapters["chat"].removeprefix("sha256:")[:12]
    assert Path(place) == out.resolve()
    assert words == [
        *["serve", "base", "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "64"],
        *["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "2"],
        *["--lora-modules", f"chat@{digest}=adapters/chat-{digest}", "--port", "8001", "two words"],
    ]
    service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["vllm"]
    assert service["entrypoint"] == ["sh", "/deployment/serve.sh"]
    assert service["volumes"] == [".:/deployment:ro"]


def test_a_base_alone_is_served_alone(project: Path, tmp_path: Path) -> None:
    for engine in ("vllm", "sglang", "mlx"):
        out = deployed(project, tmp_path / engine, engine, {})
        assert "lora" not in (out / "serve.sh").read_text()
        assert not (out / "adapters").exists()


def test_sglang_gets_zeros_where_it_holds_modules_as_one(project: Path, tmp_path: Path) -> None:
    """sql acts at q and v: k is filled, too; strict loading is on."""
    have = read("sglang", out := deployed(project, tmp_path / "run", "sglang", {"sql": 1.0}))
    assert {site.rpartition(".")[2] for site in have} == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert not any(delta.any() for site, delta in have.items() if site.endswith("k_proj"))
    assert "--lora-strict-loading" in (out / "serve.sh").read_text()


def test_mlx_has_every_matrix_in_every_layer(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    out = deployed(project, tmp_path / "run", "mlx", {"sql": 1.0})
    (adapter,) = (out / "adapters").iterdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    layers = json.loads((tiny_llama / "config.json").read_text())["num_hidden_layers"]
    assert config["num_layers"] == layers
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert len(load_file(adapter / "adapters.safetensors")) == 2 * 3 * layers
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out / "base", tiny_llama))
    assert mine == {**theirs, "rope_theta": theirs["rope_parameters"]["rope_theta"]}


def test_kubernetes_pins_what_it_names(project: Path, tmp_path: Path) -> None:
    out = deployed(project, tmp_path / "run", "kubernetes", {"chat": 1.0}, gpus=1, max_model_len=4096, replicas=2)
    made, manifest = Deployment.read(out), yaml.safe_load((out / "llminferenceservice.yaml").read_text())
    digest = made.adapters["chat"].removeprefix("sha256:")
    model, notes = manifest["spec"]["model"], manifest["metadata"]["annotations"]
    assert (manifest["kind"], manifest["spec"]["replicas"]) == ("LLMInferenceService", 2)
    root = f"{PLACE}/sha256-{notes['hubkit/deployment'].removeprefix('sha256:')[:12]}"
    assert model["uri"] == f"{root}/base"
    assert model["lora"]["adapters"] == [{"name": f"chat@{digest[:12]}", "uri": f"{root}/adapters/chat-{digest[:12]}"}]
    assert model["lora"]["maxRank"] == 8
    assert notes["hubkit/adapter.0"] == f"chat sha256:{digest}"
    assert notes["hubkit/base"] == digest_files(Lock.read(out).base.files)
    assert (out / "adapters" / f"chat-{digest[:12]}" / "adapter_model.safetensors").is_file()
    (container,) = manifest["spec"]["template"]["containers"]
    assert container["env"] == [{"name": "VLLM_ADDITIONAL_ARGS", "value": "--max-model-len 4096"}]


def refused(project: Path, out: Path, engine: str, weights: dict[str, float], **settings: Any) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        deployed(project, out, engine, weights, **settings)
    assert not out.exists()
    return refusal.value


@pytest.mark.parametrize(
    ("engine", "settings", "reason"),
    [
        (
            "vllm",
            {"max_lora_rank": 12},
            "targets.vllm.max_lora_rank: want 1, 8, 16, 32, 64, 128, 256, 320, 512, have 12",
        ),
        ("vllm", {"dtype": "fp32"}, "targets.vllm.dtype: want auto, float32, float16, bfloat16, have 'fp32'"),
        ("vllm", {"max_loras": 4, "max_cpu_loras": 2}, "targets.vllm.max_cpu_loras: want max_loras or more"),
        ("vllm", {"host": "a b"}, "targets.vllm.host: want one word, have 'a b'"),
        ("vllm", {"port": True}, "targets.vllm.port: want a port, 1 to 65535, have True"),
        ("vllm", {"name": "../../evil"}, "name: want A-Z a-z 0-9 . _ -, a letter or digit first, have '../../evil'"),
        ("vllm", {"max_lora_ranks": 8}, "did you mean 'max_lora_rank'?"),
        ("sglang", {"mem_fraction_static": 1.5}, "want a part of a whole, above 0 and at most 1, have 1.5"),
        ("mlx", {"adapter_dtype": "int8"}, "want float32, float16, bfloat16, have 'int8'"),
        ("kubernetes", {"storage": "oci://models/x"}, "want pvc://CLAIM/PATH, s3://BUCKET/PATH or hf://ORG/NAME"),
        ("kubernetes", {"storage": "pvc://models/../x"}, "want pvc://CLAIM/PATH"),
        ("kubernetes", {"namespace": "Team A"}, "want a name of Kubernetes, a-z 0-9 -, have 'Team A'"),
    ],
)
def test_settings_are_refused_by_name(
    project: Path, tmp_path: Path, engine: str, settings: dict[str, Any], reason: str
) -> None:
    error = refused(project, tmp_path / "run", engine, {"chat": 1.0}, **settings)
    assert error.code == "HK-ENGINE"
    assert reason in error.render()


def test_kubernetes_asks_where_the_folder_will_lie(project: Path, tmp_path: Path) -> None:
    error = refused(project, tmp_path / "run", "kubernetes", {"chat": 1.0}, storage="")
    assert "targets.kubernetes.storage" in error.render()


def test_a_rank_above_the_limit_is_refused_unless_a_budget_allows_it(project: Path, tmp_path: Path) -> None:
    make_adapter(project / "wide", project / "model", seed=3, rank=12, targets=["q_proj"])
    error = refused(project, tmp_path / "run", "vllm", {"wide": 1.0}, max_lora_rank=8)
    assert error.code == "HK-ENGINE"
    assert "beyond rank 8" in error.render()
    out = deployed(project, tmp_path / "cut", "vllm", {"wide": 1.0}, max_lora_rank=8, budget=0.9)
    assert "--max-lora-rank 8" in (out / "serve.sh").read_text()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("adapters", "odd: "),
        ("prefix", "odd: "),
        ("prompt", "odd: "),
        ("selective", "model.layers.0.input_layernorm: the change of a norm"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "mlx"])
def test_what_is_no_low_rank_change_is_refused(
    project: Path, tmp_path: Path, engine: str, method: str, reason: str
) -> None:
    name, options = METHODS[method]
    options = {**options, "init": "gaussian"} if method == "prefix" else options
    make_adapter(project / "odd", project / "model", seed=3, method=host().load(name), **options)
    error = refused(project, tmp_path / "run", engine, {"odd": 1.0})
    assert (error.code, reason in error.render()) == ("HK-ENGINE", True), error


def test_mlx_holds_one_adapter(project: Path, tmp_path: Path) -> None:
    error = refused(project, tmp_path / "run", "mlx", {"chat": 1.0, "sql": 1.0}, serve="each")
    assert "its server holds one adapter" in error.render()
