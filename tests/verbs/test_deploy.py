"""deploy: complete, runnable without hubkit, and one changed byte anywhere is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter

from hubkit.documents.deployment import Deployment
from hubkit.errors import HubkitError
from hubkit.verbs.deploy import deploy
from hubkit.verbs.lock import lock

RECIPE = """
mix = "{mix}"
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
    """A locked sum of two adapters of different ranks, scales and targets, on a base in a folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_llama)
    make_adapter(folder / "chat", tiny_llama, seed=1, targets="all-linear")
    make_adapter(folder / "sql", tiny_llama, seed=2, rank=3, rslora=True, targets=["q_proj", "v_proj"])
    (folder / "hubkit.toml").write_text(RECIPE.format(mix="sum"))
    lock(folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refused(*args: Path, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        deploy(*args, **options)
    return refusal.value


@pytest.mark.parametrize("engine", ["peft", "merged"])
def test_one_changed_byte_anywhere_is_found(project: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "out"
    done = deploy(out, engine=engine, lock=project)
    assert deploy(out, check=True).digest == done.digest
    assert deploy(out, check=True, digest=done.digest).checked
    for path in files_of(out):
        times, data = path.stat(), path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        error = refused(out, check=True)
        assert error.code in ("HK-DEPLOY-DRIFT", "HK-JSON"), path
        path.write_bytes(data)
    deploy(out, check=True)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda out: (out / "run.py").unlink(), "run.py: missing"),
        (lambda out: (out / "more.txt").write_text(""), "more.txt: added"),
        (lambda out: (out / "link").symlink_to("/"), "link: added"),
        (lambda out: (out / "deployment.sha256").unlink(), "deployment.sha256: missing"),
    ],
    ids=["missing", "added", "link", "seal"],
)
def test_files_that_come_and_go(project: Path, tmp_path: Path, spoil: Any, line: str) -> None:
    out = tmp_path / "out"
    deploy(out, engine="peft", lock=project)
    spoil(out)
    error = refused(out, check=True)
    assert (error.code, error.have) == ("HK-DEPLOY-DRIFT", [line])


def test_another_deployment_than_the_expected_one(project: Path, tmp_path: Path) -> None:
    peft = deploy(tmp_path / "peft", engine="peft", lock=project)
    deploy(tmp_path / "merged", engine="merged", lock=project)
    assert refused(tmp_path / "merged", check=True, digest=peft.digest).code == "HK-DEPLOY-DRIFT"


def test_the_same_lock_gives_the_same_bytes(project: Path, tmp_path: Path) -> None:
    first = deploy(tmp_path / "a", engine="merged", lock=project)
    second = deploy(tmp_path / "elsewhere" / "b", engine="merged", lock=project)
    assert first.digest == second.digest
    assert Deployment.read(tmp_path / "a").command == ("python", "run.py")
    for path in files_of(tmp_path / "a"):
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("mix", ["sum", "stack"])
def test_both_engines_compute_the_sum(project: Path, tmp_path: Path, tiny_llama: Path, mix: str) -> None:
    """PEFT with its adapters side by side, and the merged checkpoint: logits of W + 1.0·ΔW₁ - 0.5·ΔW₂."""
    import torch
    from transformers import AutoModelForCausalLM

    from hubkit.tensors.base.base import Base

    (project / "hubkit.toml").write_text(RECIPE.format(mix=mix))
    lock(project)
    logits = []
    ids = torch.arange(12).reshape(2, 6)
    for engine in ("peft", "merged"):
        out = tmp_path / engine
        deploy(out, engine=engine, lock=project)
        with torch.no_grad():
            logits.append(loaded(out)(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for name, site in Base.from_folder(tiny_llama).sites.items():
        delta = expected_delta(project, name)
        if delta is not None:
            with torch.no_grad():
                base.get_submodule(site.name).weight += delta
    with torch.no_grad():
        torch.testing.assert_close(logits[1], base(ids).logits, atol=1e-5, rtol=0)


def loaded(out: Path) -> Any:
    """The model that a deployment's run.py loads."""
    spec: dict[str, Any] = {"__file__": str(out / "run.py"), "__name__": "run"}
    exec(compile((out / "run.py").read_text(), "run.py", "exec"), spec)
    return spec["load"]("cpu")[0]


