"""Added tokens: trained, used, merged and refused; PEFT on a resized model computes the same."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForCausalLM
from variants import refused

from hubkit.artifact.folder import open_adapter, write_adapter
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum
from hubkit.tensors.weights.merging import plan_merge, write_merged
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

TOKENS = ["<call>", "<end of call>"]
WEIGHTS = "adapter_model.safetensors"
SIZE = 320
IDS = torch.tensor([[5, 320, 7, 321, 321, 9], [320, 11, 12, 3, 4, 319]])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base(request: pytest.FixtureRequest) -> Path:
    """An untied and a tied base."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def trained(base: Path, out: Path, tokens: list[str] = TOKENS, **options: Any) -> Path:
    first, last = tokens[0], tokens[-1]
    rows = [{"prompt": f"Add {n} and {n}.", "completion": f"{first}add {n}{last} {2 * n}"} for n in range(16)]
    out.parent.mkdir(exist_ok=True, parents=True)
    data = out.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = ["q_proj"] if "llama" in base.name else ["c_attn"]
    config = {"rank": 2, "targets": target, "add_tokens": tokens, **options}
    train(str(base), data, out, config=config, steps=4, learning_rate=0.02, dtype="float32")
    return out


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=ids).logits
    return made


def near(have: torch.Tensor, want: torch.Tensor) -> None:
    assert have.shape == want.shape
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_trained_used_and_merged(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = trained(base, tmp_path / "caller")
    manifest = open_adapter(folder).manifest
    assert manifest.vocabulary == {"tokens": {"<call>": 320, "<end of call>": 321}}
    verify(str(folder), base=str(base))
    held = {key: value.shape for key, value in load_file(folder / WEIGHTS).items() if "token_adapter" in key}
    assert set(held.values()) == {(2, 16)}
    assert len(held) == (2 if base.name == "llama" else 1)
    live = attach(load_base(base), str(folder), base=str(base))
    want = logits(live)
    assert want.shape == (2, 6, SIZE + 2)
    config: Any = live.model.config
    assert config.vocab_size == SIZE
    merge(str(base), str(folder), tmp_path / "merged")
    merged: Any = load_base(tmp_path / "merged")
    near(logits(merged), want)
    ties = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert (merged.config.vocab_size, ties) == (SIZE + 2, base.name == "gpt2")
    words = load_tokenizer(tmp_path / "merged")
    assert words("a<call>b<end of call>")["input_ids"][1::2] == [320, 321]
    one, two = (
        generate("Add 3 and 3.<call>", base=str(b), terms=t, max_new_tokens=8)
        for b, t in ((base, str(folder)), (tmp_path / "merged", ()))
    )
    assert one.text == two.text
    resized = load_base(base)
    resized.resize_token_embeddings(SIZE + 2)  # type: ignore[operator]
    near(logits(peft.PeftModel.from_pretrained(resized, str(folder))), want)
    export(str(folder), tmp_path / "theirs" / "caller")
    again = pack(tmp_path / "theirs" / "caller", base=str(base))
    assert again.manifest.vocabulary == manifest.vocabulary
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "theirs" / "caller" / WEIGHTS).read_bytes()
    pack(folder, base=str(base), version="1.0.0")
    assert open_adapter(folder).manifest.vocabulary == manifest.vocabulary


