"""Which bases match, what a mismatch names, and the very words of the refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hubkit.artifact.identity.base_match import differences, proven, require_same_base
from hubkit.artifact.identity.counted import TensorDigest, compose_weights
from hubkit.documents.manifest import BaseFingerprint
from hubkit.errors import HubkitError

TENSORS = [TensorDigest(f"layers.{i:03}.weight", "BF16", (4, 2), f"sha256:{i:064x}") for i in range(144)]
TENSORS += [TensorDigest(n, "BF16", (4,), "sha256:" + "1" * 64) for n in ("lm_head.weight", "model.norm.weight")]
WANT = BaseFingerprint(
    source="meta-llama/Llama-3.2-1B",
    revision="4e20de3" + "0" * 33,
    layout="sha256:" + "a" * 64,
    weights="sha256:1f3c9a" + "0" * 58,
    files={"model.safetensors": "sha256:" + "b" * 64},
    config={"model_type": "llama", "rope_theta": 500000.0},
    tokenizer="sha256:" + "c" * 64,
    template="sha256:" + "d" * 64,
)
HAVE = replace(
    WANT, source="./llama-3.2-1b", revision=None, weights="sha256:77aa01" + "0" * 58, files={"m": "sha256:0"}
)


def _changed(*names: str) -> list[TensorDigest]:
    return [replace(t, sha256="sha256:" + "2" * 64) if t.name in names else t for t in TENSORS]


def _refused(have: BaseFingerprint, have_tensors: list[TensorDigest] | None = None) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        require_same_base("chat", "ana/chat@9f31c2e", WANT, have, TENSORS, have_tensors)
    return caught.value


def test_the_words_of_the_refusal() -> None:
    error = _refused(HAVE, _changed("lm_head.weight", "model.norm.weight"))
    assert str(error) == (
        "error[HK-BASE-MISMATCH]: adapter 'chat' was trained on another base\n"
        "  where: ana/chat@9f31c2e  hubkit.json#/base/weights\n"
        "  want:  sha256:1f3c9a..  (meta-llama/Llama-3.2-1B @ 4e20de3)\n"
        "  have:  sha256:77aa01..  (./llama-3.2-1b): 2 of 146 tensors differ: lm_head.weight, model.norm.weight\n"
        "  fix:   hubkit pull --base ana/chat    or    --allow-base-mismatch"
    )
    assert error.status == 1


def test_every_difference_is_told() -> None:
    have = replace(HAVE, tokenizer="sha256:e", template="sha256:f", config={"model_type": "llama", "window": 4})
    error = _refused(have, [*_changed("lm_head.weight")[1:], TensorDigest("z", "F32", (1,), "sha256:3")])
    text = "\n".join(error.have)
    for part in (
        "1 of 146 tensors differ: lm_head.weight",
        "1 tensor missing: layers.000.weight",
        "1 tensor more: z",
        "tokenizer",
        "chat template",
        "rope_theta",
        "window",
    ):
        assert part in text
    assert len(error.have) == len(error.want) == 7
    assert "#/base/config/rope_theta" in error.where
    assert "rope_theta = 500000.0" in "\n".join(error.want)


def test_long_lists_are_cut_with_a_count() -> None:
    names = [t.name for t in TENSORS]
    (text,) = differences(WANT, HAVE, TENSORS, _changed(*names[:5]))
    assert text == f"5 of 146 tensors differ: {', '.join(names[:5])}"
    (text,) = differences(WANT, HAVE, TENSORS, _changed(*names[:23]))
    assert text == f"23 of 146 tensors differ: {', '.join(names[:5])} and 18 more"


def test_weights_or_files_prove_a_base_and_layout_never() -> None:
    remote = replace(WANT, weights=None)
    assert proven(WANT, WANT) is True
    assert proven(WANT, replace(WANT, files={}, layout="sha256:x")) is True
    assert proven(WANT, replace(remote, files={"renamed": WANT.files["model.safetensors"]})) is True
    assert proven(WANT, replace(remote, files={"model.safetensors": "sha256:other"})) is False
    assert proven(WANT, replace(remote, files={})) is None
    assert require_same_base("chat", "./chat", WANT, remote) == []


def test_files_that_differ_are_named() -> None:
    remote = replace(WANT, weights=None, files={"a": "sha256:1", "model.safetensors": WANT.files["model.safetensors"]})
    error = _refused(remote)
    assert error.code == "HK-BASE-MISMATCH"
    assert "1 of 2 weight files differs: a" in error.have[0]


def test_a_base_that_cannot_be_compared_is_undecided() -> None:
    unknown = replace(WANT, weights=None, files={})
    error = _refused(unknown)
    assert (error.code, error.status) == ("HK-BASE-UNPROVEN", 3)
    assert differences(WANT, unknown, TENSORS, TENSORS) == []
    # shapes alone can refute what they cannot prove
    headers = [replace(t, dtype="F32", sha256="") for t in TENSORS]
    assert _refused(unknown, headers).code == "HK-BASE-UNPROVEN"
    headers[0] = replace(headers[0], shape=(4, 3))
    error = _refused(unknown, headers)
    assert error.code == "HK-BASE-MISMATCH"
    assert "layers.000.weight (4x3, not 4x2)" in error.have[0]


def test_the_override_is_returned_only_when_it_was_needed() -> None:
    def allowed(have: BaseFingerprint) -> list[str]:
        return require_same_base("chat", "./chat", WANT, have, allow=True)

    assert allowed(WANT) == []
    assert allowed(HAVE) == ["allow-base-mismatch"]
    assert allowed(replace(WANT, weights=None, files={})) == ["allow-base-mismatch"]
    assert allowed(replace(WANT, tokenizer="sha256:x")) == ["allow-base-mismatch"]


def test_unknown_tokenizer_template_and_codec_are_not_compared() -> None:
    assert differences(WANT, replace(WANT, tokenizer=None, template=None, codec="nf4/64/double")) == []
    quantized = replace(WANT, codec="nf4/64/double")
    assert differences(quantized, replace(WANT, codec="nf4/64/single")) == ["the codec differs"]


def test_the_order_of_tensors_does_not_matter() -> None:
    assert compose_weights(TENSORS) == compose_weights(reversed(TENSORS))
    assert differences(WANT, HAVE, TENSORS, TENSORS[::-1]) == ["the values of the weights differ"]
