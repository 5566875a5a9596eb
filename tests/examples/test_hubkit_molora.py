"""A stranger's method that cannot be merged: installed from its wheel, it goes through every command, and each that
would need a weight refuses with the method's own reason before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installing import Command, answer, command, install, refusal

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "hubkit-molora"
REASON = "its router weighs the experts anew for every token, so no single weight says the same"
BROKEN = "raise KeyError('licence')\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(EXAMPLE, tmp_path_factory.mktemp("molora"))


@pytest.fixture
def hubkit(site: Path, tmp_path: Path) -> Command:
    return command(tmp_path, site)


def trained(hubkit: Command, base: Path, work: Path, *options: str) -> Path:
    rows = [json.dumps({"text": f"The capital of France is Paris {n}."}) for n in range(6)]
    (work / "rows.jsonl").write_text("\n".join(rows))
    line = ["train", base, "rows.jsonl", "--method", "molora", "--steps", "2", "--dtype", "float32", *options]
    assert answer(hubkit(*line, "--lr", "0.1", "--json"))["method"] == "molora"
    return work


def test_the_method_is_one_short_module() -> None:
    lines = (EXAMPLE / "hubkit_molora.py").read_text("utf-8").splitlines()
    assert len(lines) < 80
    assert [line for line in lines if "hubkit." in line and "import" in line] == [
        "from hubkit.methods.api import Base, Edit, HubkitError, MethodInfo, Site, hookimpl"
    ]


def test_it_says_why_it_cannot_be_merged(hubkit: Command) -> None:
    described = answer(hubkit("methods", "molora", "--json"))
    assert (described["unmergeable"], described["peft"]) == (REASON, None)
    assert f"merge    no: {REASON}" in hubkit("methods", "molora").stdout


@pytest.mark.slow
def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests"]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[1-9]\d+ passed", done.stdout)


@pytest.mark.slow
def test_it_goes_through_every_command(hubkit: Command, tiny_llama: Path, tmp_path: Path) -> None:
    trained(hubkit, tiny_llama, tmp_path, "--out", "own")
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    plugin = json.loads((tmp_path / "own" / "hubkit.json").read_text())["plugin"]
    assert plugin == {"distribution": "hubkit-molora", "version": "0.1.0"}
    assert "molora" in hubkit("inspect", "own").stdout
    assert answer(hubkit("pack", "own", "--version", "1.0.0", "--json"))["changed"] is True
    assert answer(hubkit("push", "own", "ana/own", "--json"))["created"] is True
    pulled = Path(str(answer(hubkit("pull", "ana/own@^1.0", "--json"))["path"]))
    assert (pulled / "hubkit.json").read_bytes() == (tmp_path / "own" / "hubkit.json").read_bytes()
    assert "ana/own" in hubkit("list").stdout
    checks = answer(hubkit("verify", "ana/own", "--base", tiny_llama, "--json"))["checks"]
    assert [check["name"] for check in checks] == ["files", "base", "tensors"]
    question = ["The capital of France", "--max-new-tokens", "8", "--json", "--base", tiny_llama]
    live = answer(hubkit("generate", *question, "--adapter", "ana/own"))["text"]
    assert live != answer(hubkit("generate", *question))["text"]

    (tmp_path / "hubkit.toml").write_text(f"[base]\nsource = '{tiny_llama}'\n[adapters.own]\nsource = 'ana/own@^1.0'\n")
    assert hubkit("lock").returncode == 0
    before = {path.name for path in tmp_path.iterdir()}
    refusals: dict[str, list[str | Path]] = {
        "HK-NOT-MERGEABLE": ["merge", "ana/own", "--base", tiny_llama, "--out", "out"],
        "HK-COMPOSE": ["compose", "ana/own", "+", "./own", "--out", "out"],
        "HK-EXPORT": ["export", "ana/own", "--to", "peft", "--out", "out"],
    }
    for code, line in refusals.items():
        have, text = refusal(hubkit(*line))
        assert have == code, text
        assert REASON in text or code != "HK-NOT-MERGEABLE"
    for engine in ("merged", "peft"):
        have, text = refusal(hubkit("deploy", "out", "--engine", engine))
        assert have == "HK-ENGINE", text
        assert REASON in text or engine != "merged"
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_without_its_package_every_command_names_what_to_install(
    hubkit: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    """What needs the method says which package and version to install; what does not, works."""
    trained(hubkit, tiny_llama, tmp_path, "--out", "own")
    assert hubkit("push", "own", "ana/own").returncode == 0
    (tmp_path / "hubkit.toml").write_text(f"[base]\nsource = '{tiny_llama}'\n[adapters.own]\nsource = './own'\n")
    assert hubkit("lock").returncode == 0
    bare = command(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    for line in (
        ["merge", "own", "--base", tiny_llama, "--out", "out"],
        ["compose", "own", "+", "./own", "--out", "out"],
        ["export", "own", "--to", "peft", "--out", "out"],
        ["verify", "own", "--base", tiny_llama],
        ["generate", "Hello", "--base", tiny_llama, "--adapter", "own"],
        ["deploy", "out", "--engine", "merged"],
    ):
        code, text = refusal(bare(*line), status=3 if line[0] == "verify" else 1)
        assert code == "HK-METHOD-UNKNOWN", (line, text)
        assert text.splitlines()[-1] == "  fix:   pip install hubkit-molora==0.1.0", line
    assert {path.name for path in tmp_path.iterdir()} == before
    for line in (["inspect", "own"], ["pull", "ana/own"], ["list"], ["methods"], ["lock"]):
        assert bare(*line).returncode == 0, line


@pytest.mark.slow
def test_a_second_claimant_and_a_broken_neighbour(
    hubkit: Command, site: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Two claimants are both named wherever the method is needed; a neighbour that raises on import disturbs nobody."""
    trained(hubkit, tiny_llama, tmp_path, "--out", "own")
    for distribution, name, code in (("rival-molora", "molora", ""), ("broken", "broken", BROKEN)):
        module = distribution.replace("-", "_")
        info = tmp_path / distribution / f"{module}-2.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[hubkit.methods]\n{name} = {module}\n")
        (tmp_path / distribution / f"{module}.py").write_text(code)
    contested = command(tmp_path, site, tmp_path / "rival-molora")
    for line in (
        ["methods", "molora"],
        ["generate", "Hello", "--base", tiny_llama, "--adapter", "own"],
        ["train", tiny_llama, "rows.jsonl", "--method", "molora", "--out", "again"],
    ):
        code, text = refusal(contested(*line))
        assert code == "HK-METHOD-CONFLICT", line
        assert "hubkit-molora 0.1.0 (hubkit_molora)" in text
        assert "rival-molora 2.0 (rival_molora)" in text
    beside = command(tmp_path, site, tmp_path / "broken")
    assert beside("generate", "Hello", "--base", tiny_llama, "--adapter", "own", "--json").returncode == 0
    assert beside("methods").returncode == 0
    code, text = refusal(beside("methods", "broken"))
    assert code == "HK-PLUGIN"
    assert "broken 2.0 (broken)" in text
