"""Everything that a GPU is for, on random-weight Llamas of 1B and 8B parameters, beside peft and bitsandbytes where
they are installed: steps of training (packed and divided, too), prefill and decoding with 1, 16 and 256 adapters, live
merging, NF4.

Both sides run in turn in one process, bf16, after a warm-up; times are medians, ratios those of neighbours. Peak
memory is torch's own count of one run. Each row is written as it is measured, so a run that is cut short has given
what it had; what no time was left for is named at the end.

python tests/benchmarks/bench_gpu.py [--out FILE] [--seconds 300] [--sizes 1B,8B] [--device cuda]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import compare
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.tensors.device import described, device_named
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.linear import quantizable, shell
from hubkit.tensors.fourbit.nf4 import PackedWeight, quantize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Route
from hubkit.training.loss import chunked_loss
from hubkit.training.ranks.sharding import divide
from hubkit.training.rows.batching import collate
from hubkit.training.rows.encode import Row
from hubkit.training.stepper import Stepper

RANK, VOCABULARY = 16, 32000
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Shapes of Llama 3.2 1B and 3.1 8B; ``tiny`` is there to try this file where no GPU is."""
BATCHES = {"tiny": (2, 16), "1B": (8, 512), "8B": (4, 512)}
"""Rows and tokens of a step of training."""
ROWS = {"tiny": (1, 4), "1B": (1, 16, 256), "8B": (1, 16)}
"""Numbers of adapters that answer one batch, a row each."""
HAS = {name: importlib.util.find_spec(name) is not None for name in ("peft", "bitsandbytes")}


class Table:
    """The figures, printed and written row by row.

    Args:
        out: the file, or None.
        device: where everything runs.
        deadline: when to stop beginning rows, by `time.monotonic`.
    """

    def __init__(self, out: Path | None, device: torch.device, deadline: float) -> None:
        self.out, self.device, self.deadline = out, device, deadline
        self.left_out: list[str] = []
        self._say(f"torch {torch.__version__}, {described(device)}; ours and the peer's in ms and GB")
        self._say("| what | ours | peer | ratio | our peak | peer's peak |\n|---|---|---|---|---|---|")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")

    def row(self, name: str, ours: Callable[[], object], theirs: Callable[[], object] | None, note: str = "") -> None:
        """Measures and writes one row, while there is time."""
        if time.monotonic() > self.deadline:
            self.left_out.append(name)
            return
        mine, peers = self._finished(ours), self._finished(theirs or ours)
        a, b, ratio = compare(mine, peers, 5)
        peaks = [self._peak(ours), self._peak(theirs) if theirs else None]
        cells = [f"{a * 1e3:.2f}", *((f"{b * 1e3:.2f}", f"{ratio:.3f}") if theirs else ("", ""))]
        cells += ["" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks]
        self._say(f"| {name}{note} | " + " | ".join(cells) + " |")

    def end(self) -> None:
        """Says what was not measured."""
        missing = [name for name, there in HAS.items() if not there]
        self._say(f"\nnot installed: {', '.join(missing) or 'nothing'}; no time for: {', '.join(self.left_out) or '-'}")

    def _finished(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            self._wait()

        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak(self, call: Callable[[], object]) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device)


def base(size: str, device: torch.device) -> Any:
    """A Llama of random weights, made where it stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **SIZES[size])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of every linear layer but the head, one by one: each may be replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quantizable(module) and not name.endswith("lm_head"):
            parent, _, last = name.rpartition(".")
            yield model.get_submodule(parent), last, module


def packed_base(size: str, device: torch.device) -> Any:
    """The same model in 4 bits."""
    model = base(size, device)
    for parent, name, layer in linears(model):
        made = shell(layer)
        made.fill(quantize(layer.weight.detach()))
        setattr(parent, name, made)
    return model


def packed_by_bitsandbytes(size: str, device: torch.device) -> Any:
    """The peer's model in 4 bits."""
    import bitsandbytes as bnb

    model = base(size, device)
    for parent, name, layer in linears(model):
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        setattr(parent, name, made.to(device))
    model.is_loaded_in_4bit = True
    return model


def adapter(attached: Attached, seed: int, method: str = "lora") -> Adapter:
    """A fresh adapter with values that are not the identity, made on the device."""
    loaded = host().load(method)
    config = parse_config(loaded.info.config, {"rank": RANK}, "")
    made = Adapter.fresh(f"a{seed}", loaded, config, attached.sites, seed)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            if name.endswith("B"):
                parameter.normal_(0, 0.01)
    return made


