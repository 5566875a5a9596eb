"""A merged model as GGUF: into the GGUF of its base, or by llama.cpp's own converter.

Into a base: the file is copied, metadata, tokenizer and every tensor that stays, and the rows that change are written
over theirs, in the order and with the shift that were proven (`hubkit.engines.gguf.proof`), one matrix at a time,
added up in fp32 and cast once. Weights that are codes in the GGUF are refused: what they would become depends on how
they were quantized; merge into f32, f16 or bf16 and quantize that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.engines.gguf.base import HEAD, GgufBase
from hubkit.engines.gguf.proof import Fit, Proof
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.weights.merging import MergePlan

CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Change:
    """Rows of a base's GGUF that a merge changes.

    Args:
        site: whose weight, or bias, they are.
        fits: where they lie.
        bias: they are its bias.
    """

    site: Site
    fits: tuple[Fit, ...]
    bias: bool = False


def plan_into(merge: MergePlan, base: Base, gguf: GgufBase) -> list[Change]:
    """What has to be written to turn the base's GGUF into the merged model's.

    Args:
        base: with weights.

    Raises:
        HubkitError: ``HK-GGUF`` for a GGUF that was not made of this base, for changes that it has no place for, and
            for weights that it holds as codes.
    """
    proof, wrong = Proof(gguf, base), list(_unfit(merge, base, gguf))
    changes: list[Change] = []
    for site in merge.sites:
        changes.append(Change(site, tuple(proof.weight(site))))
        if not merge.keeps_bias(site) and site.has_bias:
            changes.append(Change(site, tuple(proof.bias(site)), bias=True))
    for change in changes:
        wrong += [] if change.fits else [f"{change.site.name}: the GGUF has no tensor for it"]
        coded = {fit.place.tensor for fit in change.fits if gguf.dtype_of(fit.place.tensor) is None}
        wrong += [f"{name}: it is in {gguf.type_of(name)}" for name in sorted(coded)]
    if wrong:
        what = "the merged model cannot be written into this GGUF"
        fix = "a GGUF of the base in f32, f16 or bf16; or llama.cpp's own converter: llama-cpp = DIR in the recipe"
        raise HubkitError("HK-GGUF", what, where=str(gguf.path), have=wrong, fix=fix)
    return changes


def write_into(merge: MergePlan, changes: list[Change], gguf: GgufBase, out: Path) -> None:
    """Write the merged model's GGUF to `out`.

    Args:
        changes: of `plan_into`.

    Raises:
        HubkitError: ``HK-NAN`` for a value that leaves the range of its type; ``HK-DISK``, ``HK-IO``.
    """
    from hubkit.documents.files import refusing
    from hubkit.tensors.files.shards import tensor_bytes

    with refusing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(gguf.path, out)
        with open(out, "r+b") as file:
            for change in changes:
                for fit, values in _values(merge, change, gguf):
                    place = fit.place
                    file.seek(gguf.span(place.tensor, place.expert, *place.rows)[0])
                    file.write(tensor_bytes(values))


def convert(folder: Path, out: Path, llama_cpp: Path, dtype: str, name: str) -> None:
    """A model's folder as GGUF, by llama.cpp's own converter.

    Args:
        folder: of the model, in transformers' files.
        out: the file to write.
        llama_cpp: a folder that holds ``convert_hf_to_gguf.py``; its ``bin/python`` is taken, or that of its ``.venv``
            or ``venv``; without one, the one that runs this.
        dtype: ``f32``, ``f16`` or ``bf16``.
        name: ``general.name``; the converter would take the folder's.

    Raises:
        HubkitError: ``HK-GGUF`` without a converter, and with its last words where it fails.
    """
    script = llama_cpp / CONVERTER
    if not script.is_file():
        what, fix = (
            "there is no converter of llama.cpp",
            "a checkout of llama.cpp, or what scripts/engines/llamacpp makes",
        )
        raise HubkitError("HK-GGUF", what, where=str(script), fix=fix)
    words: list[str | Path] = [_python(llama_cpp), script, folder, "--outfile", out]
    words += ["--outtype", dtype, "--model-name", name]
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([os.fspath(word) for word in words], capture_output=True, text=True, env=known)
    if ran.returncode or not out.is_file():
        said = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()][-3:]
        what, fix = "llama.cpp's converter failed", "what it says, or another folder of llama.cpp"
        raise HubkitError("HK-GGUF", what, where=str(script), have=said or f"status {ran.returncode}", fix=fix)


def _python(llama_cpp: Path) -> Path:
    """The interpreter that the converter's own environment has, if there is one."""
    places = (llama_cpp / venv / "bin" / "python" for venv in (".", ".venv", "venv"))
    return next((path for path in places if path.is_file()), Path(sys.executable))


def _unfit(merge: MergePlan, base: Base, gguf: GgufBase) -> Iterator[str]:
    """Merged models that need other tensors than the base's GGUF has."""
    tables = [site for site in base.sites.values() if site.kind == "embedding"]
    if any(merge.shape(table, table.shape[::-1]) != table.shape[::-1] for table in tables):
        yield "the vocabulary grows"
    if merge.tied_head is not None:
        yield f"{merge.tied_head.name}: it is no longer tied to the embeddings, and the GGUF has one tensor for both"
    tied = any(site.tied for site in base.sites.values())
    touched = any(site.kind == "embedding" or base.arch.is_head(site.name) for site in merge.sites)
    if tied and touched and HEAD in gguf.tensors:
        yield f"{HEAD}: the base ties its head to the embeddings, and the GGUF holds the two apart"


def _values(merge: MergePlan, change: Change, gguf: GgufBase) -> Iterator[tuple[Fit, Tensor]]:
    """Each place's new rows, in the dtype that the GGUF holds them in."""
    import torch

    from hubkit.tensors.parts.values import require_finite

    whole = (merge.bias if change.bias else merge.weight)(change.site, torch.float32)
    assert whole is not None, "a site whose bias changes has one"
    rows = whole.view(whole.shape[0], -1)
    for fit in change.fits:
        dtype = gguf.dtype_of(fit.place.tensor)
        assert dtype is not None, "codes were refused"
        values = (fit.taken(rows) + fit.shift).to(dtype)
        require_finite([(fit.place.tensor, values)], str(gguf.path))
        yield fit, values
