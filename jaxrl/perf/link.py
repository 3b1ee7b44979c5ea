"""JSON lines over TCP, between the processes of a bench on several hosts."""

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from jaxrl.options import ConfigError
from jaxrl.parallel.distributed import ADDRESS, Processes

MAX_LINE = 1 << 20
CLOSE_S = 5.0  # for the other side to close its end


class Link:
    """JSON lines over a socket, in both directions."""

    def __init__(self, sock: socket.socket):
        self.sock, self.buffer, self.closed = sock, b"", False
        sock.setblocking(True)
        # A host that loses power or network says no goodbye: ask, and give up within a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("KEEPIDLE", 20), ("KEEPINTVL", 10), ("KEEPCNT", 3)):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50_000)

    def send(self, **message) -> None:
        try:
            line = json.dumps(message, default=dataclasses.asdict).encode()
            self.sock.sendall(line + b"\n")
        except OSError:
            self.closed = True

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has come in since the last call; sets `closed` at its end or if it is no JSON."""
        while not self.closed and len(self.buffer) < MAX_LINE:
            try:
                data = self.sock.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.closed = not data
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.closed = True
                return
            yield message
        if len(self.buffer) >= MAX_LINE:
            self.closed = True

    def close(self) -> None:
        """Close, once the other side has read what was sent (unread data would take it along)."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(CLOSE_S)
            while self.sock.recv(1 << 16):
                pass
        self.sock.close()


def connect(processes: Processes, timeout_s: float) -> Link:
    """A link to process 0, which may start later than this one, or be unknown to DNS until then.

    Raises ConfigError if it does not answer within `timeout_s`.
    """
    deadline, pause = time.monotonic() + timeout_s, 0.1
    while True:
        try:
            return Link(socket.create_connection(processes.address, timeout=10))
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise ConfigError(
                    f"{ADDRESS} {processes.coordinator}: process 0 did not answer within "
                    f"config.join_timeout_s = {timeout_s:g} s ({error.strerror or error}); start "
                    "the same command there, and let this host reach that port"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
