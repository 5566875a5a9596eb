"""Engine ``kubernetes``: what the engine ``vllm`` gets, and a manifest of KServe that names it where it was put.

Read in the source of KServe (``LLMInferenceService``, ``serving.kserve.io/v1alpha2``); there is no cluster here, so
nothing of this was run, and deployments say so.

| | |
|---|---|
| accepts | what vLLM accepts, from ``pvc://``, ``s3://`` or ``hf://`` |
| refuses | ``oci://``; two adapters of one name, or of the base's |
| silently wrong | nothing pins what it loads: other files under the same address are served under the same name |

So every address has the digest in its path, and the annotations repeat it in full. The folder of the deployment is put
at ``STORAGE/sha256-DIGEST12``, which the manifest names; ``hubkit deploy --check`` proves it there, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.documents.schema import canonical, sha256
from hubkit.engines.beside import COUNT, Kind, flags, write_beside, wrong_settings
from hubkit.engines.plan import Plan
from hubkit.engines.served import Served
from hubkit.engines.vllm import ENGINE as VLLM
from hubkit.engines.vllm import FLAGS, adapter_files, allowed_rank
from hubkit.engines.vllm import KINDS as SERVER

MANIFEST = "llminferenceservice.yaml"
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?")
_PLACE = re.compile(r"(pvc|s3|hf)://[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
LABEL = Kind(
    "a name of Kubernetes, a-z 0-9 -", lambda value: isinstance(value, str) and _LABEL.fullmatch(value) is not None
)
PLACE = Kind(
    "pvc://CLAIM/PATH, s3://BUCKET/PATH or hf://ORG/NAME",
    lambda value: isinstance(value, str) and _PLACE.fullmatch(value) is not None,
)
KINDS: Mapping[str, Kind] = {
    **SERVER, "storage": PLACE, "service": LABEL, "namespace": LABEL, "replicas": COUNT, "gpus": COUNT,
}  # fmt: skip
ARGUMENTS = {key: FLAGS[key] for key in FLAGS if key not in ("host", "port", "tensor_parallel_size")}
"""Settings of the server that the manifest's own fields do not say."""


class KubernetesEngine:
    """A manifest beside the files that it names."""

    name = "kubernetes"
    summary = "a KServe manifest with every digest, beside the files that it names"
    version = "v1alpha2"
    proven = False
    keys = VLLM.keys | KINDS.keys()

    def refusals(self, plan: Plan) -> list[str]:
        reasons = wrong_settings(self.name, plan.settings, KINDS)
        if "storage" not in plan.settings:
            reasons.append(f"targets.{self.name}.storage: want {PLACE.want}: where the folder will lie")
        return reasons or VLLM.refusals(plan)

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        import yaml

        found = write_beside(plan, out, adapter_files)
        text: str = yaml.safe_dump(_manifest(plan, found), sort_keys=False)
        (out / MANIFEST).write_bytes(text.encode())
        return ("kubectl", "apply", "-f", MANIFEST)


def _manifest(plan: Plan, found: tuple[Served, ...]) -> dict[str, Any]:
    settings, base = plan.settings, plan.base_digest
    digest = sha256(canonical({"base": base, "adapters": [one.digest for one in found]}))
    root = f"{settings['storage']}/sha256-{digest.removeprefix('sha256:')[:12]}"
    rank = settings.get("max_lora_rank") or allowed_rank(max((one.lowered.rank for one in found), default=1))
    most = settings.get("max_loras", max(1, min(len(found), 8)))
    lora = {
        "maxRank": rank,
        "maxAdapters": most,
        "maxCpuAdapters": settings.get("max_cpu_loras", max(most, len(found))),
        "adapters": [{"name": one.key, "uri": f"{root}/adapters/{one.folder}"} for one in found],
    }
    annotations = {
        "hubkit/deployment": digest,
        "hubkit/base": base,
        **{f"hubkit/adapter.{number}": f"{one.name} {one.digest}" for number, one in enumerate(found)},
    }
    container: dict[str, Any] = {"name": "main"}
    if "image" in settings:
        container["image"] = settings["image"]
    if arguments := flags(settings, ARGUMENTS):
        container["env"] = [{"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(arguments)}]
    if "gpus" in settings:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(settings["gpus"])}}
    spec: dict[str, Any] = {
        "model": {"uri": f"{root}/base", "name": "base", **({"lora": lora} if found else {})},
        "replicas": settings.get("replicas", 1),
    }
    if "tensor_parallel_size" in settings:
        spec["parallelism"] = {"tensor": settings["tensor_parallel_size"]}
    if len(container) > 1:
        spec["template"] = {"containers": [container]}
    name = settings.get("service", "hubkit-" + digest.removeprefix("sha256:")[:12])
    where = {"namespace": settings["namespace"]} if "namespace" in settings else {}
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": name, **where, "annotations": annotations},
        "spec": spec,
    }


ENGINE = KubernetesEngine()
