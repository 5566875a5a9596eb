"""Low-rank factors of experts as PEFT holds them: one pair for the tensor in which a model has all experts.

    files   experts.7.gate_proj  A (r, in)  B (I, r)       PEFT   experts.base_layer.lora_A  (E·R, in)
            experts.7.up_proj    A (r, in)  B (I, r)              experts.base_layer.lora_B  (2I, R·E)

Expert 7 is rows 7·R to 8·R of PEFT's A and columns 7, 7 + E, ... of its B. Taken apart, gate and up share an A; put
together, their factors become diagonal blocks of rank R = 2r, by which they are known again. Both ways are exact. Where
the files hold the tensor as the model does, each expert has one pair in both forms. PEFT takes a tensor for
(E, out, in) unless its module says ``is_transposed``; if it is turned all the same (Llama 4), A and B change places.

Format: ``ParamWrapper`` of https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py (0.17 to 0.21).
Its keys name no parameter: where a module has several, the first of them is innermost, below ``base_layer``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubkit.artifact.forms import PEFT_PREFIX
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.artifact.forms import PeftForm

PARAMETERS = "target_parameters"


class Spelling:
    """How PEFT spells the factors of a method and their scale.

    Args:
        form: of the method.
    """

    def __init__(self, form: PeftForm) -> None:
        keys = {field: key for key, field in form.options.items()}
        self.form, self.pair = form, [form.roles["linear"][role] for role in ("A", "B")]
        self.rank, self.alpha, self.dropout = (keys[field] for field in ("rank", "alpha", "dropout"))
        # the one option of a scale that is on or off: by the root of the rank
        switches = (key for key, field in form.options.items() if isinstance(form.defaults.get(field), bool))
        self.stable = next(switches, "")

    def keys(self, stem: str) -> list[str]:
        """The keys of A and B of what PEFT names `stem`."""
        return [f"{PEFT_PREFIX}{stem}.{end}" for end in self.pair]

    def modules(self, stored: Collection[str]) -> set[str]:
        """The modules that have an A among PEFT's keys."""
        end = f".{self.pair[0]}"
        return {key.removeprefix(PEFT_PREFIX).removesuffix(end) for key in stored if key.endswith(end)}


@dataclass(frozen=True)
class Fused:
    """A tensor in which a live model holds a matrix of every expert.

    Args:
        module: the path of the module that holds it, in the model.
        name: of the parameter, (experts, rows, in).
        matrices: expert -> the sites whose weights its rows are, and which rows.
        crossed: PEFT takes the inputs of its matrices for their outputs.
    """

    module: str
    name: str
    matrices: Sequence[Sequence[tuple[str, slice]]]
    crossed: bool = False

    @property
    def sites(self) -> list[str]:
        """All of its sites."""
        return [site for layers in self.matrices for site, _ in layers]

    @property
    def path(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.module}.{self.name}"


def together(spelling: Spelling, config: dict[str, Any], stored: dict[str, Tensor], tensors: Sequence[Fused]) -> None:
    """Puts the factors of experts together, in place.

    Args:
        spelling: of the adapter's method.
        config: of PEFT, its targets modules that exist in the files.
        stored: PEFT's keys -> tensors, a pair for each matrix of an expert.
        tensors: those of the model, in its order.

    Raises:
        HubkitError: ``HK-EXPORT`` for what PEFT's form cannot say.
    """
    present = spelling.modules(stored)
    experts = {site for fused in tensors for site in fused.sites} & present
    if experts or config.get(PARAMETERS):
        _require_plain(spelling, config)
    if not experts:
        return
    touched = [fused for fused in tensors if not experts.isdisjoint(fused.sites)]
    names = {fused.path: _short(fused, tensors, touched) for fused in touched}
    made: dict[str, Tensor] = {}
    for stem, fused in _stems(touched):
        *pair, rank, alpha = _joined(spelling, fused, config, stored)
        made |= dict(zip(spelling.keys(stem), pair, strict=True))
        _patterned(spelling, config, re.escape(names[fused.path]), rank, alpha)
    for key in (key for site in experts for key in spelling.keys(site)):
        del stored[key]
    stored |= made
    others = present - experts
    config["target_modules"] = [t for t in config["target_modules"] if any(_ends(name, t) for name in others)]
    config[PARAMETERS] = sorted({*(config.get(PARAMETERS) or ()), *names.values()})


