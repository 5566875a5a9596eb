"""What transformers makes of a base: its tokenizer, the class of its model, and transformers itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from hubkit.compat.transformers import quiet
from hubkit.compat.transformers_bodies import Bodies
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
            "HK-TOKENIZER-LOAD",
            "transformers cannot load the tokenizer",
            where=str(path),
            have=f"{type(e).__name__}: {e}",
            fix="it needs tokenizer.json, or the files of its tokenizer class, and a sound config.json",
        ) from e


HEADED = {"classification": "ForSequenceClassification", "token-classification": "ForTokenClassification"}
"""Kind of a task -> how transformers' classes with a head for it end."""
CAUSAL = "a base is a causal language model or an encoder-decoder for text; docs/bases.md lists those that are tried"


def why(error: Exception) -> str:
    """An error of transformers in one line: what it says before it lists every class that it has."""
    text = f"{type(error).__name__}: {error}".partition("Model type should be one of")[0]
    return " ".join(text.split())[:300]


class ForTask(Protocol):
    """Which model of a base is wanted, if not its language model; `hubkit.tensors.parts.heads.TaskModel` is one."""

    @property
    def kind(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def spare(self) -> Collection[str]: ...
    def configure(self, config: Any) -> None: ...


def model_class(transformers: Any, config: Any, task: ForTask | None = None) -> Any:
    """The Auto class that makes the language model of a configuration: alone, or as part of one that sees as well.

    Args:
        transformers: the module.
        config: of transformers; of the classes that fit it the one is taken that it was saved by.
        task: its kind, one of `HEADED`: the class with a head that chooses a label of a row, or one of each token;
            ``embedding``: the body alone, which gives hidden states; else the language model, of an encoder-decoder
            the one that reads a text and writes another.
    """
    if task is not None and task.kind in HEADED:
        return getattr(transformers, f"AutoModel{HEADED[task.kind]}")
    if task is not None and task.kind == "embedding":
        return Bodies
    known = {
        transformers.AutoModelForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.AutoModelForImageTextToText: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes:  # others in that mapping are decoders that hear
        known[transformers.AutoModelForSeq2SeqLM] = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    found = {auto: classes_of(mapping[type(config)]) for auto, mapping in known.items() if type(config) in mapping}
    saved = {str(name) for name in getattr(config, "architectures", None) or ()}
    named = [auto for auto, classes in found.items() if saved & {one.__name__ for one in classes}]
    found = dict(reversed(found.items())) if encodes else found  # BART without its head
    return next(iter([*named, *found]), transformers.AutoModelForCausalLM)


def is_seq2seq(folder: Path) -> bool:
    """Whether the base in `folder` is an encoder-decoder for text: one that reads a text and writes another."""
    transformers = transformers_module()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return model_class(transformers, config) is transformers.AutoModelForSeq2SeqLM
    except Exception:  # on a config of another maker, transformers can raise anything; who loads it says what
        return False


def require_decoder(folder: Path, what: str, fix: str) -> None:
    """Refuses an encoder-decoder where only the next token of a text is asked for: ``HK-ARCH``.

    Args:
        what: is asked for.
        fix: what a user can do instead.
    """
    if is_seq2seq(folder):
        said, want = f"{what} goes with decoders only, and the base is an encoder-decoder", "a causal language model"
        raise HubkitError("HK-ARCH", said, where=str(folder), want=want, fix=fix)


def classes_of(entry: Any) -> tuple[Any, ...]:
    """The classes of one entry of a mapping of transformers, which holds one or several."""
    return entry if isinstance(entry, tuple) else tuple(entry) if isinstance(entry, list) else (entry,)


def transformers_module() -> Any:
    """transformers: ``HK-EXTRA`` where it is not installed."""
    try:
        import transformers
    except ImportError as e:
        raise HubkitError(
            "HK-EXTRA",
            "this needs transformers, which is not installed",
            fix="pip install 'hubkit-adapters[transformers]'",
        ) from e
    return transformers
