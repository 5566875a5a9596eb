"""A server on this machine that computes with a real base and real adapters, and speaks as an engine's server does.

With the faults of the real ones that a reader has to mind: llama.cpp's keeps what it computed of a prompt whatever
adapter did, gives no log-probabilities where the token it draws is half of a character, and applies every adapter where
a request names none; MLX-LM's passes ``adapters`` over beside ``default_model``; vLLM's refuses more than 20 tokens.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from hubkit.artifact.folder import AdapterFolder
from hubkit.documents.manifest import Manifest
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.mix import Sum

Reply = tuple[int, Any]
"""HTTP status, and what is sent as JSON, or as it is where it is bytes."""


class Speaker:
    """A base with adapters that answers.

    Args:
        base: its folder.
        adapters: served name -> folder.
        dtype: in which it computes.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: str = "float32") -> None:
        self.base, self.adapters = base, dict(adapters)
        self.model = Attached(load_base(base, dtype, device="cpu"))
        self.tokenizer = load_tokenizer(base)
        self.lock = threading.Lock()
        self.kept: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for name, folder in adapters.items():
            opened = AdapterFolder(folder, Manifest.read(folder))  # whatever its files are now
            self.model.add(name, read_adapter(opened, self.model.sites, dtype="base"))

    def top(self, ids: Sequence[int], weights: Mapping[str, float], count: int) -> list[tuple[int, float]]:
        """The likeliest next tokens with their log-probabilities."""
        mix = Sum(dict(weights)) if any(weights.values()) else None
        with self.lock, torch.no_grad(), self.model.using(mix):
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float()
        found = logits.log_softmax(-1).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def vllm(self, path: str, body: Any) -> Reply:
        """vLLM's server."""
        if body is None:
            own = {"object": "model", "owned_by": "vllm"}
            cards = [{"id": "base", "root": str(self.base), "parent": None, **own}]
            cards += [{"id": n, "root": str(f), "parent": "base", **own} for n, f in self.adapters.items()]
            return (200, {"object": "list", "data": cards}) if path == "/v1/models" else (404, {})
        name = body["model"]
        if name not in ("base", *self.adapters):
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        if body["logprobs"] > 20 or path != "/v1/completions":
            return 400, {"error": {"message": "Requested sample logprobs of more than is allowed: 20"}}
        assert body["return_tokens_as_token_ids"]
        assert body["max_tokens"] == 1
        choices = []
        for index, ids in enumerate(body["prompt"]):
            top = self.top(ids, {} if name == "base" else {name: 1.0}, body["logprobs"])
            listed = {f"token_id:{token}": logprob for token, logprob in top}
            choices.append({"index": index, "text": "", "logprobs": {"top_logprobs": [listed]}})
        return 200, {"object": "text_completion", "model": name, "choices": choices[::-1]}

    def llamacpp(self, path: str, body: Any) -> Reply:
        """llama.cpp's server."""
        names = list(self.adapters)
        if path == "/lora-adapters":
            return 200, [{"id": n, "path": str(self.adapters[name]), "scale": 0.0} for n, name in enumerate(names)]
        if body is None:
            own = {"object": "model", "owned_by": "llamacpp"}
            return (
                (200, {"object": "list", "data": [{"id": "base.gguf", **own}]}) if path == "/v1/models" else (404, {})
            )
        assert path == "/completion"
        scales = {names[one["id"]]: one["scale"] for one in body.get("lora") or []} or dict.fromkeys(names, 1.0)
        ids = tuple(body["prompt"])
        if body.get("cache_prompt", True) and ids in self.kept:
            top = self.kept[ids]
        else:
            top = self.kept[ids] = self.top(ids, scales, body["n_probs"])
        drawn = self.tokenizer.decode([top[0][0]]) if "logit_bias" not in body else " a"
        listed = [{"id": token, "token": "", "bytes": [], "logprob": logprob} for token, logprob in top]
        said = [] if "�" in drawn else [{"id": top[0][0], "logprob": top[0][1], "top_logprobs": listed}]
        return 200, {"content": drawn, "tokens_evaluated": len(ids), "completion_probabilities": said}

    def mlx(self, path: str, body: Any) -> Reply:
        """MLX-LM's server, started with the first adapter."""
        if body is None:
            card = {"id": str(self.base), "object": "model", "created": 0}
            return (200, {"object": "list", "data": [card]}) if path == "/v1/models" else (404, b"Not Found")
        if body["top_logprobs"] > 11 or not isinstance(body["prompt"], str):
            return 400, {"error": "top_logprobs must be between 1 and 11"}
        names = {str(folder): name for name, folder in self.adapters.items()}
        if body["model"] == "default_model":
            weights = {next(iter(self.adapters)): 1.0} if self.adapters else {}
        elif body.get("adapters"):
            if body["adapters"] not in names:
                return 500, {"error": "The adapter path does not exist"}
            weights = {names[body["adapters"]]: 1.0}
        else:
            weights = {}
        ids = self.tokenizer(body["prompt"]).input_ids
        top = self.top(ids, weights, body["top_logprobs"])[::-1]
        listed = [{"id": token, "token": "", "logprob": logprob} for token, logprob in top]
        choice = {"index": 0, "text": "", "logprobs": {"content": [{"id": 0, "top_logprobs": listed}]}}
        return 200, {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def sglang(self, path: str, body: Any) -> Reply:
        """SGLang's server, as its code says."""
        if body is None:
            own = {"object": "model", "owned_by": "sglang"}
            cards = [{"id": "base", "root": str(self.base), **own}]
            cards += [{"id": n, "root": str(f), "parent": "base", **own} for n, f in self.adapters.items()]
            return (200, {"object": "list", "data": cards}) if path == "/v1/models" else (404, {})
        made = []
        for ids, name in zip(body["input_ids"], body["lora_path"], strict=True):
            top = self.top(ids, {name: 1.0} if name else {}, body["top_logprobs_num"])
            made.append({"meta_info": {"output_top_logprobs": [[[logprob, token, None] for token, logprob in top]]}})
        return 200, made


PROTOCOLS = ("vllm", "llamacpp", "mlx", "sglang")


@contextmanager
def serving(answer: Callable[[str, Any], Reply]) -> Iterator[str]:
    """A server whose answers to (path, body as JSON; None for GET) are those of `answer`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(*answer(self.path, None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*answer(self.path, body))

        def _send(self, status: int, said: Any) -> None:
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def loopback(protocol: str, base: Path, adapters: Mapping[str, Path], dtype: str = "float32") -> Iterator[str]:
    """The address of a `Speaker` that speaks one of `PROTOCOLS`."""
    with serving(getattr(Speaker(base, adapters, dtype), protocol)) as url:
        yield url
