"""One cell of the table: an adapter's whole life on one base, and what became of it.

Two steps of training, `pack`, `verify`, `attach` to the model that transformers loads, `merge`, and the same folder in
PEFT; then the logits are compared, in fp32.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bases.architectures import ARCHITECTURES, CAUSAL, SEQ2SEQ, VISION

TOLERANCE = 1e-4
"""What two ways of computing the same logits in fp32 may differ by, relative to the largest: the suite's own bound."""
VISIBLE = 1e-2
"""What an adapter changes at least, relative to the largest logit: a hundred times the tolerance."""
LENGTH = 24


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Args:
        config: its options.
        rate: a learning rate at which two steps are plainly visible.
        merges: whether it can be folded into weights.
        peft: PEFT's own class of configuration of the same kind, and its arguments; None where PEFT has none.
    """

    config: Mapping[str, Any]
    rate: float
    merges: bool = True
    peft: tuple[str, Mapping[str, Any]] | None = None


_LORA: Mapping[str, Any] = {"r": 2, "target_modules": "every linear layer"}
_TOKENS: Mapping[str, Any] = {"num_virtual_tokens": 4}
METHODS: Mapping[str, Method] = {
    "lora": Method({"rank": 2}, 0.05, peft=("LoraConfig", _LORA)),
    "dora": Method({"rank": 2}, 0.05, peft=("LoraConfig", {**_LORA, "use_dora": True})),
    "qlora": Method({"rank": 2}, 0.05, peft=("LoraConfig", _LORA)),
    "adapters": Method({"width": 4}, 0.1, merges=False),
    "prefix": Method(_TOKENS, 0.3, merges=False, peft=("PrefixTuningConfig", _TOKENS)),
    "prompt": Method(_TOKENS, 0.3, merges=False, peft=("PromptTuningConfig", _TOKENS)),
    "selective": Method({}, 0.1),
    "full": Method({}, 0.02),
}


@dataclass
class Cell:
    """What became of one method on one architecture.

    Args:
        architecture, method: row and column.
        code: of the refusal, where `train` refused before the first step.
        faults: everything else that should not be, worst kind first when read by `verdict`.
        note: what is not compared, and why.
    """

    architecture: str
    method: str
    code: str = ""
    faults: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``refused HK-...``, or the worst fault's kind: crash, dead, wrong, name."""
        worst = next((kind for kind in KINDS if kind in self.faults), "")
        return worst or (f"refused {self.code}" if self.code else "ok")

    def blame(self, kind: str, what: str) -> None:
        """Notes a fault; of one kind, all are kept."""
        self.faults[kind] = f"{self.faults[kind]}; {what}" if kind in self.faults else what


KINDS = {
    "crash": "an exception that is no HubkitError",
    "dead": "training ends well, and a later verb refuses the result",
    "wrong": "numbers differ, or nothing changed",
    "name": "attach without base= takes the base for another",
}
"""Kinds of faults, worst first. A table that is as it should be has none."""


def run_cell(kind: str, method: str, base: Path, work: Path, **config: Any) -> Cell:
    """Runs one cell.

    Args:
        kind: a row.
        method: a column.
        base: the row's base, as `architectures.save` writes it.
        work: a folder that does not exist; it is gone afterwards.
        config: options of the method beside those of its column.
    """
    cell = Cell(kind, method)
    work.mkdir()
    try:
        if _trained(cell, base, work, config):
            _packed(cell, base, work)
            _compared(cell, base, work)
    finally:
        shutil.rmtree(work)
    return cell


def loaded(base: Path) -> Any:
    """A model as users of transformers have it, in fp32: the one that sees or reads, else the causal one."""
    import transformers

    kind = ARCHITECTURES[_kind(base)].saved
    auto = getattr(transformers, kind if kind in (VISION, SEQ2SEQ) else CAUSAL)
    return auto.from_pretrained(base, dtype="float32").eval()


def _kind(base: Path) -> str:
    import json

    return str(json.loads((base / "config.json").read_text())["model_type"])


