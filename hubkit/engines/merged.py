"""Engine ``merged``: one checkpoint with the mix folded in, for everything that loads transformers' folders."""

from __future__ import annotations

from pathlib import Path

from hubkit.engines.plan import Plan, copy_base, not_adapters, unknown_codec, write_runner


class MergedEngine:
    """Every member must be mergeable; the result is an ordinary model."""

    name = "merged"
    summary = "one checkpoint with the adapters folded in"
    version = "5.23.0"
    proven = True
    keys: frozenset[str] = frozenset()

    def refusals(self, plan: Plan) -> list[str]:
        from hubkit.methods.reading import method_of

        reasons = [*not_adapters(plan, mixes=True), *unknown_codec(plan)]
        for name, folder in plan.folders().items() if not reasons else ():
            reason = method_of(folder)[0].unmergeable
            reasons += [f"{name}: {reason}"] if reason else []
        return reasons

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        from hubkit.tensors.weights.decoding import without_codes
        from hubkit.tensors.weights.merging import plan_merge, write_merged

        model = out / "model"
        copy_base(plan, model, weights=not plan.members)
        if plan.members:
            shards, base = plan.trained_on()
            merge = plan_merge(base, plan.whole(), plan.adapters())
            write_merged(merge, without_codes(shards, base, merge.sites), model)
        return write_runner(out)


ENGINE = MergedEngine()
