"""Answer a prompt with what is in this folder: ``python run.py "What is the capital of France?"``.

Written by hubkit deploy; needs torch, transformers and, for adapters beside their base, peft; not hubkit. It runs on a
GPU where there is one; ``--device cpu`` keeps it off. The names, order and weights of the adapters are in hubkit.lock.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

RENDER = "--render-template"
SECONDS, MEMORY = 5, 512 << 20
HERE = Path(__file__).parent
OWN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # only what is here, and no code of it


def device_named(word: str) -> str:
    """The device that `word` names, tried: ``auto`` is CUDA, then MPS, then the CPU."""
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=word).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        sys.exit(f"--device {word}: {str(error).splitlines()[0]}")
    return word


def load(device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer): ``model/`` as it is, or ``base/`` with the adapters of ``adapters/``, on `device`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device_named(device)
    whole = (HERE / "model").is_dir()
    folder = HERE / ("model" if whole else "base")
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **OWN)
    if found["missing_keys"]:  # transformers goes on with random values
        sys.exit(f"{folder}: the files lack {', '.join(sorted(found['missing_keys']))}")
    model = model.to(place)
    if not whole and (adapters := weights()):
        model = attach(model, adapters)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **OWN)


def weights() -> dict[str, float]:
    """The adapters beside the base, with their weights; one into which a tree was written has 1."""
    if not (HERE / "adapters").is_dir():
        return {}
    here = sorted(path.name for path in (HERE / "adapters").iterdir())
    locked = {one["name"]: one["weight"] for one in json.loads((HERE / "hubkit.lock").read_text("utf-8"))["adapters"]}
    return {name: locked[name] for name in locked if name in here} or dict.fromkeys(here, 1.0)


def attach(model: Any, weights: dict[str, float]) -> Any:
    """The model with all adapters acting at once, each times its weight."""
    from peft import PeftModel

    # Stored dtype is compute dtype: cast to fp32, an adapter would compute other bits than it was tested with.
    for name in weights:
        folder = HERE / "adapters" / name
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(model, folder, name, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(weights))
    for module in model.modules():  # not by PEFT's `scale_layer`, which leaves embeddings out (0.19 to 0.21)
        scaling: Any = getattr(module, "scaling", None)
        for name, weight in weights.items() if isinstance(scaling, dict) else ():
            if name in scaling:
                scaling[name] *= weight
    return model


def templated(tokenizer: Any, prompt: str) -> str:
    """The prompt through the base's chat template, a program that came with it: in a process that can be killed."""
    from transformers import PreTrainedTokenizerBase

    messages = [{"role": "user", "content": prompt}]
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    request = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map, messages])
    child = [sys.executable, __file__, RENDER]
    try:
        done = subprocess.run(child, input=request, capture_output=True, text=True, encoding="utf-8", timeout=120)
    except subprocess.TimeoutExpired:
        sys.exit("HK-TEMPLATE: the chat template does not come to an end")
    if done.returncode or not done.stdout.startswith('"'):
        said = done.stderr.strip().splitlines()[-1:] or [f"killed after {SECONDS} s or {MEMORY >> 20} MB"]
        sys.exit(f"HK-TEMPLATE: the chat template fails: {said[0]}")
    return str(json.loads(done.stdout))


def render() -> None:
    """Answer one request of `templated`."""
    from transformers import PreTrainedTokenizerBase as Base

    template, tokens, messages = json.load(sys.stdin)
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError):
        pass  # a system that limits no memory
    if hasattr(signal, "alarm"):
        signal.alarm(SECONDS)
    stub = type("Stub", (), {"get_chat_template": Base.get_chat_template})()
    stub.chat_template, stub.special_tokens_map = template, tokens
    json.dump(Base.apply_chat_template(stub, messages, add_generation_prompt=True, tokenize=False), sys.stdout)


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The model's greedy answer, through the chat template where there is one."""
    text = prompt
    if tokenizer.chat_template:
        text = templated(tokenizer, prompt)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    if sys.argv[1:] == [RENDER]:
        render()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.device)
    sys.stderr.write(f"answering on {model.device}\n")
    sys.stdout.write(answer(model, tokenizer, arguments.prompt, arguments.max_new_tokens) + "\n")


if __name__ == "__main__":
    main()
