"""docs/errors.md explains exactly the codes that hubkit raises; no document names a code that there is not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hubkit
from hubkit.cli.table import COMMANDS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "errors"
GUIDE = ROOT / "docs" / "errors.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE = re.compile(r"HK-[A-Z0-9-]+")
RAISES = """
USAGE = 2
def one(broken: bool) -> None:
    raise HubkitError("HK-ONE", f"{broken} is wrong", status=USAGE)
def two(pickle: bool) -> HubkitError:
    what = "a pickle" if pickle else "a script"
    code = "HK-TWO" if pickle else "HK-THREE"
    return HubkitError(code, what)
"""


def script() -> ModuleType:
    """scripts/errors as a module: it has no suffix, so it is loaded by its path."""
    loader = importlib.machinery.SourceFileLoader("errors_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def errors() -> ModuleType:
    return script()


def section(code: str, status: str = "1") -> str:
    return f"## {code}\n\nIt means so.\n\n- Met: here.\n- Mend: do this\n  and that.\n- Exit status: {status}\n\n"


def tree(folder: Path, code: str) -> Path:
    (folder / "hubkit").mkdir()
    (folder / "hubkit" / "some.py").write_text(code, "utf-8")
    return folder


def test_every_code_is_explained_and_no_other(errors: ModuleType) -> None:
    assert errors.faults(GUIDE.read_text("utf-8")) == []


def test_every_code_is_spelt_as_codes_are(errors: ModuleType) -> None:
    assert [code for code in errors.raised() if not CODE.fullmatch(code)] == []
    assert [
        heading for heading in errors.HEADING.findall(GUIDE.read_text("utf-8")) if not CODE.fullmatch(heading)
    ] == []


def test_each_says_what_it_means_and_what_mends_it(errors: ModuleType) -> None:
    for code, said in errors.documented(GUIDE.read_text("utf-8")).items():
        assert len(said.meaning.split()) >= 4, code
        assert said.meaning.endswith("."), code
        assert len(said.fields["Mend"].split()) >= 3, code
        assert said.fields["Met"].endswith("."), code


def test_where_a_code_is_met_names_commands_that_exist(errors: ModuleType) -> None:
    for code, said in errors.documented(GUIDE.read_text("utf-8")).items():
        for text in re.findall(r"`([^`]+)`", said.fields["Met"]):
            word = text.split()[0]
            if word.startswith("hubkit."):
                assert word.removeprefix("hubkit.").partition("(")[0] in dir(hubkit), f"{code}: {text}"
            elif re.fullmatch(r"[a-z]+", word):
                assert word in COMMANDS, f"{code}: {text}"


def test_the_list_at_the_top_leads_to_every_code_once(errors: ModuleType) -> None:
    links = re.findall(r"\[(HK-[^\]]+)\]\(#([^)]+)\)", GUIDE.read_text("utf-8"))
    assert [code for code, anchor in links if anchor != code.lower()] == []
    assert sorted(code for code, _ in links) == list(errors.documented(GUIDE.read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_codes_that_exist(document: Path, errors: ModuleType) -> None:
    named = {code.rstrip("-") for code in CODE.findall(document.read_text("utf-8"))}
    assert sorted(named - errors.raised().keys()) == []


def test_a_code_in_a_variable_is_found_with_text_and_status(errors: ModuleType, tmp_path: Path) -> None:
    found = errors.raised(tree(tmp_path, RAISES))
    assert {code: [(one.what, one.status) for one in sites] for code, sites in found.items()} == {
        "HK-ONE": [("{broken} is wrong", 2)],
        "HK-THREE": [("a pickle  |  a script", 1)],
        "HK-TWO": [("a pickle  |  a script", 1)],
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (section("HK-ONE", "2") + section("HK-THREE"), "HK-TWO: no section; raised at hubkit/some.py:8"),
        ("".join(map(section, ("HK-FOUR", "HK-THREE", "HK-TWO"))), "HK-FOUR: a section, but nothing raises it"),
        ("".join(map(section, ("HK-ONE", "HK-THREE", "HK-TWO"))), "HK-ONE: exit status 2 is not named"),
        ("".join(map(section, ("HK-TWO", "HK-THREE"))), "the sections are not in the order of the alphabet"),
        ("".join(map(section, ("HK-TWO", "HK-TWO"))), "HK-TWO: two sections"),
        ("## HK-TWO\n\nIt means so.\n", "HK-TWO: no line '- Mend:'"),
    ],
)
def test_faults_are_found(errors: ModuleType, tmp_path: Path, text: str, fault: str) -> None:
    assert fault in errors.faults(text, tree(tmp_path, RAISES))


def test_what_is_asked_about_and_never_raised_is_found(errors: ModuleType, tmp_path: Path) -> None:
    asks = f"{RAISES}\ndef three(error: HubkitError) -> bool:\n    return error.code == 'HK-NOWHERE'\n"
    found = errors.faults(section("HK-ONE", "2") + section("HK-THREE") + section("HK-TWO"), tree(tmp_path, asks))
    assert found == ["hubkit/some.py:11: HK-NOWHERE is asked about, but nothing raises it"]


@pytest.mark.slow
def test_it_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--list", "HK-STALE"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HK-STALE  (exit status 1)\n  hubkit/registry/")
    assert "the branch has moved since it was read" in done.stdout
