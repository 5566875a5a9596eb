"""Engine ``ollama``: the merged model in GGUF, and a Modelfile that names it by its digest.

Read in the documentation and change log of Ollama 0.34.1; never run with hubkit, so deployments are marked unproven.

| | |
|---|---|
| accepts | a whole model in GGUF |
| refuses | adapters: ``ADAPTER`` in a Modelfile is no longer taken, as of 0.34.1 |
| silently wrong | before that, its converter lost rsLoRA and failed on an alpha that is no whole number; a model's |
| | name is a tag that moves, and so is a ``FROM`` that names one |

So the mix is merged, into the GGUF of the base or through llama.cpp's converter, and ``FROM`` names a file whose name
is its sha256. Ollama takes the chat template from the GGUF, where it knows it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.artifact.identity.digest import hash_file
from hubkit.engines.beside import Kind, wrong_settings
from hubkit.engines.gguf.base import open_gguf
from hubkit.engines.gguf.model import plan_into, write_into
from hubkit.engines.llamacpp import SOURCES, prove, source_of, write_gguf_base, wrong_source
from hubkit.engines.merged import ENGINE as MERGED
from hubkit.engines.plan import Plan

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*")
KINDS: Mapping[str, Kind] = {
    **SOURCES,
    "name": Kind("a model's name", lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value))),
}


class OllamaEngine:
    """Every member must be mergeable; the result is one file."""

    name = "ollama"
    summary = "one model in GGUF with the adapters folded in, and a Modelfile"
    version = "0.34.1"
    proven = False
    keys = frozenset(KINDS)

    def refusals(self, plan: Plan) -> list[str]:
        reasons = [*wrong_settings(self.name, plan.settings, KINDS), *wrong_source(self.name, plan)]
        reasons += MERGED.refusals(plan)
        if not reasons and plan.members and "gguf" in plan.settings:
            prove(plan, source_of(plan))
            if plan.members:
                _into(plan)
        return reasons

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        made = out / "model.gguf"
        if not plan.members:
            write_gguf_base(plan, made)
        elif "gguf" in plan.settings:
            write_into(*_into(plan), made)
        else:
            with tempfile.TemporaryDirectory() as room:
                MERGED.write(plan, Path(room))
                write_gguf_base(plan, made, Path(room) / "model")
        name = f"{hash_file(made).replace(':', '-')}.gguf"
        made.rename(out / name)
        (out / "Modelfile").write_text(f"FROM ./{name}\n", "utf-8")
        return ("ollama", "create", plan.settings.get("name", "model"), "--file", "Modelfile")


def _into(plan: Plan) -> tuple[Any, Any, Any]:
    """The merge, the rows of the base's GGUF that it changes, and that GGUF; worked out once."""
    from hubkit.tensors.weights.merging import plan_merge

    if "into" not in plan.made:
        _, base = plan.trained_on()
        merge = plan_merge(base, plan.whole(), plan.adapters(base))
        gguf = open_gguf(source_of(plan), base.arch.model_type)
        plan.made["into"] = merge, plan_into(merge, base, gguf), gguf
    made: tuple[Any, Any, Any] = plan.made["into"]
    return made


ENGINE = OllamaEngine()
