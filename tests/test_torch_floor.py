"""The lower bounds of pyproject.toml: scripts/torch-floor reads a torch that cannot run here; the others are run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HERE = Path(torch.__file__).parent.parent
ELSEWHERE = {"torch", "triton", "trl", "mypy", "ruff"}
"""Not among the oldest that are run: no old torch for CPUs is to be had, triton is torch's, trl needs newer versions of
its neighbours, two read the code only."""

SMALL = {
    "version.py": "from typing import Optional\n__all__ = []\n__version__ = '0.9'\n",
    "__init__.py": "import os as _os\nfrom ._C import *\nfrom torch import nn as nn\n"
    "from .functional import split as split\nif _os.name:\n    from ._tensor import Tensor\nelse:\n    pi = 3\n"
    "from . import functional\nfor name in dir(_C): globals()[name] = 1\n",
    "_C/__init__.pyi": "class Generator: ...\nfloat32: int = ...\nfloat16, int8 = 1, 2\n",
    "_C/_VariableFunctions.pyi": "def zeros(*size, out=None): ...\ndef zeros(size, *, dtype=None): ...\n",
    "_tensor.py": "from torch._C import TensorBase\nclass Tensor(TensorBase): ...\n",
    "functional.py": "def split(tensor, size, dim=0): ...\n",
    "nn/__init__.py": "from .modules import *\n",
    "nn/modules.py": "class Linear:\n    def __init__(self, bias=True): ...\n    def old(self): ...\n"
    "class Free(Linear): ...\ndef free(**more): ...\n",
    "nn/functional.py": "import torch\nlinear = torch._C._nn.linear\nfrom .modules import free as _free\n",
}
GOOD = """
import torch
import torch.nn.functional as F
import numpy as np
from torch import Tensor, nn
def f():
    from torch.nn import modules as m
    torch.zeros(3, out=None), torch.zeros((3,), dtype=torch.float32, axis=1), torch.split(1, 2, dim=1)
    nn.Linear(bias=False).new(strange=1), nn.Free(strange=1), m.free(strange=1), Tensor.strange
    F.linear(1, strange=2), torch.nn.Linear, torch.int8, torch.pi, torch.Generator, np.strange, torch.functional.split
"""
BAD = {
    "import torch\ntorch.strange": "torch.strange",
    "import torch\ntorch.strange.split(1)": "torch.strange",
    "import torch as t\nt.nn.strange.more": "torch.nn.strange",
    "import torch.strange": "torch.strange",
    "from torch import strange as nn": "torch.strange",
    "from torch import nn\nnn.functional.strange()": "torch.nn.functional.strange",
    "from torch.nn import functional as F\nF.strange": "torch.nn.functional.strange",
    "import torch\ntorch.split(1, 2, strange=3)": "torch.split(strange=)",
    "import torch\ntorch.zeros(1, strange=3)": "torch.zeros(strange=)",
    "import torch\ndef f(): return torch.nn.Linear(bias=1, strange=3)": "torch.nn.Linear(strange=)",
}


def script(*arguments: object) -> tuple[int, str]:
    line = [sys.executable, str(ROOT / "scripts" / "torch-floor"), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a torch of a few lines, with everything by which the real one comes to its names."""
    for name, text in SMALL.items():
        path = tmp_path / "site" / "torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "site"


def test_the_installed_torch_has_every_name() -> None:
    status, said = script(HERE)
    assert status == 0, said
    assert re.fullmatch(rf"torch {re.escape(torch.__version__)}: \d{{3,}} names used, 0 missing\n", said)


def test_what_is_there_is_found(small: Path, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD, encoding="utf-8")
    status, said = script(small, tmp_path / "good.py")
    assert (status, said.partition(":")[0]) == (0, "torch 0.9"), said


def test_what_is_not_there_is_named(small: Path, tmp_path: Path) -> None:
    for number, text in enumerate(BAD):
        (tmp_path / f"bad{number}.py").write_text(text, encoding="utf-8")
    status, said = script(small, *tmp_path.glob("bad*.py"))
    assert status == 1
    for number, (text, name) in enumerate(BAD.items()):
        places = next((line for line in said.splitlines() if line.startswith(f"  {name}: ")), "")
        assert f"bad{number}.py:{text.count(chr(10)) + 1}" in places, (text, said)
    assert f" {len(set(BAD.values()))} missing\n" in said


def test_a_folder_without_a_torch(tmp_path: Path) -> None:
    usage = "usage: scripts/torch-floor FOLDER [SOURCES...], where FOLDER holds a torch\n"
    assert script(tmp_path) == script() == (2, usage)


def bounds() -> dict[str, str]:
    """Package -> the lower bound that pyproject.toml has for it."""
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    found: dict[str, str] = {}
    for wanted in map(Requirement, lines):
        for bound in wanted.specifier:
            assert bound.operator == ">="
            assert found.setdefault(wanted.name, bound.version) == bound.version, wanted.name
    return found


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {name.replace("_", "-"): Version(version) for name, version in pinned.items()}
    wanted = {name: Version(version) for name, version in bounds().items() if name not in ELSEWHERE}
    assert {name: pins.get(name) for name in wanted} == wanted


def test_one_bound_of_torch_everywhere() -> None:
    written = [*(ROOT / "examples").glob("*/pyproject.toml"), ROOT / "hubkit" / "methods" / "template.py"]
    found = {path: re.findall(r"torch>=([\d.]+)", path.read_text(encoding="utf-8")) for path in written}
    resolver = ROOT / "examples" / "hubkit-vllm" / "pyproject.toml"  # touches no tensor itself
    assert found == {path: [] if path == resolver else [bounds()["torch"]] for path in written}
