"""Numbers for Prometheus, text format 0.0.4: what was asked and answered, what is stored, how full the quotas are.

Labels are routes, methods, statuses and names of namespaces that have a quota; no repository is named.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

MEDIA = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Seconds up to which a request counts into each bucket of the histogram."""
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
Sample = tuple[Mapping[str, str], float]


@dataclass
class Times:
    """How long the requests of one route took."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0


class Numbers:
    """Counts requests; a thread may read while another counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str, int], int] = {}
        self._times: dict[str, Times] = {}
        self._received = self._sent = 0

    def count(self, route: str, method: str, status: int, seconds: float, received: int, sent: int) -> None:
        """One request that was answered: its route, and bytes of both bodies."""
        key = route, method if method in METHODS else "other", status
        with self._lock:
            self._requests[key] = self._requests.get(key, 0) + 1
            times = self._times.setdefault(route, Times())
            times.buckets[bisect_left(BOUNDS, seconds)] += 1
            times.total += seconds
            self._received += received
            self._sent += sent

    def render(self) -> Iterator[str]:
        """The lines about requests."""
        with self._lock:
            requests = dict(self._requests)
            times = {route: Times(list(one.buckets), one.total) for route, one in self._times.items()}
            received, sent = self._received, self._sent
        rows = [({"route": r, "method": m, "status": str(s)}, float(n)) for (r, m, s), n in sorted(requests.items())]
        yield from family("hubkit_requests_total", "counter", "Requests that were answered.", rows)
        yield from head("hubkit_request_seconds", "histogram", "From a request's head to the end of its answer.")
        for route, one in sorted(times.items()):
            reached = 0
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), one.buckets, strict=True):
                reached += count
                yield sample("hubkit_request_seconds_bucket", {"route": route, "le": bound}, reached)
            yield sample("hubkit_request_seconds_sum", {"route": route}, one.total)
            yield sample("hubkit_request_seconds_count", {"route": route}, reached)
        yield from family("hubkit_received_bytes_total", "counter", "Bytes of requests' bodies.", [({}, received)])
        yield from family("hubkit_sent_bytes_total", "counter", "Bytes of answers' bodies.", [({}, sent)])


def family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """One metric: its two comments, then its samples."""
    yield from head(name, kind, text)
    for labels, value in samples:
        yield sample(name, labels, value)


def head(name: str, kind: str, text: str) -> Iterator[str]:
    """The comments before a metric."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line; whole numbers without a point."""
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    shown = str(int(value)) if float(value).is_integer() else repr(float(value))
    return f"{name}{{{inside}}} {shown}" if inside else f"{name} {shown}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
