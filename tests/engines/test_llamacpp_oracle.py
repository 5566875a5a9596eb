"""What llama.cpp's server answers from a deployment's own folder, beside hubkit's attached model.

The environment is made by ``scripts/engines/llamacpp DIR`` and found by ``HUBKIT_LLAMACPP=DIR``, or in
``.cache/engines/llamacpp``. ``pytest -m oracle -s tests/engines/test_llamacpp_oracle.py`` shows the figures of
RESULTS.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from torch import Tensor

import hubkit
from hubkit.verbs.deploy import Deployed

ROOT = Path(__file__).parent.parent.parent
TOOLS = Path(os.environ.get("HUBKIT_LLAMACPP") or ROOT / ".cache" / "engines" / "llamacpp").absolute()
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(
        not (TOOLS / "bin" / "llama-server").is_file(),
        reason=f"no llama.cpp in {TOOLS}: scripts/engines/llamacpp DIR, HUBKIT_LLAMACPP=DIR",
    ),
]

TEXTS = (
    "The restaurant is called Blue Spice. It serves French food in the riverside area, and prices are high.",
    "If a train travels 60 miles in one hour, then in three hours it travels 180 miles, because 3 times 60",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n\n\ndef multiply(a, b):",
    "Once upon a time there was a small village by the sea. Every morning the fishermen went out in their",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the pressure is lower, and so it",
    "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], area[riverside], near[Burger",
    "Janet has 12 apples. She gives 3 to her brother and buys 5 more at the market. How many apples does",
    "The first law of thermodynamics says that energy can neither be created nor destroyed. The second law says that",
    "Dear Sir or Madam, I am writing to apply for the position of a librarian that was advertised on your",
    "Paris is the capital of France, Rome is the capital of Italy, and Berlin is the capital of Germany. Of",
)
LENGTH, TOP = 20, 20
"""Positions of each text, and how many of the likeliest tokens are compared at each: 200 positions, 4000 numbers."""
WIDE = 2e-3
"""What two programs' sums in fp32 may differ by, over 30 layers."""
SPREAD = {"plain": 0.03, "patterned": 0.012}
"""Of the random factors: an effect of about a nat."""
PLAIN: dict[str, Any] = {"rank": 8}
PATTERNED: dict[str, Any] = {
    "rank": 4,
    "alpha": 32.0,
    "rslora": True,
    "targets": "q_proj,v_proj,o_proj",
    "rank_pattern": {"v_proj": 6},
    "alpha_pattern": {"o_proj": 12.0},
}


@dataclass(frozen=True)
class Bench:
    """A base, adapters of it, and hubkit's answers.

    Args:
        folder: with ``hubkit.toml``'s neighbours: the base as ``base``, adapters by name.
        ids: the texts as tokens, (10, 20).
        model: the base in fp32, with all adapters attached.
    """

    folder: Path
    ids: Tensor
    model: Any

    def wanted(self, mix: Any) -> Tensor:
        """Log-probabilities (10, 20, vocabulary), of each next token."""
        with torch.no_grad(), self.model.using(mix):
            return torch.log_softmax(self.model(self.ids).logits.double(), dim=-1)