def test_the_tokenizers_agree_and_the_base_is_left_alone(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "caller")
    model = load_base(base)
    plain = logits(model, IDS.clamp(max=SIZE - 1))
    live = attach(model, str(folder), base=str(base), tokenizer=load_tokenizer(folder))
    with live.using(None):
        assert torch.equal(logits(live, IDS.clamp(max=SIZE - 1)), plain)
        with pytest.raises(IndexError):
            logits(live)
    with pytest.raises(IndexError):
        logits(live, IDS + 1)
    loss = live(input_ids=IDS, labels=IDS).loss
    assert torch.isfinite(loss)
    assert live.detach() is model
    assert torch.equal(logits(model, IDS.clamp(max=SIZE - 1)), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {p.name for p in base.glob("*token*")} <= {p.name for p in folder.iterdir()}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (base / name).exists():
            assert (folder / name).read_bytes() == (base / name).read_bytes()


def test_the_base_beside_its_adapter_in_another_thread(base: Path, tmp_path: Path) -> None:
    """Both are inside the model at once, and each has the loss of its own vocabulary: neither writes to the model."""
    live: Any = attach(load_base(base), str(trained(base, tmp_path / "caller")), base=str(base))
    known = IDS.clamp(max=SIZE - 1)
    both, sizes = threading.Barrier(2, timeout=60), []

    def meet(*_: object) -> None:
        both.wait()
        sizes.append(live.model.config.vocab_size)

    def alone() -> float:
        with live.using(None):
            return float(live(input_ids=known, labels=known).loss)

    def adapted() -> float:
        return float(live(input_ids=IDS, labels=IDS).loss)

    want = [alone(), adapted()]
    live.model.get_output_embeddings().register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        have = [pool.submit(each) for each in (alone, adapted)]
    assert [each.result() for each in have] == pytest.approx(want, rel=1e-5)
    assert sizes == [SIZE, SIZE]


def test_labels_are_refused_where_the_model_counts_its_own_vocabulary() -> None:
    """As bart and bert do: they flatten logits by what the configuration says, in their forward."""

    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    live = Attached(BartForCausalLM(BartConfig(vocab_size=48, **sizes)).eval())
    method = host().load("lora")
    config = {"rank": 2, "targets": ["q_proj"], "add_tokens": ["<a>"], "token_ids": [48]}
    live.add("a", Adapter.fresh("a", method, parse_config(method.info.config, config, ""), live.sites, 0))
    live.set_mix("a")
    ids = torch.tensor([[5, 48, 7]])
    assert logits(live, ids).shape[-1] == 49
    error = refused("HK-VOCABULARY", live, input_ids=ids, labels=ids)
    assert "from the logits" in error.fix
    with live.using(None):
        assert torch.isfinite(live(input_ids=ids.clamp(max=47), labels=ids.clamp(max=47)).loss)


@pytest.mark.parametrize("mix", [Sum({"a": 0.5, "b": -2.0}), Stack([("a", 0.3), "b"]), Sum([("b", 1.0), ("b", -1.0)])])
def test_live_is_merged_for_any_mix(mix: Any, base: Path, tmp_path: Path) -> None:
    """The embeddings of one member change as well: its factors know nothing of the new tokens."""
    table = "embed_tokens" if base.name == "llama" else "wte"
    live = Attached(load_base(base))
    for name, options in (("b", {"token_ids": [3]}), ("a", {"targets": [table], "add_tokens": []})):
        folder = trained(base, tmp_path / name / "caller", **options)
        live.add(name, read_adapter(open_adapter(folder), live.sites, dtype="base"))
    live.set_mix(mix)
    want = logits(live)
    (tmp_path / "out").mkdir()
    write_merged(plan_merge(live.sites, mix, live.adapters), open_shards(base), tmp_path / "out")
    near(logits(load_base(tmp_path / "out")), want)
    live.set_mix("b")
    live.remove("a")
    assert logits(live).shape[-1] == SIZE + 2


def test_only_rows_of_new_tokens_are_trained(base: Path, tmp_path: Path) -> None:
    live = attach(load_base(base), str(trained(base, tmp_path / "caller")), base=str(base), trainable=True)
    rows = {n: p for n, p in live.adapters["caller"].parameters().items() if n.endswith(".rows")}
    live(input_ids=IDS, labels=IDS).loss.backward()
    assert rows
    assert all(p.grad is not None and bool(p.grad.abs().sum(1).all()) for p in rows.values())
    assert all(p.grad is None for p in live.model.parameters())


def with_token(base: Path, out: Path, token: str) -> Path:
    """The same base with a tokenizer that knows one token more."""
    shutil.copytree(base, out)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(out)
    return out


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    for tokens in (["<s>"], ["<x>", "<x>"], [" "]):
        refused("HK-VOCABULARY", trained, tiny_llama, tmp_path / "bad", tokens)
    refused("HK-VOCABULARY", trained, tiny_llama, tmp_path / "bad", token_ids=[400])
    for name in ("embed_tokens", "lm_head"):
        refused("HK-CONFIG", trained, tiny_llama, tmp_path / "bad", targets=["q_proj", name])
        refused("HK-CONFIG", trained, tiny_llama, tmp_path / "bad", modules_to_save=[name])
    assert not (tmp_path / "bad").exists()
    one, other = trained(tiny_llama, tmp_path / "one"), trained(tiny_llama, tmp_path / "other", ["<y>"])
    both = f"{one} + {other}"
    refused("HK-VOCABULARY", generate, "Hi", base=str(tiny_llama), terms=both)
    refused("HK-VOCABULARY", merge, str(tiny_llama), both, tmp_path / "merged")
    refused("HK-VOCABULARY", compose, both, tmp_path / "composed")
    refused("HK-VOCABULARY", attach, load_base(tiny_llama), both, base=str(tiny_llama))
    refused("HK-COMPOSE", compose, f"{one} - 0.5*{one}", tmp_path / "composed")
    taken = with_token(tiny_llama, tmp_path / "taken", "<other>")
    error = refused("HK-VOCABULARY", generate, "Hi", base=str(taken), terms=str(one), allow_base_mismatch=True)
    assert "320: <call> in the adapter, <other> in the tokenizer" in error.have
    refused("HK-VOCABULARY", merge, str(taken), str(one), tmp_path / "merged", allow_base_mismatch=True)
    words = load_tokenizer(taken)
    refused("HK-VOCABULARY", attach, load_base(tiny_llama), str(one), base=str(tiny_llama), tokenizer=words)
    assert not (tmp_path / "merged").exists()


def resized_by_peft(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """An adapter that PEFT trained on a model with two more tokens, saved with its tokenizer; its logits."""
    peft = pytest.importorskip("peft")
    model: Any = load_base(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(SIZE + 2, mean_resizing=False)
    target = "q_proj" if base.name == "llama" else "c_attn"
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], **options)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and ("lora" in name or "token" in name):
                parameter += 0.2 * torch.randn(parameter.shape)
    made.save_pretrained(folder, save_embedding_layers=not options)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(TOKENS)
    tokenizer.save_pretrained(folder)
    return logits(made)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["resized", "rows"])