def logits(model: Any) -> Any:
    """Logits of three fixed rows, (3, LENGTH, vocabulary); an encoder-decoder reads and writes the same."""
    import torch

    ids = torch.randint(3, 300, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    both = {"decoder_input_ids": ids} if hasattr(getattr(model, "model", model), "encoder") else {}
    with torch.no_grad():
        return model(input_ids=ids, **both).logits[:, -LENGTH:]  # PEFT's prompts stand in the logits, too


def _trained(cell: Cell, base: Path, work: Path, config: Mapping[str, Any]) -> bool:
    """Trains two steps; whether there is an adapter."""
    from variants import rows_file

    import hubkit
    from hubkit.errors import HubkitError

    method, out = METHODS[cell.method], work / "adapter"
    steps: list[object] = []
    rows = rows_file(work / "rows.jsonl", 8)
    try:
        hubkit.train(
            base,
            rows,
            out,
            method=cell.method,
            config={**method.config, **config},
            steps=2,
            batch_size=4,
            warmup=0.0,
            schedule="constant",
            learning_rate=method.rate,
            dtype="float32",
            device="cpu",
            report=lambda event: steps.append(event) if isinstance(event, hubkit.Started) else None,
        )
    except HubkitError as error:
        if error.__cause__ is not None and error.code in ("HK-PLUGIN", "HK-INTERNAL"):
            cell.blame("crash", f"train: {error.code}: {_line(error.__cause__)}")
        elif steps or {path.name for path in work.iterdir()} != {"rows.jsonl"}:
            cell.blame("dead", f"train refuses after it began: {_line(error)}")
        else:
            cell.code, cell.note = error.code, _line(error)
        return False
    except Exception as error:
        cell.blame("crash", f"train: {_line(error)}")
        return False
    if still := _still(out):
        cell.blame("wrong", f"{len(still)} factors were not trained: {', '.join(still[:3])}")
    return True


def _still(folder: Path) -> list[str]:
    """Factors that two steps left as they were, zero: of modules that the model does not call. Experts may be idle."""
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    return [key for key, value in stored.items() if ".lora_B." in key and not value.any() and ".experts." not in key]


def _packed(cell: Cell, base: Path, work: Path) -> None:
    """Packs and verifies the adapter, and merges it where its method can be merged."""
    import hubkit

    out = work / "adapter"
    _attempt(cell, "pack", "dead", lambda: hubkit.pack(out, base=base))
    _attempt(cell, "verify", "dead", lambda: hubkit.verify(out, base=base))
    if METHODS[cell.method].merges:
        _attempt(cell, "merge", "dead", lambda: hubkit.merge(base, out, work / "merged"))


def _attempt(cell: Cell, verb: str, refused: str, call: Callable[[], Any]) -> Any:
    """What `call` gives; None where it fails, which is noted, a refusal as one of kind `refused`."""
    from hubkit.errors import HubkitError

    try:
        return call()
    except HubkitError as error:
        cell.blame(refused, f"{verb}: {_line(error)}")
    except Exception as error:
        cell.blame("crash", f"{verb}: {_line(error)}")
    return None


def _compared(cell: Cell, base: Path, work: Path) -> None:
    """Compares the logits of the model with the adapter attached, of the merged one, and of PEFT's."""
    import hubkit

    out = work / "adapter"
    plain = logits(loaded(base))
    attached = _attempt(cell, "attach", "name", lambda: hubkit.attach(loaded(base), out))
    if attached is None:
        attached = _attempt(cell, "attach with base=", "dead", lambda: hubkit.attach(loaded(base), out, base=base))
    live = None if attached is None else _attempt(cell, "live", "dead", lambda: logits(attached))
    merged = None
    if (work / "merged").exists():
        merged = _attempt(cell, "loading what was merged", "dead", lambda: logits(loaded(work / "merged")))
    if live is not None and not _differ(live, plain) > VISIBLE:
        cell.blame("wrong", f"attached, it changes the logits by {_differ(live, plain):.1e} only")
    plainly = loaded(base)
    if cell.method == "qlora" and attached is not None:  # acts beside what 4 bits hold, live and merged
        plainly = _rounded(plainly, attached)
    folder = _for_peft(cell, base, out)
    theirs = None if folder is None else _by_peft(cell, base, plainly, folder)
    pairs = {"live and merged": (live, merged), "live and PEFT": (live, theirs), "merged and PEFT": (merged, theirs)}
    for name, (one, other) in pairs.items():
        if one is not None and other is not None and not _differ(one, other) <= TOLERANCE:
            cell.blame("wrong", f"{name} differ by {_differ(one, other):.1e}")


def _differ(one: Any, other: Any) -> float:
    """The largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def _for_peft(cell: Cell, base: Path, out: Path) -> Path | None:
    """The folder that PEFT gets: the adapter's own; exported where the model names modules as its files do not."""
    import hubkit
    from hubkit.errors import HubkitError
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.experts.expert import is_expert

    sites = Base.from_folder(base)
    if METHODS[cell.method].peft is None or not any(is_expert(n) or sites.arch.tower(n) for n in sites.sites):
        return out
    try:
        return hubkit.export(out, out.parent / "peft", base=base).path
    except HubkitError as error:
        if "use_dora: true" in error.have:
            cell.note = f"PEFT cannot: {_line(error)}"
        else:
            cell.blame("dead", f"export: {_line(error)}")
        return None


def _by_peft(cell: Cell, base: Path, model: Any, folder: Path) -> Any:
    """The logits of PEFT; None where it is no judge, which is noted, and where it should be and fails, a fault."""
    import peft

    if METHODS[cell.method].peft is None:
        return None
    try:
        return logits(peft.PeftModel.from_pretrained(model, str(folder)).eval())
    except Exception as error:
        refusal = _peft_cannot(cell.method, loaded(base))
        if refusal is None:
            cell.blame("dead", f"PEFT: {_line(error)}")
        else:
            cell.note = f"PEFT cannot: {refusal}"
    return None


def _peft_cannot(method: str, model: Any) -> str | None:
    """Why PEFT does not compute with a fresh adapter of its own making on `model`; None where it does."""
    import peft

    made = METHODS[method].peft
    assert made is not None
    name, values = made
    if "target_modules" in values:
        values = {**values, "target_modules": _linears(model)}
    try:
        logits(peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **values)).eval())
    except Exception as error:
        return _line(error)
    return None


