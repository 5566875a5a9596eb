"""compose: the exact weighted sum, written as one adapter."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from making import make_adapter
from variants import OTHERS, logits, names, refused, resharded, say, small_disk, tree

from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import Manifest
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.pack import pack

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-6
"""Relative error, in the norm of a site's delta, of one fp32 product against another that rounds otherwise."""

RELOADED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from hubkit.artifact.folder import open_adapter
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
base = Base.from_folder(Path(sys.argv[1]))
adapter = read_adapter(open_adapter(Path(sys.argv[2])), base, dtype="master")
deltas = {s.name: adapter.delta(s).matrix().contiguous() for s in base.sites.values() if s.name in adapter.parts}
save_file(deltas, sys.argv[3])
"""


@pytest.fixture
def two(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Rank 4 with patterns on some sites, rank 8 with rsLoRA on all linear ones."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 5},
        "alpha_pattern": {"k_proj": 7},
    }
    targets = ["q_proj", "k_proj", "v_proj"]
    a = make_adapter(tmp_path / "a", tiny_llama, seed=1, rank=4, alpha=5, targets=targets, **patterns)
    return a, make_adapter(tmp_path / "b", tiny_llama, seed=2, rank=8, rslora=True, alpha=3)


def formula(adapter: Path, weight: float) -> dict[str, Tensor]:
    """weight · s · B A of each site in fp64, read off the files by their formats alone."""
    import math
    import re

    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    made: dict[str, Tensor] = {}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        alpha, rank = float(config["lora_alpha"]), a.shape[0]
        for pattern, value in config["alpha_pattern"].items():
            if re.match(rf"(.*\.)?({pattern})$", site):
                alpha = float(value)
                break
        made[site] = weight * alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * (b @ a)
    return made


def test_reloaded_in_a_new_process_each_delta_is_the_sum(
    two: tuple[Path, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    done = compose(f"1.0*{two[0]} + -0.5*{two[1]}", tmp_path / "c")
    out = tmp_path / "deltas.safetensors"
    assert done.path is not None
    subprocess.run([sys.executable, "-c", RELOADED, tiny_llama, done.path, out], check=True)
    have = load_file(out)
    first, second = formula(two[0], 1.0), formula(two[1], -0.5)
    assert set(have) == set(first) | set(second)
    assert len(set(first) - set(second)) == 0
    assert len(set(second) - set(first)) == 8
    for site, delta in have.items():
        want = second[site] + first.get(site, 0.0)
        assert torch.linalg.norm(delta.double() - want) <= EXACT * torch.linalg.norm(want), site
        rounded = second[site].float() + (first[site].float() if site in first else 0.0)
        assert torch.linalg.norm(delta - rounded) <= EXACT * torch.linalg.norm(rounded), site


def test_a_grid_of_ranks_signs_scales_and_patterns(tiny_llama: Path, tmp_path: Path) -> None:
    """Every combination of rank, sign, scale rule and patterns, summed or averaged; reloaded in a new process."""
    import torch
    from safetensors.torch import load_file

    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9.0}}
    a = make_adapter(tmp_path / "a", tiny_llama, seed=1, rank=5, alpha=7)
    want: dict[str, dict[str, Tensor]] = {}
    for rank, sign, rslora, given in itertools.product((4, 8, 16), (1, -1), (False, True), ({}, patterns)):
        name, operator = f"b{len(want)}", ("sum", "average")[rank > 4]
        b = make_adapter(tmp_path / name, tiny_llama, seed=2 + len(want), rank=rank, rslora=rslora, alpha=3, **given)
        weights = (0.75, sign * 1.5)
        compose({str(a): weights[0], str(b): weights[1]}, tmp_path / f"c-{name}", method=operator)
        total = sum(weights) if operator == "average" else 1.0
        first, second = formula(a, weights[0] / total), formula(b, weights[1] / total)
        want[f"c-{name}"] = {site: first[site] + second[site] for site in first}
    script = (
        "import sys; from pathlib import Path; code = sys.stdin.read(); model, root = sys.argv[1:3]\n"
        "for c in sorted(Path(root).glob('c-*')):\n"
        "    sys.argv = ['', model, str(c), f'{c}.safetensors']; exec(code)\n"
    )
    subprocess.run([sys.executable, "-c", script, tiny_llama, tmp_path], input=RELOADED, text=True, check=True)
    assert len(want) == 24
    for name, sites in want.items():
        have = load_file(tmp_path / f"{name}.safetensors")
        assert set(have) == set(sites)
        for site, delta in have.items():
            error = torch.linalg.norm(delta.double() - sites[site])
            assert error <= EXACT * torch.linalg.norm(sites[site]), (name, site)


def test_it_computes_what_the_mix_computes(two: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    terms = f"0.7*{two[0]} + -1.5*{two[1]}"
    compose(terms, tmp_path / "c")
    base = load_base(tiny_llama)
    attached = attach(base, terms)
    want = logits(attached)
    attached.detach()
    assert (logits(attach(base, str(tmp_path / "c"))) - want).abs().max() <= 1e-5


def test_a_composed_adapter_is_an_ordinary_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = compose(f"{two[0]} - 0.5*{two[1]}", tmp_path / "c", license="mit")
    manifest = open_adapter(tmp_path / "c").manifest
    digests = [Manifest.read(folder).digest for folder in two]
    assert [(p.reference, p.digest, p.weight) for p in manifest.parents] == [
        ("a", digests[0], 1),
        ("b", digests[1], -0.5),
    ]
    assert (manifest.license, manifest.overrides, done.rank) == ("mit", (), 5 + 8)
    compose(f"{tmp_path / 'c'} + {two[0]}", tmp_path / "d")
    pack(tmp_path / "d", version="1.0.0")


def test_the_same_bytes_in_any_folder(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    compose(f"{two[0]} + {two[1]}", tmp_path / "c")
    compose(f"{two[0]} + {two[1]}", tmp_path / "deep" / "er" / "c")
    assert tree(tmp_path / "c") == tree(tmp_path / "deep" / "er" / "c")
    assert all(str(tmp_path).encode() not in data for data in tree(tmp_path / "c").values())


@pytest.mark.parametrize("what", OTHERS)
def test_members_of_different_bases(
    what: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = OTHERS[what]
    a = make_adapter(tmp_path / "a", tiny_llama)
    b = make_adapter(tmp_path / "b", make(tiny_llama, tmp_path / "other"), seed=1)
    before = names(tmp_path)
    error = refused("HK-BASE-MISMATCH", compose, f"{a} + {b}", tmp_path / "c")
    assert said in error.have[0]
    done = say(capsys, "compose", a, "+", b, "-o", tmp_path / "c")
    assert done.refusal() == "HK-BASE-MISMATCH"
    assert "--allow-base-mismatch" in done.err
    assert names(tmp_path) == before
    assert compose(f"{a} + {b}", tmp_path / "c", allow_base_mismatch=True).overrides == ("allow-base-mismatch",)
    assert Manifest.read(tmp_path / "c").overrides == ("allow-base-mismatch",)
    assert compose(f"{a} + {a}", tmp_path / "d", allow_base_mismatch=True).overrides == (), "not needed, not recorded"


def test_members_of_one_base_in_other_files(tiny_llama: Path, tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a", tiny_llama)
    b = make_adapter(tmp_path / "b", resharded(tiny_llama, tmp_path / "other"), seed=1)
    assert compose(f"{a} + {b}", tmp_path / "c").overrides == ()


def test_refusals_write_nothing(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(tmp_path)
    for line, status, code in (
        ((adapter, "-o", adapter), 1, "HK-EXISTS"),
        ((adapter, "-o", tmp_path / "a b"), 2, "HK-NAME"),
        ((adapter, "+", "-o", tmp_path / "c"), 2, "HK-TERMS"),
        ((tmp_path / "nope", "-o", tmp_path / "c"), 1, "HK-NOT-ADAPTER"),
        (("nope", "-o", tmp_path / "c"), 2, "HK-REFERENCE"),
        (("-o", tmp_path / "c"), 2, "HK-USAGE"),
    ):
        assert say(capsys, "compose", *line).refusal(status) == code
    for size in (0, 100, 2000, 4000):
        with small_disk(size):
            refused("HK-DISK", compose, str(adapter), tmp_path / "c")
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_the_old_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    compose(str(two[0]), tmp_path / "c")
    before = tree(tmp_path)
    with small_disk(3000):
        refused("HK-DISK", compose, str(two[1]), tmp_path / "c", replace=True)
    assert tree(tmp_path) == before
    compose(str(two[1]), tmp_path / "c", replace=True)
    assert tree(tmp_path) != before
