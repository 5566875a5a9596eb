"""Deployments for llama.cpp and Ollama, from recipe to folder; what a server makes of them: test_llamacpp_oracle.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggufs import changes_of, config_of, converted, gguf_of, read_gguf, state_of, write_gguf
from making import make_adapter

from hubkit.documents.deployment import Deployment
from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.verbs.deploy import Deployed, deploy
from hubkit.verbs.export import export
from hubkit.verbs.lock import lock
from hubkit.verbs.merge import merge

RECIPE = """
[base]
source = "./model"
[adapters.chat]
source = "./chat"
[adapters.sql]
source = "./sql"
weight = -0.5
"""


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path) -> Path:
    """Two adapters of different ranks and scales, and their base in both forms."""
    return made(tmp_path / "project", tiny_llama)


def made(folder: Path, base: Path) -> Path:
    folder.mkdir()
    shutil.copytree(base, folder / "model")
    gguf_of(base, folder / "base.gguf")
    make_adapter(folder / "chat", base, seed=1, rank=2)
    make_adapter(folder / "sql", base, seed=2, rank=3, rslora=True, targets=["q_proj", "v_proj", "lm_head"])
    return folder


def run(project: Path, engine: str = "llamacpp", recipe: str = RECIPE, **settings: Any) -> Deployed:
    """Recipe, lock and deployment."""
    lines = [f"[targets.{engine}]", *(f'"{key}" = {json.dumps(value)}' for key, value in settings.items())]
    (project / "hubkit.toml").write_text(recipe + "\n".join(lines) + "\n", "utf-8")
    lock(project)
    return deploy(project / "run", engine=engine, lock=project, replace=True)


def refused(project: Path, *args: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        run(project, *args, **options)
    assert not (project / "run").exists()
    assert not [path for path in project.iterdir() if path.name.startswith(".run")]
    return caught.value


def deltas(project: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What an adapter adds, from its own files by alpha / r, through the converter's rules."""
    import torch
    from safetensors.numpy import load_file

    config = json.loads((project / name / "adapter_config.json").read_text())
    tensors = load_file(project / name / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = tensors[key.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64) * scale
            found[f"{site}.weight"] = torch.from_numpy(product)
    return {key: value.double().numpy() for key, value in converted(found, config_of(project / "model")).items()}


def test_the_mix_is_served_as_one_adapter(project: Path) -> None:
    done = run(project, gguf="base.gguf")
    (file,) = done.path.glob("adapters/*/adapter.gguf")
    chat, sql, have = deltas(project, "chat"), deltas(project, "sql"), changes_of(file)
    assert have.keys() == chat.keys() | sql.keys()
    for name, value in have.items():
        want = chat.get(name, 0.0) - 0.5 * sql.get(name, np.zeros(()))
        assert np.linalg.norm(value - want) <= 1e-6 * np.linalg.norm(want), name
    assert (done.path / "base" / "base.gguf").read_bytes() == (project / "base.gguf").read_bytes()
    assert read_gguf(file)[0]["adapter.lora.task_name"] == file.parent.name.replace("mix-", "mix@")
    adapter = file.relative_to(done.path).as_posix()
    assert done.command == (
        *("llama-server", "--model", "base/base.gguf", "--no-cache-prompt", "--cache-ram", "0"),
        *("--lora-scaled", f"{adapter}:0"),
    )
    readme = (done.path / "README.md").read_text("utf-8")
    assert " ".join(done.command) in readme
    assert json.loads((done.path / "request.json").read_text())["lora"] == [{"id": 0, "scale": 1.0}]
    assert deploy(done.path, check=True).checked
    document = Deployment.read(done.path)
    assert (document.version, document.unproven) == ("b11434", False)


def test_every_member_by_itself_and_options_of_the_server(project: Path) -> None:
    done = run(project, gguf="base.gguf", serve="each", port=9000, ctx_size=512, host="0.0.0.0", adapter_dtype="f16")
    files = sorted(done.path.glob("adapters/*/adapter.gguf"))
    assert [file.parent.name.split("-")[0] for file in files] == ["chat", "sql"]
    words = " ".join(done.command)
    assert words.count("--lora-scaled adapters/") == 2
    assert words.endswith("--host 0.0.0.0 --port 9000 --ctx-size 512")
    assert json.loads((done.path / "request.json").read_text())["lora"] == [
        {"id": 0, "scale": 1.0},
        {"id": 1, "scale": 0.0},
    ]
    assert "http://0.0.0.0:9000/completion" in (done.path / "README.md").read_text("utf-8")
    for file in files:
        want = deltas(project, file.parent.name.split("-")[0])
        factor = 1.0 if file.parent.name.startswith("chat") else -0.5
        for name, value in changes_of(file).items():
            assert np.linalg.norm(value - factor * want[name]) <= 1e-3 * np.linalg.norm(want[name])


def test_a_base_alone(project: Path) -> None:
    done = run(project, recipe='[base]\nsource = "./model"\n', gguf="base.gguf")
    assert done.command == ("llama-server", "--model", "base/base.gguf")
    assert not (done.path / "request.json").exists()


def test_the_same_bytes_from_two_folders(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    other = made(tmp_path / "other", tiny_llama)
    for engine in ("llamacpp", "ollama"):
        assert run(project, engine, gguf="base.gguf").digest == run(other, engine, gguf="base.gguf").digest


def test_settings_that_are_none(project: Path) -> None:
    assert "have neither" in refused(project).have[0]
    assert "have gguf and llama-cpp" in refused(project, gguf="base.gguf", **{"llama-cpp": "."}).have[0]
    assert "did you mean 'gguf'" in refused(project, guff="base.gguf").have[0]
    error = refused(project, gguf="base.gguf", dtype="q4_0", port=0, adapter_dtype="f8", ctx_size=True)
    assert error.code == "HK-ENGINE"
    named = sorted(line.split(":")[0] for line in error.have)
    assert named == [f"targets.llamacpp.{key}" for key in ("adapter_dtype", "ctx_size", "dtype", "dtype", "port")]
    assert "several are served" in refused(project, gguf="base.gguf", serve="each", prompt_prefix="x").have[0]
    assert refused(project, gguf="nowhere.gguf").code == "HK-MISSING"
    error = refused(project, **{"llama-cpp": "nowhere"})
    assert (error.code, error.what) == ("HK-GGUF", "there is no converter of llama.cpp")
    assert "targets.ollama.name" in refused(project, "ollama", gguf="base.gguf", name="no name").have[0]


@pytest.mark.parametrize("engine", ["llamacpp", "ollama"])
def test_a_gguf_of_another_base_is_refused_wherever_it_differs(project: Path, engine: str) -> None:
    """Also where no adapter acts: what was tested is what runs."""
    tensors = converted(state_of(project / "model"), config_of(project / "model"))
    tensors["output_norm.weight"] = tensors["output_norm.weight"] + 0.01
    write_gguf(project / "other.gguf", "llama", tensors, config_of(project / "model"))
    error = refused(project, engine, gguf="other.gguf")
    assert (error.code, error.what) == ("HK-GGUF", "the GGUF was not made of this base")
    assert "output_norm.weight" in error.have[0]


def test_what_no_adapter_in_gguf_can_say(project: Path, tiny_llama: Path) -> None:
    make_adapter(project / "chat", tiny_llama, method=host().load("selective"))
    error = refused(project, gguf="base.gguf")
    assert error.code == "HK-ENGINE"
    assert "the change of a norm" in error.have[0]
    make_adapter(project / "chat", tiny_llama, method=host().load("adapters"), width=2)
    assert refused(project, gguf="base.gguf").code == "HK-ENGINE"
    make_adapter(project / "chat", tiny_llama, method=host().load("dora"), rank=2)
    assert any("factored" in line for line in run(project, gguf="base.gguf").said)


def test_ollama_gets_the_merged_model(project: Path) -> None:
    done = run(project, "ollama", gguf="base.gguf", name="ana/mix:1")
    (file,) = done.path.glob("*.gguf")
    assert file.name == f"sha256-{hashlib.sha256(file.read_bytes()).hexdigest()}.gguf"
    assert (done.path / "Modelfile").read_text() == f"FROM ./{file.name}\n"
    assert done.command == ("ollama", "create", "ana/mix:1", "--file", "Modelfile")
    assert done.unproven
    merge(project / "model", f"{project / 'chat'} + -0.5*{project / 'sql'}", project / "merged")
    assert file.read_bytes() == gguf_of(project / "merged", project / "merged.gguf").read_bytes()


def test_export_writes_the_adapter_alone(project: Path) -> None:
    settings = {"gguf": str(project / "base.gguf"), "adapter_dtype": "f32"}
    done = export(project / "sql", project / "out", to="gguf", base=project / "model", settings=settings)
    assert done.files == ("adapter.gguf",)
    assert any("scale" in line for line in done.said)
    for name, value in changes_of(project / "out" / "adapter.gguf").items():
        want = deltas(project, "sql")[name]
        assert np.linalg.norm(value - want) <= 1e-6 * np.linalg.norm(want)
    with pytest.raises(HubkitError) as caught:
        export(project / "sql", project / "more", to="gguf", settings=settings)
    assert caught.value.code == "HK-BASE-NEEDED"
    assert not (project / "more").exists()
