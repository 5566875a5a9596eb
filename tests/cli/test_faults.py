"""Faults of the command line, each named by its number: streams, errors that do not help, and what is trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from variants import refused, say

from hubkit.errors import HubkitError
from hubkit.verbs.generate import generate
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

HUBKIT = f"{sys.executable} -m hubkit"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", line], env=kept, capture_output=True, text=True, check=False)


# 12: a chat template is a stranger's program

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
GREEDY = "{% set ns = namespace(x='ab') %}{% for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.fixture
def hostile(tiny_llama: Path, tmp_path: Path) -> Any:
    """Makes a base with another chat template."""
    import shutil

    def make(template: str) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("template", [ENDLESS, GREEDY], ids=["endless", "greedy"])
def test_fault_12_a_template_without_end_is_killed(
    hostile: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubkit.tensors import rendering

    monkeypatch.setattr(rendering, "SECONDS", 2.0)
    base = hostile(template)
    begun = time.monotonic()
    assert refused("HK-TEMPLATE", generate, "hello", base=str(base)).fix == "--raw"
    assert time.monotonic() - begun < 90
    assert generate("hello", base=str(base), raw=True, max_new_tokens=1).tokens == 1


def test_fault_12_training_is_not_held_up_either(hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hubkit.tensors import rendering

    monkeypatch.setattr(rendering, "SECONDS", 2.0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    refused("HK-TEMPLATE", train, str(hostile(ENDLESS)), rows, tmp_path / "out", steps=1)


def test_fault_12_one_process_renders_what_transformers_would(tiny_llama: Path) -> None:
    from hubkit.tensors.base.tokenizer import load_tokenizer
    from hubkit.tensors.rendering import _CHILD, rendered

    tokenizer = load_tokenizer(tiny_llama)
    pids = set()
    for number in range(20):
        talk = [{"role": "user", "content": f"ü {number}\n"}, {"role": "assistant", "content": "yes"}]
        for prompt in (True, False):
            wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert rendered(tokenizer, talk, prompt) == wanted
        assert _CHILD._process is not None
        pids.add(_CHILD._process.pid)
    assert len(pids) == 1


def test_fault_12_nor_is_a_deployment(hostile: Any, tiny_llama: Path) -> None:
    from hubkit.engines import run
    from hubkit.tensors.base.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    talk = [{"role": "user", "content": "hello ü"}]
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert run.templated(tokenizer, "hello ü") == wanted
    with pytest.raises(SystemExit, match="HK-TEMPLATE"):
        run.templated(load_tokenizer(hostile(ENDLESS)), "hello")


# 19: streams


@pytest.mark.parametrize("command", ["list --json", "list", "--help", "list --help", "nope --json"])
@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_fault_19_an_output_that_takes_nothing(command: str, where: str) -> None:
    done = shell(f"{HUBKIT} {command} {where}")
    assert done.returncode == (2 if "nope" in command else 1)
    assert done.stderr.startswith("error[HK-")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_fault_19_nor_does_a_closed_stderr_end_anything(tmp_path: Path) -> None:
    done = shell(f"{HUBKIT} list --json 2>&-", HUBKIT_HOME=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert shell(f"{HUBKIT} pull ana/chat --offline 2>&-", HUBKIT_HOME=str(tmp_path)).returncode == 1
    assert shell(f"{HUBKIT} pull ana/chat --offline --json 2>&- <&-", HUBKIT_HOME=str(tmp_path)).stdout.startswith("{")


def test_fault_19_json_is_json_on_a_narrow_stream() -> None:
    done = shell(f"{HUBKIT} pull ü/€ --json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["error"]["have"] == ["ü/€"]
    assert done.stdout.isascii()


def test_fault_19_json_holds_no_character_that_commands_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from hubkit.cli.output import write_error

    said = "a\u009bb\u202ec\u2028d\U000e0001e ü\n"
    write_error(HubkitError("HK-X", said), True)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert "ü" in out
    assert json.loads(out)["error"]["what"] == said


# 22: the line that mends it


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("train a b --rank 8", "hubkit train --set rank=VALUE    or    hubkit train --help"),
        ("help", "hubkit --help"),
        ("verfy", "hubkit verify    or    hubkit --help"),
        ("push a b --privat", "hubkit push --private    or    hubkit push --help"),
    ],
)
def test_fault_22_usage(capsys: pytest.CaptureFixture[str], line: str, fix: str) -> None:
    done = say(capsys, *line.split())
    assert done.status == 2
    assert done.err.rstrip().splitlines()[-1] == f"  fix:   {fix}"


def test_fault_22_a_base_is_no_adapter(tiny_llama: Path) -> None:
    assert refused("HK-NOT-ADAPTER", verify, str(tiny_llama)).fix == f"this is a base: --base {tiny_llama}"


def test_fault_22_arguments_that_changed_places(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    fault = refused("HK-DATA", train, str(rows), tiny_llama, tmp_path / "out", steps=1)
    assert fault.fix == f"hubkit train {tiny_llama} ROWS: the base comes first"


def test_fault_22_only_what_is_out_of_range_is_named() -> None:
    fault = refused("HK-OPTIONS", generate, "a", base="x", max_new_tokens=0)
    assert (fault.want, fault.have) == (["max_new_tokens >= 1"], ["max_new_tokens = 0"])
    fault = refused("HK-OPTIONS", generate, "a", base="x", temperature=-1.0)
    assert fault.have == ["temperature = -1.0"]


def test_fault_22_a_folder_deep_inside_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hubkit.registry.reference import parse_reference

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    assert refused("HK-REFERENCE", parse_reference, "a/b/c").fix == "./a/b/c"


def test_fault_22_long_lists_are_cut_for_people_alone() -> None:
    fault = HubkitError("HK-X", "much", have=[str(number) for number in range(40)], fix="hubkit list")
    assert fault.render(10).splitlines()[10:] == [
        "         9",
        "         and 30 more: --json shows them",
        "  fix:   hubkit list",
    ]
    assert len(fault.as_json()["error"]["have"]) == 40  # type: ignore[index]
    assert fault.render(10, colour=True).startswith("\x1b[1;31merror[HK-X]\x1b[0m: much")


def test_fault_22_a_model_that_is_no_language_model(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel
    from words import tokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    tokenizer().save_pretrained(tmp_path / "vit")
    with pytest.raises(HubkitError) as caught:
        generate("hello", base=str(tmp_path / "vit"))
    text = caught.value.render()
    assert len(text) < 1000
    assert "causal language model" in caught.value.fix


# 25: what is trained on, what is promised


def test_fault_25_a_row_that_says_nothing_is_no_row(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "", "completion": " \\n"}\n')
    fault = refused("HK-NO-TARGETS", train, str(tiny_llama), rows, tmp_path / "out", steps=1)
    assert fault.have == ["rows.jsonl:2"]
    for column, value in (("text", " "), ("messages", [{"role": "user", "content": ""}])):
        rows.write_text(json.dumps({column: value}) + "\n")
        refused("HK-NO-TARGETS", train, str(tiny_llama), rows, tmp_path / "out", steps=1)


@pytest.mark.parametrize(
    "text",
    ["mit", "Apache-2.0", "cc-by-sa-4.0", "MIT OR (apache-2.0 AND LicenseRef-mine)", "GPL-2.0+ WITH gcc-exception-2.0"],
)
def test_fault_25_spdx_expressions_are_taken(adapter: Path, text: str) -> None:
    assert pack(adapter, license=text, dry_run=True).manifest.license == text


@pytest.mark.parametrize("text", ["apache", "free", "", "mit and", "(mit", "mit mit", "mit WITH mit", "LicenseRef-"])
def test_fault_25_everything_else_is_refused(adapter: Path, text: str) -> None:
    fault = refused("HK-LICENSE", pack, adapter, license=text)
    assert fault.status == 2
    if text == "apache":
        assert "--license apache-2.0" in fault.fix
