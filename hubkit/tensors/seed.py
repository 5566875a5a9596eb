"""Seeds made of other seeds: one for every site, member and step, the same in every process and in any order."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *purpose: object, between: str = "\0") -> int:
    """A seed (63 bits) of its own for each purpose: the first bytes of sha256(seed, purpose).

    Args:
        seed: the one that a user gives.
        purpose: what it is for: a site, words, numbers.
        between: stands between the words that are hashed. Each use keeps its own: with another one, the same seed of a
            user would draw other adapters than it did.
    """
    text = between.join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))
