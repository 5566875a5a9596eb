"""What hubkit 0.1.0 wrote is read, proven and written again to the byte: golden artifacts with the script that made
them (tests/golden/artifacts/make.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from hubkit.artifact.folder import open_adapter
from hubkit.documents.lock import Lock
from hubkit.methods.foreign import own_files
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.verbs.compose import compose
from hubkit.verbs.lock import lock
from hubkit.verbs.pack import pack
from hubkit.verbs.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "artifacts"
DIGESTS: dict[str, str] = json.loads((GOLDEN / "digests.json").read_text())
ADAPTERS = [name for name in DIGESTS if name != "mix"]


def digest(folder: Path) -> str:
    """The identity of an artifact: the sha256 of its manifest."""
    return hashlib.sha256((folder / "hubkit.json").read_bytes()).hexdigest()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, writable."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.mark.parametrize("name", DIGESTS)
def test_it_is_proven_and_has_its_digest(name: str) -> None:
    assert digest(GOLDEN / name) == DIGESTS[name]
    assert verify(str(GOLDEN / name), base=str(GOLDEN / "base")).overrides == ()


@pytest.mark.parametrize("name", ADAPTERS)
def test_packed_again_it_has_the_same_digest(name: str, golden: Path) -> None:
    assert pack(golden / name).digest == f"sha256:{DIGESTS[name]}"
    assert digest(golden / name) == DIGESTS[name]


@pytest.mark.parametrize("name", ADAPTERS)
def test_its_tensors_are_read_and_written_to_the_byte(name: str) -> None:
    adapter = read_adapter(open_adapter(GOLDEN / name), Base.from_folder(GOLDEN / "base"))
    for file, data in own_files(adapter).items():
        if file.endswith(".safetensors"):
            assert data == (GOLDEN / name / file).read_bytes()


def test_a_lock_and_a_sum_are_the_same_bytes(golden: Path) -> None:
    """A lock of the first release stays to the byte while nothing moves; one made anew has its digest, and seals."""
    lock(golden)
    assert (golden / "hubkit.lock").read_bytes() == (GOLDEN / "hubkit.lock").read_bytes()
    (golden / "hubkit.lock").unlink()
    assert lock(golden).digest == Lock.read(GOLDEN).digest
    assert (golden / "hubkit.lock").read_bytes() == (GOLDEN / "sealed.lock").read_bytes()
    done = compose(f"1.0*{golden / 'lora'} + -0.5*{golden / 'lora'}", golden / "again")
    assert done.path is not None
    file = "adapter_model.safetensors"
    assert (done.path / file).read_bytes() == (GOLDEN / "composed" / file).read_bytes()
