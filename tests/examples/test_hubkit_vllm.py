"""The resolver for vLLM: what a name in a request leads to, without vLLM and, marked oracle, in a real `vllm serve`."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engines.real import ask, differences, environment, free_port, of_model, running
from making import make_adapter

import hubkit
from hubkit.documents.lock import Lock
from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.registry.directory.directory import DirectoryRegistry

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "hubkit-vllm"
RECIPE = """
[base]
source = "./model"
[adapters.chat]
source = "ana/chat@^1.0"
[adapters.sql]
source = "./sql"
[adapters.heavy]
source = "./heavy"
[adapters.alien]
source = "./alien"
"""


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    """The example's one module."""
    spec = importlib.util.spec_from_file_location("hubkit_vllm", EXAMPLE / "hubkit_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hubkit_vllm"] = module
    spec.loader.exec_module(module)
    return module


def other_base(base: Path, folder: Path) -> Path:
    """A copy of a base with one number changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder, symlinks=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def project_on(base: Path, folder: Path, registry: Path, **sizes: Any) -> Path:
    """A locked project: one adapter in a registry, one of a folder, one that vLLM cannot run, one of another base."""
    folder.mkdir()
    (folder / "model").symlink_to(base)
    publish(base, folder / "chat", registry, seed=1, version="1.0.0", **sizes)
    patterns: dict[str, Any] = {
        "rslora": True,
        "rank": 4,
        "alpha": 16.0,
        "rank_pattern": {"v_proj": 8},
        "targets": ["q_proj", "v_proj"],
    }
    make_adapter(folder / "sql", base, seed=2, **patterns, **sizes)
    make_adapter(folder / "heavy", base, seed=3, method=host().load("dora"), rank=2, **sizes)
    make_adapter(folder / "alien", other_base(base, folder / "other"), seed=4, **sizes)
    (folder / "hubkit.toml").write_text(RECIPE)
    hubkit.lock(folder, registry=str(registry), allow_base_mismatch=True)
    return folder


def publish(base: Path, folder: Path, registry: Path, **options: Any) -> None:
    make_adapter(folder, base, **options)
    hubkit.push(folder, "ana/chat", registry=str(registry))


def digest12(project: Path, name: str) -> str:
    (found,) = (one.digest for one in Lock.read(project).adapters if one.name == name)
    return found.removeprefix("sha256:")[:12]


def move_tag(base: Path, folder: Path, registry: Path) -> str:
    """Publishes another adapter and points the old version's tag at it; its commit."""
    make_adapter(folder, base, seed=9, version="1.1.0")
    commit = hubkit.push(folder, "ana/chat", registry=str(registry)).commit
    assert commit is not None
    place = DirectoryRegistry(registry)
    place.delete_tag("ana/chat", "v1.0.0")
    place.tag("ana/chat", "v1.0.0", commit)
    return commit


@pytest.fixture
def project(tiny_llama: Path, tmp_path: Path, registry: str) -> Path:
    return project_on(tiny_llama, tmp_path / "project", Path(registry))


@pytest.fixture
def resolver(plugin: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HUBKIT_LOCK", str(project / "hubkit.lock"))
    return plugin.HubkitResolver()


def refused(resolver: Any, base: Path | str, name: str) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        resolver.find(str(base), name)
    return refusal.value


def test_a_name_a_version_and_a_digest_lead_to_the_locked_adapter(
    resolver: Any, project: Path, tiny_llama: Path
) -> None:
    digest = digest12(project, "chat")
    for name in ("chat", "chat@1.0.0", "chat@v1.0.0", f"chat@{digest}"):
        found = resolver.find(str(tiny_llama), name)
        assert found.name == f"chat@{digest}"
        assert (found.path / "hubkit.json").read_bytes() == (project / "chat" / "hubkit.json").read_bytes()
    assert resolver.find(str(tiny_llama), "sql").name == f"sql@{digest12(project, 'sql')}"


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("chatt", "HK-NOT-FOUND", "ask for chat"),
        ("chat@2.0.0", "HK-NO-REVISION", "chat@1.0.0"),
        ("chat@0123456789ab", "HK-NO-REVISION", "chat@1.0.0"),
        ("heavy", "HK-ENGINE", "use_dora: true"),
        ("alien", "HK-BASE-MISMATCH", "model.norm.weight"),
        ("../project/sql", "HK-NOT-FOUND", "sql"),
        ("", "HK-NOT-FOUND", "chat, sql, heavy, alien"),
    ],
)
def test_what_does_not_hold_is_said(resolver: Any, tiny_llama: Path, name: str, code: str, line: str) -> None:
    error = refused(resolver, tiny_llama, name)
    assert error.code == code
    assert line in error.render()


