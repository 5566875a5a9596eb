"""Live models: loading a base with transformers, and the fingerprint of a model in memory."""

from __future__ import annotations

import importlib.util
import json
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.artifact.identity.base_files import local, read_config, weight_headers
from hubkit.artifact.identity.digest import (
    BaseRecord,
    TensorDigest,
    compose_weights,
    config_values,
    counted,
    fingerprint_folder,
    is_buffer,
    layout_digest,
    template_digest,
    ties,
    tokenizer_digest,
    values_digest,
)
from hubkit.artifact.identity.header import TensorInfo
from hubkit.compat.torch import version_of
from hubkit.compat.transformers import commit_of, quiet
from hubkit.compat.transformers_names import as_in_files
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import BaseFingerprint
from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import refuse_incomplete, require_release
from hubkit.tensors.base.token_sites import heads_last
from hubkit.tensors.base.tokenizer import CAUSAL, ForTask, model_class, transformers_module, why
from hubkit.tensors.device import computing, device_named, require_dtype
from hubkit.tensors.files.coded import QUANTIZATION
from hubkit.tensors.files.dtypes import DTYPE_NAMES, dtype_named
from hubkit.tensors.files.shards import tensor_bytes
from hubkit.tensors.live.loading_4bit import is_packed, load_packed


