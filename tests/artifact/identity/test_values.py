"""The values digest: one per list of numbers, whatever dtype holds it; decided on bit patterns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.artifact.identity import values
from hubkit.artifact.identity.values import digest_blocks, values_digest

halves = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40).map(lambda v: np.array(v, "<u2"))


def _digest(dtype: str, array: np.ndarray) -> tuple[str, str]:
    return values_digest(dtype, memoryview(array.tobytes()))


def _raw(array: np.ndarray) -> str:
    return "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()


@given(halves)
def test_brain_values_keep_their_digest_in_single_and_double(bits: np.ndarray) -> None:
    single = bits.astype("<u4") << 16
    assert _digest("BF16", bits) == _digest("F32", single) == ("BF16", _raw(bits))
    plain = single[~np.isnan(single.view("<f4"))]
    double = plain.view("<f4").astype("<f8")
    assert _digest("F64", double) == _digest("F32", plain)


@given(halves)
def test_half_values_keep_their_digest_in_single_and_double(bits: np.ndarray) -> None:
    bits = bits[~np.isnan(bits.view("<f2"))]
    single = bits.view("<f2").astype("<f4")
    assert _digest("F16", bits) == _digest("F32", single) == _digest("F64", single.astype("<f8"))


def test_every_half_pattern_against_numpy() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    single = bits.view("<f2").astype("<f4").view("<u4")
    brain, fits = values._brains_of_halves()
    number = ~np.isnan(bits.view("<f2"))
    np.testing.assert_array_equal(fits[number], (single[number] & 0xFFFF) == 0)
    np.testing.assert_array_equal(brain[number & fits], (single[number & fits] >> 16).astype("<u2"))
    np.testing.assert_array_equal(values._narrow(single[number], values._F32, values._F16), bits[number])


@settings(max_examples=300)
@given(st.lists(st.floats(width=64) | st.floats(width=32) | st.floats(width=16), min_size=1, max_size=6))
def test_the_first_dtype_that_holds_all_numbers(numbers: list[float]) -> None:
    array = np.array(numbers, "<f8")
    array = array[~np.isnan(array)]
    with np.errstate(all="ignore"):
        single = array.astype("<f4")
        half = array.astype("<f2")
    exact = bool((single.astype("<f8").view("<u8") == array.view("<u8")).all())
    if exact and not (single.view("<u4") & 0xFFFF).any():
        want = ("BF16", _raw((single.view("<u4") >> 16).astype("<u2")))
    elif (half.astype("<f8").view("<u8") == array.view("<u8")).all():
        want = ("F16", _raw(half))
    elif exact:
        want = ("F32", _raw(single))
    else:
        want = ("F64", _raw(array))
    assert _digest("F64", array) == want


@pytest.mark.parametrize(
    ("pattern", "stored"),
    [
        (0x80000000, "BF16"),  # -0.0
        (0x00010000, "BF16"),  # a subnormal of fp32 that bf16 has, too
        (0x00000001, "F32"),  # the smallest subnormal of fp32
        (0x33800000, "BF16"),  # 2**-24, the smallest subnormal of fp16
        (0x387FC000, "F16"),  # the largest subnormal of fp16
        (0x38FFE000, "F16"),  # 2047 * 2**-24
        (0x477FE000, "F16"),  # 65504, the largest of fp16
        (0x7F7FE000, "F32"),  # too large for fp16, too fine for bf16
        (0x7F800000, "BF16"),  # infinity
        (0x7FC00000, "BF16"),  # the usual NaN
        (0x7F810000, "BF16"),  # a signalling NaN with a payload that bf16 holds
        (0x7F802000, "F16"),  # a signalling NaN with a payload that only fp16 holds
        (0x7FC00001, "F32"),  # a NaN with a payload that needs fp32
    ],
)
def test_special_patterns_of_single(pattern: int, stored: str) -> None:
    assert _digest("F32", np.array([pattern], "<u4"))[0] == stored


def test_zero_signs_and_nan_payloads_count() -> None:
    patterns = [0x0000, 0x8000, 0x7FC0, 0x7F81, 0xFFC0]
    digests = {_digest("F32", np.array([p], "<u4") << 16)[1] for p in patterns}
    assert len(digests) == len(patterns)


def test_a_value_that_does_not_fit_far_into_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "BLOCK", 64)
    array = np.ones(200, "<f4")
    assert _digest("F32", array)[0] == "BF16"
    array[150] = np.float32(1 + 2**-10)
    assert _digest("F32", array) == ("F16", _raw(array.astype("<f2")))
    array[199] = np.float32(1e30)
    assert _digest("F32", array) == ("F32", _raw(array))


def test_other_dtypes_and_empty_tensors_are_hashed_as_they_are() -> None:
    data = bytes(range(16))
    for dtype in ("I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "BF16"):
        assert values_digest(dtype, memoryview(data)) == (dtype, "sha256:" + hashlib.sha256(data).hexdigest())
    assert values_digest("F32", memoryview(b"")) == ("BF16", "sha256:" + hashlib.sha256().hexdigest())


def test_one_buffer_may_serve_all_blocks() -> None:
    array = np.arange(64, dtype="<f4") + np.float32(1e-3)
    buffer = bytearray(32)

    def blocks() -> Iterator[memoryview]:
        for i in range(0, 256, 32):
            buffer[:] = array.tobytes()[i : i + 32]
            yield memoryview(buffer)

    assert digest_blocks("F32", blocks) == _digest("F32", array)