def test_a_moved_tag_changes_nothing(resolver: Any, project: Path, tiny_llama: Path, registry: str) -> None:
    before = resolver.find(str(tiny_llama), "chat")
    move_tag(tiny_llama, project / "newer", Path(registry))
    assert resolver.find(str(tiny_llama), "chat") == before
    assert resolver.find(str(tiny_llama), "chat@1.0.0") == before


def test_a_flipped_byte_in_the_store_is_found_and_fetched_again(resolver: Any, tiny_llama: Path) -> None:
    path = resolver.find(str(tiny_llama), "chat").path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert (resolver.find(str(tiny_llama), "chat").path / "adapter_model.safetensors").read_bytes() == data


def test_a_folder_that_changes_after_it_was_proven_is_not_what_is_served(
    resolver: Any, project: Path, tiny_llama: Path
) -> None:
    """vLLM reads an adapter again when it had to give way: from a copy that nobody writes to."""
    served = resolver.find(str(tiny_llama), "sql").path / "adapter_model.safetensors"
    data = served.read_bytes()
    path = project / "sql" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert served.read_bytes() == data
    make_adapter(project / "sql", tiny_llama, seed=8)
    assert resolver.find(str(tiny_llama), "sql").path == served.parent


def test_another_adapter_than_was_locked_is_refused(resolver: Any, project: Path, tiny_llama: Path) -> None:
    make_adapter(project / "sql", tiny_llama, seed=8)
    assert refused(resolver, tiny_llama, "sql").code == "HK-LOCK-DRIFT"


def test_the_base_that_is_served_decides(resolver: Any, project: Path) -> None:
    error = refused(resolver, project / "other", "chat")
    assert error.code == "HK-BASE-MISMATCH"
    assert resolver.find(str(project / "other"), "alien").name.startswith("alien@")
    assert resolver.find("ana/base", "chat").name.startswith("chat@")  # the name in its manifest
    assert refused(resolver, "ana/other", "chat").code == "HK-BASE-MISMATCH"