@pytest.fixture(scope="module")
def bench(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("llamacpp")
    (folder / "base").symlink_to(smol)
    make_adapter(folder / "plain", smol, seed=1, size=SPREAD["plain"], **PLAIN)
    make_adapter(folder / "patterned", smol, seed=2, size=SPREAD["patterned"], **PATTERNED)
    both = f"{folder / 'plain'} + {folder / 'patterned'}"
    return Bench(folder, rows(smol), hubkit.attach(hubkit.load_base(smol, dtype="float32", device="cpu"), both))


def rows(base: Path) -> Tensor:
    tokenizer = hubkit.load_tokenizer(base)
    found = [tokenizer(text)["input_ids"][:LENGTH] for text in TEXTS]
    assert {len(row) for row in found} == {LENGTH}
    return torch.tensor(found)


@pytest.fixture(scope="module")
def mixture(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Random weights at the full structure of a mixture of experts, and an adapter of rank 4 on them all, ``plain``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "head_dim": 32}
    heads: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    tokenizer = hubkit.load_tokenizer(smol)
    torch.manual_seed(3)
    config = Qwen3MoeConfig(**sizes, **heads, **experts, vocab_size=len(tokenizer), initializer_range=0.1)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    make_adapter(folder / "plain", folder / "base", seed=4, size=0.1, rank=4, targets="all-linear")
    base = hubkit.load_base(folder / "base", dtype="float32", device="cpu")
    return Bench(folder, rows(smol), hubkit.attach(base, folder / "plain"))


def deployed(
    bench: Bench, name: str, members: Mapping[str, float], engine: str = "llamacpp", **settings: Any
) -> Deployed:
    """A deployment for an engine of some of the adapters, from a recipe, through its lock."""
    target = {"llama-cpp": str(TOOLS), "dtype": "f32", **settings}
    target = {key: value for key, value in target.items() if value is not None}
    lines = ["[base]", 'source = "./base"']
    for member, weight in members.items():
        lines += [f"[adapters.{member}]", f'source = "./{member}"', f"weight = {weight}"]
    lines += [f"[targets.{engine}]", *(f'"{key}" = {json.dumps(value)}' for key, value in target.items())]
    (bench.folder / "hubkit.toml").write_text("\n".join(lines) + "\n", "utf-8")
    hubkit.lock(bench.folder / "hubkit.toml")
    return hubkit.deploy(bench.folder / name, engine=engine, lock=bench.folder, replace=True)


PRECISE = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
"""Attention in fp32: the server's own default rounds keys and values to 16 bits."""


@contextmanager
def serving(folder: Path, command: tuple[str, ...], *more: str) -> Iterator[str]:
    """The address of a server started by a command, in its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{TOOLS / 'bin'}:{os.environ['PATH']}"
    words = [*command, *more, "--port", str(port), "-c", "512", "-np", "1", "-t", "1"]
    with (folder.parent / "server.log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, env={**os.environ, "PATH": path}, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while not _healthy(address):
                assert server.poll() is None, (folder.parent / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as answer:
        return json.load(answer)


def next_tokens(address: str, ids: list[int], **body: Any) -> dict[int, float]:
    """Token id -> log-probability, of the likeliest next tokens."""
    body = {"prompt": ids, "n_predict": 1, "n_probs": TOP, "temperature": 0.0, "cache_prompt": False, **body}
    answer = ask(address, "/completion", **{key: value for key, value in body.items() if value is not None})
    return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}


@dataclass(frozen=True)
class Difference:
    """Largest and mean difference of log-probabilities, and at how many positions of how many the likeliest agree."""

    largest: float
    mean: float
    same: int
    decided: int

    def __str__(self) -> str:
        return f"largest {self.largest:.1e}, mean {self.mean:.1e}, top-1 {self.same} of {self.decided}"


def difference(address: str, bench: Bench, wanted: Tensor, tie: float = 0.02, **body: Any) -> Difference:
    """At every position of every text, one request each.

    Args:
        tie: where the two likeliest are closer than this, which one is first says nothing.
    """
    errors, same, decided = [], 0, 0
    for row, ids in enumerate(bench.ids.tolist()):
        for at in range(LENGTH):
            have, want = next_tokens(address, ids[: at + 1], **body), wanted[row, at]
            errors += [abs(value - float(want[token])) for token, value in have.items()]
            first, second = want.topk(2).values.tolist()
            decided += first - second > tie
            same += first - second > tie and max(have, key=lambda one: have[one]) == int(want.argmax())
    return Difference(max(errors), sum(errors) / len(errors), same, decided)


def only(number: int, count: int = 1, scale: float = 1.0) -> dict[str, Any]:
    return {"lora": [{"id": one, "scale": scale if one == number else 0.0} for one in range(count)]}


def say(what: str, found: object) -> None:
    """A figure for RESULTS.md, with ``-s``."""
    print(f"\nllama.cpp, {what}: {found}")


@pytest.mark.parametrize(
    ("name", "members", "mix"),
    [
        ("plain", {"plain": 1.0}, "plain"),
        ("patterned", {"patterned": 1.0}, "patterned"),
        ("sum", {"plain": 0.7, "patterned": -0.5}, {"plain": 0.7, "patterned": -0.5}),
    ],
    ids=["plain", "rslora-patterns", "sum"],
)
def test_f32_is_the_attached_model(bench: Bench, name: str, members: dict[str, float], mix: Any) -> None:
    done = deployed(bench, f"run-{name}", members)
    wanted = bench.wanted(mix if isinstance(mix, str) else hubkit.Sum(mix))
    with serving(done.path, done.command, *PRECISE) as address:
        found = difference(address, bench, wanted, **only(0))
        base = difference(address, bench, bench.wanted(None), **only(0, scale=0.0))
        listed = ask(address, "/lora-adapters")
    effect = float((wanted - bench.wanted(None)).abs().topk(TOP).values.mean())
    say(f"f32, {name} (effect {effect:.2f})", found)
    say("f32, its base", base)
    assert [one["scale"] for one in listed] == [0.0]
    assert listed[0]["task_name"].startswith(("plain@", "patterned@", "mix@"))
    assert found.largest <= WIDE
    assert base.largest <= WIDE
    assert effect > 100 * WIDE
    assert found.same == found.decided


def test_experts_are_the_attached_models(mixture: Bench) -> None:
    done = deployed(mixture, "run-plain", {"plain": 1.0})
    wanted, bare = mixture.wanted("plain"), mixture.wanted(None)
    # of a random model the likeliest token may be an end or half a character, with which the server says nothing; which
    # one is drawn does not change the log-probabilities
    (letter,) = hubkit.load_tokenizer(mixture.folder / "base")("a")["input_ids"]
    drawn: dict[str, Any] = {"logit_bias": [[letter, 1000.0]]}
    with serving(done.path, done.command, *PRECISE) as address:
        found = difference(address, mixture, wanted, **only(0), **drawn)
        base = difference(address, mixture, bare, **only(0, scale=0.0), **drawn)
    effect = float((wanted - bare).abs().topk(TOP).values.mean())
    say(f"f32, experts (effect {effect:.2f})", found)
    say("f32, their base", base)
    assert max(found.largest, base.largest) <= WIDE
    assert effect > 100 * WIDE
    assert found.same == found.decided


def test_every_member_by_itself(bench: Bench) -> None:
    done = deployed(bench, "run-each", {"plain": 1.0, "patterned": 1.0}, serve="each")
    request = json.loads((done.path / "request.json").read_text())
    with serving(done.path, done.command, *PRECISE) as address:
        for number, name in enumerate(("plain", "patterned")):
            want, ids = bench.wanted(name)[0, -1], bench.ids[0].tolist()
            have = next_tokens(address, ids, **only(number, 2))
            assert max(abs(value - float(want[token])) for token, value in have.items()) <= WIDE
        answer = ask(address, "/completion", **request)
        chat = ask(
            address, "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, **only(1, 2)
        )
    assert answer["content"]
    assert answer["generation_settings"]["lora"] == request["lora"]
    assert chat["choices"][0]["message"]["content"]


def test_nothing_is_left_of_an_earlier_request(bench: Bench) -> None:
    """With the command as it is; the same server that keeps prompts answers from what an adapter computed."""
    done = deployed(bench, "run-plain", {"plain": 1.0})
    ids, other = bench.ids[0].tolist(), bench.ids[1].tolist()
    base = bench.wanted(None)[0, -1]

    def after(address: str) -> float:
        """How far the base's answer is off after one of the adapter's, to a client that asks for the cache."""
        next_tokens(address, ids, cache_prompt=True, **only(0))
        have = next_tokens(address, ids, cache_prompt=True)
        return max(abs(value - float(base[token])) for token, value in have.items())

    def again(address: str) -> float:
        """The same with another prompt between, which sends the first one to the cache in memory."""
        next_tokens(address, ids, cache_prompt=True, **only(0))
        next_tokens(address, other, cache_prompt=True, **only(0, scale=0.0))
        have = next_tokens(address, ids, cache_prompt=True, **only(0, scale=0.0))
        return max(abs(value - float(base[token])) for token, value in have.items())

    keeping = tuple(word for word in done.command if word not in ("--no-cache-prompt", "--cache-ram", "0"))
    with serving(done.path, keeping, *PRECISE) as address:
        say("an empty list after an adapter, default server", after(address))
        say("scale 0 after an adapter and another prompt, default server", again(address))
    with serving(done.path, done.command, *PRECISE) as address:
        next_tokens(address, ids, cache_prompt=None, **only(0))
        have = next_tokens(address, ids, cache_prompt=None)
        assert max(abs(value - float(base[token])) for token, value in have.items()) <= WIDE
        assert again(address) <= WIDE


def test_f16_and_its_perplexity(bench: Bench) -> None:
    done = deployed(bench, "run-half", {"patterned": 1.0}, dtype="f16", adapter_dtype="f16")
    with serving(done.path, done.command) as address:
        found = difference(address, bench, bench.wanted("patterned"), **only(0))
    say("f16, patterned", found)
    assert found.same >= 0.95 * found.decided
    rows = [
        json.loads(line) for line in (ROOT / "examples" / "data" / "e2e_heldout.jsonl").read_text("utf-8").splitlines()
    ]
    text = "\n".join(" ".join(map(str, row.values())) for row in rows[:60])
    (done.path.parent / "text.txt").write_text(text, "utf-8")
    (adapter,) = (done.path / "adapters").glob("*/adapter.gguf")
    have = perplexity(done.path / "base" / "base.gguf", adapter, done.path.parent / "text.txt")
    want = own_perplexity(bench, "patterned", text)
    say("f16 perplexity", f"{have:.4f}, hubkit in fp32 {want:.4f}, {have / want - 1:+.2%}")
    assert abs(have / want - 1) <= 0.01


WINDOW = 256


def perplexity(base: Path, adapter: Path, text: Path) -> float:
    """By llama.cpp's own program: windows of 256 tokens, the second half of each counts."""
    words = [TOOLS / "bin" / "llama-perplexity", "-m", base, "--lora", adapter, "-f", text, "-c", WINDOW, "-b", WINDOW]
    ran = subprocess.run([*map(str, words), "-t", "1"], capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", ran.stdout + ran.stderr)
    assert found is not None, ran.stderr[-2000:]
    return float(found[1])


def own_perplexity(bench: Bench, mix: str, text: str) -> float:
    """The same of the attached model in fp32."""
    ids = torch.tensor(hubkit.load_tokenizer(bench.folder / "base")(text)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = []
    with torch.no_grad(), bench.model.using(mix):
        for window in windows:
            logits = bench.model(window[None]).logits[0, WINDOW // 2 : -1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[WINDOW // 2 + 1 :], reduction="sum"))
    return float((torch.stack(losses).sum() / (len(windows) * (WINDOW // 2 - 1))).exp())


@pytest.mark.parametrize(("name", "lost"), [("plain", False), ("patterned", True)])
def test_what_its_own_converter_loses(bench: Bench, name: str, lost: bool) -> None:
    done = deployed(bench, f"run-{name}", {name: 1.0})
    peft = bench.folder / f"{name}-peft"
    if not peft.exists():
        hubkit.export(bench.folder / name, peft, to="peft")
    theirs = done.path.parent / f"{name}-theirs.gguf"
    script, python = TOOLS / "convert_lora_to_gguf.py", TOOLS / "bin" / "python"
    words = [python, script, "--base", bench.folder / "base", "--outfile", theirs, "--outtype", "f32", peft]
    subprocess.run([*map(str, words)], check=True, capture_output=True)
    command = tuple(f"{theirs}:0" if word.endswith("adapter.gguf:0") else word for word in done.command)
    with serving(done.path, command, *PRECISE) as address:
        found = difference(address, bench, bench.wanted(name), **only(0))
    say(f"f32, {name} by convert_lora_to_gguf.py", found)
    assert (found.largest > 50 * WIDE) == lost
    assert (found.largest <= WIDE) != lost


def test_merged_into_the_base_is_the_adapter_beside_it(bench: Bench) -> None:
    """By both ways: written into the base's GGUF, and merged and converted; the sum in fp32 is not rounded to bf16."""
    done = deployed(bench, "run-patterned", {"patterned": 1.0})
    shutil.copyfile(done.path / "base" / "base.gguf", bench.folder / "base.gguf")
    merged = deployed(
        bench, "run-ollama", {"patterned": 1.0}, "ollama", gguf="base.gguf", **{"llama-cpp": None, "dtype": None}
    )
    (model,) = merged.path.glob("*.gguf")
    assert merged.unproven
    with serving(merged.path, ("llama-server", "--model", model.name), *PRECISE) as address:
        found = difference(address, bench, bench.wanted("patterned"))
    say("f32, merged into the base's GGUF", found)
    assert found.largest <= WIDE
    converted = deployed(bench, "run-converted", {"patterned": 1.0}, "ollama")
    (model,) = converted.path.glob("*.gguf")
    with serving(converted.path, ("llama-server", "--model", model.name), *PRECISE) as address:
        found = difference(address, bench, bench.wanted("patterned"))
    say("merged in bf16 and converted", found)
    assert found.same >= 0.95 * found.decided
