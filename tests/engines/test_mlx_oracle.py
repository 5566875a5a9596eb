"""What MLX-LM computes with a deployment, beside transformers: its own command, over HTTP, on an fp32 base.

In the environment that scripts/engines/mlx makes (HUBKIT_MLX). Its server says nothing of a prompt's tokens, so it
writes greedily, and transformers is asked about the very tokens that it wrote. ``-s`` shows the figures of RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines.real import LARGEST, MEAN, ask, differences, environment, of_model, running, show
from making import make_adapter

import hubkit
from hubkit.documents.deployment import Deployment
from hubkit.verbs.deploy import deploy
from hubkit.verbs.lock import lock

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.model]

STABLE: dict[str, Any] = {
    "rank": 4,
    "alpha": 16.0,
    "rslora": True,
    "targets": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 8},
}
MIXES: dict[str, dict[str, float]] = {
    "base": {},
    "plain": {"plain": 1.0},
    "stable": {"stable": 1.0},
    "sum": {"plain": 1.0, "stable": -0.5},
}
PROMPTS = ("The restaurant by the river", "Once upon a time", "In the year 1850,", "A list of animals: cat, dog,")
TOKENS = 200


@pytest.fixture(scope="module")
def place() -> Path:
    return environment("mlx")


@pytest.fixture(scope="module")
def wide(place: Path, smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with its weights in fp32, where MLX-LM computes in that."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    model: Any = hubkit.load_base(smol, dtype="float32")
    model.save_pretrained(folder)
    for path in smol.iterdir():
        if not (folder / path.name).exists() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def project(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "project"
    folder.mkdir()
    (folder / "model").symlink_to(wide)
    make_adapter(folder / "plain", wide, seed=1, size=0.03, rank=8, alpha=16.0, targets="all-linear")
    alphas = {r".*\.(1|3|5)\.self_attn\.q_proj": 32.0}
    make_adapter(folder / "stable", wide, seed=2, size=0.05, **STABLE, alpha_pattern=alphas)
    return folder


@pytest.mark.parametrize("name", MIXES)
def test_the_served_model_is_the_one_that_was_tested(
    project: Path, wide: Path, place: Path, tmp_path: Path, name: str
) -> None:
    members = "".join(
        f'[adapters.{one}]\nsource = "./{one}"\nweight = {weight}\n' for one, weight in MIXES[name].items()
    )
    (project / "hubkit.toml").write_text(f'[base]\nsource = "./model"\n[targets.mlx]\nmax_tokens = 64\n{members}')
    lock(project)
    deploy(tmp_path / "run", engine="mlx", lock=project)
    tokenizer, model = hubkit.load_tokenizer(wide), hubkit.load_base(wide)
    adapted: Any = model
    if MIXES[name]:
        terms = {str(project / one): weight for one, weight in MIXES[name].items()}
        adapted = hubkit.attach(model, terms, base=wide)
    have: list[float] = []
    want: list[float] = []
    plain: list[float] = []
    with running(Deployment.read(tmp_path / "run").command, tmp_path / "run", place, {"OMP_NUM_THREADS": "2"}) as url:
        for prompt in PROMPTS:
            if len(have) >= TOKENS:
                break
            body = {"model": "default_model", "prompt": prompt, "max_tokens": 100, "temperature": 0, "logprobs": True}
            status, answer = ask(f"{url}/v1/completions", body)
            assert status == 200, answer
            ids, values = _tokens(answer)
            asked = tokenizer(prompt)["input_ids"]
            have += values
            want += of_model(adapted, [*asked, *ids], len(asked))
            if MIXES[name]:
                attached_off = adapted.detach()
                plain += of_model(attached_off, [*asked, *ids], len(asked))
                adapted = hubkit.attach(attached_off, terms, base=wide)
    largest, mean = show("MLX-LM", name, have[:TOKENS], want[:TOKENS])
    assert len(have) >= TOKENS
    assert (largest < LARGEST, mean < MEAN) == (True, True)
    if MIXES[name]:
        assert differences(want, plain)[1] > 0.1, "an adapter that changes nothing proves nothing"


def _tokens(answer: Any) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of what the server wrote."""
    said = answer["choices"][0]["logprobs"]["content"]
    return [int(one["id"]) for one in said], [float(one["logprob"]) for one in said]


def test_without_rope_theta_its_base_would_be_another(wide: Path) -> None:
    """The reason for the config that a deployment writes: transformers 5 says the base of the rotation elsewhere."""
    config = json.loads((wide / "config.json").read_text("utf-8"))
    assert "rope_theta" not in config
    assert config["rope_parameters"]["rope_theta"] == 100000


def test_experts_embeddings_and_an_untied_head(place: Path, tmp_path: Path) -> None:
    """On a tiny mixture: MLX-LM has all experts of a layer in one module, and embeddings as A and B transposed."""
    from words import tokenizer
    from zoo import model_of

    base, project = tmp_path / "model", tmp_path / "project"
    model_of("qwen3_moe", vocab_size=320, tie_word_embeddings=False).save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    more = {
        "num_experts": config["num_local_experts"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }  # as the Hub's checkpoints have them
    (base / "config.json").write_text(json.dumps({**config, **more}))
    project.mkdir()
    (project / "model").symlink_to(base)
    targets = r"lm_head|model\.embed_tokens|.*\.(experts\.[0-9]+\.\w+|q_proj)"
    make_adapter(project / "odd", base, seed=5, size=0.2, rank=3, alpha=6.0, targets=targets)
    (project / "hubkit.toml").write_text('[base]\nsource = "./model"\n[adapters.odd]\nsource = "./odd"\n')
    lock(project)
    deploy(tmp_path / "run", engine="mlx", lock=project)
    model, words = hubkit.load_base(base), hubkit.load_tokenizer(base)
    told: list[tuple[list[int], list[int]]] = []
    have: list[float] = []
    with running(Deployment.read(tmp_path / "run").command, tmp_path / "run", place) as url:
        for prompt in ("The capital of France is", "Two and two", "A restaurant", "The lazy dog jumps over", "Paris"):
            body = {"model": "default_model", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": True}
            status, answer = ask(f"{url}/v1/completions", body)
            assert status == 200, answer
            ids, values = _tokens(answer)
            told.append((words(prompt)["input_ids"], ids))
            have += values
    plain = [value for asked, ids in told for value in of_model(model, [*asked, *ids], len(asked))]
    attached = hubkit.attach(model, project / "odd", base=base)
    want = [value for asked, ids in told for value in of_model(attached, [*asked, *ids], len(asked))]
    largest, mean = show("MLX-LM", "experts, embeddings, head (tiny mixture)", have, want)
    assert (largest < LARGEST, mean < MEAN) == (True, True)
    assert differences(want, plain)[1] > 0.1