def apart(
    spelling: Spelling, config: dict[str, Any], stored: dict[str, Tensor], tensors: Sequence[Fused], where: str
) -> None:
    """Takes the factors of experts apart, in place: a pair for each matrix of an expert, as the files hold these.

    Args:
        spelling: of the adapter's method.
        config: of PEFT, perhaps with tensors of experts among its ``target_parameters``.
        stored: PEFT's keys -> tensors.
        tensors: those of the model, in its order.
        where: the file, for messages.

    Raises:
        HubkitError: ``HK-TARGET`` for targets that are no tensor of experts; ``HK-SHAPE``.
    """
    wanted = [str(name) for name in config.get(PARAMETERS) or ()]
    chosen = [fused for fused in tensors if any(_ends(fused.path, name) for name in wanted)]
    lost = [n for n in wanted if not n.endswith(".weight") and not any(_ends(f.path, n) for f in chosen)]
    if lost:
        raise HubkitError(
            "HK-TARGET",
            "targets of the adapter are no tensors in which the base's model holds experts",
            where=f"{where}#/{PARAMETERS}",
            have=lost,
            want=sorted({fused.name for fused in tensors}) or "nothing: this model has no such tensors",
            fix="the base that it was trained on, and the transformers (5 or newer) that made it",
        )
    for stem, fused in _stems(chosen):
        a, b = (stored.pop(key, None) for key in spelling.keys(stem))
        if a is not None and b is not None:  # what is promised and missing is told with the rest
            stored |= _taken_apart(spelling, fused, config, a, b, f"{where}: {stem}")
    if wanted:
        kept = [name for name in wanted if not any(_ends(fused.path, name) for fused in chosen)]
        config[PARAMETERS] = kept + [f"{site}.weight" for fused in chosen for site in fused.sites]


def _stems(chosen: Sequence[Fused]) -> Iterator[tuple[str, Fused]]:
    """What PEFT names each tensor in its keys: of those that are chosen in one module, the first is innermost."""
    left = Counter(fused.module for fused in chosen)
    for fused in chosen:
        left[fused.module] -= 1
        yield f"{fused.module}{'.base_layer' * left[fused.module]}", fused


def _short(fused: Fused, tensors: Sequence[Fused], chosen: Sequence[Fused]) -> str:
    """The shortest name by which PEFT finds a tensor and no other that is not chosen: ``experts.down_proj``."""
    short = f"{fused.module.rpartition('.')[2]}.{fused.name}"
    paths = {one.path for one in chosen}
    return short if {one.path for one in tensors if _ends(one.path, short)} <= paths else fused.path


def _require_plain(spelling: Spelling, config: Mapping[str, Any]) -> None:
    """Refuses what PEFT does not do at a tensor: ``HK-EXPORT``."""
    more = set(spelling.form.roles["linear"]) - {"A", "B"}  # a method that is more than its factors
    active = [*(spelling.form.requires if more else ()), *([spelling.dropout] if config.get(spelling.dropout) else ())]
    if active:
        raise HubkitError(
            "HK-EXPORT",
            "PEFT has no such adapters at experts, nor at modules beside them of the same name",
            have=[f"{key}: {json.dumps(config[key])}" for key in active],
            fix="hubkit merge, or an adapter without these",
        )


