"""The layers of ARCHITECTURE.md, read from the imports themselves: what may know what, and who may print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hubkit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Low to high. Two layers at one height do not know each other.
HEIGHT = {
    "errors": 0,
    "compat": 1,
    "documents": 2,
    "artifact": 3,
    "registry": 4,
    "tensors": 4,
    "methods": 5,
    "training": 6,
    "engines": 6,
    "named": 7,
    "adopting": 8,
    "locking": 8,
    "verbs": 9,
    "cli": 10,
}
TORCHLESS = ("documents", "artifact", "registry", "cli")
HEAVY = ("torch", "numpy", "jsonschema", "huggingface_hub", "starlette", "uvicorn", "transformers", "rich", "peft")
# `api` and `suite` are what a plugin author imports beside torch; nothing that starts a command imports them.
# The server's own modules are imported by `server/run.py`, inside its functions.
MAY_IMPORT_HEAVY_FIRST = (
    "compat/torch.py",
    "compat/torch_meta.py",
    "tensors",
    "training",
    "methods/api.py",
    "methods/suite.py",
    "registry/server/",
)
PROGRAM = "hubkit/engines/run.py"
"""Deployments carry it and run it by itself."""
METHODS = r"q?lora|dora|vera|ia3|adalora|loha|lokr|bitfit|rslora|qdora|reft|houlsby|pfeiffer|p-?tuning"
SPOKEN = re.compile(r"^[-.\w]+$|`\w+`|[-./\w]*[-./_][-./\w]*")
"""Options, keys and addresses of an engine's own, in its own words: ``--enable-lora``, ``lora_A.weight``."""
METHOD = re.compile(rf"(?<![a-z])({METHODS})(?![a-z])", re.IGNORECASE)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a file, those inside functions too; `from hubkit import x` is hubkit.x."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "hubkit":
                yield from ((f"hubkit.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def at_import(path: Path) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: none inside functions, none for type checkers only."""
    pending: list[ast.AST] = [tree(path)]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                pending.extend(node.orelse)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or "", node.lineno
            else:
                pending.append(node)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_down_only(path: Path) -> None:
    here = layer(path)
    if here not in HEIGHT:
        pytest.skip("the package's front door names everything, lazily")
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] != "hubkit" or len(parts) < 2 or parts[1] not in HEIGHT or parts[1] == here:
            continue
        assert HEIGHT[parts[1]] < HEIGHT[here], f"{ids(path)}:{line}: {here} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_heavy_libraries_wait_until_they_are_needed(path: Path) -> None:
    inside = path.relative_to(PACKAGE).as_posix()
    if inside.startswith(MAY_IMPORT_HEAVY_FIRST):
        return
    for module, line in at_import(path):
        assert module.split(".")[0] not in HEAVY, f"{ids(path)}:{line}: {module} at the top of the module"


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) in TORCHLESS], ids=ids)
def test_no_torch_below_tensors(path: Path) -> None:
    for module, line in imports(path):
        assert module.split(".")[0] not in ("torch", "transformers"), f"{ids(path)}:{line}: {module}"


