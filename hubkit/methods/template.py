"""The files of a new method's package, as text: a complete plugin with a small method that merges, ready to be changed.

What stands here runs as it is: its own tests are the conformance kit, and they pass before the first line is changed.
"""

from __future__ import annotations

import keyword
import re
from string import Template

from hubkit.errors import USAGE, HubkitError

_LONGEST = 40


def require_method_name(name: str) -> None:
    """Refuses what cannot name a method, its module and its entry point: ``HK-NAME`` (status 2)."""
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name) and len(name) <= _LONGEST:
        return
    near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:_LONGEST]
    usable = near and not keyword.iskeyword(near)
    raise HubkitError(
        "HK-NAME",
        "this cannot be the name of a method",
        want=f"lower-case letters, digits and _, a letter first, no word of Python, at most {_LONGEST}",
        have=name,
        fix=f"near: {near}" if usable else "",
        status=USAGE,
    )


def distribution_name(name: str) -> str:
    """The distribution that offers method `name`: ``hubkit-my-gain`` for ``my_gain``."""
    return "hubkit-" + re.sub(r"_+", "-", name).strip("-")


def package_files(name: str, version: str) -> dict[str, str]:
    """Path in the package -> text.

    Args:
        name: the method's.
        version: of hubkit: the oldest that the package asks for.
    """
    words = {
        "name": name,
        "module": f"hubkit_{name}",
        "distribution": distribution_name(name),
        "title": "".join(word.capitalize() for word in name.split("_")),
        "version": version,
    }
    texts = {
        "pyproject.toml": _PROJECT,
        "README.md": _README,
        f"{words['module']}.py": _MODULE,
        f"tests/test_{name}.py": _TEST,
    }
    return {path: Template(text).substitute(words) for path, text in texts.items()}


_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The method $name for hubkit."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["hubkit-adapters>=$version", "torch>=2.6"]

[project.optional-dependencies]
test = ["hubkit-adapters[transformers]", "pytest>=8"]

[project.entry-points."hubkit.methods"]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
"""

_MODULE = '''\
"""$title: a learned gain per output, the scale of SSF, Lian et al. 2022, https://arxiv.org/abs/2210.08823

    y = (1 + g) * (W x + b)    g (out,), 0 at the start

so the weight becomes (1 + g) * W, row by row, and the bias (1 + g) * b.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hubkit.methods.api import Base, Delta, Edit, HubkitError, MethodInfo, Site, hookimpl


@dataclass(frozen=True)
class ${title}Config:
    """Options of the method; each becomes an option of ``hubkit train --set``.

    Args:
        targets: modules whose output gets a gain: all-linear, names, or an expression.
        limit: largest gain at the start of training; 0 starts at the base.
    """

    targets: str | tuple[str, ...] = "all-linear"
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise HubkitError("HK-CONFIG", "out of range", want="limit >= 0", have=f"limit {self.limit}")


class ${title}Part(Edit):
    """The gains of one site. Its parameters are what is trained, stored, weighted and merged."""

    def __init__(self, site: Site, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.g = nn.Parameter(torch.empty(site.shape[0]))

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        nn.init.uniform_(self.g, -self.limit, self.limit, generator=generator)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y * self.g.to(y.dtype)


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="$name",
        summary="a learned gain per output; merges exactly",
        config=${title}Config,
        paper="https://arxiv.org/abs/2210.08823",
        recipe={"learning_rate": 1e-2, "weight_decay": 0.0},
        sources="a starting point; replace it by what you measured",
    )


@hookimpl
def inject(base: Base, config: ${title}Config) -> Mapping[str, ${title}Part]:
    return {site.name: ${title}Part(site, config.limit) for site in base.match(config.targets, "linear")}


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor]) -> Delta:
    gain, bias = tensors["g"], site.bias()
    return Delta.full(gain[:, None] * site.weight(), None if bias is None else gain * bias)
'''

_TEST = """\
from hubkit.methods.suite import MethodSuite


class Test$title(MethodSuite):
    method = "$name"
"""

_README = """\
# $distribution

The method `$name` for [hubkit](https://pypi.org/project/hubkit-adapters/): one module, `$module.py`.

```
pip install -e '.[test]'
pytest
hubkit methods $name
hubkit train BASE rows.jsonl --method $name --out ./adapter
```

The entry point `$name` of group `hubkit.methods` in `pyproject.toml` makes the method known to every command. The test
is hubkit's conformance kit: a fresh adapter is the base bit for bit, merged equals live, what is written reads back to
the same bytes, opposites cancel, and more.

To make it yours, change four things in `$module.py`: the options, the parameters of the part, `forward` (what to add to
the output) and `merge` (what to add to weight and bias). Leave `merge` out where that cannot be said, and give
`MethodInfo` the reason as `unmergeable`.
"""