def ours_on(model: nn.Module, count: int = 1, method: str = "lora") -> Attached:
    """`model` with adapters a0, a1, ... ready to answer; those beyond the first are copies with other values."""
    attached = Attached(model)
    first = adapter(attached, 0, method)
    if count > 1:
        first.to_compute_dtype()
    attached.add("a0", first)
    for number in range(1, count):
        values = {
            site: {role: torch.randn_like(p) * 0.01 for role, p in part.roles().items()}
            for site, part in first.parts.items()
        }
        made = Adapter.of_factors(f"a{number}", first.method, first.config, attached.sites, values)
        attached.add(f"a{number}", made)
    return attached


def peft_on(model: nn.Module, count: int = 1) -> Any:
    """`model` with peft's adapters of the same size."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=count == 1)
    made: Any = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, count):
        made.add_adapter(f"a{number}", config)
    return made


def ids(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def step(model: nn.Module, rows: int, length: int, device: torch.device) -> Callable[[], object]:
    """The peer's step: forward, transformers' loss, backward, torch's fused AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    batch = ids(rows, length, device)

    def run() -> None:
        model.train()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def rows_of(rows: int, length: int, *, varied: bool = False) -> list[Row]:
    """Rows to train on: of `length` tokens each, or `varied`, of an eighth of that up to it."""
    every = ids(rows, length, torch.device("cpu")).tolist()
    ends = [length * (n % 8 + 1) // 8 if varied else length for n in range(rows)]
    return [Row(row[:end], row[:end], "") for row, end in zip(every, ends, strict=True)]


def loop_step(model: Attached, batch: list[Row], stack: ExitStack, *, packing: bool = False) -> Callable[[], object]:
    """A step of hubkit's own loop, with its loss, its check of the gradient and its one wait for the device."""
    one = model.adapters["a0"]
    model.set_mix("a0")
    assert isinstance(one.method, Method)
    stepper = Stepper(model, one.trainables(), one.method.train_step, weight_decay=0.01, clip=1.0, packing=packing)
    stack.enter_context(chunked_loss(model, collate(batch, stepper.device)))

    def run() -> None:
        model.train()
        stepper.step([batch], 1e-4, lambda: False)

    return run


def answering(model: Any, batch: Tensor, tokens: int, **how: Any) -> Callable[[], object]:
    """A forward of `batch`, then so many steps of decoding with its cache."""

    @torch.no_grad()
    def run() -> None:
        model.eval()
        out = model(input_ids=batch, use_cache=tokens > 0, **how)
        for _ in range(tokens):
            out = model(input_ids=batch[:, :1], past_key_values=out.past_key_values, use_cache=True, **how)

    return run


def training(table: Table, size: str) -> None:
    """Steps of LoRA and QLoRA."""
    rows, length = BATCHES[size]
    for name, packed in (("LoRA", False), ("QLoRA", True)):
        make_base = packed_base if packed else base
        with ExitStack() as stack:
            ours = loop_step(ours_on(make_base(size, table.device)), rows_of(rows, length), stack)
            theirs = None
            if HAS["peft"] and (HAS["bitsandbytes"] or not packed):
                model = (packed_by_bitsandbytes if packed else base)(size, table.device)
                theirs = step(peft_on(model), rows, length, table.device)
            table.row(f"{size} {name} step {rows}x{length}, r {RANK}", ours, theirs)
        del ours, theirs
        release(table.device)


def packing(table: Table, size: str) -> None:
    """A step of rows of different lengths, one behind the other, beside the same rows padded."""
    rows, length = BATCHES[size]
    with ExitStack() as stack:
        batch = rows_of(rows, length, varied=True)
        ours = loop_step(ours_on(base(size, table.device)), batch, stack, packing=True)
        theirs = loop_step(ours_on(base(size, table.device)), batch, stack)
        table.row(f"{size} LoRA step packed, {rows} rows of {length // 8} to {length}", ours, theirs, ", peer padded")
    del ours, theirs
    release(table.device)


def sharding(table: Table, size: str) -> None:
    """A step on a base that FSDP2 divides, among one process alone, beside the base whole: what gathering costs."""
    rows, length = BATCHES[size]
    backend = "cpu:gloo,cuda:nccl" if table.device.type == "cuda" else "gloo"
    meeting = Path(tempfile.mkdtemp()) / "ranks"
    distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        with ExitStack() as stack:
            divided = ours_on(base(size, table.device))
            divide(divided.model, init_device_mesh(table.device.type, (1,)))
            ours = loop_step(divided, rows_of(rows, length), stack)
            theirs = loop_step(ours_on(base(size, table.device)), rows_of(rows, length), stack)
            table.row(f"{size} LoRA step {rows}x{length}, FSDP2 on one rank", ours, theirs, ", peer undivided")
        del ours, theirs, divided
        release(table.device)
    finally:
        distributed.destroy_process_group()
        shutil.rmtree(meeting.parent)


def serving(table: Table, size: str) -> None:
    """Prefill and decoding, one adapter and routes of many, beside peft's mixed batch and beside the bare base."""
    for count in ROWS[size]:
        attached = ours_on(base(size, table.device), count)
        attached.set_mix("a0" if count == 1 else Route([f"a{number}" for number in range(count)]))
        peer, how = None, {}
        if HAS["peft"] and count <= 16:  # peft takes minutes to make 256
            peer = peft_on(base(size, table.device), count).eval()
            how = {"adapter_names": [f"a{number}" for number in range(count)]} if count > 1 else {}
        bare = base(size, table.device)
        rows = min(ROWS[size][-1], 16) if count == 1 else count
        for kind, length, tokens in (("prefill", 64, 0), ("decode", 1, 16)):
            batch = ids(rows, length, table.device)
            ours = answering(attached, batch, tokens)
            theirs = None if peer is None else answering(peer, batch, tokens, **how)
            label = f"{size} {kind} {rows}x{length or 1}, {count} adapter{'s' * (count > 1)}"
            table.row(label, ours, theirs, ", peer peft" if theirs else "")
            table.row(label, ours, answering(bare, batch, tokens), ", peer the bare base")
        del attached, peer, bare, ours, theirs
        release(table.device)


def merging(table: Table, size: str) -> None:
    """Merging into the live model and taking it out again."""
    attached = ours_on(base(size, table.device))
    attached.set_mix("a0")
    peer = peft_on(base(size, table.device)) if HAS["peft"] else None

    def ours() -> None:
        attached.merge()
        attached.unmerge()

    def theirs() -> None:
        assert peer is not None
        peer.merge_adapter()
        peer.unmerge_adapter()

    table.row(f"{size} merge and unmerge", ours, theirs if peer is not None else None)


def quantizing(table: Table, side: int) -> None:
    """NF4 with double quantization of one square weight, both ways."""
    weight = torch.randn(side, side, device=table.device, dtype=torch.bfloat16)
    packed = quantize(weight)
    encode: Callable[[], object] | None = None
    decode: Callable[[], object] | None = None
    if HAS["bitsandbytes"]:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        encode = lambda: functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)  # noqa: E731
        decode = lambda: functional.dequantize_4bit(codes, state)  # noqa: E731
    table.row(f"NF4 encode {side}x{side}", lambda: quantize(weight), encode)
    table.row(f"NF4 decode {side}x{side}, 10 times", _times(lambda: dequantize(packed)), _times(decode))
    bound = _bytes(packed) / 4.8e12 * 1e4
    table._say(f"  the decode moves {_bytes(packed) / 1e6:.1f} MB: {bound:.3f} ms for 10 at an H200's 4.8 TB/s")


def _times(call: Callable[[], object] | None) -> Any:
    return None if call is None else lambda: [call() for _ in range(10)]


def _bytes(packed: PackedWeight) -> int:
    """What a decode to bf16 reads and writes."""
    rows, columns = packed.shape
    return packed.codes.nbytes + packed.absmax.nbytes + 2 * rows * columns


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--sizes", default="1B,8B")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    table = Table(given.out, device_named(given.device), time.monotonic() + given.seconds)
    sizes = given.sizes.split(",")
    quantizing(table, 128 if sizes == ["tiny"] else 8192)
    for size in sizes:
        for part in (training, packing, sharding, serving, merging):
            if time.monotonic() > table.deadline:
                table.left_out.append(f"{size} {part.__name__}")
            else:
                part(table, size)
                release(table.device)
    table.end()


if __name__ == "__main__":
    main(sys.argv[1:])
