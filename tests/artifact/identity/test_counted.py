"""Which tensors make a base's identity."""

from __future__ import annotations

import pytest

from hubkit.artifact.identity.counted import TensorDigest, counted, is_alias, is_buffer, layout_digest


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (32,)),
        ("gpt_neox.layers.3.attention.rotary_emb.cos_cached", "F32", (1, 1, 8, 4)),
        ("h.0.attn.bias", "F32", (1, 1, 1024, 1024)),
        ("transformer.h.11.attn.masked_bias", "F32", ()),
        ("gpt_neox.layers.0.attention.bias", "BOOL", (1, 1, 8, 8)),
        ("bert.embeddings.position_ids", "I64", (1, 512)),
    ],
)
def test_buffers(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert is_buffer(name, dtype, shape)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("h.0.attn.c_attn.bias", "F32", (2304,)),
        ("model.layers.0.attn.bias", "F32", (64,)),
        ("layers.0.attention.bias", "F32", (1, 8, 16, 16)),
        ("embeddings.position_ids", "F32", (1, 512)),
        ("model.freq.weight", "F32", (4,)),
    ],
)
def test_parameters_that_look_like_buffers(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert not is_buffer(name, dtype, shape)


@pytest.mark.parametrize(
    ("alias", "partner"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
        ("lm_head.weight", "wte.weight"),
        ("lm_head.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("model.decoder.embed_tokens.weight", "model.shared.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ],
)
def test_tied_pairs(alias: str, partner: str) -> None:
    assert is_alias(alias, partner)
    assert not is_alias(partner, alias)
    both = [TensorDigest(alias, "BF16", (4, 2), "sha256:1"), TensorDigest(partner, "BF16", (4, 2), "sha256:1")]
    assert [t.name for t in counted(both, ties=True)] == [partner]
    assert len(counted(both, ties=False)) == 2
    other = [both[0], TensorDigest(partner, "BF16", (4, 2), "sha256:2")]
    assert len(counted(other, ties=True)) == 2
    # one alone is the model's only copy
    assert counted(both[:1], ties=True) == (both[0],)
    assert layout_digest(both, True) == layout_digest(both[1:], True) != layout_digest(both, False)


def test_equal_layers_are_no_aliases() -> None:
    same = [TensorDigest(f"model.layers.{i}.norm.weight", "BF16", (4,), "sha256:1") for i in range(3)]
    assert counted(same[::-1], ties=True) == tuple(same)
