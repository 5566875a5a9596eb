"""Makes the golden artifacts beside this file: a tiny base, an adapter of every method on it, a mix, a recipe's lock.

Made once, by hubkit 0.1.0; later versions must read them, and make the same bytes of what is in them
(tests/test_golden.py). Run again only for a format that is new on purpose: ``python tests/golden/artifacts/make.py``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent)]

RECIPE = """[base]
source = "./base"
[adapters.lora]
source = "./lora"
[adapters.dora]
source = "./dora"
weight = -0.5
"""
METHODS = ("lora", "heads", "tokens", "dora", "qlora", "adapters", "prefix", "prompt", "selective", "full")


def make(folder: Path) -> None:
    import conftest
    from every_method import METHODS as CONFIGS
    from transformers import LlamaConfig, LlamaForCausalLM
    from variants import rows_file

    from hubkit.documents.lock import pretty
    from hubkit.verbs.compose import compose
    from hubkit.verbs.lock import lock
    from hubkit.verbs.mix import mix
    from hubkit.verbs.pack import pack
    from hubkit.verbs.train import train

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=320,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **sizes,
    )
    conftest._save(LlamaForCausalLM, config, folder / "base")
    rows = rows_file(folder / "rows.jsonl", 8)
    for name in METHODS:
        method, options = CONFIGS[name]
        train(
            str(folder / "base"),
            rows,
            folder / name,
            method=method,
            config=options,
            steps=2,
            learning_rate=0.05,
            name=name,
            device="cpu",
        )
        shutil.rmtree(folder / f"{name}.run")
        pack(folder / name, version="1.2.3", license="apache-2.0")
    rows.unlink()
    mix(f"stack({folder / 'lora'}, 0.5*sum({folder / 'dora'}, -1*{folder / 'full'}))", folder / "mix")
    compose(f"1.0*{folder / 'lora'} + -0.5*{folder / 'lora'}", folder / "composed")
    (folder / "hubkit.toml").write_text(RECIPE)
    made_now = lock(folder).lock
    (folder / "hubkit.lock").replace(folder / "sealed.lock")
    (folder / "hubkit.lock").write_bytes(pretty(made_now.to_document(), "lock"))  # as locks were before they had seals
    made = [
        name for name in sorted(path.name for path in folder.iterdir()) if (folder / name / "hubkit.json").is_file()
    ]
    digests = {name: hashlib.sha256((folder / name / "hubkit.json").read_bytes()).hexdigest() for name in made}
    (folder / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    make(HERE)
