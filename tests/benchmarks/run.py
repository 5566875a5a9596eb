"""All benchmarks: ``make bench``. Prints ours, the peer's, the ratio of the same run, and the target of each."""

from __future__ import annotations

import sys
from pathlib import Path

import bench_compose
import bench_family
import bench_lora
import bench_memory
import bench_prefix
import bench_route
import bench_startup

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from get_base import get_base

    base = get_base(ROOT / ".cache" / "SmolLM2-135M-Instruct")
    bench_startup.main()
    bench_lora.main(base, ["step", "loop", "forward", "decode", "attach"])
    bench_family.main(base)
    bench_prefix.main(base, ["step", "loop", "prompt"])
    bench_memory.main(base)
    bench_route.main(base, ["swap", "many", "decode", "prefill", "peft"])
    bench_compose.main(base, list(bench_compose.TARGETS))


if __name__ == "__main__":
    main()
