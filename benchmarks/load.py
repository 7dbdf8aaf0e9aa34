"""
100 clients at once for a minute: `make load`.

Starts a service of its own on this machine, without workers, and lets locust
list, show and submit jobs, and look at its health; stops by itself. Arguments: seconds, clients.

    python benchmarks/load.py 60 100
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from local_service import service, write_tiny_model
from machine import conditions


def main(seconds: int = 60, clients: int = 100) -> None:
    """Run locust, which prints the table."""
    print(f"{conditions()}; {clients} clients for {seconds} s, on the same machine")
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        write_tiny_model(folder)
        with service(folder, workers=0, max_unfinished_jobs="1000000") as url:
            people = Path(__file__).with_name("locustfile.py")
            command = [
                sys.executable, "-m", "locust", "-f", str(people), "--headless", "--only-summary",
                "--users", str(clients), "--spawn-rate", str(clients), "--host", url,
                "--run-time", f"{seconds}s", "--stop-timeout", "10",
            ]  # fmt: skip
            raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
