"""Results of an evaluation as the Hub has them: ``model-index`` in the card, ``.eval_results/*.yaml`` of benchmarks.

The first holds any rows, by name. The second is for data sets of the Hub that are benchmarks there: an entry names the
data set and the task in it, as that data set's own ``eval.yaml`` spells it, so nobody but the user can say which it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hubkit.artifact.frontmatter import SOURCE
from hubkit.artifact.gates import flat
from hubkit.errors import USAGE, HubkitError

FOLDER = ".eval_results"
LANGUAGE = "text-generation"
_TYPES = {
    "classification": "text-classification",
    "token-classification": "token-classification",
    "embedding": "sentence-similarity",
}
"""Kind of a task -> what the Hub calls it."""
_BENCHMARK = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[0-9a-f]{40}))?"
    r":(?P<task>[A-Za-z0-9][\w.-]*)=(?P<figure>[A-Za-z][\w.,/-]*)",
    re.ASCII,
)
_WANT = "ORG/DATASET[@COMMIT]:TASK=FIGURE, e.g. openai/gsm8k:gsm8k=tasks.gsm8k.exact_match"


def results_of(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The results of ``model-index``: one for the held-out rows, one for the general ones, one for each task."""
    if not evaluation:
        return []
    made = []
    if "heldout" in evaluation:
        heldout, task = evaluation["heldout"], evaluation.get("task")
        metrics = [("perplexity", "perplexity", "held-out perplexity"), ("loss", "loss", "held-out loss, nats a token")]
        if task:  # accuracy, f1_macro: the Hub knows the first word
            scores = [name for name in heldout if not name.endswith(("_low", "_high"))]
            metrics = [(name.partition("_")[0], name, f"held-out {name.replace('_', ' ')}") for name in scores]
        found = [_metric(kind, heldout[key], name) for kind, key, name in metrics if key in heldout]
        made.append(_result(evaluation.get("data", {}), "held-out rows", found, _TYPES.get(str(task), LANGUAGE)))
    if "forgetting" in evaluation:
        name = "forgetting: nats a token more than the base on general rows"
        found = [_metric("forgetting", evaluation["forgetting"].get("value"), name)]
        made.append(_result(evaluation.get("general", {}), "general rows", found))
    for task, figures in sorted(evaluation.get("tasks", {}).items()):
        found = [_metric(name, value, name) for name, value in sorted(flat(figures)) if not name.endswith("_stderr")]
        made.append(_result({"name": task}, task, found))
    return made


def _metric(kind: str, value: Any, name: str) -> dict[str, Any]:
    return {"type": kind, "value": value, "name": name}


def _result(rows: Mapping[str, Any], name: str, metrics: list[dict[str, Any]], kind: str = LANGUAGE) -> dict[str, Any]:
    return {
        "task": {"type": kind},
        "dataset": {"type": str(rows.get("name", name)), "name": str(rows.get("name", name))},
        "metrics": metrics,
        "source": {"name": SOURCE, "url": "https://huggingface.co/docs/hub/model-cards"},
    }


def parse_benchmarks(texts: Iterable[str]) -> list[dict[str, str]]:
    """``ORG/DATASET[@COMMIT]:TASK=FIGURE`` as entries: id, task_id, revision where given, figure.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2).
    """
    made = []
    for text in texts:
        match = _BENCHMARK.fullmatch(text)
        if match is None:
            raise HubkitError("HK-OPTIONS", "this names no benchmark", want=_WANT, have=text, status=USAGE)
        entry = {"id": match["id"], "task_id": match["task"], "figure": match["figure"]}
        made.append(entry | ({"revision": match["revision"]} if match["revision"] else {}))
    return made


def result_files(evaluation: Mapping[str, Any], benchmarks: Iterable[Mapping[str, str]]) -> dict[str, bytes]:
    """``.eval_results/NAME.yaml`` -> its bytes, a file for each data set.

    Raises:
        HubkitError: ``HK-GATE`` for a figure that was not measured.
    """
    import yaml

    figures, entries = dict(flat(evaluation)), dict[str, list[dict[str, Any]]]()
    for one in benchmarks:
        value = figures.get(one["figure"], figures.get(f"{one['figure']}.value"))
        if value is None:
            what = "a benchmark names a figure that was not measured"
            raise HubkitError("HK-GATE", what, want=", ".join(sorted(figures)), have=one["figure"], status=USAGE)
        dataset = {key: one[key] for key in ("id", "task_id", "revision") if key in one}
        path = f"{FOLDER}/{one['id'].replace('/', '--')}.yaml"
        entries.setdefault(path, []).append({"dataset": dataset, "value": value, "notes": SOURCE})
    return {path: yaml.safe_dump(found, sort_keys=False).encode() for path, found in entries.items()}
