"""The real Trainer, pipeline, accelerate and SFTTrainer, given an attached model as they would be given its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from making import make_adapter
from safetensors.torch import load_file
from variants import logits

import hubkit
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.verify import verify

pytest.importorskip("accelerate")


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows with a column that no model takes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row, "source": "here"} for row in ids]


def attached_to(base: Path, adapter: Path) -> Attached:
    return hubkit.attach(load_base(base), adapter, trainable=True).train()


def trainer(attached: Attached, out: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=attached,
        args=TrainingArguments(output_dir=str(out), **settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[hubkit.trainer_callback("chat", license="mit")],
    )


def counted(ids: torch.Tensor) -> int:
    """How many targets Trainer takes the mean over: before transformers 5 the first token of each row is among them."""
    return ids.numel() if transformers.__version__.startswith("4.") else ids[:, 1:].numel()


def losses(of: Any) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_as_a_plain_loop(checkpointing: bool, tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attached_to(tiny_llama, adapter)
    before = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    masters = {name: value.clone() for name, value in attached.state_dict().items()}
    options = {"per_device_train_batch_size": 8, "gradient_checkpointing": checkpointing}
    done = trainer(attached, tmp_path / "run", save_strategy="no", **options)
    done.train()
    plain = attached_to(tiny_llama, adapter)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    ids = torch.stack([row["input_ids"] for row in rows()])
    want = []
    for _ in range(4):
        loss = plain(input_ids=ids, labels=ids, num_items_in_batch=counted(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())
    assert want[0] > want[-1]
    assert losses(done) == pytest.approx(want, abs=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in attached.model.named_parameters())
    assert not any(torch.equal(masters[name], value) for name, value in attached.state_dict().items())


def test_a_checkpoint_is_the_adapter_and_goes_on(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attached_to(tiny_llama, adapter)
    whole = trainer(attached, tmp_path / "run")
    whole.train()
    at_two, at_four = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    stored = load_file(at_four / "model.safetensors")
    assert stored.keys() == attached.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in attached.state_dict().items())
    assert all(name.startswith("chat.") for name in stored)
    resumed = attached_to(tiny_llama, adapter)
    again = trainer(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(at_two))
    assert losses(again) == losses(whole)
    assert all(torch.equal(stored[name], value) for name, value in resumed.state_dict().items())


def test_a_checkpoint_holds_a_finished_adapter(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attached_to(tiny_llama, adapter)
    trainer(attached, tmp_path / "run").train()
    folder = tmp_path / "run" / "checkpoint-4" / "chat"
    assert verify(str(folder), base=str(tiny_llama)).overrides == ()
    assert torch.equal(logits(attached_to(tiny_llama, folder).eval()), logits(attached.eval()))


def test_the_state_of_other_adapters_is_not_gone_on_from(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    trainer(attached_to(tiny_llama, adapter), tmp_path / "run").train()
    other = attached_to(tiny_llama, make_adapter(tmp_path / "other", tiny_llama))
    with pytest.raises(hubkit.HubkitError, match="HK-KEYS"):
        trainer(other, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_trainer_evaluates_and_smooths_as_for_the_base(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    """It asks the class: what its labels are called, and by its name whether these are shifted."""
    attached = attached_to(tiny_llama, adapter).eval()
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        out = attached(input_ids=ids, labels=ids, num_items_in_batch=counted(ids))
    assert trainer(attached, tmp_path / "run").evaluate()["eval_loss"] == pytest.approx(float(out.loss), abs=1e-5)
    scores = torch.log_softmax(out.logits[:, :-1], -1)
    nll = -scores.gather(-1, ids[:, 1:, None]).mean()
    want = 0.9 * nll - 0.1 * scores.mean()
    smoothing = trainer(attached, tmp_path / "run", label_smoothing_factor=0.1)
    assert smoothing.evaluate()["eval_loss"] == pytest.approx(float(want), abs=1e-5)


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    attached = attached_to(tiny_llama, adapter)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.5}
    done = trainer(attached, tmp_path / "run", **options)
    done.train()
    best = load_file(Path(done.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(best[name], value) for name, value in attached.state_dict().items())


def test_a_pipeline_answers_as_generate(tiny_llama: Path, adapter: Path) -> None:
    from transformers import pipeline

    attached = hubkit.attach(load_base(tiny_llama), adapter)
    tokenizer = load_tokenizer(tiny_llama)
    tokens = tokenizer("The quick brown", return_tensors="pt", return_token_type_ids=False)
    want = attached.generate(**tokens, max_new_tokens=8, do_sample=False)[0]
    answer = pipeline("text-generation", model=attached, tokenizer=tokenizer)
    have = answer("The quick brown", max_new_tokens=8, do_sample=False, return_tensors=True)[0]
    assert have["generated_token_ids"] == want.tolist()
    base = pipeline("text-generation", model=load_base(tiny_llama), tokenizer=tokenizer)
    assert have != base("The quick brown", max_new_tokens=8, do_sample=False, return_tensors=True)[0]


def test_accelerate_prepares_it(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    attached = attached_to(tiny_llama, adapter)
    plain = attached_to(tiny_llama, adapter)
    ids = torch.stack([row["input_ids"] for row in rows()])
    accelerator = Accelerator(cpu=True)
    chosen = torch.optim.SGD([p for p in attached.parameters() if p.requires_grad], 0.1)
    model, optimizer = accelerator.prepare(attached, chosen)
    for _ in range(2):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert accelerator.unwrap_model(model) is attached
    own = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        plain(input_ids=ids, labels=ids).loss.backward()
        own.step()
        own.zero_grad()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in attached.state_dict().items())
    accelerator.save_state(str(tmp_path / "state"))
    kept = {name: value.clone() for name, value in attached.state_dict().items()}
    with torch.no_grad():
        for parameter in attached.parts.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(kept[name], value) for name, value in attached.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_sft_trainer_trains_it(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """TRL's trainer, which computes its loss from the backbone and the head's weight: as a plain loop, too."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from hubkit.methods.host import host

    front = {"num_virtual_tokens": 3, "init": "gaussian"}
    made: dict[str, Any] = {"method": host().load(method), **front} if method != "lora" else {}
    adapter = make_adapter(tmp_path / "chat", tiny_llama, **made)
    attached, plain = attached_to(tiny_llama, adapter), attached_to(tiny_llama, adapter)
    before = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    tokens = [row["input_ids"].tolist() for row in rows()]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        packing=False,
    )

    table = datasets.table.InMemoryTable.from_pydict({"input_ids": tokens})

    def sft(model: Attached) -> Any:
        return trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset(table, fingerprint="rows"),
            processing_class=load_tokenizer(tiny_llama),
            callbacks=[hubkit.trainer_callback("chat")],
        )

    done = sft(attached)
    done.train()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    ids, want = torch.tensor(tokens), []
    for _ in range(4):
        loss = plain(input_ids=ids, labels=ids, num_items_in_batch=counted(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())
    assert losses(done) == pytest.approx(want, abs=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in attached.model.named_parameters())
    folder = tmp_path / "run" / "checkpoint-4" / "chat"
    assert verify(str(folder), base=str(tiny_llama)).overrides == ()
    assert torch.equal(logits(attached_to(tiny_llama, folder).eval()), logits(attached.eval()))
    resumed = sft(attached_to(tiny_llama, adapter))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(done)
