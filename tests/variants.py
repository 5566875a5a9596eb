"""Bases that differ from another in one thing, rows to train on, and ways to look at what a verb did or refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hubkit.cli import run
from hubkit.errors import HubkitError


def rows_file(path: Path, count: int = 24) -> Path:
    """Prompts and completions of different lengths, as JSON lines."""
    rows = [
        {"prompt": f"What is {n} and {n}?", "completion": f"It is {'very ' * (n % 4)}{2 * n}."} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def other_weights(base: Path, out: Path) -> Path:
    """One value of one tensor is another: same shapes, same everything else."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    name = sorted(name for name in tensors if "layers.1" in name or "h.1" in name)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def other_tokenizer(base: Path, out: Path) -> Path:
    """The same weights with a tokenizer that knows one merge less."""
    shutil.copytree(base, out)
    document = json.loads((out / "tokenizer.json").read_text())
    first, second = document["model"]["merges"].pop()
    document["model"]["vocab"].pop(first + second)
    (out / "tokenizer.json").write_text(json.dumps(document))
    return out


def other_template(base: Path, out: Path) -> Path:
    """The same weights and tokenizer with another chat template."""
    shutil.copytree(base, out)
    (out / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    return out


def resharded(base: Path, out: Path) -> Path:
    """The same base in three weight files with other names, another order and other metadata."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = sorted(load_file(base / "model.safetensors").items(), reverse=True)
    index: dict[str, str] = {}
    for number in range(3):
        part = dict(tensors[number::3])
        save_file(part, out / f"part-{number}.safetensors", {"format": "pt", "note": f"part {number}"})
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return out


OTHERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "weights": (other_weights, "1 of "),
    "tokenizer": (other_tokenizer, "the tokenizer differs"),
    "template": (other_template, "the chat template differs"),
}
"""What differs -> how to make such a base, and what a refusal says of it."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    """What lies in `folder`, hidden things too."""
    return {path.name for path in folder.iterdir()}


def refused(code: str, function: Callable[..., Any], *args: Any, **options: Any) -> HubkitError:
    """The refusal of a call that must be refused with `code`."""
    with pytest.raises(HubkitError) as refusal:
        function(*args, **options)
    assert refusal.value.code == code, refusal.value
    return refusal.value


class Said:
    """What one command line printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def refusal(self, status: int = 1) -> str:
        """The code of the one refusal it printed: on stderr, in DESIGN's form, nothing else and never a traceback."""
        assert self.status == status, self.err
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("error[")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        code = lines[0].partition("]")[0].removeprefix("error[")
        assert code != "HK-INTERNAL", self.err
        return code


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Runs one command line in this process, as the `hubkit` command does."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    return Said(status, *capsys.readouterr())


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def logits(model: Any, length: int = 24) -> Any:
    """Logits for three fixed rows of tokens."""
    import torch

    ids = torch.randint(3, 300, (3, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits
