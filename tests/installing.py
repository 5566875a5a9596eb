"""A stranger's package: its wheel built and installed where one test sees it, and the command run with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUBKIT = Path(sys.executable).with_name("hubkit")
Command = Callable[..., subprocess.CompletedProcess[str]]
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")


def install(package: Path, work: Path) -> Path:
    """Builds the wheel of `package` without a network and installs it; on PYTHONPATH the folder is a site-packages."""
    shutil.copytree(package, work / "src", ignore=_LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(work / "src")]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(work / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return work / "site"


def offer(site: Path, distribution: str, methods: dict[str, Path]) -> None:
    """Puts a distribution into `site` that offers methods, name -> the file of its module; nothing is built."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module.stem}\n" for name, module in methods.items()]
    (info / "entry_points.txt").write_text("[hubkit.methods]\n" + "".join(lines))
    for module in methods.values():
        shutil.copy(module, site)


def command(work: Path, *sites: Path) -> Command:
    """``hubkit`` in a process of its own, run in `work` with a store and a registry there, and `sites` installed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, sites)),
        "HUBKIT_HOME": str(work / "home"),
        "HUBKIT_REGISTRY": f"file://{work / 'registry'}",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [str(HUBKIT), *map(str, arguments)]
        return subprocess.run(line, env=environment, cwd=work, capture_output=True, text=True, check=False)

    return run


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON document of a command that went well."""
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refusal(done: subprocess.CompletedProcess[str], status: int = 1) -> tuple[str, str]:
    """(code, whole text) of a command's one refusal; never a traceback."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error[")]
    return line.partition("]")[0].removeprefix("error["), done.stderr
