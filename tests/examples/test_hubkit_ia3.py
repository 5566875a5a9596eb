"""A stranger's method: its wheel is built and installed, and every command works with it, hubkit untouched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "hubkit-ia3"
HUBKIT = Path(sys.executable).with_name("hubkit")
CLAIM = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's wheel, built from a copy of its sources, without a network."""
    place = tmp_path_factory.mktemp("build")
    shutil.copytree(EXAMPLE, place / "src", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(place / "src")]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = place.glob("*.whl")
    assert made.name == "hubkit_ia3-0.1.0-py3-none-any.whl"
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the wheel is installed in; on PYTHONPATH it is what site-packages would be."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return target


@pytest.fixture
def hubkit(site: Path, tmp_path: Path) -> Command:
    """The command, in a process of its own, with a store and a registry of its own; `path`: folders to install from."""

    def run(*arguments: str | Path, path: tuple[Path, ...] = (site,)) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "HUBKIT_HOME": str(tmp_path / "home"),
            "HUBKIT_REGISTRY": f"file://{tmp_path / 'registry'}",
            "OMP_NUM_THREADS": "1",
        }
        line = [str(HUBKIT), *map(str, arguments)]
        return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def claim(folder: Path, distribution: str, version: str, code: str) -> Path:
    """An installed distribution that offers a method named ia3, made by the module `code`."""
    module = distribution.replace("-", "_")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(CLAIM.format(name=distribution, version=version))
    (info / "entry_points.txt").write_text(f"[hubkit.methods]\nia3 = {module}\n")
    (folder / f"{module}.py").write_text(code)
    return folder


def test_the_method_is_one_short_module() -> None:
    lines = (EXAMPLE / "hubkit_ia3.py").read_text("utf-8").splitlines()
    assert len(lines) <= 90
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imports == {"collections", "dataclasses", "torch", "hubkit"}
    assert [line for line in lines if "hubkit." in line and "import" in line] == [
        "from hubkit.methods.api import Base, Delta, Edit, MethodInfo, PeftForm, Site, hookimpl"
    ]


def test_installing_the_wheel_makes_the_method_known(hubkit: Command) -> None:
    rows = {row["name"]: row for row in json.loads(hubkit("methods", "--json").stdout)}
    assert rows["ia3"] == {"name": "ia3", "distribution": "hubkit-ia3", "version": "0.1.0", "default": False}
    described = answer(hubkit("methods", "ia3", "--json"))
    assert described["peft"] == "IA3"
    assert described["unmergeable"] == ""
    assert [option["name"] for option in described["options"]] == ["targets", "feedforward"]
    assert "ia3" not in {row["name"] for row in json.loads(hubkit("methods", "--json", path=()).stdout)}


@pytest.mark.slow
def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    """Every law of methods, on Llama and GPT-2, real PEFT among them: as its author runs them."""
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests"]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[1-9]\d+ passed", done.stdout)


@pytest.mark.slow
def test_its_whole_life(hubkit: Command, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"The capital of France is Paris {n}."}) for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    line = ["train", tiny_llama, "rows.jsonl", "--out", "own", "--method", "ia3", "--steps", "2", "--dtype", "float32"]
    assert answer(hubkit(*line, "--lr", "0.1", "--json"))["method"] == "ia3"
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["feedforward_modules"]) == ("IA3", ["down_proj"])
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert json.loads((tmp_path / "own" / "hubkit.json").read_text())["plugin"] == {
        "distribution": "hubkit-ia3",
        "version": "0.1.0",
    }

    assert answer(hubkit("push", "own", "ana/own", "--json"))["created"] is True
    pulled = Path(str(answer(hubkit("pull", "ana/own@^0.1", "--json"))["path"]))
    assert (pulled / "hubkit.json").read_bytes() == (tmp_path / "own" / "hubkit.json").read_bytes()
    checks = answer(hubkit("verify", "ana/own", "--base", tiny_llama, "--json"))["checks"]
    assert [check["name"] for check in checks] == ["files", "base", "tensors"]

    merged = answer(hubkit("merge", "ana/own", "--base", tiny_llama, "--out", "merged", "--json"))
    assert merged["changed"] == 6
    question = ["The capital of France", "--max-new-tokens", "8", "--json"]
    live = answer(hubkit("generate", *question, "--base", tiny_llama, "--adapter", "ana/own"))
    assert live["text"] == answer(hubkit("generate", *question, "--base", "merged"))["text"]


def test_without_it_the_package_to_install_is_named(hubkit: Command, adapter: Path, tiny_llama: Path) -> None:
    from hubkit.artifact.folder import write_adapter
    from hubkit.documents.manifest import Manifest, Plugin
    from hubkit.methods.host import host

    manifest = Manifest.read(adapter)
    files: dict[str, bytes | Path] = {entry.path: (adapter / entry.path).read_bytes() for entry in manifest.files}
    write_adapter(adapter, replace(manifest, method="ia3", plugin=Plugin("hubkit-ia3", "0.1.0")), files, replace=True)
    done = hubkit("merge", adapter, "--base", tiny_llama, "--out", "merged", path=())
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error[HK-METHOD-UNKNOWN]: no installed package offers the method 'ia3'",
        f"  want:  {', '.join(name for name in host().offers() if name != 'ia3')}",
        "  have:  ia3",
        "  fix:   pip install hubkit-ia3==0.1.0",
    ]
    assert not (adapter.parent / "merged").exists()


def test_two_packages_claim_one_name(hubkit: Command, site: Path, tmp_path: Path) -> None:
    other = claim(tmp_path / "other", "other-ia3", "2.0", "raise SystemExit('a claimed name is not imported')")
    listed = hubkit("methods", path=(site, other))
    assert listed.returncode == 0
    (row,) = [line for line in listed.stdout.splitlines() if line.startswith("ia3")]
    assert row.split() == ["ia3", "hubkit-ia3,", "other-ia3", "0.1.0,", "2.0"]
    done = hubkit("methods", "ia3", path=(site, other))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error[HK-METHOD-CONFLICT]: several packages offer the method 'ia3'",
        "  have:  hubkit-ia3 0.1.0 (hubkit_ia3)",
        "         other-ia3 2.0 (other_ia3)",
        "  fix:   uninstall one of them: pip uninstall other-ia3",
    ]
    assert hubkit("methods", "lora", path=(site, other)).returncode == 0


def test_a_package_that_cannot_be_imported_disturbs_nobody(hubkit: Command, tmp_path: Path) -> None:
    broken = claim(tmp_path / "broken", "broken-ia3", "1.0", "raise RuntimeError('no licence')")
    assert hubkit("methods", path=(broken,)).returncode == 0
    assert hubkit("methods", "lora", path=(broken,)).returncode == 0
    done = hubkit("methods", "ia3", path=(broken,))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error[HK-PLUGIN]: method 'ia3' cannot be imported",
        "  where: broken-ia3 1.0 (broken_ia3)",
        "  have:  RuntimeError: no licence",
        "  fix:   update or uninstall broken-ia3; the other methods are not affected",
    ]