@checked
def load_base(
    path: Path | str,
    dtype: str | None = None,
    codec: str | None = None,
    device: str | torch.device = "auto",
    *,
    allow_incomplete_base: bool = False,
    task: Any = None,
) -> nn.Module:
    """The language model in folder `path`, in eval mode, its parameters frozen.

    A folder in 4 bits, as bitsandbytes writes it, is loaded as it is. Tensors go straight to `device`, one by one: main
    memory never holds the model as well.

    Args:
        dtype: ``float32``, ``bfloat16``...; None: as stored.
        codec: ``nf4/64/double``: the linear layers but the output head are quantized while they are read, on `device`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``: see `hubkit.tensors.device`.
        allow_incomplete_base: let transformers make up weights that the files lack, and leave out those that it has no
            place for.
        task: a `ForTask`, as `model_class` has it; what it says is made is not asked of the files.
            Not together with a base whose files are in 4 bits.

    Raises:
        HubkitError: ``HK-BASE-MISSING``, ``HK-BASE-UNSAFE``, ``HK-BASE-LOAD``, ``HK-CODEC``, ``HK-QUANT-STATE``;
            ``HK-BASE-INCOMPLETE`` where the files do not hold each weight of the model once, in its shape;
            ``HK-NAN`` for a weight that cannot be quantized; ``HK-DEVICE``, ``HK-DTYPE`` and ``HK-MEMORY`` where
            `device` is not there, does not compute so, or is too small; ``HK-EXTRA`` without transformers, or without
            accelerate off the CPU.
    """
    path, place = Path(path), device_named(device)
    config, transformers = sound_config(path), transformers_module()
    wanted, stored = dtype_named(dtype), is_packed(config)
    if task and stored:
        what, fix = "a base whose files are in 4 bits is loaded as a language model only", "the base in 16 bits"
        raise HubkitError("HK-CODEC", what, where=str(path), want="a base that is not quantized", fix=fix)
    if (codec or stored) and config.get("is_encoder_decoder"):  # T5 casts to the dtype of packed weights
        what, fix = "an encoder-decoder is loaded in 16 or 32 bits only", "a base or a --method in 16 bits"
        raise HubkitError("HK-CODEC", what, where=str(path), want="a base that is not quantized", fix=fix)
    require_dtype(place, wanted or _stated_dtype(config))
    options: dict[str, Any] = {"dtype": wanted or "auto", "local_files_only": True, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    if place.type != "cpu":
        _require_accelerate(place)
        options["device_map"] = {"": place}
    try:
        with quiet(), computing(place, f"the base {path.name}", "--dtype bfloat16, or a quantized base"):
            if codec or stored:
                model, found = load_packed(path, transformers, None if stored else codec, options, place, task)
            else:
                stated = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
                _decoded_when_loaded(stated)
                if task is not None:
                    task.configure(stated)
                loader = model_class(transformers, stated, task)
                model, found = loader.from_pretrained(path, config=stated, trust_remote_code=False, **options)
    except HubkitError:
        raise
    except Exception as e:  # on a config of another maker, transformers can raise anything
        raise HubkitError(
            "HK-BASE-LOAD",
            "transformers cannot load the base as a language model",
            where=str(path),
            have=why(e),
            fix=CAUSAL,
        ) from e
    if not allow_incomplete_base:
        _require_complete(model, found, path, task)
    require_dtype(place, next((p.dtype for p in model.parameters() if p.is_floating_point()), None))
    model.eval().requires_grad_(False)
    if codec and not stored:
        _ORIGINS[model] = (_values(model), fingerprint_folder(path), codec)
    return model


def sound_config(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` of a folder whose base may be loaded.

    Raises:
        HubkitError: ``HK-BASE-MISSING``, ``HK-BASE-UNSAFE``, ``HK-BASE-LOAD``, ``HK-EXTRA``.
    """
    if not (path / "config.json").is_file():
        raise HubkitError(
            "HK-BASE-MISSING",
            "the folder does not hold a base model",
            where=str(path),
            want="config.json",
            fix="hubkit pull --base ORG/NAME",
        )
    config = read_config(local(path))
    _require_own(path, config)
    transformers_module()
    require_release(config, path)
    return config


def _decoded_when_loaded(config: Any) -> None:
    """Asks transformers to decode the weights of compressed-tensors while it loads them.

    Left to itself a layer decodes its weight in its first forward, and its parameter is another one from then on.
    """
    facts = getattr(config, QUANTIZATION, None)
    if isinstance(facts, dict) and facts.get("quant_method") == "compressed-tensors":
        facts |= {"dequantize": True, "run_compressed": False}  # 5.x and 4.57 call it so


def _require_own(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder of which transformers would make more than its weights: ``HK-BASE-UNSAFE``.

    An adapter of PEFT that lies beside the weights is put onto them without a word, and is in no fingerprint; an
    attention or experts implementation with a slash is native code that is fetched from the Hub and run.
    """
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    words = [
        str(part.get(key))
        for part in parts
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
        if part.get(key)
    ]
    faults = [f"config.json asks for the code of {word}" for word in words if "/" in word]
    if (path / "adapter_config.json").exists():
        faults.append("adapter_config.json: an adapter beside the weights")
    if faults:
        raise HubkitError(
            "HK-BASE-UNSAFE",
            "transformers would make more of the folder than its weights",
            where=str(path),
            want="a base alone",
            have=faults,
            fix="a folder without these; an adapter beside the base: move it away, then hubkit pack it",
        )


def _require_complete(model: nn.Module, found: Mapping[str, Any], path: Path, task: ForTask | None) -> None:
    """Refuses a model whose weights are not those of the files, each once: ``HK-BASE-INCOMPLETE``.

    transformers draws what the files lack at random and passes over what it has no place for, with a warning: a base
    model without its head, a classifier, a config that promises more layers. Buffers that models compute themselves
    count on neither side.

    Args:
        found: what ``from_pretrained(output_loading_info=True)`` says.
        task: what was made, and has no place, is as it should be.
    """
    stored = {name: info for infos in weight_headers(local(path)).values() for name, info in infos.items()}
    live = {
        name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in model.state_dict().items() if t.dtype in DTYPE_NAMES
    }
    spare = {name for name, info in stored.items() if is_buffer(name, info.dtype, info.shape)}
    spare |= {name for name, facts in live.items() if is_buffer(name, *facts)}
    if task is not None:
        spare |= {*task.tensors, *task.spare}
    refuse_incomplete(
        model, path, {kind: {_key(one) for one in found.get(f"{kind}_keys", ())} - spare for kind in _REPORTED}
    )


_REPORTED = ("missing", "mismatched", "unexpected")


def _key(said: str | tuple[Any, ...]) -> str:
    """The name in one line of transformers' report: mismatched keys come with their shapes in some releases."""
    return said if isinstance(said, str) else str(said[0])


def _stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a ``config.json`` says its weights have, where it says it in a word that torch knows."""
    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return stated if isinstance(stated, torch.dtype) else None


def _require_accelerate(device: torch.device) -> None:
    """transformers puts tensors on a device as it reads them only where accelerate is: ``HK-EXTRA``."""
    if importlib.util.find_spec("accelerate") is None:
        raise HubkitError(
            "HK-EXTRA",
            f"loading onto {device} needs accelerate, which is not installed",
            fix="pip install 'hubkit-adapters[transformers]'",
        )


def stored_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """Name in the files -> tensor, of a live model: its state, tied aliases once, under the first of their names.

    Experts that transformers has fused into one tensor are taken apart again.
    """
    seen: dict[tuple[int, torch.Size], str] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in heads_last(model, model.state_dict(keep_vars=True).items()):
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and seen.setdefault(key, name) != name:
            continue
        found[name] = tensor.detach()
    return as_in_files(model, found)


_PROBES = 8
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[object, BaseRecord]] = weakref.WeakKeyDictionary()
_ORIGINS: weakref.WeakKeyDictionary[nn.Module, tuple[object, BaseRecord, str]] = weakref.WeakKeyDictionary()
"""What a model was that was quantized while it was loaded, and how: its values are not at hand any more."""


def codec_loaded(model: nn.Module) -> str | None:
    """How `load_base` quantized `model`; None where it did not."""
    origin = _ORIGINS.get(model)
    return origin[2] if origin else None


def fingerprint_model(model: nn.Module, tokenizer: Any = None) -> BaseRecord:
    """The identity of a live model: equal to that of the folder it was loaded from, in the same or a wider dtype.

    Hashed once per model and set of values; values changed in place are noticed. `files` is empty, and tokenizer and
    template are unknown unless a tokenizer is given.

    Args:
        tokenizer: its transformers tokenizer, to be compared as well.
    """
    values = _values(model)
    key = (id(tokenizer), values)
    known = _KNOWN.get(model)
    if known is not None and known[0] == key:
        return known[1]
    origin = _ORIGINS.get(model)
    if origin is not None and origin[0] == values:
        if tokenizer is None:
            return origin[1]
        words, template = _texts(tokenizer)
        fingerprint = replace(origin[1].fingerprint, tokenizer=words, template=template)
        return replace(origin[1], fingerprint=fingerprint)
    tensors = stored_tensors(model)
    config = _config(model)
    infos = [TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape), 0, 0) for name, t in tensors.items()]
    with ThreadPoolExecutor(2) as pool:
        hashed = list(pool.map(_digest, tensors.items()))
    kept, texts = counted(hashed, ties(config)), _texts(tokenizer)
    fingerprint = BaseFingerprint(
        source=getattr(model, "name_or_path", None) or None,
        revision=commit_of(getattr(model, "config", None)),
        layout=layout_digest(infos, ties(config)),
        weights=compose_weights(kept),
        files={},
        config=config_values(config),
        tokenizer=texts[0],
        template=texts[1],
    )
    record = BaseRecord(fingerprint, kept)
    _KNOWN[model] = (key, record)
    return record


def _values(model: nn.Module) -> object:
    """What changes when a parameter or buffer does, without looking at all values."""
    return [(version_of(t), t.dtype, t.shape, _probe(t)) for t in (*model.parameters(), *model.buffers())]


def _texts(tokenizer: Any) -> tuple[str | None, str | None]:
    """The digests of tokenizer and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return _live_tokenizer(tokenizer), template_digest(template) if template else None


def _probe(tensor: Tensor) -> list[float]:
    """A few of the values: writing through ``.data``, as merging tools do, leaves a tensor's version as it was."""
    count = tensor.numel()
    if not tensor.is_contiguous() or count < _PROBES:
        tensor = tensor.reshape(-1)[:: max(1, count // _PROBES)]
    else:
        tensor = tensor.as_strided((_PROBES,), (count // _PROBES,))
    values: list[float] = tensor.tolist()
    return values


def _config(model: Any) -> dict[str, Any]:
    """The configuration of a live model; whether its head is tied, the model itself says.

    transformers 4.57 fills in that the whole is tied where the language model in it is not.
    """
    if not hasattr(model, "config"):
        return {}
    config = dict(json.loads(model.config.to_json_string(use_diff=False)))
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    table, head = (getattr(end, "weight", None) for end in ends)
    return config if table is None or head is None else {**config, "tie_word_embeddings": table is head}


def _digest(item: tuple[str, Tensor]) -> TensorDigest:
    name, tensor = item
    dtype, digest = values_digest(DTYPE_NAMES[tensor.dtype], tensor_bytes(tensor))
    return TensorDigest(name, dtype, tuple(tensor.shape), digest)


def _live_tokenizer(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")}
    return tokenizer_digest(backend.to_str().encode(), special)
