"""``deployment.json``: a lock made runnable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hubkit.documents.deployment import Deployment
from hubkit.documents.manifest import BaseFingerprint, FileEntry
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

DIGEST = sha256(b"")
BASE = BaseFingerprint("org/base", "a" * 40, DIGEST, DIGEST, {"model.safetensors": DIGEST}, {"layers": 2}, DIGEST, None)
MADE = Deployment(
    engine="vllm",
    lock=DIGEST,
    base=BASE,
    adapters={"sql": DIGEST, "chat": DIGEST},
    files=(FileEntry("z", 1, DIGEST), FileEntry("a", 2, DIGEST)),
    command=("vllm", "serve", "base", "--enable-lora", ""),
    settings={"max_loras": 4},
    overrides=("allow-base-mismatch",),
)


def test_a_deployment_survives_writing_and_reading(tmp_path: Path) -> None:
    with pytest.raises(HubkitError, match="HK-MISSING"):
        Deployment.read(tmp_path)
    MADE.write(tmp_path)
    again = Deployment.read(tmp_path / "deployment.json")
    assert again == dataclasses.replace(MADE, files=MADE.files[::-1])
    assert again.to_bytes() == MADE.to_bytes() == (tmp_path / "deployment.json").read_bytes()
    assert again.digest == MADE.digest


def test_the_least_deployment() -> None:
    least = dataclasses.replace(MADE, adapters={}, files=(), settings={}, overrides=())
    assert Deployment.from_bytes(least.to_bytes()) == least


@pytest.mark.parametrize("change", [{"comand": []}, {"command": []}, {"lock": "main"}, {"adapters": {"a b": DIGEST}}])
def test_wrong_deployments_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(HubkitError, match="HK-SCHEMA"):
        Deployment.from_bytes(json.dumps({**MADE.to_document(), **change}).encode())


def test_a_token_is_never_written() -> None:
    with pytest.raises(HubkitError, match="HK-SECRET"):
        dataclasses.replace(MADE, command=("x", "--token=hf_" + "a" * 34)).to_bytes()


def test_a_file_outside_its_folder_is_refused() -> None:
    document = MADE.to_document()
    document["files"][0]["path"] = "../x"
    with pytest.raises(HubkitError, match="HK-NAME"):
        Deployment.from_bytes(json.dumps(document).encode())
