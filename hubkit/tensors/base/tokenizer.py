"""The tokenizer of a base, and transformers itself, imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubkit.compat.transformers import quiet
from hubkit.documents.arguments import checked
from hubkit.errors import HubkitError


@checked
def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer in folder `path`.

    Raises:
        HubkitError: ``HK-TOKENIZER-LOAD``, ``HK-EXTRA``.
    """
    transformers = transformers_module()
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # on files of another maker, tokenizer classes can raise anything
        raise HubkitError(
            "HK-TOKENIZER-LOAD", "transformers cannot load the tokenizer", where=str(path),
            have=f"{type(e).__name__}: {e}",
            fix="it needs tokenizer.json, or the files of its tokenizer class, and a sound config.json",
        ) from e  # fmt: skip


def transformers_module() -> Any:
    """transformers: ``HK-EXTRA`` where it is not installed."""
    try:
        import transformers
    except ImportError as e:
        raise HubkitError(
            "HK-EXTRA", "this needs transformers, which is not installed",
            fix="pip install 'hubkit-adapters[transformers]'",
        ) from e  # fmt: skip
    return transformers
