"""What answers say of an adapter: the scale, found on curves of real models; and what is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import make_adapter
from probing import answers_at, gentle, larger, live, scaled

from hubkit.documents.probes import Probes
from hubkit.engines.runtimes.fit import BOUNDS, Answers, best_scale, distance, effect_of, fitted
from hubkit.verbs.pack import pack

STEPS = [step / 16 for step in range(33)]


SIZES = {"lora": 0.007, "rslora": 0.015, "dora": 0.007, "adapters": 0.1, "selective": 0.3, "full": 0.05}
"""Methods whose adapters have a scale, and how far from a fresh one an adapter has the effect of a trained one."""


@pytest.mark.parametrize("name", SIZES)
def test_a_scale_is_found_to_a_sixteenth(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """On a real model, at scales between those stored, whatever the method."""
    folder = gentle(tmp_path / "one", tiny_llama, name, by=SIZES[name])
    pack(folder, base=tiny_llama, probes=True)
    probes, adapter = Probes.read(folder), live(folder, tiny_llama)
    assert 0.15 < effect_of(probes) < 0.7
    for scale, answers in answers_at(adapter, probes, STEPS).items():
        assert abs(best_scale(probes, answers)[0] - scale) <= 1 / 16, scale


def test_stored_scales_are_met_to_the_last_digit_written(probed: Path, tiny_llama: Path) -> None:
    probes, adapter = Probes.read(probed), live(probed, tiny_llama)
    for scale, answers in answers_at(adapter, probes, probes.scales).items():
        assert distance(probes, answers, scale) < 1e-4
        assert best_scale(probes, answers)[0] == scale


def test_the_healthy_the_bare_the_scaled_and_the_other(probed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    probes, adapter = Probes.read(probed), live(probed, tiny_llama)
    other = live(gentle(tmp_path / "other", tiny_llama, seed=7), tiny_llama)
    found = answers_at(adapter, probes, (0.0, 0.25, 1.0, 1.5))
    for dtype, bound in BOUNDS.items():

        def finding(answers: Answers, bound: float = bound) -> str:
            return fitted(probes, answers, bound=bound).finding

        if dtype == "q8_0":  # 0.42 nats are not three times 0.15
            assert {finding(answers) for answers in found.values()} == {"undecided"}
            continue
        assert finding(found[1.0]) == "applied"
        assert finding(found[0.0]) == "not applied"
        assert finding(found[0.25]) == finding(found[1.5]) == "another scale"
        assert finding(other.answers(probes.prompts, 1.0)) == "another"
    assert fitted(probes, found[0.25], bound=0.01, expected=0.25).finding == "applied"


def test_another_base_is_another(probed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    probes = Probes.read(probed)
    base = larger(tiny_llama, tmp_path / "base")
    found = fitted(probes, live(probed, base).answers(probes.prompts, 1.0), bound=0.01)
    assert found.finding == "another"


def test_coarser_arithmetic_is_told_from_another_scale(probed: Path, tiny_llama: Path) -> None:
    probes = Probes.read(probed)
    answers = live(probed, tiny_llama, "bfloat16").answers(probes.prompts, 1.0)
    off = distance(probes, answers, 1.0)
    assert 1e-3 < off < BOUNDS["bf16"]
    assert fitted(probes, answers, bound=BOUNDS["bf16"]).finding == "applied"
    assert fitted(probes, answers, bound=off / 2).finding == "rounded"


def test_an_adapter_that_does_too_little_is_not_decided(tiny_llama: Path, tmp_path: Path) -> None:
    weak = scaled(make_adapter(tmp_path / "strong", tiny_llama), tmp_path / "weak", 1e-3)
    pack(weak, base=tiny_llama, probes=True)
    probes = Probes.read(weak)
    for scale in (0.0, 1.0):
        answers = live(weak, tiny_llama).answers(probes.prompts, scale)
        assert fitted(probes, answers, bound=0.01).finding == "undecided"


def test_the_null_adapter_is_the_same_values_in_another_order(probed: Path, tiny_llama: Path) -> None:
    probes, adapter = Probes.read(probed), live(probed, tiny_llama)
    before = {name: value.detach().clone() for name, value in adapter.model.adapters["chat"].parameters().items()}
    adapter.shuffle()
    for name, value in adapter.model.adapters["chat"].parameters().items():
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
        assert not torch.equal(value, before[name])
    rows = adapter.rows([one.ids for one in probes.prompts], 1.0)
    for prompt, row in zip(probes.prompts, rows, strict=True):
        assert (row[list(prompt.tokens)] - torch.tensor(prompt.null)).abs().max() < 1e-4


def test_noise_is_as_good_as_nothing_and_a_small_adapter_beside_it_is_not_taken_for_this_one(probed: Path) -> None:
    """Answers off the curve that are nearer to the base than a third of the effect, and than the null adapter is."""
    probes = Probes.read(probed)
    noise = [
        {t: min(p + 0.12 * (-1) ** t, 0.0) for t, p in zip(one.tokens, one.logprobs[0], strict=True)}
        for one in probes.prompts
    ]
    assert fitted(probes, noise, bound=0.01).finding == "not applied"


def test_answers_of_fewer_or_unknown_tokens_are_compared_all_the_same(probed: Path) -> None:
    probes = Probes.read(probed)
    row = [dict(zip(one.tokens, one.logprobs[3], strict=True)) for one in probes.prompts]
    assert distance(probes, [dict(list(one.items())[:5]) for one in row], 1.0) == 0
    strangers = [{max(one.tokens) + 1 + n: -0.1 for n in range(10)} for one in probes.prompts]
    assert distance(probes, strangers, 1.0) > 1
