"""compose of methods that are not low-rank, mixed with those that are: the sum of their changes, by their papers'
formulas in fp64; what is refused; and that the result is an ordinary adapter."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from example_method import SOURCE
from installing import offer
from making import make_adapter
from safetensors.torch import load_file
from torch import Tensor
from variants import logits, refused, say, tree

from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.methods.host import host
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack
from hubkit.verbs.push import push
from hubkit.verbs.verify import verify

EXACT = 1e-6
"""Relative error, in the norm of one tensor's change, of fp32 products and quotients against fp64."""
BEST = 1e-5
"""The same of fp32 factors of a best approximation."""
DORA, FULL, SELECTIVE = "dora", "full", "selective"


def write_changes(base: str, root: str) -> None:
    """Reads each adapter ``c-*`` in `root` and writes its changes beside it, by the names of the tensors."""
    from pathlib import Path

    from safetensors.torch import save_file

    from hubkit.artifact.folder import open_adapter
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.base.base import Base

    for folder in sorted(path for path in Path(root).glob("c-*") if path.is_dir()):
        found: dict[str, Tensor | None] = {}
        adapter = read_adapter(open_adapter(folder), Base.from_folder(Path(base)), dtype="master")
        for site in adapter.sites.values():
            delta = adapter.delta(site)
            assert delta is not None
            found |= {f"{site.name}.weight": delta.matrix(), f"{site.name}.bias": delta.bias}
        save_file({name: t.contiguous() for name, t in found.items() if t is not None}, f"{folder}.safetensors")


def member(folder: Path, base: Path, method: str, **options: Any) -> Path:
    return make_adapter(folder, base, method=host().load(method), **options)


def changes(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Name of a tensor -> what the adapter adds to it, (out, in) or (out,), by the formats and papers, in fp64."""
    tensors = {name: value.double() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    if not (adapter / "adapter_config.json").exists():
        return tensors
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(base / "model.safetensors")
    made = {}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        site, a, b = stem.removeprefix("base_model.model."), tensors[key], tensors[f"{stem}.lora_B.weight"]
        alpha, rank = float(config["lora_alpha"]), a.shape[0]
        for pattern, value in config["alpha_pattern"].items():
            alpha = float(value) if re.match(rf"(.*\.)?({pattern})$", site) else alpha
        change = alpha / (rank**0.5 if config["use_rslora"] else rank) * (b @ a)
        if config["use_dora"]:
            weight = weights[f"{site}.weight"].double()
            weight = weight.t() if config["fan_in_fan_out"] else weight
            turned = weight + change
            change = tensors[f"{stem}.lora_magnitude_vector"][:, None] * turned / turned.norm(dim=1)[:, None] - weight
        made[f"{site}.weight"] = change
    return made


def added(parts: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part, weight in parts:
        for name, change in part.items():
            total[name] = total.get(name, 0.0) + weight * change
    return total


def near(have: Tensor, want: Tensor, error: float, name: object = "") -> None:
    assert torch.linalg.norm(have.double() - want) <= error * torch.linalg.norm(want), name


def changed_by(folder: Path, base: Path) -> dict[str, Tensor]:
    """What the adapter ``c-*`` at `folder` adds to each tensor, as it is read."""
    write_changes(str(base), str(folder.parent))
    found: dict[str, Tensor] = load_file(f"{folder}.safetensors")
    return found


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    made: Tensor = (u[:, :rank] * values[:rank]) @ vt[:rank]
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_grid_of_mixed_methods(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Ranks, signs, scale rules and patterns of DoRA, every combination in one of the two families, with a LoRA, a full
    and a selective member: biases, norms, embeddings, a tied head, transposed weights. Reloaded in one new process."""
    base = request.getfixturevalue(f"tiny_{family}")
    first = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    patterns = {"rank_pattern": {first: 3}, "alpha_pattern": {rf".*[.]1[.].*{first}": 9.0}}
    fixed = [
        make_adapter(tmp_path / "low", base, seed=1, rank=5, alpha=7),
        member(tmp_path / "full", base, FULL, seed=2),
        member(tmp_path / "part", base, SELECTIVE, seed=3, weights=(first, "all-norm")),
    ]
    parts = [changes(path, base) for path in fixed]
    want: dict[str, dict[str, Tensor]] = {}
    plain, other = (False, True) if family == "llama" else (True, False)
    scales: list[tuple[bool, dict[str, Any]]] = [(plain, {}), (other, patterns)]
    for rank, sign, (rslora, given) in itertools.product((4, 8, 16), (1, -1), scales):
        name, operator = f"{len(want):02}", ("sum", "average")[rank == 8]
        dora = member(tmp_path / name, base, DORA, seed=len(want), rank=rank, rslora=rslora, alpha=3, **given)
        weights = {dora: 1.5, fixed[0]: sign * 0.75, fixed[1]: -0.5, fixed[2]: 2.0}
        terms = {str(path): weight for path, weight in weights.items()}
        done = compose(terms, tmp_path / f"c-{name}", method=operator, base=str(base))
        assert done.rank == 0
        total = sum(weights.values()) if operator == "average" else 1.0
        scaled = [weight / total for weight in weights.values()]
        want[f"c-{name}"] = added(list(zip([changes(dora, base), *parts], scaled, strict=True)))
    script = f"import sys\n{inspect.getsource(write_changes)}\nwrite_changes(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", script, base, tmp_path], check=True)
    assert len(want) == 12
    for name, tensors in want.items():
        have = load_file(tmp_path / f"{name}.safetensors")
        assert {n for n in have if not n.startswith("lm_head")} == {n for n in tensors if not n.startswith("lm_head")}
        for tensor, change in tensors.items():
            near(have[tensor], change, EXACT, (name, tensor))


