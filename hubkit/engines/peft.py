"""Engine ``peft``: the base beside its adapters, run by transformers and PEFT alone; hubkit is not needed there."""

from __future__ import annotations

from pathlib import Path

from hubkit.artifact.folder import PEFT_CONFIG
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.engines.plan import Plan, copy, copy_base, not_adapters, unknown_codec, write_runner


class PeftEngine:
    """Adapters stay separate. Several, or a weight other than 1, need low-rank parts: those PEFT adds exactly."""

    name = "peft"
    summary = "base and adapters side by side, run by transformers and PEFT"

    def refusals(self, plan: Plan) -> list[str]:
        reasons = not_adapters(plan)
        reasons += [
            f"{m.name}: PEFT does not know the method {m.folder.manifest.method!r}"
            for m in plan.members
            if m.tree is None and PEFT_CONFIG not in {entry.path for entry in m.folder.manifest.files}
        ]
        reasons += unknown_codec(plan)
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
        copy_base(plan, out / "base", weights=plan.codec is None)
        if plan.codec is not None:
            # adapters of a quantized base saw its decoded weights; these are written, so that PEFT computes with them
            from hubkit.tensors.weights.decoding import write_decoded

            write_decoded(plan.base, out / "base", plan.codec, plan.compute_dtype)
        for member in plan.members:
            for name in (MANIFEST_NAME, *(entry.path for entry in member.folder.manifest.files)):
                copy(member.folder.path / name, out / "adapters" / member.name / name)
        return write_runner(out)


ENGINE = PeftEngine()
