"""Several processes train what one trains: two under gloo on the CPU, beside one alone with the same rows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import failing_run
import pytest
from every_method import METHODS
from filelock import FileLock
from ranks_run import LATE, OPTIONS, STOP
from safetensors.torch import load_file
from tiny import llama, tokenizer

import hubkit
from hubkit.errors import HubkitError, is_told, set_told
from hubkit.training.checkpoint import CHECKPOINT, load
from hubkit.training.ranks.launched import Launch, launched, speaks
from hubkit.training.ranks.world import World, within, world

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DIVIDED = [name for name in METHODS if name != "prompt"]
WORDS = ["one", "two", "three", "four", "five", "six"]
RTOL = 1e-6
"""Of losses: fp32 rounds at 6e-8, and some of ten terms are added in another order at most."""


def environment(**changes: str) -> dict[str, str]:
    """Of a process that starts a launch: one thread each, no launch of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    paths = [str(ROOT), str(HERE), str(HERE.parent)]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **changes}


def launch(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun`` on this machine, on any free port."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return run(*start, *arguments)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd=ROOT)


@dataclass(frozen=True)
class Ran:
    """What one process (`one`) and two (`two`) have trained, from `base`, `rows` and `held`."""

    base: Path
    rows: Path
    held: Path
    one: Path
    two: Path

    def facts(self, rank: int) -> dict[str, Any]:
        return dict(json.loads((self.two / f"facts-{rank}.json").read_text()))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Made once, by whichever worker comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "ranks"
    found = Ran(*(folder / name for name in ("base", "rows.jsonl", "held.jsonl", "one", "two")))
    with FileLock(shared / "ranks.lock"):
        if not (folder / "done").exists():
            _make(found)
            (folder / "done").touch()
    return found


def _make(found: Ran) -> None:
    found.one.mkdir(parents=True)
    found.two.mkdir()
    llama(vocab_size=64).save_pretrained(found.base)
    tokenizer().save_pretrained(found.base)
    _write(found.rows, 9)  # steps of 4, 4 and 1 row: in the last one the second process has nothing
    _write(found.held, 5)
    _label(found.rows.with_name("labelled.jsonl"), 9, 1)
    _label(found.held.with_name("labelled-held.jsonl"), 5, 5)
    script, files = HERE / "ranks_run.py", (found.base, found.rows, found.held)
    alone = run(script, *files, found.one)
    assert alone.returncode == 0, alone.stderr
    both = launch(script, *files, found.two, found.one / "stopped.run")
    assert both.returncode == 0, both.stderr


def _write(path: Path, count: int) -> None:
    draw = random.Random(path.name)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))

    path.write_text("".join(json.dumps({"prompt": text(), "completion": text()}) + "\n" for _ in range(count)))


