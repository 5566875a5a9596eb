"""Twenty random adapters on the real servers: B zeroed, B × 0.25, another adapter and healthy, by their probes alone.

In the environments that ``scripts/engines/vllm`` and ``scripts/engines/llamacpp`` make (HUBKIT_VLLM, HUBKIT_LLAMACPP).
``-s`` shows the figures of RESULTS.md.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from engines.real import environment, running
from making import make_adapter
from probing import scaled

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.documents.probes import Probes
from hubkit.engines.runtimes.asking import asked, runtime_at
from hubkit.engines.runtimes.fit import Fit, effect_of
from hubkit.engines.runtimes.runtime import Runtime, chosen
from hubkit.errors import HubkitError

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.model]

COUNT = 20
STABLE: dict[str, Any] = {"rank": 4, "alpha": 16.0, "rslora": True, "targets": ["q_proj", "v_proj"]}
PLAIN: dict[str, Any] = {"rank": 8, "alpha": 16.0, "targets": "all-linear"}
SERVED: Mapping[str, float] = {"one": 1.0, "none": 0.0, "quarter": 0.25}
"""What an adapter's B is multiplied by where it is served."""


@pytest.fixture(scope="module")
def project(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``probed/NN``: twenty adapters with probes; ``one-NN``, ``none-NN``, ``quarter-NN``: what is served of each."""
    folder = tmp_path_factory.mktemp("probes") / "project"
    (folder / "probed").mkdir(parents=True)
    (folder / "model").symlink_to(smol)
    for number in range(COUNT):
        name = f"{number:02}"
        options, size = (STABLE, 0.025) if number % 2 else (PLAIN, 0.04)
        make_adapter(folder / "probed" / name, smol, seed=number + 1, size=size, **options)
        hubkit.pack(folder / "probed" / name, base=smol, probes=True)
        assert effect_of(Probes.read(folder / "probed" / name)) > 0.3
        for served, factor in SERVED.items():
            out = scaled(folder / "probed" / name, folder / f"{served}-{name}", factor)
            hubkit.pack(out, name=out.name)
    return folder


def deployed(project: Path, engine: str, settings: Mapping[str, Any]) -> Path:
    """All sixty in one deployment, each served by itself."""
    lines = ["[base]", 'source = "./model"']
    for path in sorted(project.iterdir()):
        if path.name.partition("-")[0] in SERVED:
            lines += [f"[adapters.{path.name}]", f'source = "./{path.name}"']
    lines += [
        f"[targets.{engine}]",
        'serve = "each"',
        *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in settings.items()),
    ]
    (project / "hubkit.toml").write_text("\n".join(lines) + "\n", "utf-8")
    hubkit.lock(project)
    out = project.parent / engine
    shutil.rmtree(out, ignore_errors=True)
    hubkit.deploy(out, engine=engine, lock=project)
    return out


@pytest.fixture(scope="module", params=["vllm", "llamacpp"])
def server(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A real server with all of them, in fp32."""
    engine = request.param
    place = environment(engine)
    project: Path = request.getfixturevalue("project")  # made only where there is a server
    if engine == "vllm":
        settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True}
        more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    else:
        settings, more = {"llama-cpp": str(place), "dtype": "f32"}, {}
    out = deployed(project, engine, settings)
    command = json.loads((out / "deployment.json").read_text("utf-8"))["command"]
    command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"] if engine == "llamacpp" else []
    with running(command, out, place, more) as url:
        yield runtime_at(url, 300.0)


def told(runtime: Runtime, project: Path, number: int, served: str, of: int) -> Fit | HubkitError:
    """What the probes of one adapter say of what is served of another."""
    folder = open_adapter(project / f"{served}-{of:02}", verify=False)
    entry = chosen(runtime, folder.manifest.name, folder.manifest.digest, None)
    try:
        return asked(runtime, Probes.read(project / "probed" / f"{number:02}"), entry, dtype="f32")
    except HubkitError as error:
        return error


def test_twenty_of_twenty_are_told_apart(server: Runtime, project: Path) -> None:
    right: dict[str, int] = dict.fromkeys(("healthy", "HK-NOOP", "HK-SCALE", "HK-PROBE-ADAPTER"), 0)
    worst, slowest = 0.0, 0.0
    for number in range(COUNT):
        began = time.monotonic()
        healthy = told(server, project, number, "one", number)
        slowest = max(slowest, time.monotonic() - began)
        assert isinstance(healthy, Fit), healthy
        right["healthy"] += healthy.finding == "applied"
        worst = max(worst, healthy.off)
        wrong = {
            "HK-NOOP": told(server, project, number, "none", number),
            "HK-SCALE": told(server, project, number, "quarter", number),
            "HK-PROBE-ADAPTER": told(server, project, number, "one", (number + 2) % COUNT),
        }
        for code, error in wrong.items():
            assert isinstance(error, HubkitError), (code, error)
            right[code] += error.code == code
        assert "scale 0.25, 0.25 times" in str(wrong["HK-SCALE"])
    print(f"\n{server.engine:8} {right}  healthy at most {worst:.4f} nats off, 8 prompts in {slowest:.1f} s at most")
    assert set(right.values()) == {COUNT}
