"""Which server is there, and whether it applies an adapter: asked with the adapter's probes, judged, told in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hubkit.documents.probes import Probes
from hubkit.engines.runtimes.fit import BOUNDS, Answers, Fit, distance, fitted
from hubkit.engines.runtimes.llamacpp import LlamacppRuntime
from hubkit.engines.runtimes.mlx import MlxRuntime
from hubkit.engines.runtimes.runtime import Entry, Runtime
from hubkit.engines.runtimes.sglang import SglangRuntime
from hubkit.engines.runtimes.vllm import VllmRuntime
from hubkit.engines.runtimes.wire import TIMEOUT, Server, short
from hubkit.errors import UNDECIDED, USAGE, HubkitError

MODELS = "v1/models"
OWNERS: Mapping[str, Callable[[Server, Sequence[dict[str, Any]]], Runtime]] = {
    "vllm": VllmRuntime, "llamacpp": LlamacppRuntime, "sglang": SglangRuntime,
}  # fmt: skip
"""What a server says owns its models -> its reader. MLX-LM's says nothing."""
TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Short name of a dtype -> torch's."""
DTYPES = {**{long: short for short, long in TORCH.items()}, **{name: name for name in BOUNDS}}
"""What a user may call a dtype -> its name in `BOUNDS`."""


def runtime_at(url: str, timeout: float = TIMEOUT) -> Runtime:
    """The reader for the server at an address, by what that says of its models.

    Raises:
        HubkitError: ``HK-OPTIONS``; ``HK-RUNTIME-UNKNOWN`` for a server of another kind, what asking it raises.
    """
    server = Server(url, timeout)
    try:
        answer = server.get(MODELS)
    except HubkitError as error:
        if error.code == "HK-RUNTIME-REFUSED" and any("HTTP 404" in line for line in error.have):
            raise _unknown(server, error.have[0]) from None
        raise
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise _unknown(server, repr(answer))
    owners = {str(one["owned_by"]) for one in models if one.get("owned_by")}
    known = owners & OWNERS.keys()
    if known:
        return OWNERS[known.pop()](server, models)
    if owners or not all({"id", "object"} <= one.keys() for one in models):
        raise _unknown(server, f"models of {', '.join(sorted(owners)) or 'nobody'}")
    return MlxRuntime(server, models)


def _unknown(server: Server, have: str) -> HubkitError:
    what, want = "this is no server whose answers are understood", "vLLM, llama.cpp, MLX-LM or SGLang, by /v1/models"
    return HubkitError("HK-RUNTIME-UNKNOWN", what, where=server.url, want=want, have=short(have), status=UNDECIDED)


def bound_of(dtype: str) -> float:
    """What rounding may do in a dtype: one of `DTYPES`.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2).
    """
    if dtype not in DTYPES:
        raise HubkitError("HK-OPTIONS", "unknown dtype", want=", ".join(DTYPES), have=dtype, status=USAGE)
    return BOUNDS[DTYPES[dtype]]


def asked(runtime: Runtime, probes: Probes, entry: Entry, *, dtype: str, expected: float = 1.0) -> Fit:
    """Asks a server for an adapter's probes and refuses it unless the adapter acts as it should.

    Args:
        entry: what the server serves it as.
        dtype: in which the server computes: one of `DTYPES`.
        expected: the scale at which the adapter should act.

    Raises:
        HubkitError: as `require`, with the base asked where the answers are another adapter's; what asking raises.
    """

    def bare() -> Answers | None:
        base = runtime.bare(entry)
        return None if base is None else runtime.likeliest(probes.prompts, base)

    found = fitted(probes, runtime.likeliest(probes.prompts, entry), bound=bound_of(dtype), expected=expected)
    return require(found, probes, f"{runtime.server.url}  {entry.path or entry.name}", bare)


def require(found: Fit, probes: Probes, where: str, bare: Callable[[], Answers | None]) -> Fit:
    """Refuses whatever is not the adapter at its scale; gives `found` back otherwise.

    Args:
        where: who answered.
        bare: gives the answers of the base alone; asked only where the adapter's are none of it. None: cannot be had.

    Raises:
        HubkitError: ``HK-NOOP``, ``HK-SCALE``, ``HK-PROBE-ROUNDING``, ``HK-PROBE-BASE``, ``HK-PROBE-ADAPTER``; with
            status 3 ``HK-PROBE-WEAK`` where the adapter does too little to be seen.
    """
    at = f"at scale {found.expected:g} within {found.bound:g} nats"
    fix = "serve the folder that hubkit deploy writes"
    have = f"{found.off:.3f} nats from that; nearest scale {_number(found.scale)}, {found.residual:.3f} nats off"
    if found.finding == "applied":
        return found
    if found.finding == "undecided":
        what = "the adapter changes the answers to its probes too little to be seen behind rounding"
        want = f"at least {3 * found.bound:g} nats, three times what rounding may do"
        fix = (
            "--dtype of the server, if it computes finer; or hubkit pack --probes --prompts with texts of its own kind"
        )
        have = f"{found.effect:.3f} nats"
        raise HubkitError("HK-PROBE-WEAK", what, where=where, want=want, have=have, fix=fix, status=UNDECIDED)
    if found.finding == "not applied":
        raise HubkitError(
            "HK-NOOP",
            "the adapter is not applied: the server answers as the base does",
            where=where,
            want=at,
            have=have,
            fix=fix,
        )
    if found.finding == "another scale":
        times = found.scale / found.expected if found.expected else found.scale
        what = f"the adapter is applied at scale {_number(found.scale)}, {_number(times)} times what it should be"
        raise HubkitError(
            "HK-SCALE",
            what,
            where=where,
            want=at,
            have=f"{_number(found.scale)}, residual {found.residual:.3f} nats",
            fix=fix,
        )
    if found.finding == "rounded":
        what = "the adapter is applied, but the answers are further off than rounding allows"
        raise HubkitError(
            "HK-PROBE-ROUNDING",
            what,
            where=where,
            want=at,
            have=have,
            fix="--dtype f16, bf16 or q8_0, as the server computes; or the base is another quantization",
        )
    base = bare()
    off = None if base is None else distance(probes, base, 0.0)
    if off is not None and off > max(found.bound, found.effect / 4):
        have = f"the bare base is {off:.3f} nats from the one that the adapter was made on"
        raise HubkitError("HK-PROBE-BASE", "the server's base is not the adapter's", where=where, have=have, fix=fix)
    said = have if off is None else f"{have}; the bare base is right, {off:.3f} nats off"
    what = "the server answers as another adapter" + (", or on another base" if off is None else "")
    raise HubkitError("HK-PROBE-ADAPTER", what, where=where, want=at, have=said, fix=fix)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
