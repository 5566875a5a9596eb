"""What vLLM computes with a deployment, beside transformers: the deployment's own command, over HTTP, in fp32.

In the environment that scripts/engines/vllm makes (HUBKIT_VLLM). ``-s`` shows the figures of RESULTS.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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

RECIPE = """
[base]
source = "./model"
[adapters.plain]
source = "./plain"
[adapters.stable]
source = "./stable"
weight = {weight}
[targets.vllm]
serve = "{serve}"
dtype = "float32"
max_model_len = 512
max_num_seqs = 4
enforce_eager = true
"""
STABLE: dict[str, Any] = {
    "rank": 4,
    "alpha": 16.0,
    "rslora": True,
    "targets": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 8},
}
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def place() -> Path:
    return environment("vllm")


@pytest.fixture(scope="module")
def project(place: Path, smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter at all linear layers, and one with rsLoRA and patterns, both with an effect that is seen."""
    folder = tmp_path_factory.mktemp("oracle") / "project"
    folder.mkdir()
    (folder / "model").symlink_to(smol)
    make_adapter(folder / "plain", smol, seed=1, size=0.03, rank=8, alpha=16.0, targets="all-linear")
    alphas = {r".*\.(1|3|5)\.self_attn\.q_proj": 32.0}
    make_adapter(folder / "stable", smol, seed=2, size=0.05, **STABLE, alpha_pattern=alphas)
    return folder


@pytest.fixture(scope="module")
def ids(smol: Path) -> list[int]:
    """201 tokens: what is said of 200 of them is compared."""
    rows = (Path(__file__).parents[2] / "examples" / "data" / "e2e_heldout.jsonl").read_text("utf-8").splitlines()
    text = "\n".join(" ".join(map(str, json.loads(row).values())) for row in rows[:12])
    found: list[int] = hubkit.load_tokenizer(smol)(text)["input_ids"]
    return found[:201]


@pytest.fixture(scope="module")
def wanted(project: Path, smol: Path, ids: list[int]) -> dict[str, list[float]]:
    """What transformers gives with the adapters as they are stored, by hubkit's own attach, in fp32."""
    model = hubkit.load_base(smol, dtype="float32")
    found = {"base": of_model(model, ids)}
    attached = hubkit.attach(model, f"{project / 'plain'} + {project / 'stable'}", base=smol)
    for name, mix in (("plain", "plain"), ("stable", "stable"), ("mix", hubkit.Sum({"plain": 1.0, "stable": -0.5}))):
        attached.set_mix(mix)
        found[name] = of_model(attached, ids)
    return found


def deployed(project: Path, out: Path, serve: str, weight: float) -> Deployment:
    (project / "hubkit.toml").write_text(RECIPE.format(serve=serve, weight=weight))
    lock(project)
    deploy(out, engine="vllm", lock=project)
    return Deployment.read(out)


def said(url: str, model: str, ids: Sequence[int]) -> list[float]:
    """The log-probabilities that the server gives the tokens of a text, from the second on."""
    body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    status, answer = ask(f"{url}/v1/completions", body)
    assert status == 200, answer
    rows: list[Any] = answer["choices"][0]["prompt_logprobs"]
    return [float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]


def models(url: str) -> list[str]:
    return [one["id"] for one in ask(f"{url}/v1/models")[1]["data"]]


@pytest.fixture(scope="module")
def each(project: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Deployment]]:
    """A server of both adapters, each by itself."""
    out = tmp_path_factory.mktemp("each") / "run"
    made = deployed(project, out, "each", 1.0)
    with running(made.command, out, place, CPU) as url:
        yield url, made


def key(made: Deployment, name: str) -> str:
    return f"{name}@{made.adapters[name].removeprefix('sha256:')[:12]}"


@pytest.mark.parametrize("name", ["base", "plain", "stable"])
def test_the_served_model_is_the_one_that_was_tested(
    each: tuple[str, Deployment], wanted: dict[str, list[float]], ids: list[int], name: str
) -> None:
    url, made = each
    served = name if name == "base" else key(made, name)
    assert served in models(url)
    largest, mean = show("vLLM", name, said(url, served, ids), wanted[name])
    assert (largest < LARGEST, mean < MEAN) == (True, True)
    if name != "base":
        assert differences(wanted[name], wanted["base"])[1] > 0.1, "an adapter that changes nothing proves nothing"


def test_a_sum_is_one_adapter(
    project: Path, place: Path, wanted: dict[str, list[float]], ids: list[int], tmp_path: Path
) -> None:
    made = deployed(project, tmp_path / "run", "mix", -0.5)
    with running(made.command, tmp_path / "run", place, CPU) as url:
        (served,) = (name for name in models(url) if name.startswith("mix@"))
        largest, mean = show("vLLM", "plain - 0.5 stable, concatenated", said(url, served, ids), wanted["mix"])
    assert (largest < LARGEST, mean < MEAN) == (True, True)


def test_its_own_reading_of_the_stored_adapter(
    each: tuple[str, Deployment], project: Path, wanted: dict[str, list[float]], ids: list[int]
) -> None:
    """vLLM reads rsLoRA and patterns rightly: what a resolver gives it need not be lowered."""
    url, _ = each
    for name in ("plain", "stable"):
        body = {"lora_name": f"raw-{name}", "lora_path": str(project / name)}
        status, answer = ask(f"{url}/v1/load_lora_adapter", body)
        assert status == 200, answer
        largest, mean = show("vLLM", f"{name}, as it is stored", said(url, f"raw-{name}", ids), wanted[name])
        assert (largest < LARGEST, mean < MEAN) == (True, True)