def _scaled(spelling: Spelling, config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies B·A by at `name`."""
    from hubkit.methods.patterns import pattern_value

    alpha = float(pattern_value(config.get("alpha_pattern") or {}, name, config.get(spelling.alpha, 8)))
    return alpha / (math.sqrt(rank) if config.get(spelling.stable) else rank)


def _patterned(spelling: Spelling, config: dict[str, Any], pattern: str, rank: int, alpha: float) -> None:
    """Notes rank and alpha at modules of a name where they are not the general ones."""
    for key, value, general in (("rank", rank, spelling.rank), ("alpha", alpha, spelling.alpha)):
        if value != config.get(general, 8):
            whole = int(value) if value == int(value) else value
            config[f"{key}_pattern"] = {pattern: whole, **(config.get(f"{key}_pattern") or {})}  # the first one counts


def _joined(
    spelling: Spelling, fused: Fused, config: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, int, float]:
    """PEFT's A and B for one tensor, their rank and alpha."""
    import torch

    def pair(site: str) -> tuple[Tensor, Tensor] | None:
        found = [stored.get(key) for key in spelling.keys(site)]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    pairs = {site: found for site in fused.sites if (found := pair(site)) is not None}
    scales = {_scaled(spelling, config, site, len(a)) for site, (a, _) in pairs.items()}
    if len(scales) > 1:
        what = "PEFT scales all experts of a layer alike"
        have = f"{fused.path}: {', '.join(map(str, sorted(scales)))}"
        raise HubkitError("HK-EXPORT", what, have=have, fix="hubkit merge, or one alpha for all of them")
    size, some = max(rows.stop for layers in fused.matrices for _, rows in layers), next(iter(pairs.values()))
    made: list[tuple[Tensor, Tensor]] = []
    for layers in fused.matrices:
        here = [(pairs[site], rows) for site, rows in layers if site in pairs]
        shared = len(here) == len(layers) and all(torch.equal(a, here[0][0][0]) for (a, _), _ in here)
        a = here[0][0][0] if shared else torch.cat([a for (a, _), _ in here]) if here else some[0][:0]
        b, column = a.new_zeros(size, len(a)), 0
        for (one, up), rows in here:
            column = 0 if shared else column
            b[rows, column : column + len(one)] = up
            column += len(one)
        made.append((a, b))
    rank = max(len(a) for a, _ in made)
    down = torch.cat([torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]) for a, _ in made])
    up = torch.stack([torch.cat([b, b.new_zeros(size, rank - b.shape[1])], 1) for _, b in made], -1)
    down, up = _crossed(down, up.flatten(1), len(made)) if fused.crossed else (down, up.flatten(1))
    return down, up, rank, scales.pop() * (math.sqrt(rank) if config.get(spelling.stable) else rank)


def _taken_apart(
    spelling: Spelling, fused: Fused, config: dict[str, Any], down: Tensor, up: Tensor, where: str
) -> dict[str, Tensor]:
    """A pair of factors for each site of a tensor; their ranks and alphas are noted in `config`."""
    count = len(fused.matrices)
    if fused.crossed and len(down) % count == 0 and up.shape[1] == len(down):
        down, up = _crossed(down, up, count)
    size = max(rows.stop for layers in fused.matrices for _, rows in layers)
    rank = len(down) // count
    if len(down) % count or tuple(up.shape) != (size, rank * count):
        want = f"({count}·r, in) and ({size}, {count}·r)"
        what = f"the factors are not those of {count} experts"
        raise HubkitError("HK-SHAPE", what, where=where, want=want, have=f"{tuple(down.shape)} and {tuple(up.shape)}")
    scale, wide = _scaled(spelling, config, fused.path, rank), up.view(size, rank, count)
    found: dict[str, Tensor] = {}
    parted = len(fused.matrices[0])
    blocks = rank % parted == 0 and parted > 1 and _is_diagonal(fused, wide, rank // parted)
    own = rank // parted if blocks else rank
    for number, layers in enumerate(fused.matrices):
        a = down[number * rank : (number + 1) * rank]
        for index, (site, rows) in enumerate(layers):
            part = slice(index * own, (index + 1) * own) if blocks else slice(rank)
            pair = a[part].clone(), wide[rows, part, number].clone()
            found |= dict(zip(spelling.keys(site), pair, strict=True))
    alpha = scale * (math.sqrt(own) if config.get(spelling.stable) else own)
    for last in {site.rpartition(".")[2] for site in fused.sites}:
        stem = re.escape(fused.sites[0].rpartition(".experts.")[0])
        _patterned(spelling, config, rf"{stem}\.experts\.[0-9]+\.{re.escape(last)}", own, alpha)
    return found


def _crossed(down: Tensor, up: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The factors of the transposed matrices: A (count·r, in), B (out, r·count) -> (count·r, out), (in, r·count)."""
    rank = len(down) // count
    turned = up.view(-1, rank, count).permute(2, 1, 0).reshape(count * rank, -1)
    return turned, down.view(count, rank, -1).permute(2, 1, 0).reshape(-1, rank * count)


def _is_diagonal(fused: Fused, wide: Tensor, own: int) -> bool:
    """Whether every expert's B holds blocks of rank `own` on its diagonal, one for each site, and zeros elsewhere."""
    off = wide.clone()
    for number, layers in enumerate(fused.matrices):
        for index, (_, rows) in enumerate(layers):
            off[rows, index * own : (index + 1) * own, number] = 0
    return not bool(off.any()) and bool(wide.any())


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
