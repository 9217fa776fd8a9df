"""Connections that end when their client dawdles: uvicorn alone waits for ever for a request."""

from asyncio import TimerHandle, Transport
from typing import Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

# Both chosen, unmeasured.
_MOST_CONNECTIONS = 256  # above it, a request is answered with 503
_SECONDS_TO_END = 3  # for the answers that are under way at Ctrl-C


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server of an app: nothing of it is logged but its own failures."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="error",  # a warning is about what others send: they could fill the terminal
        access_log=False,  # paths hold the token once
        server_header=False,
        proxy_headers=False,  # nobody sits in front whose headers could be trusted
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    return uvicorn.Server(config)


class Connection(H11Protocol):
    """A connection whose client must ask in time, and take the answer in time; else it is dropped.

    Of the connections whose request is not whole yet only so many are kept: one more drops the
    oldest of them, so that whoever opens them without end keeps nobody out.
    """

    REQUEST_SECONDS: ClassVar[float] = 10.0
    ANSWER_SECONDS: ClassVar[float] = 120.0  # a very long history takes a minute to be read
    MOST_WITHOUT_REQUEST: ClassVar[int] = 64

    _without_request: ClassVar[dict["Connection", None]] = {}  # the oldest first

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: TimerHandle | None = None
        self._is_asking = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        super().data_received(data)
        self._allow_answer()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may have come already."""
        self._await_request()
        super().on_response_complete()
        self._allow_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._without_request.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()

    def _await_request(self) -> None:
        self._is_asking = True
        self._without_request.pop(self, None)
        if self.transport.get_write_buffer_size():  # of the answer before, on a slow line
            self._drop_after(self.ANSWER_SECONDS)
            return
        self._drop_after(self.REQUEST_SECONDS)
        self._without_request[self] = None
        if len(self._without_request) > self.MOST_WITHOUT_REQUEST:
            next(iter(self._without_request))._drop()

    def _allow_answer(self) -> None:
        """Give the answer its own time, once the request is whole."""
        if self._is_asking and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._is_asking = False
            self._without_request.pop(self, None)
            self._drop_after(self.ANSWER_SECONDS)

    def _drop_after(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._drop)

    def _drop(self) -> None:
        self._without_request.pop(self, None)
        self.transport.abort()
