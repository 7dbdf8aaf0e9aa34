"""
Hostile requests, files and faults against a service of its own: `make attack`.

Starts a service on this machine and on no other address, tries one attack after the other, each
bounded in count and time, and looks at /healthz all the while. It prints what was tried, what
held, and the slowest health check of each, and fails if anything did not hold.

    python benchmarks/attack.py
    python benchmarks/attack.py --only "big folder" --only "parquet that grows"
"""

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx
from attack_bounds import BOUNDS, TURN_S, WITH_KEYS
from attack_faults import FAULTS
from attack_files import FILES
from attack_goals import GOALS, GOALS_WITH_KEYS
from attack_recovery import RECOVERIES, RECOVERIES_WITH_KEYS
from attack_requests import REQUESTS
from attack_target import Attack, Target
from chaos import Service
from local_service import write_tiny_model
from machine import conditions, software
from rich import box
from rich.console import Console
from rich.table import Table

ALL = (
    *REQUESTS, *FILES, *BOUNDS, *FAULTS, *RECOVERIES, *GOALS,
    *WITH_KEYS, *RECOVERIES_WITH_KEYS, *GOALS_WITH_KEYS,
)  # fmt: skip
CALM_S = 3.0  # without an attack, before each: how quick health checks are on a busy machine
SLOWER_S, TIMES = 1.0, 3  # that a health check may take more, and of what it took before
LONGEST_S = 3600


@dataclass(kw_only=True)
class Health:
    """
    Asks for /healthz ten times a second, on a new connection each time.

    Attributes:
        slowest_s: Of the answers since :meth:`begin`.
        unanswered: How many got none within ten seconds, or another than 200.
    """

    url: str
    slowest_s: float = 0.0
    unanswered: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Forget what was seen so far."""
        with self._lock:
            self.slowest_s, self.unanswered = 0.0, 0

    def watch(self) -> None:
        """Ask until it is over."""
        while not self._over.wait(0.1):
            started = time.monotonic()
            try:
                well = httpx.get(f"{self.url}/healthz", timeout=10).status_code == 200
            except httpx.HTTPError:
                well = False
            with self._lock:
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                self.unanswered += not well

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, it is asked for."""
        thread = threading.Thread(target=self.watch)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


@click.command()
@click.option("--only", multiple=True, help="Names of attacks; all by default.")
@click.option("--seed", default=0, show_default=True)
def main(only: tuple[str, ...], seed: int) -> None:
    """Attack a service of its own, and print the table."""
    attacks = [a for a in ALL if not only or a.name in only]
    unknown = {*only} - {a.name for a in attacks}
    if unknown:
        known = ", ".join(a.name for a in ALL)
        raise click.UsageError(f"{sorted(unknown)[0]!r} is not an attack. There are: {known}.")
    print(f"{conditions()}; {software('fastapi', 'uvicorn', 'torch')}; seed {seed}", flush=True)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_S)
    table = Table(box=box.MARKDOWN)
    for title in ("attack", "what was tried", "held", "slowest health check, s", "before it"):
        table.add_column(title)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="pho-attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # the database may run as another user
        spec = write_tiny_model(folder)
        silent = socket.create_server(("127.0.0.1", 0), backlog=500)  # a hub that never answers
        os.environ.setdefault("PHO_MAX_WRONG_KEYS_PER_MINUTE", "60")
        os.environ |= {
            "PHO_TURN_S": f"{TURN_S:g}", "PHO_NOTIFY_HOSTS": "127.0.0.1",
            "PHO_NOTIFY_SECRET": "of the attacks alone", "PHO_NOTIFY_PRIVATE": "true",
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }  # fmt: skip
        with Service(folder=folder, workers=1, outside=0) as service:
            target = Target(service=service, folder=folder, spec=spec, seed=seed)
            health = Health(url=service.url)
            with health.watching():
                for attack in attacks:
                    print(f"{attack.name} ...", flush=True)
                    health.begin()
                    time.sleep(CALM_S)
                    calm_s = health.slowest_s
                    health.begin()
                    wrong = _tried(attack, target)
                    slow = health.slowest_s > SLOWER_S + TIMES * calm_s and attack.health
                    gone = health.unanswered > 0 and attack.health
                    words = wrong or ("health checks were slow" if slow or gone else "")
                    failed += bool(words)
                    table.add_row(
                        attack.name, attack.about, "yes" if not words else f"NO: {words}",
                        f"{health.slowest_s:.2f}" + ("" if attack.health else " (not counted)"),
                        f"{calm_s:.2f}",
                    )  # fmt: skip
    console = Console()
    console.width = max(console.width, 200)
    console.print(table)
    print("not tried, as they are the reverse proxy's: slow headers, bodies, readers, idle clients")
    print(f"{len(attacks) - failed} of {len(attacks)} attacks held")
    raise SystemExit(1 if failed else 0)


def _tried(attack: Attack, target: Target) -> str:
    """What did not hold; empty if all did."""
    try:
        return attack.run(target) or ""
    except Exception as error:  # an attack that cannot be made is told as one that did not hold
        return f"{type(error).__name__}: {str(error)[:300]}"


def _too_long(*_: object) -> None:
    raise SystemExit(f"the attacks did not end by themselves after {LONGEST_S} s")


if __name__ == "__main__":
    main()
