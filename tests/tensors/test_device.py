"""Words for devices, and what is said when one is not there, does not compute so, or is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from variants import refused, rows_file, say, tree

from hubkit.errors import USAGE
from hubkit.tensors.device import computing, described, device_named, forked_rng, indices, require_dtype
from hubkit.tensors.live.loading import load_base

GPU = torch.cuda.is_available() or torch.backends.mps.is_available()


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "cuda:-1", "", "cpu cuda"])
def test_a_word_that_names_none(word: str) -> None:
    error = refused("HK-DEVICE", device_named, word)
    assert error.status == USAGE
    assert "auto, cpu, cuda" in str(error.want)
    assert error.fix == ("--device cuda" if word == "gpu" else "--device auto")


@pytest.mark.parametrize("word", ["meta", "xpu", "hpu", "vulkan"])
def test_a_device_that_holds_no_values_here(word: str) -> None:
    error = refused("HK-DEVICE", device_named, word)
    assert error.fix == "--device auto"


@pytest.mark.skipif(GPU, reason="this machine has one")
def test_without_a_gpu() -> None:
    assert device_named("auto") == torch.device("cpu")
    assert described(torch.device("cpu")).startswith("cpu")
    for word, fix in (("cuda", "--device cpu"), ("cuda:1", "--device cpu"), ("mps", "--device cpu")):
        error = refused("HK-DEVICE", device_named, word)
        assert fix in error.fix
        assert error.have


def test_a_device_that_is_not_there_is_said_before_anything_is_read(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    for line in (
        ("train", tmp_path / "none", tmp_path / "none.jsonl", "-o", tmp_path / "out"),
        ("generate", "Hello", "--base", tmp_path / "none"),
    ):
        assert say(capsys, *line, "--device", "cuda:4096").refusal() == "HK-DEVICE"
        assert say(capsys, *line, "--device", "abacus").refusal(2) == "HK-DEVICE"
    refused("HK-DEVICE", load_base, tiny_llama, device="abacus")
    assert tree(tmp_path) == before


def test_both_commands_say_where_they_compute(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    done = say(capsys, "train", tiny_llama, rows, "-o", tmp_path / "out", "--steps", 1, "--device", "cpu")
    assert any(line.endswith("1 steps, on cpu") for line in done.err.splitlines())
    done = say(capsys, "generate", "Hello", "--base", tiny_llama, "--max-new-tokens", 2, "--device", "cpu", "--json")
    assert done.err.splitlines()[0] == "answering on cpu"
    assert '"device": "cpu"' in done.out


def test_a_full_memory_is_a_refusal() -> None:
    cpu = torch.device("cpu")

    def fill() -> None:
        with computing(cpu, "the base", "a smaller one"):
            torch.empty(1 << 50)

    error = refused("HK-MEMORY", fill)
    assert error.want == ["4194304.00 GiB more"]
    assert "DefaultCPUAllocator" in error.have[1]
    assert error.fix == "a smaller one"
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB", "2.50 GiB more"),
        ("MPS backend out of memory (MPS allocated: 17 GB). Tried to allocate 512.00 MB on private pool.", "512.00 MB"),
        ("CUDA error: out of memory", "more"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "more"),
    ],
)
def test_what_other_allocators_say(text: str, asked: str) -> None:
    def fail() -> None:
        with computing(torch.device("cpu"), "the base", "a smaller one"):
            raise RuntimeError(text)

    assert asked in str(refused("HK-MEMORY", fail).want)


@pytest.mark.parametrize("text", ["a fault of the code", "my cache ran out of memory slots: raise cache_size"])
def test_another_error_is_left_as_it_is(text: str) -> None:
    with pytest.raises(RuntimeError, match=text), computing(torch.device("cpu"), "the base", "nothing"):
        raise RuntimeError(text)


def test_the_generators_are_as_they_were() -> None:
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    with forked_rng(torch.device("cpu")):
        torch.rand(7)
    assert torch.equal(torch.rand(4), want)


def test_an_index_is_made_once_and_serves_with_gradient_when_it_was_made_without() -> None:
    with torch.inference_mode():
        made = indices((2, 0), torch.device("cpu"))
    assert made is indices((2, 0), torch.device("cpu"))
    x = torch.ones(3, requires_grad=True)
    x.index_select(0, made).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


def test_every_dtype_is_computed_on_a_cpu() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, None):
        require_dtype(torch.device("cpu"), dtype)


@pytest.fixture
def old_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards of 2018, as torch would tell of them."""
    monkeypatch.setattr(torch.version, "hip", None)
    told: dict[str, object] = {
        "is_available": True,
        "device_count": 2,
        "current_device": 1,
        "get_device_name": "Tesla T4",
        "get_device_capability": (7, 5),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


@pytest.mark.usefixtures("old_cards")
def test_a_number_beyond_the_last_card(tiny_llama: Path) -> None:
    assert device_named("cuda") == torch.device("cuda", 1)
    assert device_named("cuda:0") == torch.device("cuda", 0)
    for call in (lambda: device_named("cuda:2"), lambda: load_base(tiny_llama, device="cuda:2")):
        error = refused("HK-DEVICE", call)
        assert (error.want, error.have) == (["cuda:0: Tesla T4", "cuda:1: Tesla T4"], ["cuda:2"])


@pytest.mark.usefixtures("old_cards")
def test_a_card_that_does_not_compute_in_bfloat16(tiny_llama: Path) -> None:
    error = refused("HK-DTYPE", load_base, tiny_llama, "bfloat16", device="cuda:0")
    assert "Tesla T4" in error.what
    assert "--dtype float16" in error.fix
    for dtype in (torch.float16, torch.float32, None):
        require_dtype(torch.device("cuda", 0), dtype)