def test_what_peft_saves_of_a_resized_model_is_adopted(way: str, base: Path, tmp_path: Path) -> None:
    names = ["embed_tokens", "lm_head"] if base.name == "llama" else ["wte"]
    options = {"trainable_token_indices": {name: [321, 7, 320] for name in names}} if way == "rows" else {}
    want = resized_by_peft(base, tmp_path / "theirs", **options)
    done = pack(tmp_path / "theirs", base=str(base), out=tmp_path / "mine" / "caller")
    assert done.manifest.vocabulary == {"tokens": {"<call>": 320, "<end of call>": 321}}
    held = {key: len(value) for key, value in load_file(tmp_path / "mine" / "caller" / WEIGHTS).items()}
    assert {count for key, count in held.items() if "lora" not in key} == {3 if way == "rows" else 2}
    near(logits(attach(load_base(base), str(tmp_path / "mine" / "caller"), base=str(base))), want)
    merge(str(base), str(tmp_path / "mine" / "caller"), tmp_path / "merged")
    near(logits(load_base(tmp_path / "merged")), want)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resized_model_that_changed_more_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    resized_by_peft(tiny_llama, tmp_path / "theirs")
    weights = tmp_path / "theirs" / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not a map of what is replaced
    key = "base_model.model.model.embed_tokens.weight"
    changed = tensors[key].clone()
    changed[5, 5] += 1
    save_file({**tensors, key: changed}, weights)
    assert refused("HK-VOCABULARY", pack, tmp_path / "theirs", base=str(tiny_llama)).where == key
    save_file({**tensors, key: tensors[key][:SIZE].clone()}, weights)
    refused("HK-VOCABULARY", pack, tmp_path / "theirs", base=str(tiny_llama))
    save_file({**tensors, key: changed[:SIZE].clone()}, weights)
    refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama))
    save_file(tensors, weights)
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    refused("HK-VOCABULARY", pack, tmp_path / "theirs", base=str(tiny_llama))
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "theirs")
    refused("HK-VOCABULARY", pack, tmp_path / "theirs", base=str(tiny_llama))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_of_the_table_alone_are_adopted(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT can train rows of the embeddings and leave an untied head: the head's are the base's then."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [9, 4]}
    made = peft.get_peft_model(load_base(tiny_llama), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    made.save_pretrained(tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    ids = IDS.clamp(max=9)
    near(logits(attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama)), ids), logits(made, ids))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_garbage(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"trainable_token_indices": {"embed_tokens": [321, 320], "lm_head": [321, 320]}}
    resized_by_peft(tiny_llama, tmp_path / "theirs", **options)
    config, weights = tmp_path / "theirs" / "adapter_config.json", tmp_path / "theirs" / WEIGHTS
    document, tensors = json.loads(config.read_text()), load_file(weights)
    adopt = lambda: pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")  # noqa: E731
    for ids in (
        "x",
        [1.5],
        [True, 2],
        {"embed_tokens": [320, 321], "lm_head": [321, 320]},
        [320, 322],
        [320, 320],
        [-1],
    ):
        config.write_text(json.dumps(document | {"trainable_token_indices": ids}))
        refused("HK-VOCABULARY", adopt)
    for names in (5, [5], "lm_head", {"lm_head": 1}, [""]):
        config.write_text(json.dumps(document | {"modules_to_save": names}))
        refused("HK-OPTION", adopt)
    config.write_text(json.dumps(document))
    key = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    for code, value in (
        ("HK-SHAPE", tensors[key][:1].clone()),
        ("HK-SHAPE", tensors[key][0].clone()),
        ("HK-NAN", tensors[key] * float("nan")),
    ):
        save_file({**tensors, key: value}, weights)
        refused(code, adopt)
    save_file({name: value for name, value in tensors.items() if name != key}, weights)
    refused("HK-KEYS", adopt)
    assert not (tmp_path / "mine").exists()


def test_a_manifest_that_contradicts_itself_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from hubkit.documents.schema import canonical

    folder = trained(tiny_llama, tmp_path / "caller")
    document = json.loads((folder / "hubkit.json").read_text())
    for changed in (
        {"vocabulary": {"tokens": {"<call>": 321, "<end of call>": 320}}},
        {"vocabulary": {"tokens": 5}},
        {"config": {**document["config"], "add_tokens": 5}},
        {"config": {**document["config"], "token_ids": []}},
    ):
        (folder / "hubkit.json").write_bytes(canonical(document | changed))
        refused("HK-VOCABULARY", generate, "Hi", base=str(tiny_llama), terms=str(folder))


def test_a_tokenizer_without_the_tokens_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Every digest is right: whoever made the adapter put another tokenizer in."""
    folder = trained(tiny_llama, tmp_path / "caller")
    manifest = open_adapter(folder).manifest
    files: dict[str, bytes | Path] = {entry.path: (folder / entry.path).read_bytes() for entry in manifest.files}
    write_adapter(folder, manifest, {**files, "tokenizer.json": tiny_llama / "tokenizer.json"}, replace=True)
    error = refused("HK-VOCABULARY", merge, str(tiny_llama), str(folder), tmp_path / "merged")
    assert error.want == ["<call> = 320", "<end of call> = 321"]
    assert not (tmp_path / "merged").exists()
