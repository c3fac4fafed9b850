"""TCP connections between the processes of a run (`kvjax.peers`)."""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}  # 20 s in all
RETRY_SECONDS = 0.2
LONGEST_LINE = 1 << 16


class Link:
    """A TCP connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of them, other systems some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Does nothing where the other end is gone: whoever reads finds that out."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> dict[str, Any]:
        """The next message; empty at the end, and for what is no message of ours."""
        try:
            message = json.loads(self._lines.readline(LONGEST_LINE))
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        close(self._connection)


def listen(host: str, port: int) -> socket.socket:
    try:
        if is_loopback(host):
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        both = socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"`coordinator={host}:{port}`: process 0 cannot listen on port {port} ({_reason(error)}); choose "
            "another port, the same for all processes."
        ) from None


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Tries again until process 0 is there: processes start in any order."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise OSError(
                    f"`coordinator={host}:{port}` was not to be reached within {seconds:.0f} s "
                    f"({_reason(error)}); start process 0 there, on a port that no firewall closes."
                ) from None
        time.sleep(RETRY_SECONDS)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def close(connection: socket.socket) -> None:
    """Also where another thread waits for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
