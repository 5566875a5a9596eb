"""How uvicorn's connections tell that they wait for a request; read in 0.30 to 0.54.

uvicorn waits for ever for the head of a request that was begun, and for a client that takes nothing of its answer: each
such connection stays open, until no further one can be. It has no setting for that, only ``timeout_keep_alive``, which
ends with the first byte.
"""

from __future__ import annotations

import asyncio
from typing import Any


def impatient(seconds: float, stalled: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP/1.1, made to close a connection that does not end a request's head in time.

    A connection can also be told to end whatever it is at, by `cut`.

    ``H11Protocol.cycle`` is the request that is being answered, None before the first, and its ``response_complete``
    says that the answer was sent: there are no public names for that. The class itself is what
    ``uvicorn.Config(http=...)`` takes.

    Args:
        seconds: from the connection, or from the first byte behind an answer, to the end of the head.
        stalled: seconds in which a client takes nothing, or next to it, of what waits for it.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._calm()
            self._unstall()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(stalled, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unstall()

        def cut(self) -> None:
            """End it now; who answers learns that the client is gone."""
            self.transport.abort()

        def _unstall(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
            self._stalled = None

        def _look(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._calm()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self.transport.close)

        def _calm(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = None

    return Impatient
