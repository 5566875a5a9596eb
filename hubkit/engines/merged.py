"""Engine ``merged``: one checkpoint with the mix folded in, for everything that loads transformers' folders."""

from __future__ import annotations

from pathlib import Path

from hubkit.engines.plan import Plan, copy_base, not_adapters, unknown_codec, write_runner


class MergedEngine:
    """Every member must be mergeable; the result is an ordinary model."""

    name = "merged"
    summary = "one checkpoint with the adapters folded in"

    def refusals(self, plan: Plan) -> list[str]:
        from hubkit.methods.reading import method_of

        reasons = [*not_adapters(plan, mixes=True), *unknown_codec(plan)]
        for name, folder in plan.folders().items() if not reasons else ():
            reason = method_of(folder)[0].unmergeable
            reasons += [f"{name}: {reason}"] if reason else []
        return reasons

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        from hubkit.tensors.base.base import Base
        from hubkit.tensors.files.shards import open_shards
        from hubkit.tensors.weights.decoding import decoded
        from hubkit.tensors.weights.merging import plan_merge, write_merged

        model = out / "model"
        copy_base(plan, model, weights=not plan.members)
        if plan.members:
            shards = open_shards(plan.base)
            if plan.codec is not None:  # the weights that the adapters were trained beside
                shards = decoded(shards, plan.codec, plan.compute_dtype)
            base = Base.from_headers(shards.headers, shards.config, str(plan.base), shards.read)
            write_merged(plan_merge(base, plan.whole(), plan.adapters()), shards, model)
        return write_runner(out)


ENGINE = MergedEngine()
