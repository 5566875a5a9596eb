"""Where hubkit's ``all-linear`` is another set of modules than PEFT's: both asked, on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bases.architectures import ARCHITECTURES, CAUSAL, VISION, config_of, known

BEGIN, END = "<!-- all-linear: scripts/bases --linear -->", "<!-- all-linear: end -->"
_PARTS = (".experts.base_layer",)
"""Modules that PEFT makes while it wraps others."""


def rows() -> list[str]:
    """Lines of a table: the architectures where the two differ, what only hubkit takes and what only PEFT takes."""
    found = ["| architecture | only hubkit | only PEFT |", "|---|---|---|"]
    for kind in known():
        if ARCHITECTURES[kind].saved in (CAUSAL, VISION):
            ours, theirs = difference(kind)
            found += [f"| `{kind}` | {ours} | {theirs} |"] if ours or theirs else []
    return found


def difference(kind: str) -> tuple[str, str]:
    """What only hubkit and what only PEFT takes on the model of one architecture, without numbers of layers."""
    import peft
    import torch
    import transformers
    from peft.tuners.tuners_utils import BaseTunerLayer

    from hubkit.tensors.base.base import Base

    with torch.device("meta"):
        model: Any = getattr(transformers, ARCHITECTURES[kind].saved).from_config(config_of(kind))
    paths = {id(module): path for path, module in model.named_modules()}
    modules = [site.module for site in Base.from_model(model).match("all-linear")]
    ours = {paths[id(getattr(module, "holder", module))] for module in modules}  # an expert is a part of its holder's
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        made = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        return "", f"refused: {str(error).partition('] ')[2].split('.')[0]}"
    layers = (path for path, module in made.named_modules() if isinstance(module, BaseTunerLayer))
    theirs = {path.removeprefix("base_model.model.") for path in layers if not path.endswith(_PARTS)}
    return _families(ours - theirs), _families(theirs - ours)


def _families(names: Iterable[str]) -> str:
    """Names without the numbers in them, each once."""
    return ", ".join(sorted({f"`{re.sub(r'[.][0-9]+(?=[.])', '.*', name)}`" for name in names}))


def within(document: str, lines: Iterable[str]) -> str:
    """`document` with the table between its marks."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "".join(f"{line}\n" for line in lines) + END + rest.partition(END)[2]