def test_without_a_lock_names_are_those_of_the_registry(
    plugin: ModuleType, project: Path, tiny_llama: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUBKIT_LOCK", raising=False)
    resolver, digest = plugin.HubkitResolver(), digest12(project, "chat")
    before = resolver.find(str(tiny_llama), "ana/chat@1.0.0")
    assert before.name == f"ana/chat@{digest}"
    move_tag(tiny_llama, project / "newer", Path(registry))
    assert resolver.find(str(tiny_llama), "ana/chat@1.0.0") == before  # what it meant first, until the server ends
    assert refused(plugin.HubkitResolver(), tiny_llama, "ana/chat@1.0.0").code == "HK-MOVED"  # nor after a restart
    assert refused(resolver, tiny_llama, "ana/chat@^7").code == "HK-NO-REVISION"
    assert refused(resolver, tiny_llama, "ana/nothing").code == "HK-NOT-FOUND"
    for name in ("chat", f"file://{registry}/ana/chat", "/etc", "./project/sql", "ana/chat@main:folder"):
        assert refused(resolver, tiny_llama, name).code in ("HK-NOT-FOUND", "HK-REFERENCE"), name


def test_a_digest_finds_its_adapter_in_the_registry(
    plugin: ModuleType, project: Path, tiny_llama: Path, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUBKIT_LOCK", raising=False)
    publish(tiny_llama, project / "newer", Path(registry), seed=9, version="1.1.0")
    digest = digest12(project, "chat")
    assert plugin.HubkitResolver().find(str(tiny_llama), f"ana/chat@{digest}").name == f"ana/chat@{digest}"
    assert refused(plugin.HubkitResolver(), tiny_llama, "ana/chat@0123456789ab").code == "HK-NO-REVISION"


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ("vllm serve base --enable-lora", 16),
        ("vllm serve base --max-lora-rank 64 --port 1", 64),
        ("vllm serve base --max_lora_rank=8", 8),
        ("vllm serve base --config server.yaml", 512),
        ("python -m vllm.entrypoints.openai.api_server --model base", 512),
    ],
)
def test_the_servers_rank_is_read_off_its_command_line(plugin: ModuleType, line: str, rank: int) -> None:
    assert plugin.served_rank(line.split()) == rank


def test_a_rank_above_the_servers_is_refused(resolver: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "base", "--max-lora-rank", "1"])
    assert "rank 8: the server takes 1 at most" in refused(resolver, tiny_llama, "sql").render()


# In a real server


