"""What the documents show is true: commands parse, the README runs as typed and prints what it prints there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

from hubkit.cli import hubkit as group
from hubkit.cli.group import Command
from hubkit.cli.table import COMMANDS
from hubkit.registry.directory.directory import DirectoryRegistry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
TYPED = [README, *(path for path in GUIDES if "```console" in path.read_text("utf-8"))]
"""Documents whose blocks are run."""
PREPARATION = ("git ", "cd ", "make ", "pip ", "source ", ". ")
"""Lines of the README that set a machine up; the tests run on one that is."""
END = "--end-of-command-"


def command_of(name: str) -> Command:
    command = group.get_command(click.Context(group), name)
    assert isinstance(command, Command)
    return command


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def transcripts(document: Path) -> list[tuple[str, list[str]]]:
    """(command, lines it is said to print) of every ``$ `` line of the console blocks, continuations joined."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(document, "console")).replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((line[2:].strip(), []))
        elif found:
            found[-1][1].append(line)
    return found


def parses(line: str) -> None:
    """One typed line: the command exists and takes these arguments."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "&", "&&", ";", "2>&1")), None)]
    assert words[:1] == ["hubkit"], line
    if words[1:] and words[1] in COMMANDS and "--help" not in words:
        command_of(words[1]).make_context(words[1], words[2:])
    else:
        assert words[1:] in ([], ["--help"], ["--version"]) or words[1] in COMMANDS, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_parses(name: str) -> None:
    command = command_of(name)
    text = command.get_help(click.Context(command, info_name=name))
    assert text.rstrip().endswith(f"Example:\n{command.example}".rstrip())
    lines = [line.strip() for line in command.example.replace("\\\n", " ").splitlines() if line.strip()]
    assert lines
    for line in lines:
        parses(line)


def test_every_command_has_json() -> None:
    for name in COMMANDS:
        assert "--json" in {option for param in command_of(name).params for option in param.opts}, name


@pytest.mark.parametrize("name", [*DOCUMENTS, "LICENSE", "examples/data/README.md"])
def test_documents_exist(name: str) -> None:
    assert len((ROOT / name).read_text("utf-8")) > 200


def test_the_changelog_begins_with_this_version() -> None:
    import hubkit

    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert hubkit.__version__ in headings[:2]


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*(ROOT / name for name in DOCUMENTS), *GUIDES):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", TYPED, ids=lambda path: path.name)
def test_documents_name_commands_that_exist(document: Path) -> None:
    typed = [line for line, _ in transcripts(document) if line.startswith("hubkit")]
    assert typed, "commands are shown as one would type them, in console blocks"
    for line in typed:
        parses(line)


def test_the_readme_lists_every_guide() -> None:
    text = README.read_text("utf-8")
    assert [path.name for path in GUIDES if f"(docs/{path.name})" not in text] == []


def test_the_readme_lists_every_command() -> None:
    text = README.read_text("utf-8")
    assert [name for name in COMMANDS if not re.search(rf"hubkit {name}\b|`{name}`", text)] == []


def alike(line: str) -> str:
    """A line without what differs from run to run and machine to machine: digests, numbers, widths, folders."""
    line = re.sub(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{7,64}\b", "<hex>", line)
    line = re.sub(r"(?:/[\w.<>~-]+)+/", "<dir>/", line)
    return re.sub(r"\s+", " ", re.sub(r"\d+(?:[.,]\d+)*", "<n>", line)).strip()


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    """Serves a directory as a Hub, and gives its address."""
    with ExitStack() as stack:

        def start(folder: Path) -> str:
            line = [sys.executable, "-m", "hubkit", "serve", str(folder), "--port", "0"]
            server = stack.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
            stack.callback(server.terminate)
            assert server.stdout is not None
            return server.stdout.readline().split()[-1]

        yield start


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="the documents are written for a POSIX shell")
@pytest.mark.parametrize("document", TYPED, ids=lambda path: path.name)
def test_documents_run_as_typed(document: Path, smol: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All console blocks in order, in one shell in an empty folder; each documented line of output is printed.
    Then the Python blocks, in the folder that those left.

    The Hub is a directory that holds the base under its name there, served to the README; ``...`` in a document stands
    for anything.
    """
    place = DirectoryRegistry(tmp_path / "hub")
    place.create("HuggingFaceTB/SmolLM2-135M-Instruct")
    files = {path.name: path for path in smol.iterdir()}
    place.commit("HuggingFaceTB/SmolLM2-135M-Instruct", files, [], message="base", parent=None)
    work = tmp_path / "work"
    work.mkdir()
    (work / "examples").symlink_to(ROOT / "examples")
    (work / "SmolLM2-135M-Instruct").symlink_to(smol)
    shown = [(line, output) for line, output in transcripts(document) if not line.startswith(PREPARATION)]
    script = "".join(f"{line}\necho {END}$?\necho {END} >&2\n" for line, _ in shown)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HUBKIT_HOME": str(tmp_path / "home"),
        "HUBKIT_CONFIG": str(tmp_path / "config.toml"),
    }
    if document == README:  # says itself which registry there is, and where bases are
        environment["HF_ENDPOINT"] = request.getfixturevalue("served")(tmp_path / "hub")
    else:
        environment["HUBKIT_REGISTRY"] = str(tmp_path / "hub")
    done = subprocess.run(
        ["bash", "-c", f"trap 'kill $(jobs -p) 2>/dev/null' EXIT\n{script}"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    out = re.split(rf"^{END}(\d+)\n", done.stdout, flags=re.MULTILINE)
    err = re.split(rf"^{END}\n", done.stderr, flags=re.MULTILINE)
    for number, (line, output) in enumerate(shown):
        printed, status = out[2 * number] + err[number], int(out[2 * number + 1])
        refused = any(text.startswith("error[") for text in output)
        assert (status != 0) == refused, f"{line}: exit status {status}\n{printed}"
        have = {alike(text) for text in printed.splitlines()}
        for text in (text for text in output if text.strip() and "..." not in text):
            assert alike(text) in have, f"{line}: {document.name} shows {text!r}; printed:\n{printed}"
    for block in blocks(document, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=work, env=environment, check=True, timeout=600)