def _label(path: Path, count: int, least: int) -> None:
    """Texts, by turns with one of the first words and with another; of `least` more words and up."""
    draw = random.Random(path.name)
    rows = [
        {"text": " ".join([WORDS[n % 2], *draw.choices(WORDS[2:], k=least + n % 4)]), "label": n % 2}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def losses(folder: Path) -> list[float]:
    """Of the steps and the validation rows, of the adapter in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return [metrics[name] for name in ("loss", "validation_loss", "untrained_loss")]


def stored(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_write_the_bytes_of_one_that_accumulates(ran: Ran, method: str) -> None:
    """Of two micro-batches a step the sum has one order, whoever computes them."""
    assert stored(ran.two / method) == stored(ran.one / method)
    assert (ran.two / method / "metrics.json").read_bytes() == (ran.one / method / "metrics.json").read_bytes()


@pytest.mark.parametrize("method", DIVIDED)
def test_a_divided_base_gives_the_losses_of_a_whole_one(ran: Ran, method: str) -> None:
    assert losses(ran.two / f"{method}-shard") == pytest.approx(losses(ran.one / method), rel=RTOL)


def test_a_task_is_trained_and_scored_by_several_as_by_one(ran: Ran) -> None:
    assert stored(ran.two / "task") == stored(ran.one / "task")
    for name in ("metrics.json", "hubkit.json"):
        assert (ran.two / "task" / name).read_bytes() == (ran.one / "task" / name).read_bytes()
    assert losses(ran.two / "task-shard") == pytest.approx(losses(ran.one / "task"), rel=RTOL)
    history = [(ran.two / f"{name}.run" / "metrics.jsonl").read_text() for name in ("task", "task-shard")]
    scores = [
        [one["accuracy"] for line in text.splitlines() if "accuracy" in (one := json.loads(line))] for text in history
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2


@pytest.mark.parametrize("method", LATE)
def test_a_base_that_is_divided_while_it_is_read_gives_the_same_bytes(ran: Ran, method: str) -> None:
    """As one that each process reads as a whole: also where parts begin with what the base holds or computes."""
    assert stored(ran.two / f"{method}-shard") == stored(ran.two / f"{method}-late")


def test_checkpointing_goes_with_a_divided_base(ran: Ran) -> None:
    assert losses(ran.two / "recomputed") == pytest.approx(losses(ran.one / "recomputed"), rel=RTOL)


def test_dropout_is_drawn_for_the_micro_batch_not_for_the_process(ran: Ran) -> None:
    assert stored(ran.two / "dropout") == stored(ran.one / "dropout")
    assert stored(ran.two / "dropout") != stored(ran.two / "lora")


def test_what_is_trained_was_trained(ran: Ran) -> None:
    """Else all of the above would hold of nothing."""
    trained = load_file(ran.two / "lora" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_learned_embeddings_are_refused_on_a_divided_base(ran: Ran) -> None:
    assert [ran.facts(rank)["prompt-shard"] for rank in (0, 1)] == ["HK-OPTIONS", "HK-OPTIONS"]
    assert not (ran.two / "prompt-shard").exists()


def test_one_ctrl_c_stops_all_between_the_same_steps(ran: Ran) -> None:
    assert [ran.facts(rank)["resumed"] for rank in (0, 1)] == ["interrupt", "interrupt"]
    checkpoint = load(ran.two / "stopped.run")
    assert checkpoint is not None
    assert checkpoint.progress.step == STOP


def test_a_run_that_is_resumed_by_as_many_has_the_same_bytes(ran: Ran) -> None:
    assert stored(ran.two / "resumed") == stored(ran.two / "dropout")


def test_a_run_of_one_goes_on_with_two(ran: Ran) -> None:
    assert losses(ran.two / "foreign") == pytest.approx(losses(ran.one / "dropout"), rel=RTOL)


def test_a_run_of_two_goes_on_with_one(ran: Ran, tmp_path: Path) -> None:
    (copy := tmp_path / "own.run").mkdir()
    for file in (ran.two / "stopped.run").iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    hubkit.train(
        ran.base, ran.rows, tmp_path / "own", method="lora", config={"rank": 2, "dropout": 0.3}, name="x",
        validation_data=ran.held, device="cpu", resume=True, **OPTIONS,
    )  # fmt: skip
    assert losses(tmp_path / "own") == pytest.approx(losses(ran.one / "dropout"), rel=RTOL)


def test_a_loss_that_is_no_number_ends_all_processes(ran: Ran) -> None:
    assert [ran.facts(rank)["nan"] for rank in (0, 1)] == ["HK-NAN", "HK-NAN"]


def test_what_befalls_one_process_is_raised_in_all(ran: Ran) -> None:
    assert [ran.facts(rank)["alone"] for rank in (0, 1)] == ["HK-MEMORY", "HK-MEMORY"]


def test_of_a_quantized_base_each_process_holds_half(ran: Ran) -> None:
    before, after = ran.facts(0)["bytes"]
    assert after * 2 == before
    assert ran.facts(1)["bytes"] == [before, after]


@pytest.mark.slow
def test_seventy_billion_parameters_are_divided_as_reckoned() -> None:
    """FSDP2 itself divides an empty model among eight processes that are not there."""
    done = run(HERE / "dry_run.py", 8)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["divided"] == facts["arithmetic"]
    assert facts["after"] == facts["whole"] < 8.001 * facts["divided"]
    assert facts["whole"] == 39_517_110_272  # 4.127 bits of 68.5 G in layers, 16 of 2.1 G outside
    assert facts["gathered"] < 0.13 * facts["whole"]


@pytest.mark.slow
def test_the_command_speaks_once_and_its_adapter_is_whole(ran: Ran, tmp_path: Path) -> None:
    out = tmp_path / "made"
    options = ["--steps", 1, "--batch-size", 2, "--accumulate", 2, "--device", "cpu", "--shard"]
    done = launch("-m", "hubkit", "train", ran.base, ran.rows, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained ") == 1
    assert done.stderr.count("training ") == 1
    assert not (out.with_name("made.run") / CHECKPOINT).exists()
    hubkit.verify(out, base=ran.base)


@pytest.mark.slow
def test_accelerate_launches_processes_on_the_cpu_too(ran: Ran, tmp_path: Path) -> None:
    """By its launcher for several GPUs; that for a CPU starts one process, which refuses to divide a base."""
    train = ["-m", "hubkit", "train", ran.base, ran.rows, "-o", tmp_path / "made", "--name", "x"]
    train += ["--steps", 1, "--batch-size", 2, "--accumulate", 2, "--device", "cpu", "--shard"]
    start = ["-m", "accelerate.commands.launch", "--num_processes", 2]
    alone = run(*start, "--cpu", *train)
    assert alone.returncode != 0
    assert alone.stderr.count("error[HK-OPTIONS]") == 1, alone.stderr
    done = run(*start, "--multi_gpu", *train)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained ") == 1
    hubkit.verify(tmp_path / "made", base=ran.base)


TOLD = {"killed": "HK-INTERRUPTED", "memory": "HK-MEMORY", "plugin": "HK-PLUGIN"}


@pytest.mark.slow
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", TOLD)
def test_where_one_process_fails_all_end_and_the_run_goes_on(
    ran: Ran, how: str, rank: int, divided: bool, tmp_path: Path
) -> None:
    """One error is told, nothing is half written, and what was saved before is sound."""
    out = tmp_path / "made"
    train = ["train", ran.base, ran.rows, "-o", out, "--steps", 4, "--batch-size", 2, "--accumulate", 2]
    train += ["--device", "cpu", "--save-every", failing_run.STEPS, *["--shard"] * divided]
    failed = launch(HERE / "failing_run.py", how, rank, *train)
    assert failed.returncode == 1
    assert failed.stderr.count(f"error[{TOLD[how]}]") == failed.stderr.count("error[") == 1, failed.stderr
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"made.run"}
    assert not [path for path in (tmp_path / "made.run").iterdir() if "partial" in path.name]
    saved = load(tmp_path / "made.run")
    assert saved is not None
    assert saved.progress.step == failing_run.STEPS
    resumed = launch("-m", "hubkit", *train, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    hubkit.verify(out, base=ran.base)


def test_the_command_tells_one_error(ran: Ran, tmp_path: Path) -> None:
    out = tmp_path / "made"
    done = launch("-m", "hubkit", "train", ran.base, ran.rows, "-o", out, "--accumulate", 2, "--text", "nope")
    assert done.returncode == 1
    assert done.stderr.count("error[HK-COLUMNS]") == 1
    assert done.stderr.count("error[") == 1
    assert "hubkit" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_who_is_launched_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    assert speaks()
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Launch(3, 4, 1)
    assert not speaks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert launched() is None


@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 4), (2, 5), (3, 2), (4, 9)])
def test_each_micro_batch_is_one_process_s_and_all_have_as_many_rounds(size: int, count: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [number for share in shares for number in share if number is not None]
    assert sorted(dealt) == list(range(count))
    assert all(share == sorted(share, key=lambda n: count if n is None else n) for share in shares)


def test_more_processes_than_micro_batches_are_refused_with_as_many_rows() -> None:
    with pytest.raises(HubkitError) as caught:
        World(0, 4).require_work(8, 2)
    assert caught.value.code == "HK-OPTIONS"
    assert caught.value.fix == "--batch-size 4 --accumulate 4"
    World(0, 4).require_work(8, 4)


def test_a_base_is_divided_among_several_only(ran: Ran, tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught:
        hubkit.train(ran.base, ran.rows, tmp_path / "x", method="lora", device="cpu", shard=True, steps=1)
    assert caught.value.code == "HK-OPTIONS"
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_decides_at_once() -> None:
    alone = world()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.once(lambda: 3) == 3
    with within(World(1, 2)) as two:
        assert world() is two
    assert world() == alone


def test_an_error_can_be_another_process_s_to_tell() -> None:
    error = KeyboardInterrupt()
    assert not is_told(error)
    set_told(error)
    assert is_told(error)