@pytest.fixture(scope="module")
def place() -> Path:
    return environment("vllm")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hubkit and the example are installed in, built as their wheels."""
    made = tmp_path_factory.mktemp("wheel")
    shutil.copytree(EXAMPLE, made / "example", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    (made / "hubkit").mkdir()
    for name in ("hubkit", "plugins", "schemas"):
        shutil.copytree(ROOT / name, made / "hubkit" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, made / "hubkit" / name)
    for source in ("hubkit", "example"):
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(made / source)]
        subprocess.run(build, check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(made / "site")]
    subprocess.run([*pip, *map(str, made.glob("*.whl"))], check=True, capture_output=True)
    return made / "site"


class Delay:
    """A way to a server that is slow: every connection through it waits."""

    def __init__(self, port: int, seconds: float) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.to, self.seconds = self.listening.getsockname()[1], port, seconds
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(here,), daemon=True).start()

    def _carry(self, here: socket.socket) -> None:
        time.sleep(self.seconds)
        there = socket.create_connection(("127.0.0.1", self.to))
        for source, target in ((here, there), (there, here)):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture(scope="module")
def served(
    place: Path, smol: Path, site: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Path]]:
    """(address of a `vllm serve` with the plugin and an empty store, the project, the registry's folder)."""
    folder = tmp_path_factory.mktemp("served")
    project = project_on(smol, folder / "project", folder / "registry", size=0.05)
    port = free_port()
    line = [sys.executable, "-m", "hubkit", "serve", str(folder / "registry"), "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    slow = Delay(port, 1.0)
    command = ["vllm", "serve", str(smol), "--served-model-name", "base", "--dtype", "float32", "--enable-lora"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager", "--max-loras", "2"]
    more = {
        "PYTHONPATH": str(site),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HUBKIT_LOCK": str(project / "hubkit.lock"),
        "HUBKIT_HOME": str(folder / "home"),
        "HUBKIT_REGISTRY": f"http://127.0.0.1:{slow.port}",
    }
    try:
        with running(command, folder, place, more) as url:
            yield url, project, folder / "registry"
    finally:
        slow.listening.close()
        server.terminate()
        server.wait(20)


def complete(url: str, model: str, prompt: Any = "The") -> tuple[int, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    return ask(f"{url}/v1/completions", body)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.model
class TestInVllm:
    def test_the_right_adapter_is_served_while_health_answers(self, served: tuple[str, Path, Path], smol: Path) -> None:
        """Pulled from a registry that takes its time, into an empty store."""
        url, project, _ = served
        ids = hubkit.load_tokenizer(smol)("The restaurant by the river serves fish and is open every day.")["input_ids"]
        answers: list[tuple[int, Any]] = []
        began = time.monotonic()
        asking = threading.Thread(target=lambda: answers.append(complete(url, "chat", ids)))
        asking.start()
        waits = []
        while asking.is_alive():
            start = time.monotonic()
            assert ask(f"{url}/health", timeout=5)[0] == 200
            waits.append(time.monotonic() - start)
            time.sleep(0.05)
        took = time.monotonic() - began
        ((status, answer),) = answers
        assert status == 200, answer
        assert answer["model"] == f"chat@{digest12(project, 'chat')}"
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        have = [float(row[str(token)]["logprob"]) for row, token in zip(rows, ids[1:], strict=True)]
        model = hubkit.load_base(smol, dtype="float32")
        want = of_model(hubkit.attach(model, project / "chat", base=smol), ids)
        assert differences(have, want)[0] < 2e-3
        print(f"\nresolved in {took:.1f} s, the slowest of {len(waits)} answers of /health {max(waits):.2f} s", end="")
        assert took > 2
        assert max(waits) < 1, "a resolver that blocked the loop would have held one answer all the while"

    @pytest.mark.parametrize(
        ("name", "status", "line"),
        [
            ("chatt", 404, "error[HK-NOT-FOUND]: no adapter 'chatt' is locked"),
            ("chat@2.0.0", 404, "error[HK-NO-REVISION]"),
            ("heavy", 409, "error[HK-ENGINE]"),
            ("alien", 409, "error[HK-BASE-MISMATCH]"),
        ],
    )
    def test_what_does_not_hold_is_refused_with_its_reason(
        self, served: tuple[str, Path, Path], name: str, status: int, line: str
    ) -> None:
        have, answer = complete(served[0], name)
        assert (have, line in json.dumps(answer)) == (status, True), answer

    def test_rslora_with_patterns_is_read_as_it_is(self, served: tuple[str, Path, Path], smol: Path) -> None:
        url, project, _ = served
        ids = hubkit.load_tokenizer(smol)("The restaurant by the river serves fish and is open every day.")["input_ids"]
        status, answer = complete(url, "sql", ids)
        assert status == 200, answer
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        have = [float(row[str(token)]["logprob"]) for row, token in zip(rows, ids[1:], strict=True)]
        model = hubkit.load_base(smol, dtype="float32")
        want = of_model(hubkit.attach(model, project / "sql", base=smol), ids)
        assert differences(have, want)[0] < 2e-3

    def test_a_moved_tag_and_a_flipped_byte(self, served: tuple[str, Path, Path], smol: Path) -> None:
        """In this order: the tag moves and nothing changes; a byte of the store flips, and a new name fetches it anew;
        then one of the registry's, too, and there is nothing to serve."""
        url, project, registry = served
        move_tag(smol, project / "newer", registry)
        digest = digest12(project, "chat")
        status, answer = complete(url, "chat@1.0.0")
        assert (status, answer["model"]) == (200, f"chat@{digest}"), answer
        (path,) = (project.parent / "home" / "store").rglob("adapter_model.safetensors")
        data = path.read_bytes()
        flip(path)
        status, answer = complete(url, "chat@v1.0.0")
        assert (status, answer["model"]) == (200, f"chat@{digest}"), answer
        assert path.read_bytes() == data
        flip(path)
        for held in (registry / "repos" / "ana" / "chat" / "objects").rglob("*"):
            if held.is_file() and held.read_bytes() == data:
                flip(held)
        status, answer = complete(url, f"chat@{digest}")
        assert (status, "error[HK-" in json.dumps(answer)) == (409, True), answer
        print(f"\na flipped byte: {answer}", end="")


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
