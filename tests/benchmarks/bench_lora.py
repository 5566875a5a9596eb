"""LoRA r=16 on all linear layers beside peft's, on the real 135M model, bf16, two threads, one process.

python tests/benchmarks/bench_lora.py MODEL_FOLDER [step loop forward decode attach ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import compare, report
from torch import nn

from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter

ROWS, LENGTH, RANK, VOCABULARY = 4, 128, 16, 49152


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def our_model(path: Path) -> Attached:
    ours = Attached(load_base(path))
    method = host().load("lora")
    ours.add("a", Adapter.fresh("a", method, parse_config(method.info.config, {"rank": RANK}, ""), ours.sites, 0))
    ours.set_mix("a")
    return ours


def peft_model(path: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(load_base(path), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))


def step(model: nn.Module) -> Callable[[], None]:
    """Forward, the model's own loss, backward, torch's AdamW with its defaults."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = tokens(ROWS, LENGTH)

    def run() -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def loop_step(model: Attached, stack: ExitStack, attention: bool = True) -> Callable[[], None]:
    """One step of hubkit's training loop on the same rows: every token is a target, none is skipped."""
    from hubkit.training.attention import short_attention
    from hubkit.training.loss import chunked_loss
    from hubkit.training.rows.batching import collate
    from hubkit.training.rows.encode import Row
    from hubkit.training.stepper import Stepper

    rows = [Row(ids, ids, "") for ids in tokens(ROWS, LENGTH).tolist()]
    one = model.adapters["a"]
    assert isinstance(one.method, Method)
    stepper = Stepper(model, one.parameters(), one.method.train_step, weight_decay=0.01, clip=1.0)
    assert stack.enter_context(chunked_loss(model, collate(rows)))
    assert stack.enter_context(short_attention(model, attention)) == attention

    def run() -> None:
        model.train()
        stepper.step([rows], 1e-4, lambda: False)

    return run


def forward(model: nn.Module, rows: int, length: int) -> Callable[[], None]:
    ids = tokens(rows, length)

    def run() -> None:
        with torch.no_grad():
            model.eval()(input_ids=ids)

    return run


def decode(model: nn.Module, rows: int, count: int = 16) -> Callable[[], None]:
    """`count` steps of one token per row, with the cache."""
    ids = tokens(rows, 1)

    def run() -> None:
        with torch.no_grad():
            out = model.eval()(input_ids=ids, use_cache=True)
            for _ in range(count):
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)

    return run


def attach_both(path: Path, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A further 20 MB adapter onto a loaded base that has one, ready to answer: files verified, base proven."""
    from peft import PeftModel

    from hubkit.verbs.attach import attach

    theirs = PeftModel.from_pretrained(load_base(path), folder)
    ours = attach(load_base(path), {str(folder): 1.0})
    names = iter(range(10**6))

    def run_ours() -> None:
        attach(ours, {str(folder): 1.0})

    def run_theirs() -> None:
        name = f"x{next(names)}"
        theirs.load_adapter(folder, name)
        theirs.set_adapter(name)

    return run_ours, run_theirs


def saved(path: Path) -> Path:
    """A 20 MB adapter, as PEFT writes it in fp32 and hubkit packs it in bf16: both tools read the same folder."""
    from hubkit.verbs.pack import pack

    folder = Path(tempfile.mkdtemp()) / "adapter"
    peft_model(path).save_pretrained(folder)
    pack(folder, base=str(path))
    return folder


def main(path: Path, names: list[str]) -> None:
    torch.set_num_threads(2)
    ours, theirs = our_model(path), peft_model(path)
    if "step" in names:
        report("train step 4x128, bare adapter", compare(step(ours), step(theirs), 9), 0.85)
    if "loop" in names:
        with ExitStack() as stack:
            report("train step 4x128, hubkit's loop", compare(loop_step(ours, stack), step(theirs), 9), 0.75)
    for p in (p for a in ours.adapters.values() for p in a.parameters().values()):
        p.requires_grad_(False)
    ours.adapters["a"].to_compute_dtype()
    ours.set_mix("a")
    if "forward" in names:
        report("forward 16x64, one adapter", compare(forward(ours, 16, 64), forward(theirs, 16, 64), 9), 0.70)
    if "decode" in names:
        report("decode 16x1 with cache, 17 tokens", compare(decode(ours, 16), decode(theirs, 16), 15), 0.92)
        report("  the same beside the bare base", compare(decode(ours, 16), decode(load_base(path), 16), 15), 1.30)
    del ours, theirs
    if "attach" in names:
        report("attach a 20 MB adapter", compare(*attach_both(path, saved(path)), 9), 0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["step", "loop", "forward", "decode", "attach"])
