"""Engine ``peft``: the base beside its adapters, run by transformers and PEFT alone; hubkit is not needed there.

| | |
|---|---|
| accepts | every method of PEFT's, one at a time; sums and stacks of low-rank ones, each at its weight |
| refuses | keys that it cannot place, types that it does not know |
| silently wrong | single experts of a mixture on some architectures; a weight at an embedding by ``scale_layer`` |

PEFT has no tree of adapters, so a lock with a mix in it is lowered to one.
"""

from __future__ import annotations

from pathlib import Path

from hubkit.artifact.folder import PEFT_CONFIG
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.engines.beside import peft_files, write_beside
from hubkit.engines.plan import Plan, copy, not_adapters, unknown_codec, write_base, write_runner
from hubkit.engines.served import unservable


class PeftEngine:
    """Adapters stay separate, but for trees of them. Several, or a weight other than 1, need low-rank parts."""

    name = "peft"
    summary = "base and adapters side by side, run by transformers and PEFT"
    version = "0.21.2"
    proven = True
    keys: frozenset[str] = frozenset()

    def refusals(self, plan: Plan) -> list[str]:
        if _trees(plan):
            return unservable(plan) or _experts(plan)
        reasons = not_adapters(plan)
        reasons += [
            f"{m.name}: PEFT does not know the method {m.folder.manifest.method!r}"
            for m in plan.members
            if m.tree is None and PEFT_CONFIG not in {entry.path for entry in m.folder.manifest.files}
        ]
        reasons += unknown_codec(plan)
        reasons += _experts(plan) if not reasons else []
        if reasons or [m.weight for m in plan.members] in ([], [1.0]):
            return reasons
        from hubkit.tensors.parts.part import LowRank

        # A low-rank part reads neither the weight nor what other members added, so a stack of them is their sum.
        return [
            f"{name}: PEFT cannot weigh or add up parts of the method {adapter.method.name!r}"
            for name, adapter in plan.adapters().items()
            if not all(isinstance(part, LowRank) for part in adapter.parts.values())
        ]

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        if _trees(plan):
            write_beside(plan, out, lambda one, base, settings: peft_files(one.lowered.adapter, settings))
            return write_runner(out)
        write_base(plan, out / "base")
        for member in plan.members:
            for name in (MANIFEST_NAME, *(entry.path for entry in member.folder.manifest.files)):
                copy(member.folder.path / name, out / "adapters" / member.name / name)
        return write_runner(out)


def _trees(plan: Plan) -> bool:
    return any(member.tree is not None for member in plan.members)


def _experts(plan: Plan) -> list[str]:
    """Adapters at single experts of a mixture: which of them PEFT reads from their folders differs by architecture."""
    from hubkit.tensors.experts.expert import is_expert

    return [
        f"{name}: it acts at single experts, which PEFT passes over without a word on some architectures"
        for name, folder in plan.folders().items()
        if any(map(is_expert, folder.header()))
    ]


ENGINE = PeftEngine()