def test_a_deployment_makes_no_weight_up(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    (project / "model").unlink()
    shutil.copytree(tiny_llama, project / "model")
    tensors = load_file(project / "model" / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, project / "model" / "model.safetensors", {"format": "pt"})
    lock(project, allow_base_mismatch=True)
    deploy(tmp_path / "out", engine="peft", lock=project)
    with pytest.raises(SystemExit, match=r"the files lack model\.layers\.1\.post_attention_layernorm\.weight"):
        loaded(tmp_path / "out")


def expected_delta(project: Path, site: str) -> Any:
    """The formula, from the files: Σ w · alpha / r · B A, alpha / sqrt(r) for the second adapter."""
    from safetensors.torch import load_file

    total = None
    for name, factor in (("chat", 32 / 2), ("sql", -0.5 * 32 / 3**0.5)):
        tensors = load_file(project / name / "adapter_model.safetensors")
        key = f"base_model.model.{site}"
        if f"{key}.lora_A.weight" in tensors:
            delta = factor * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            total = delta if total is None else total + delta
    return total


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["peft", "merged"])
def test_it_runs_without_hubkit(project: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "out"
    deploy(out, engine=engine, lock=project)
    block = "import sys; sys.modules['hubkit'] = None; sys.argv = ['run.py', 'hello', '--max-new-tokens', '4']; "
    code = f"{block}import runpy; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    deploy(out, check=True)


def test_what_changed_since_the_lock_is_refused(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    make_adapter(project / "sql", tiny_llama, seed=8)
    error = refused(tmp_path / "out", engine="peft", lock=project)
    assert error.code == "HK-LOCK-DRIFT"
    assert not (tmp_path / "out").exists()


def test_another_base_than_the_locked_one_is_refused(project: Path, tmp_path: Path, tiny_gpt2: Path) -> None:
    (project / "model").unlink()
    (project / "model").symlink_to(tiny_gpt2)
    error = refused(tmp_path / "out", engine="merged", lock=project)
    assert error.code == "HK-LOCK-DRIFT"
    assert any(line.startswith("model.safetensors: sha256:") for line in error.have)


def test_an_unknown_engine(project: Path, tmp_path: Path) -> None:
    error = refused(tmp_path / "out", engine="mergd", lock=project)
    assert (error.code, error.fix) == ("HK-ENGINE-UNKNOWN", "--engine merged")


def test_a_folder_of_somebody_is_not_replaced(project: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for replace in (False, True):
        assert refused(tmp_path / "out", engine="peft", lock=project, replace=replace).code == "HK-EXISTS"
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_replace_exchanges_a_deployment(project: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "out", engine="peft", lock=project)
    assert refused(tmp_path / "out", engine="merged", lock=project).code == "HK-EXISTS"
    deploy(tmp_path / "out", engine="merged", lock=project, replace=True)
    assert deploy(tmp_path / "out", check=True).engine == "merged"


def test_a_dry_run_writes_nothing(project: Path, tmp_path: Path) -> None:
    assert deploy(tmp_path / "out", engine="merged", lock=project, dry_run=True).dry_run
    assert not (tmp_path / "out").exists()


def test_what_is_replaced_is_kept_and_can_be_gone_back_to(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = deploy(out, engine="peft", lock=project)
    second = deploy(out, engine="merged", lock=project, replace=True)
    assert second.changed is not None
    assert second.changed[0] == "engine: peft -> merged"
    for want, other in ((first, second), (second, first)):  # once back, and once forth again
        done = deploy(out, rollback=True)
        assert (done.digest, done.engine) == (want.digest, want.engine)
        assert deploy(out, check=True, digest=want.digest).checked
        (kept,) = sorted((tmp_path / "out.earlier").iterdir())
        assert deploy(kept, check=True, digest=other.digest).checked


def test_no_more_are_kept_than_were_asked_for(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    engines = ("peft", "merged", "peft", "merged")
    made = [deploy(out, engine=engine, lock=project, replace=True, keep=1) for engine in engines]
    assert len(list((tmp_path / "out.earlier").iterdir())) == 1
    assert deploy(out, rollback=True, digest=made[-2].digest).engine == "peft"
    deploy(out, engine="merged", lock=project, replace=True, keep=0)
    assert not (tmp_path / "out.earlier").exists()


def test_nothing_to_go_back_to(project: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "out", engine="peft", lock=project)
    assert refused(tmp_path / "out", rollback=True).code == "HK-MISSING"
    deploy(tmp_path / "out", engine="merged", lock=project, replace=True)
    error = refused(tmp_path / "out", rollback=True, digest="sha256:" + "0" * 64)
    assert error.code == "HK-MISSING"
    assert deploy(tmp_path / "out", check=True).engine == "merged"


def test_a_damaged_earlier_deployment_is_not_gone_back_to(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    deploy(out, engine="peft", lock=project)
    second = deploy(out, engine="merged", lock=project, replace=True)
    (kept,) = (tmp_path / "out.earlier").iterdir()
    (kept / "run.py").write_text("import os")
    assert refused(out, rollback=True).code == "HK-DEPLOY-DRIFT"
    assert deploy(out, check=True).digest == second.digest


def test_two_deployments_are_told_apart(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    deploy(old, engine="peft", lock=project)
    before = Deployment.read(old).adapters["sql"]
    make_adapter(project / "sql", tiny_llama, seed=9, rank=3)
    lock(project)
    deploy(new, engine="peft", lock=project)
    changed = deploy(new, diff=old).changed
    assert changed is not None
    assert changed[0] == f"adapter sql: {before} -> {Deployment.read(new).adapters['sql']}"
    assert {line.split(":")[0] for line in changed[1:]} == {
        "adapters/sql/adapter_config.json",
        "adapters/sql/adapter_model.safetensors",
        "adapters/sql/hubkit.json",
        "hubkit.lock",
    }
    assert deploy(old, diff=old).changed == ()


def test_a_setting_that_the_engine_does_not_have(project: Path, tmp_path: Path) -> None:
    recipe = (project / "hubkit.toml").read_text()
    (project / "hubkit.toml").write_text(recipe + "\n[targets.peft]\nserv = 'each'\n")
    lock(project)
    error = refused(tmp_path / "out", engine="peft", lock=project)
    assert (error.code, error.have) == ("HK-ENGINE", ["targets.peft.serv: unknown; known: nothing"])


def test_probes_go_along(project: Path, tmp_path: Path, tiny_llama: Path) -> None:
    """Where adapters are served by themselves; what is served of several at once is none of theirs."""
    from hubkit.verbs.pack import pack

    pack(project / "chat", base=tiny_llama, probes=True)
    for serve, kept in (("each", ["chat"]), ("mix", [])):
        (project / "hubkit.toml").write_text(RECIPE.format(mix="sum") + f"[targets.vllm]\nserve = '{serve}'\n")
        lock(project)
        deploy(tmp_path / serve, engine="vllm", lock=project)
        found = list((tmp_path / serve).rglob("probes.json"))
        assert [path.parent.name.rpartition("-")[0] for path in found] == kept
        assert all(path.read_bytes() == (project / "chat" / "probes.json").read_bytes() for path in found)