def _linears(model: Any) -> list[str]:
    """Last names of the linear layers but the output head, as PEFT's ``all-linear`` means them."""
    from torch import nn

    head = model.get_output_embeddings()
    found = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" if m is not head
    ]
    return sorted({name.rpartition(".")[2] for name in found})


def _rounded(model: Any, attached: Any) -> Any:
    """`model` with the weights that the linear layers of `attached` compute with: those that 4 bits hold."""
    import torch

    from hubkit.tensors.experts.expert import Expert

    names = {id(module): name for name, module in attached.model.named_modules()}
    with torch.no_grad():
        for site in attached.sites.sites.values():
            if site.kind == "linear" and not site.tied:
                weight = site.weight()
                if isinstance(site.module, Expert):
                    fused = model.get_submodule(names[id(site.module.holder)]).get_parameter(site.module.tensor)
                    site.module.within(fused).copy_(weight.t() if site.transposed else weight)
                else:
                    model.get_submodule(names[id(site.module)]).weight.copy_(weight.t() if site.transposed else weight)
    return model


def _line(error: BaseException) -> str:
    """An exception in one line; of a refusal also the first things that it found."""
    code, have = getattr(error, "code", "") or type(error).__name__, getattr(error, "have", None) or []
    words = " ".join(str(getattr(error, "what", "") or error).split())[:160]
    found = f" ({', '.join(have[:2])[:160]}{', ...' if len(have) > 2 else ''})" if have else ""
    return f"{code} {words}{found}"