def test_two_files_know_huggingface_hub() -> None:
    """The one that speaks to registries, and the one that knows what the library does not promise."""
    users = {ids(path) for path in FILES for module, _ in imports(path) if module.split(".")[0] == "huggingface_hub"}
    assert users == {"hubkit/registry/hub/huggingface.py", "hubkit/compat/huggingface_hub.py"}


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) != "cli" and ids(p) != PROGRAM], ids=ids)
def test_only_the_command_line_prints(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{ids(path)}:{node.lineno}: print"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            spoken = node.value.id == "sys" and node.attr in ("stdout", "stderr")
            assert not spoken, f"{ids(path)}:{node.lineno}: sys.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_string_names_a_method(path: Path) -> None:
    """The host asks what a method can do, never what it is called. Docstrings may name methods."""
    module = tree(path)
    docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found = METHOD.search(SPOKEN.sub("", node.value) if layer(path) == "engines" else node.value)
            assert not found, f"{ids(path)}:{node.lineno}: the string {node.value!r} names a method"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_branch_on_a_methods_name(path: Path) -> None:
    """`method == "x"`, `peft_type in (...)`: also with names that are ordinary words, such as prefix and prompt."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        asked = {s.id for s in sides if isinstance(s, ast.Name)} | {
            s.attr for s in sides if isinstance(s, ast.Attribute)
        }
        choices = [item for s in sides for item in (s.elts if isinstance(s, ast.Tuple | ast.List | ast.Set) else [s])]
        literal = any(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in choices)
        assert not (literal and asked & {"method", "method_name", "peft_type"}), f"{ids(path)}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*.py")), ids=ids)
def test_a_plugin_imports_the_api_and_torch(path: Path) -> None:
    allowed = {"hubkit.methods.api", "torch", "__future__", "math", "dataclasses", "collections", "typing", "re"}
    for module, line in imports(path):
        known = module in allowed or module.split(".")[0] in allowed
        kin = path.stem in ("qlora", "dora") and module == "hubkit.plugins.lora"
        assert known or kin, f"{ids(path)}:{line}: {module}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "plugins").glob("*.py"))], ids=ids)
def test_functions_stay_small(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or node.lineno) - first.lineno + 1
            assert length <= 60, f"{ids(path)}:{node.lineno}: {node.name} has {length} lines; aim: under 40"


PRIVATE = re.compile(r"_(?!_)\w+")
ASKING = ("getattr", "hasattr", "setattr", "delattr", "attrgetter", "get", "pop")
"""Functions and methods that are given the name of an attribute as text."""
KEYS = {
    "_load_in_4bit": "config.json, as bitsandbytes writes it",
    "_id": "a row of the Hub's protocol",
    "_HUBKIT_COMPLETE": "the environment, by which shells ask click for completions",
}
"""Private names that are keys of documents, and of which."""
DOCUMENTED = ("_save_to_state_dict", "_load_from_state_dict")
"""Private methods of torch that its docstrings invite to override."""
OUTSIDE_COMPAT = [path for path in [*FILES, *sorted((ROOT / "plugins").glob("*.py"))] if path.parent.name != "compat"]


def names_given(path: Path) -> Iterator[str]:
    """What a file calls its own: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id in ("self", "cls") else []


def names_used(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every attribute that a file uses, whoever's it is: `x.name`, `getattr(x, "name")`,
    `vars(x)["name"]`, `{"name": ...}`, and of what it imports from other libraries."""
    for node in ast.walk(tree(path)):
        texts: list[ast.expr | None] = []
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            asked = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            texts += node.args if asked in ASKING else []
        elif isinstance(node, ast.Subscript):
            texts.append(node.slice)
        elif isinstance(node, ast.Dict):
            texts += node.keys
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hubkit"):
            yield from ((name, node.lineno) for name in (node.module or "").split("."))
            yield from ((alias.name, node.lineno) for alias in node.names)
        for text in texts:
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value, text.lineno


OURS = {name for path in OUTSIDE_COMPAT for name in names_given(path)} | {*KEYS}


def strange(path: Path) -> list[str]:
    """Private names that a file uses and nobody in hubkit has given."""
    return [
        f"{ids(path)}:{line}: {name}" for name, line in names_used(path) if PRIVATE.fullmatch(name) and name not in OURS
    ]


@pytest.mark.parametrize("path", OUTSIDE_COMPAT, ids=ids)
def test_the_insides_of_other_libraries_are_used_in_compat_alone(path: Path) -> None:
    assert strange(path) == []


def test_the_law_of_insides_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it rests on; a file may use what another one of hubkit has called so."""
    file = tmp_path / "file.py"
    file.write_text("""
from torch import _C
from torch._dynamo import exc
x._parameters, self._modules, x._given, self._given, x.__dict__, y
getattr(x, "_orig_mod", None), vars(x)["_buffers"], vars(x).update({"_hooks": 1, "_given": 2}), "_text"
""")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "OURS", {"_given"})
    found = {line.rpartition(" ")[2] for line in strange(file)}
    assert found == {"_C", "_dynamo", "_parameters", "_modules", "_orig_mod", "_buffers", "_hooks"}


def test_what_torch_does_to_a_module_is_overridden_in_compat_alone() -> None:
    """A method of that name would be ours by the law above."""
    from torch import nn

    theirs = {name for name in dir(nn.Module) if PRIVATE.fullmatch(name)} - {*DOCUMENTED}
    for path in OUTSIDE_COMPAT:
        assert not theirs & {*names_given(path)}, ids(path)
