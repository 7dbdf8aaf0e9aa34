"""
100 clients at once for a minute: `make load`.

Starts a service of its own on this machine, without workers, and lets locust
list, show and submit jobs, and look at its health; stops by itself. Arguments: seconds, clients,
and connections beside them that say nothing, and that do not read what they asked for.

    python benchmarks/load.py 60 100
    python benchmarks/load.py 60 100 1000 60
"""

import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from local_service import service, write_tiny_model
from machine import conditions


def main(seconds: int = 60, clients: int = 100, idle: int = 0, slow: int = 0) -> None:
    """Run locust, which prints the table."""
    print(
        f"{conditions()}; {clients} clients for {seconds} s, on the same machine, beside {idle} "
        f"idle connections and {slow} slow readers"
    )
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        write_tiny_model(folder)
        with service(folder, workers=0, max_unfinished_jobs="1000000") as url:
            port = int(url.rpartition(":")[2])
            people = Path(__file__).with_name("locustfile.py")
            command = [
                sys.executable, "-m", "locust", "-f", str(people), "--headless", "--only-summary",
                "--users", str(clients), "--spawn-rate", str(clients), "--host", url,
                "--run-time", f"{seconds}s", "--stop-timeout", "10",
            ]  # fmt: skip
            with ExitStack() as stack:
                for number in range(idle + slow):
                    _connect(stack, port, asks=number >= idle)
                raise SystemExit(subprocess.run(command, check=False).returncode)


def _connect(stack: ExitStack, port: int, *, asks: bool) -> None:
    """A connection that rests, or asks for megabytes and does not read them."""
    try:
        opened = socket.create_connection(("127.0.0.1", port), timeout=2)
    except OSError:
        return  # refused: that is an answer, too
    stack.enter_context(opened)
    if asks:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = f"GET /docs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        openapi = f"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        opened.sendall((request + openapi * 40).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
