"""A user's own architectures: what their JSON says is used as if it were shipped, and what is wrong with it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import refused, say

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize, tiny_model
from hubkit.tensors.base.arch import arch_of, decoders, known_layers
from hubkit.tensors.base.archfile import VARIABLE
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter


class Mixer(nn.Module):
    """A layer of a made-up architecture: two sub-layers that no shipped table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.turn = nn.LayerNorm(8), nn.Linear(8, 8)
        self.after, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.turn(self.before(x))
        y: Tensor = x + self.narrow(torch.relu(self.wide(self.after(x))))
        return y


class Mixers(nn.Module):
    """Two of them and a head that is called otherwise than any shipped one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "mixers", "to_dict": lambda self: {"model_type": "mixers"}})()
        self.table, self.blocks = nn.Embedding(20, 8), nn.ModuleList([Mixer(), Mixer()])
        self.readout = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.readout(x)
        return y


MIXERS: dict[str, Any] = {
    "heads": ["readout"],
    "layers": ["blocks"],
    "sublayers": [
        {"role": "attention", "name": "attention", "projection": "turn", "output": "turn", "residual": "before"},
        {"role": "feedforward", "name": "feed", "projection": "narrow", "output": "narrow", "residual": "after"},
    ],
}


def named(monkeypatch: pytest.MonkeyPatch, folder: Path, document: Any, name: str = "arch.json") -> Path:
    path = folder / name
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_a_made_up_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, ids = Mixers(), torch.arange(6)[None]
    method = host().load("adapters")
    config = parse_config(method.info.config, {"placement": "houlsby", "width": 3}, "test")
    assert "readout" in [s.name for s in Base.from_model(model).match("all-linear")]
    refused("HK-TARGET", Adapter.fresh, "a", method, config, Base.from_model(model), 0)
    named(monkeypatch, tmp_path, {"mixers": MIXERS})
    base = Base.from_model(model)
    assert "readout" not in [s.name for s in base.match("all-linear")]
    assert {s.role for s in base.sites.values() if isinstance(s, Block)} == {"attention", "feedforward"}
    plain, attached = model(ids), Attached(model, base)
    attached.add("a", randomize(Adapter.fresh("a", method, config, base, 0), 1))
    attached.set_mix("a")
    assert (attached(ids) - plain).abs().max() > 1e-2
    assert torch.equal(attached.detach()(ids), plain)


def examples() -> list[dict[str, Any]]:
    """What docs/bases.md gives as examples."""
    text = (Path(__file__).parents[3] / "docs" / "bases.md").read_text("utf-8")
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def test_the_examples_teach_what_the_refusals_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown type that is built as Llama is: refused with what to write, and with that as good as Llama."""
    model: Any = tiny_model("llama")
    model.config.model_type = "frob"
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("FrobAttention", (type(layer.self_attn),), {})
    made = {name: host().load(name) for name in ("adapters", "prefix", "prompt")}
    configs = {name: parse_config(method.info.config, SMALL[name], "test") for name, method in made.items()}
    for name, code in (("adapters", "HK-TARGET"), ("prefix", "HK-ARCH"), ("prompt", "HK-ARCH")):
        error = refused(code, Adapter.fresh, "a", made[name], configs[name], Base.from_model(model), 0)
        assert '{"frob": {' in error.fix
        assert VARIABLE in error.fix
    ids = torch.arange(6)[None]
    plain = model(ids).logits
    short, long = examples()
    for document, names in ((short, made), (long, ["adapters"])):
        named(monkeypatch, tmp_path, document, f"{len(names)}.json")
        base = Base.from_model(model)
        for name in names:
            attached = Attached(model, base)
            attached.add("a", randomize(Adapter.fresh("a", made[name], configs[name], base, 0), 1))
            attached.set_mix("a")
            assert (attached(ids).logits - plain).abs().max() > 1e-3
            attached.detach()


SMALL: dict[str, dict[str, Any]] = {
    "adapters": {"width": 3},
    "prefix": {"num_virtual_tokens": 2},
    "prompt": {"num_virtual_tokens": 2},
}


def test_it_is_merged_over_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = arch_of("llama")
    named(monkeypatch, tmp_path, {"llama": {"heads": ["out"]}, "mixers": {"like": "llama", "attention": "Mix"}})
    assert arch_of("llama").heads == ("out",)
    assert (arch_of("llama").attention, arch_of("llama").sublayers) == (shipped.attention, shipped.sublayers)
    assert arch_of("mixers").sublayers == shipped.sublayers
    assert "mixers" in decoders()
    assert "mixers" in known_layers()
    monkeypatch.delenv(VARIABLE)
    assert arch_of("llama") == shipped
    assert "mixers" not in decoders()


def test_like_is_followed_and_may_go_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"far": {"like": "near"}, "near": {"like": "qwen2"}, "one": {"like": "two"}, "two": {"like": "one"}}
    named(monkeypatch, tmp_path, document)
    assert arch_of("far").sublayers == arch_of("llama").sublayers != ()
    assert arch_of("one").sublayers == ()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"mixers": {"head": ["x"]}}, "mixers.head: unknown key, near: heads"),
        ({"mixers": {"heads": "readout"}}, 'mixers.heads: "readout", want a list of names'),
        ({"mixers": {"learned_positions": 1}}, "true or false"),
        ({"mixers": {"without": {"keys": "x"}}}, "kv or tokens to reasons"),
        ({"mixers": {"norms": "("}}, "a regular expression"),
        ({"mixers": {"like": "nothing"}}, "no type of the table"),
        ({"mixers": {"sublayers": [{"role": "attention", "name": "x"}]}}, "mixers.sublayers[0].residual: missing"),
        ({"mixers": {"sublayers": [{**MIXERS["sublayers"][0], "role": "memory"}]}}, "attention or feedforward"),
        ({"mixers": {"encoder": {"attention": []}}}, "mixers.encoder.attention"),
        ({"mixers": {"encoder": {}}}, "mixers.encoder.attention: missing"),
        ({"mixers": []}, "mixers: [], want an object"),
        ([MIXERS], "list, not an object"),
        (b"{", "Expecting"),
        (b"\xff\xfe\x00", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_what_is_wrong_is_said(document: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = named(monkeypatch, tmp_path, document)
    for _ in range(2):
        error = refused("HK-ARCH-FILE", arch_of, "llama")
        assert said in str(error.have)
        assert error.where == str(path)


def test_every_fault_at_once_and_no_traceback(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two"}\n')
    named(monkeypatch, tmp_path, {"a": {"head": [], "heads": [1]}, "b": 3})
    said = say(capsys, "train", tiny_llama, rows, "-o", tmp_path / "out")
    assert said.refusal() == "HK-ARCH-FILE"
    assert all(text in said.err for text in ("a.head", "a.heads", "b: 3"))
    assert not (tmp_path / "out").exists()
    for missing in (tmp_path / "none.json", tmp_path):
        monkeypatch.setenv(VARIABLE, str(missing))
        refused("HK-ARCH-FILE", arch_of, "llama")
