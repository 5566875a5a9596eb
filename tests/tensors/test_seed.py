"""Seeds made of other seeds: the same numbers for ever, or a user's seed would give other adapters."""

from __future__ import annotations

import hashlib

from hubkit.tensors.seed import derived_seed
from hubkit.training.rows.batching import derive_seed


def test_the_bytes_that_are_hashed_stay_the_same() -> None:
    for seed, text in ((derived_seed(7, "model.q_proj"), b"7\0model.q_proj"), (derived_seed(7, "a", ""), b"7\0a\0")):
        assert seed == int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    assert derive_seed(7, "order", 3) == int.from_bytes(hashlib.sha256(b"7/order/3").digest()[:8], "little") >> 1
