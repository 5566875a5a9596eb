"""LoRA r=16 on all linear layers against peft, on the real 135M model in bf16 with two threads.

python tests/benchmarks/bench_lora.py MODEL_FOLDER [step forward decode attach]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from harness import compare, report
from torch import nn

ROWS, LENGTH, RANK = 4, 128, 16


def models(path: Path) -> tuple[nn.Module, nn.Module]:
    """The base with hubkit's adapter, and with peft's, of the same shape."""
    from peft import LoraConfig, get_peft_model

    from hubkit.methods.config import parse_config
    from hubkit.methods.host import host
    from hubkit.tensors.adapter import Adapter
    from hubkit.tensors.attach import Attached
    from hubkit.tensors.live import load_base

    theirs = get_peft_model(load_base(path), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    ours = Attached(load_base(path))
    method = host().load("lora")
    config = parse_config(method.info.config, {"rank": RANK}, "bench")
    ours.add("a", Adapter.fresh("a", method, config, ours.sites, 0))
    ours.set_mix("a")
    return ours, theirs


def step(model: nn.Module) -> object:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def forward(model: nn.Module, rows: int, length: int) -> object:
    ids = torch.randint(0, 49152, (rows, length), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with torch.no_grad():
            model.eval()(input_ids=ids)

    return run


def decode(model: nn.Module, rows: int, tokens: int = 16) -> object:
    ids = torch.randint(0, 49152, (rows, 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with torch.no_grad():
            model.eval()
            out = model(input_ids=ids, use_cache=True)
            for _ in range(tokens):
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)

    return run


def attach(path: Path) -> tuple[object, object]:
    """Loading a 20 MB adapter from a folder onto a loaded base."""
    from peft import PeftModel

    from hubkit.artifact.folder import open_adapter
    from hubkit.methods.config import parse_config
    from hubkit.methods.foreign import own_files
    from hubkit.methods.host import host
    from hubkit.tensors.adapter import Adapter
    from hubkit.tensors.attach import Attached
    from hubkit.tensors.live import load_base

    ours, _ = models(path)
    folder = Path(tempfile.mkdtemp())
    for name, data in own_files(ours.adapters["a"]).items():
        (folder / name).write_bytes(data)
    method = host().load("lora")
    config = ours.adapters["a"].config
    theirs = PeftModel.from_pretrained(load_base(path), folder)
    mine = Attached(load_base(path))
    count = iter(range(10**6))

    def run_ours() -> None:
        name = f"x{next(count)}"
        mine.add(name, Adapter.read(name, method, config, mine.sites, folder / "adapter_model.safetensors", "base"))
        mine.set_mix(name)

    def run_theirs() -> None:
        name = f"x{next(count)}"
        theirs.load_adapter(folder, name)
        theirs.set_adapter(name)

    return run_ours, run_theirs


def main(path: Path, names: list[str]) -> None:
    torch.set_num_threads(2)
    ours, theirs = models(path)
    if "step" in names:
        report("train step 4x128, bare adapter", compare(step(ours), step(theirs), 9), 0.85)
    if "forward" in names:
        report("forward 16x64, one adapter", compare(forward(ours, 16, 64), forward(theirs, 16, 64)), 0.70)
    if "decode" in names:
        report("decode 16x1 with cache, 17 tokens", compare(decode(ours, 16), decode(theirs, 16), 11), 0.92)
    del ours, theirs
    if "attach" in names:
        report("attach a 20 MB adapter", compare(*attach(path), 9), 0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["step", "forward", "decode", "attach"])
