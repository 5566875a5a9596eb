"""Tasks of lm-evaluation-harness on a live model, by names (which need the network) or from a folder (which does not).

Only what the package promises is used: `TaskManager`, `simple_evaluate`, and its wrapper of a transformers model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.errors import USAGE, HubkitError

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Tasks:
    """Which tasks are run.

    Args:
        names: of tasks, or of groups.
        folder: where their YAML files lie; None for those of the package.
        limit: examples of each at most; None: all.
    """

    names: tuple[str, ...]
    folder: Path | None
    limit: int | None


def tasks_named(text: str | None, limit: int | None) -> Tasks | None:
    """What ``--tasks`` names: names with commas, or a folder whose YAML files are the tasks; None for none.

    Raises:
        HubkitError: ``HK-EXTRA`` without lm-evaluation-harness; ``HK-OPTIONS`` for no name, a folder without a task, a
            limit below 1; ``HK-DATA`` for a file that cannot be read.
    """
    if limit is not None and limit < 1:
        raise HubkitError("HK-OPTIONS", "out of range", want="limit >= 1", have=f"limit = {limit}", status=USAGE)
    if text is None:
        return None
    folder = Path(text) if Path(text).is_dir() else None
    names = _in_folder(folder) if folder else tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        want = "names with commas, or a folder of task files (.yaml)"
        raise HubkitError("HK-OPTIONS", "there are no tasks", want=want, have=text, status=USAGE)
    package()
    return Tasks(names, folder, limit)


def _in_folder(folder: Path) -> tuple[str, ...]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads ``!function module.name``, which task files may have, as its text."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    names = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        try:
            document = yaml.load(path.read_text("utf-8"), Loader=Loader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            have = str(error).splitlines()[0]
            raise HubkitError("HK-DATA", "a task file cannot be read", where=str(path), have=have) from None
        if isinstance(document, dict) and isinstance(document.get("task"), str):
            names.append(document["task"])
    return tuple(dict.fromkeys(names))


def package() -> Any:
    """The package lm_eval.

    Raises:
        HubkitError: ``HK-EXTRA`` where it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        what, fix = "tasks need the package lm-eval", "pip install 'hubkit-adapters[eval]'"
        raise HubkitError("HK-EXTRA", what, have=str(error), fix=fix) from error
    return lm_eval


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, seed: int) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, with the adapter under its name and with the base alone under ``base``.

    Args:
        model: a live base with adapters, their mix active.
        seed: of the choice of examples, and of the harness's own bootstrap.

    Raises:
        HubkitError: ``HK-DATA`` where the harness cannot run a task.
    """
    adapted = _run(model, tokenizer, tasks, seed)
    with model.using(None):
        bare = _run(model, tokenizer, tasks, seed)
    return {name: {**values, **({"base": bare[name]} if name in bare else {})} for name, values in adapted.items()}


def _run(model: Any, tokenizer: Any, tasks: Tasks, seed: int) -> dict[str, dict[str, float]]:
    harness = package()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    include = None if tasks.folder is None else str(tasks.folder.resolve())
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        found = harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=list(tasks.names),
            task_manager=TaskManager(include_path=include, include_defaults=tasks.folder is None),
            limit=tasks.limit,
            log_samples=False,
            **seeds,
        )
    except HubkitError:
        raise
    except Exception as error:  # a task's own code can raise anything
        have = f"{type(error).__name__}: {error}"[:300]
        fix = "named tasks need the network; a folder of task files with local data does not"
        raise HubkitError("HK-DATA", "a task cannot be run", have=have, want=", ".join(tasks.names), fix=fix) from error
    return {name: _figures(values) for name, values in sorted(found["results"].items())}


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``: a filter is named where it is one."""
    made = {}
    for name, value in values.items():
        metric, _, kept = name.partition(",")
        if kept and isinstance(value, int | float) and value == value:
            made[metric if kept == "none" else f"{metric}_{kept}"] = float(f"{value:.6g}")
    return dict(sorted(made.items()))
