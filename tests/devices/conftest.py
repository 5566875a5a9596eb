"""The devices that this folder's tests run on: a stand-in on any machine, CUDA where there is one (mark: gpu)."""

from __future__ import annotations

import pytest
import standin
import torch

STAND_IN = standin.install()
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["standin", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test computes; not the CPU."""
    return STAND_IN if request.param == "standin" else torch.device("cuda", 0)
