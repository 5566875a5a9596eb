"""A new method's package: complete, tested by its own tests before a line is changed, and never half written."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from variants import names, refused, say, tree

from hubkit.methods.host import GROUP, Method, Offer
from hubkit.methods.suite import MethodSuite
from hubkit.verbs.methods import methods

FILES = {"README.md", "pyproject.toml", "hubkit_my_gain.py", "tests/test_my_gain.py"}


def load(folder: Path, name: str) -> Method:
    """The method in a package's folder, as the host would load it."""
    spec = importlib.util.spec_from_file_location(f"hubkit_{name}", folder / f"hubkit_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Method(Offer(name, f"hubkit-{name}", "0.1.0", EntryPoint(name, f"hubkit_{name}", GROUP)), module)


class TestTheWrittenMethod(MethodSuite):
    """Every law of methods, on the module as it is written: in this process, nothing installed."""

    method = "my_gain"

    @pytest.fixture(autouse=True)
    def _written(self, tmp_path: Path) -> None:
        methods("my_gain", tmp_path / "package")
        self.loaded = load(tmp_path / "package", "my_gain")

    def load(self) -> Method:
        return self.loaded


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(capsys, "methods", "--new", "my_gain", tmp_path / "package")
    assert said.status == 0
    assert set(tree(tmp_path / "package")) == FILES
    module = (tmp_path / "package" / "hubkit_my_gain.py").read_text("utf-8")
    assert len(module.splitlines()) < 80
    assert [line for line in module.splitlines() if line.startswith("from hubkit")] == [
        "from hubkit.methods.api import Base, Delta, Edit, HubkitError, MethodInfo, Site, hookimpl"
    ]
    assert names(tmp_path) == {"package"}
    (tmp_path / "empty").mkdir()
    made = methods("my_gain", tmp_path / "empty")
    assert (made.distribution, set(made.files)) == ("hubkit-my-gain", FILES)
    assert tree(tmp_path / "empty") == tree(tmp_path / "package"), "the same name, the same bytes"


@pytest.mark.parametrize("name", ["9gain", "Gain", "my-gain", "", "class", "a b", "../x", "gaïn", "x" * 41, "x\n"])
def test_a_name_that_cannot_be_one(name: str, tmp_path: Path) -> None:
    assert refused("HK-NAME", methods, name, tmp_path / "package").status == 2
    assert names(tmp_path) == set()


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    taken = methods()[0]
    error = refused("HK-NAME-TAKEN", methods, taken.name, tmp_path / "package")
    assert taken.distribution in str(error.have)
    assert names(tmp_path) == set()


def test_a_folder_that_is_not_empty_and_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for place in (tmp_path / "full", tmp_path / "file"):
        refused("HK-EXISTS", methods, "my_gain", place)
    refused("HK-IO", methods, "my_gain", tmp_path / "file" / "below")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "words", [("--new",), ("--new", "my_gain"), ("my_gain", "./dir"), ("--new", "my_gain", "./a", "./b")]
)
def test_wrong_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "methods", *words).refusal(status=2) == "HK-USAGE"


@pytest.mark.slow
def test_its_wheel_is_installed_in_a_fresh_environment_and_its_tests_pass(tmp_path: Path) -> None:
    """As its author would: the wheel built, installed where nothing else is, its own tests run there."""
    package, place = tmp_path / "package", tmp_path / "env"
    methods("my_gain", package)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(package)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    (wheel,) = tmp_path.glob("hubkit_my_gain-*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, capture_output=True)
    ours = sysconfig.get_path("purelib")  # torch, transformers, hubkit: what pip would fetch, without a network
    (site,) = place.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    shutil.copytree(package / "tests", tmp_path / "tests")
    line = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d+ passed", done.stdout)
    listed = subprocess.run([python, "-m", "hubkit", "methods"], env=environment, capture_output=True, text=True)
    assert "my_gain" in listed.stdout