def test_a_rank_is_dense_svds_best_approximation(tiny_llama: Path, tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a", tiny_llama, seed=1, rank=5, targets=["q_proj", "up_proj"])
    b = member(tmp_path / "b", tiny_llama, DORA, seed=2, rank=4)
    c = member(tmp_path / "c", tiny_llama, SELECTIVE, seed=3, weights=("v_proj",), biases=())
    weights = {a: 0.5, b: -1.0, c: 2.0}
    want = added([(changes(path, tiny_llama), weight) for path, weight in weights.items()])
    for rank in (1, 6, 16, 999):
        done = compose({str(p): w for p, w in weights.items()}, tmp_path / f"c-{rank}", base=str(tiny_llama), rank=rank)
        assert done.rank == min(rank, 16), "no change of a weight of 16 rows or columns has more"
    for rank in (1, 6, 16, 999):
        have = changed_by(tmp_path / f"c-{rank}", tiny_llama)
        assert set(have) == set(want)
        for name, change in want.items():
            near(have[name], best(change, rank), BEST, (rank, name))


def test_a_tie_that_one_member_breaks(tiny_gpt2: Path, tmp_path: Path) -> None:
    """A full member's head follows its table; a LoRA on the table alone leaves the head as it is, and so does a sum."""
    low = make_adapter(tmp_path / "low", tiny_gpt2, seed=1, targets=["wte"])
    full = member(tmp_path / "full", tiny_gpt2, FULL, seed=2, targets=("wte", "wpe"))
    compose({str(full): 2.0}, tmp_path / "c-one")
    compose({str(full): 2.0, str(low): 1.0}, tmp_path / "c-two")
    one, two = (changed_by(tmp_path / f"c-{n}", tiny_gpt2) for n in ("one", "two"))
    table = changes(full, tiny_gpt2)["transformer.wte.weight"]
    near(one["lm_head.weight"], 2 * table.t(), EXACT)
    near(two["lm_head.weight"], 2 * table.t(), EXACT)
    assert not torch.allclose(two["transformer.wte.weight"], two["lm_head.weight"].t(), atol=1e-3)
    for name, terms in (("one", {str(full): 2.0}), ("two", {str(full): 2.0, str(low): 1.0})):
        merge(str(tiny_gpt2), terms, tmp_path / f"want-{name}")
        merge(str(tiny_gpt2), str(tmp_path / f"c-{name}"), tmp_path / f"have-{name}")
        want, have = (load_base(tmp_path / f"{which}-{name}") for which in ("want", "have"))
        assert (logits(have) - logits(want)).abs().max() <= 1e-5


@pytest.mark.parametrize("cut", [None, 6])
def test_the_result_is_an_ordinary_adapter(cut: int | None, tiny_llama: Path, registry: str, tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a", tiny_llama, seed=1, rank=3)
    b = member(tmp_path / "b", tiny_llama, DORA, seed=2, rank=4)
    done = compose({str(a): 1.0, str(b): -0.5}, tmp_path / "c", base=str(tiny_llama), rank=cut)
    packed = pack(tmp_path / "c", version="1.2.0", license="mit")
    digests = [Manifest.read(path).digest for path in (a, b)]
    manifest = open_adapter(tmp_path / "c").manifest
    assert [(p.reference, p.digest, p.weight) for p in manifest.parents] == [
        ("a", digests[0], 1),
        ("b", digests[1], -0.5),
    ]
    assert manifest.composition == done.composition
    push(tmp_path / "c", "ana/c")
    verify("ana/c@v1.2.0", base=str(tiny_llama))
    assert Manifest.read(tmp_path / "c").digest == packed.digest
    merge(str(tiny_llama), "ana/c@^1.0", tmp_path / "merged")
    merged = dict(load_base(tmp_path / "merged").named_parameters())
    with attach(load_base(tiny_llama), "ana/c").merge() as live:
        assert all(torch.equal(merged[name], value) for name, value in live.named_parameters())
    if cut is None:
        with attach(load_base(tiny_llama), {str(a): 1.0, str(b): -0.5}).merge() as both:
            for name, value in both.named_parameters():
                near(merged[name], value.double(), EXACT, name)
    again = compose(f"ana/c - {a}", tmp_path / "again", base=str(tiny_llama))
    assert again.parents[0].digest == packed.digest


def test_one_member_and_one_twice(tiny_llama: Path, tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a", tiny_llama, seed=1, rank=3)
    compose({str(a): -2.0}, tmp_path / "c-one")
    twice = compose(f"{a} + 0.5*{a}", tmp_path / "c-two")
    assert [(p.reference, p.weight) for p in twice.parents] == [("a", 1.0), ("a", 0.5)]
    compose(f"{a} - {a}", tmp_path / "c-none")
    one, two, none = (changed_by(tmp_path / f"c-{n}", tiny_llama) for n in ("one", "two", "none"))
    for name, change in changes(a, tiny_llama).items():
        near(one[name], -2 * change, EXACT)
        near(two[name], 1.5 * change, EXACT)
        assert torch.linalg.norm(none[name].double()) <= EXACT * torch.linalg.norm(change)


def rewritten(adapter: Path, **fields: Any) -> Path:
    """The adapter with other fields in its manifest."""
    manifest = replace(Manifest.read(adapter), **fields)
    (adapter / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return adapter


def test_added_vocabularies(tiny_llama: Path, tmp_path: Path) -> None:
    one, other = {"tokens": {"<a>": 320}}, {"tokens": {"<b>": 320}}
    a, b, c = (make_adapter(tmp_path / n, tiny_llama, seed=i) for i, n in enumerate("abc"))
    rewritten(a, vocabulary=one)
    rewritten(b, vocabulary=other)
    before = tree(tmp_path)
    error = refused("HK-VOCABULARY", compose, f"{a} + {b}", tmp_path / "out")
    assert error.have == ['a: {"tokens":{"<a>":320}}', 'b: {"tokens":{"<b>":320}}']
    assert refused("HK-VOCABULARY", compose, f"{c} + {b}", tmp_path / "out").have[0] == "c: none"
    assert tree(tmp_path) == before
    rewritten(b, vocabulary=one)
    assert refused("HK-COMPOSE", compose, f"{a} + {b}", tmp_path / "out").have == ["a", "b"]


def test_what_cannot_be_summed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make_adapter(tmp_path / n, tiny_llama, seed=i) for i, n in enumerate("ab"))
    prefix = member(tmp_path / "prefix", tiny_llama, "prefix", num_virtual_tokens=3, init="small")
    bottleneck = member(tmp_path / "bottleneck", tiny_llama, "adapters")
    full = member(tmp_path / "full", tiny_llama, FULL)
    dora = member(tmp_path / "dora", tiny_llama, DORA)
    lost = rewritten(make_adapter(tmp_path / "lost", tiny_llama), config={"targets": ["nope"], "rank": 2})
    out, both = tmp_path / "out", (a, "+", b)
    before = tree(tmp_path)
    for line, status, code in (
        ((a, "+", prefix), 1, "HK-COMPOSE"),
        ((a, "+", f"0.5*{prefix}"), 1, "HK-COMPOSE"),
        ((a, "-", bottleneck), 1, "HK-COMPOSE"),
        ((a, "+", lost), 1, "HK-TARGET"),
        ((a, "+", dora), 1, "HK-BASE-NEEDED"),
        ((a, "+", full, "--rank", "4"), 1, "HK-COMPOSE"),
        ((a, "+", full, "--energy", "0.9"), 1, "HK-COMPOSE"),
        ((*both, "--rank", "0"), 2, "HK-RANK"),
        ((*both, "--rank", "-3"), 2, "HK-RANK"),
        ((*both, "--method", "ties", "--density", "1.01"), 2, "HK-DENSITY"),
        ((*both, "--method", "ties", "--density", "-0.5"), 2, "HK-DENSITY"),
        ((f"1e39*{a}", "+", full), 1, "HK-NAN"),
        (("inf*./a", "+", b), 2, "HK-REFERENCE"),
    ):
        assert say(capsys, "compose", *line, "-o", out).refusal(status) == code, line
        assert tree(tmp_path) == before, line
    refused("HK-TERMS", compose, {str(a): float("nan")}, out)
    refused("HK-TERMS", compose, {}, out)
    assert compose(f"{a} + {b}", out, rank=10**6).rank == 4, "a rank above the members' leaves nothing out"


def test_where_nothing_that_is_installed_holds_the_result(tiny_llama: Path, tmp_path: Path, packages: Path) -> None:
    """Another package claims every method that could: none of them can be loaded, and none is a member's own."""
    offer(packages, "hubkit-ia3", {"ia3": SOURCE})
    members = [make_adapter(tmp_path / n, tiny_llama, seed=i, method=host().load("ia3")) for i, n in enumerate("ab")]
    compose(f"{members[0]} + {members[1]}", tmp_path / "whole", base=tiny_llama)
    offer(packages, "hubkit-rival", dict.fromkeys(set(host().offers()) - {"ia3"}, SOURCE))
    host.cache_clear()
    refused("HK-COMPOSE", compose, f"{members[0]} + {members[1]}", tmp_path / "out", base=tiny_llama)
    assert not (tmp_path / "out").exists()
