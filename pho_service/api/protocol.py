"""
How one process of the API speaks HTTP: who may keep how many connections, and for how long.

uvicorn's protocol waits forever for headers that do not come and for clients that do not read,
and answers 503 to everybody once connections are many that do nothing.
"""

import asyncio
from collections import OrderedDict
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from pho_service.api.guard import address_of

HEADERS_S = 30.0  # for a request to come as far as its body, which the API waits for as long
WRITE_S = 30.0  # in which a client must read some of its answer
WRITE_BYTES = 64 * 1024  # that are some
CONNECTIONS = 1000  # at once


class Connections:
    """
    The open connections of a process, those first that have rested for longest.

    Who opens one too many of its own, or of all, makes the one that has rested for longest
    close; only if none rests is the new one refused. So nobody can hold up others with
    connections that do nothing.

    Args:
        most: In all.
        most_per_host: Limit of connections from one IPv4 address or IPv6 network.
    """

    def __init__(self, most: int, most_per_host: int) -> None:
        self.most = most
        self.most_per_host = most_per_host
        self._of: dict[str, OrderedDict[BoundedProtocol, None]] = {}
        self._all: OrderedDict[BoundedProtocol, None] = OrderedDict()

    def enter(self, protocol: "BoundedProtocol", host: str) -> bool:
        """Tell whether a new connection may stay."""
        mine = self._of.setdefault(host, OrderedDict())
        if len(mine) >= self.most_per_host and not self._make_room(mine):
            return False
        if len(self._all) >= self.most and not self._make_room(self._all):
            return False
        self._of.setdefault(host, mine)[protocol] = None  # it may have been emptied just now
        self._all[protocol] = None
        return True

    def rest(self, protocol: "BoundedProtocol", host: str) -> None:
        """Note that a connection rests from now on."""
        if protocol in self._all:
            self._all.move_to_end(protocol)
            self._of[host].move_to_end(protocol)

    def leave(self, protocol: "BoundedProtocol", host: str) -> None:
        """Forget a connection that is closed."""
        self._all.pop(protocol, None)
        mine = self._of.get(host)
        if mine is not None:
            mine.pop(protocol, None)
            if not mine:
                del self._of[host]

    def _make_room(self, among: "OrderedDict[BoundedProtocol, None]") -> bool:
        for protocol in among:
            if protocol.rests:
                self.leave(protocol, protocol.host)
                protocol.transport.abort()
                return True
        return False


class BoundedProtocol(H11Protocol):
    """
    uvicorn's, with bounds on time and number.

    Attributes:
        headers_s: How long it waits for headers.
        write_s: How long a client may take to read :data:`WRITE_BYTES` of an answer.
        connections: Connections of the process.
    """

    headers_s = HEADERS_S
    write_s = WRITE_S
    connections_open: ClassVar[Connections] = Connections(CONNECTIONS, CONNECTIONS)
    host = ""
    _deadline: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _unread = 0

    @property
    def rests(self) -> bool:
        """Whether no request has come, or all were answered and the answers read."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self.host = address_of(self.client[0] if self.client else "")
        if not self.connections_open.enter(self, self.host):
            transport.abort()
            return
        self._deadline = self.loop.call_later(self.headers_s, transport.close)

    def data_received(self, data: bytes) -> None:
        """Stop to wait when the headers are there; begin again with the next request's."""
        super().data_received(data)
        complete = self.cycle is not None and not self.cycle.response_complete
        if self._deadline is not None and complete:
            self._deadline.cancel()
            self._deadline = None
        elif self._deadline is None and not complete:
            self._deadline = self.loop.call_later(self.headers_s, self.transport.close)

    def on_response_complete(self) -> None:
        """Rest, and see to it that the answer is read."""
        self.connections_open.rest(self, self.host)
        super().on_response_complete()
        self._watch_reader()

    def pause_writing(self) -> None:
        """See to it that the client reads what was written."""
        super().pause_writing()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self.connections_open.leave(self, self.host)
        for timer in (self._deadline, self._writing):
            if timer is not None:
                timer.cancel()

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and self._writing is None:
            self._unread = left
            self._writing = self.loop.call_later(self.write_s, self._is_read)

    def _is_read(self) -> None:
        """Give up a client that has read next to nothing since it was looked at last."""
        self._writing = None
        left = self.transport.get_write_buffer_size()
        if left > max(0, self._unread - WRITE_BYTES):
            self.transport.abort()
            return
        self._watch_reader()


def bounded_protocol(most_per_host: int) -> type[BoundedProtocol]:
    """The protocol of one process, whose connections are counted together."""
    connections = Connections(CONNECTIONS, most_per_host)
    return type("ProcessProtocol", (BoundedProtocol,), {"connections_open": connections})
