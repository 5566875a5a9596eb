"""What a user's editor and type checker see of `hubkit`, and that `hubkit` has it when the program runs."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import hubkit
from hubkit.training.options import TrainGiven, TrainOptions

ROOT = Path(__file__).parent.parent
PUBLIC: list[str] = vars(hubkit)["__all__"]  # hidden from type checkers, for whom the names are imported
USER = """
import hubkit
import hubkit.methods.api
from hubkit import Columns, Mix, Terms, Trained
from hubkit.methods.api import MethodInfo

def several(terms: Terms, mix: Mix, columns: Columns, info: MethodInfo, done: Trained) -> None: ...

reveal_type(hubkit.train("b", "d", "o", steps=3))
reveal_type(hubkit.methods())
reveal_type(hubkit.Sum({"a": 1.0}))
hubkit.trian
hubkit.train("b", "d", "o", stepps=3)
hubkit.train("b", "d", "o", steps="3")
hubkit.push("./a", 7)
"""
SEEN = [
    'Revealed type is "hubkit.verbs.train.Trained"',
    'Revealed type is "tuple[hubkit.verbs.methods.InstalledMethod, ...]"',
    'Revealed type is "hubkit.tensors.parts.mix.Sum"',
    'Module has no attribute "trian"; maybe "train"?',
    'Unexpected keyword argument "stepps" for "train"; did you mean "steps"?',
    'Argument "steps" to "train" has incompatible type "str"; expected "int | None"',
    'Argument 2 to "push" has incompatible type "int"; expected "str"',
]


def copied(work: Path) -> Path:
    """The project's files in a folder of their own, as a clone has them: builds leave something beside sources."""
    for folder in ("hubkit", "plugins", "schemas"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, work / folder, symlinks=True, ignore=left_out)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, work / file)
    return work


def environment(work: Path, *what: str | Path) -> Path:
    """A fresh environment with `what` installed as pip installs it, and nothing else; its Python.

    Without --ignore-installed pip would first take what is in the environment that runs the tests away.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", work], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--ignore-installed", "--prefix", work, *what], check=True, capture_output=True)
    return work / "bin" / "python"


def seen(python: Path, work: Path) -> list[str]:
    """What ``mypy --strict`` says of a user's file in that environment, where there is no torch."""
    file = work / "user.py"
    file.write_text(USER)
    line: list[str | Path] = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", work / ".mypy"]
    line += ["--python-executable", python, file.name]
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(line, cwd=work, env=plain, capture_output=True, text=True, check=False)
    said = [
        re.sub(r"^user\.py:\d+: (?:error|note): | +\[[a-z-]+\]$", "", one)
        for one in done.stdout.splitlines()
        if "defined in" not in one
    ]
    assert said[-1].startswith("Found 4 errors in 1 file"), done.stdout + done.stderr
    return said[:-1]


@pytest.mark.slow
def test_mypy_sees_it_in_an_installed_wheel(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*build, tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = environment(tmp_path / "fresh", wheel)
    assert seen(python, tmp_path) == SEEN


@pytest.mark.slow
def test_mypy_sees_it_in_an_editable_environment_and_new_files_at_once(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    python = environment(tmp_path / "fresh", "--editable", source)
    assert seen(python, tmp_path) == SEEN
    (source / "plugins" / "new.py").touch()
    (source / "hubkit" / "new.py").touch()
    probe = (
        "import hubkit.new, hubkit.plugins.new; from importlib.resources import files; print(files('hubkit.schemas'))"
    )
    done = subprocess.run([python, "-I", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).samefile(source / "schemas")


def test_what_type_checkers_read_is_what_there_is() -> None:
    tree = ast.parse((ROOT / "hubkit" / "__init__.py").read_text("utf-8"))
    (block,) = (one for one in tree.body if isinstance(one, ast.If) and isinstance(one.test, ast.Name))
    read = [(one.module, alias.name) for one in block.body if isinstance(one, ast.ImportFrom) for alias in one.names]
    assert all(
        alias.asname == alias.name for one in block.body if isinstance(one, ast.ImportFrom) for alias in one.names
    )
    assert read == [(module, name) for module, names in hubkit._HOMES.items() for name in names]
    assert set(hubkit.VERBS) < {name for _, name in read}


def test_every_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(hubkit, name) is not None
    assert dir(hubkit) == sorted(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        hubkit.trian  # type: ignore[attr-defined]  # noqa: B018


def test_the_fields_of_training_options_are_one_list() -> None:
    given = typing.get_type_hints(TrainGiven)
    options = typing.get_type_hints(TrainOptions)
    assert list(given) == [field.name for field in dataclasses.fields(TrainOptions)]
    assert given == {name: kind | None for name, kind in options.items()}


@pytest.mark.parametrize("first", ["import hubkit.methods.api", "hubkit.methods()", "from hubkit import methods"])
def test_methods_is_a_verb_and_a_package(first: str) -> None:
    probe = f"""
import hubkit
{first}
names = [one.name for one in hubkit.methods()]
import hubkit.methods.api as api
from hubkit import methods
assert methods is hubkit.methods and hubkit.methods.api is api
assert [one.name for one in methods()] == names, names
print(*names)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [one.name for one in hubkit.methods()]


def types_in(annotation: object) -> set[str]:
    """The classes of hubkit that an annotation, as text, speaks of."""
    words = set(re.findall(r"\b[A-Z][A-Za-z]+\b", getattr(annotation, "__forward_arg__", str(annotation))))
    return {word for word in words if not hasattr(typing, word)} - {"None", "Path", "PathLike", "Module"}


SPEAKING = sorted(
    name
    for module, names in hubkit._HOMES.items()
    if module.startswith(("hubkit.verbs", "hubkit.training", "hubkit.tensors.live.loading"))
    for name in names
)
"""Verbs and what they return; what is inside of documents is documents' own."""


@pytest.mark.parametrize("name", [name for name in SPEAKING if hasattr(getattr(hubkit, name), "__annotations__")])
def test_every_type_in_a_public_signature_is_public(name: str) -> None:
    value = getattr(hubkit, name)
    value = getattr(value, "_verb", value)
    for argument, annotation in value.__annotations__.items():
        assert types_in(annotation) <= set(PUBLIC), f"{name}: {argument}: {annotation}"
