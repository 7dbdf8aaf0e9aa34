"""
A service whose parts are killed, frozen, starved, stopped and started again, as a seed says.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import text

from storage.database import Database
from storage.embedded import running_url
from storage.studies import StorageError

PATIENCE_S = 180.0  # for a part to start or to end, on a busy machine
STALLED_AFTER_S = 5.0
OUT_OF_MEMORY = "worker out of memory"
_LIMITS = hasattr(psutil, "RLIMIT_AS")  # of another process: on Linux alone
PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]

Disturb = Callable[[random.Random], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    What the service takes at a moment.

    Attributes:
        at_s: Seconds since the first.
        api_bytes: Resident memory of the API's process; None while there is none.
        connections: To the database, of all processes; None while it is away.
    """

    at_s: float
    api_bytes: int | None
    connections: int | None


@dataclass(kw_only=True)
class Service:
    """
    `pho serve` with its own PostgreSQL and workers, and more workers that are not its children.

    Attributes:
        folder: For the data; models and texts of jobs lie below it. Logs are ``*.log``.
        workers: Local ones, that the service starts again when they die.
        outside: `pho worker` processes, that are started again here.
        url: Of the API, the same after a restart.
        seen: Every process that there ever was.
    """

    folder: Path
    workers: int
    outside: int
    url: str = ""
    seen: set[psutil.Process] = field(default_factory=set)
    _api: subprocess.Popen[str] | None = None
    _crew: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _port: int = 0
    _known_url: str = ""

    def __enter__(self) -> "Service":
        self.start_api()
        for number in range(self.outside):
            self._crew.append(self.start_worker(number))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all_workers():
            with suppress(psutil.Error):
                process.resume()
        for worker in self._crew:
            _end(worker, signal.SIGTERM)
        self.end_api(signal.SIGTERM)

    @property
    def data(self) -> Path:
        """The data folder of the service."""
        return self.folder / "data"

    @property
    def database_url(self) -> str:
        """Of the embedded PostgreSQL, whether it answers or not."""
        return running_url(self.data) or self._known_url

    def start_api(self) -> None:
        """Start `pho serve`, and wait until it has said where it listens."""
        command = [*PHO, "serve", "--port", str(self._port), "--workers", str(self.workers)]
        with (self.folder / "serve.log").open("a") as log:
            self._api = subprocess.Popen(
                command, env=self._environment(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._api.stdout is not None
        found = re.search(r"http://\S+?:(\d+)", self._api.stdout.readline())
        if not found:
            self.end_api(signal.SIGTERM)
            raise SystemExit(f"the service does not start; see {self.folder / 'serve.log'}")
        self.url, self._port = found[0], int(found[1])
        self._known_url = running_url(self.data) or ""
        self.look()

    def end_api(self, number: int) -> None:
        """Send `pho serve` a signal that ends it, and wait until it has ended."""
        assert self._api is not None
        with self._api:
            _end(self._api, number)

    def look(self) -> None:
        """Start workers that have ended again, and note which processes there are."""
        for number, worker in enumerate(self._crew):
            if worker.poll() is not None:
                self._crew[number] = self.start_worker(number)
        with suppress(psutil.Error):
            assert self._api is not None
            api = psutil.Process(self._api.pid)
            self.seen |= {api, *api.children(recursive=True)}
        for worker in self._crew:
            with suppress(psutil.Error):
                self.seen.add(psutil.Process(worker.pid))

    def all_workers(self) -> list[psutil.Process]:
        """The worker processes that are there, orphans of a killed service among them."""
        self.look()
        return sorted((p for p in self.seen if _is_worker(p)), key=lambda p: p.pid)

    def all_processes(self) -> list[psutil.Process]:
        """All processes of the service that are there, the database's too."""
        self.look()
        server = self.postmaster()
        return [p for p in {*self.seen, *([server] if server else [])} if _lives(p)]

    def postmaster(self) -> psutil.Process | None:
        """The embedded PostgreSQL; None if it does not run."""
        try:
            number = (self.data / "postgresql" / "postmaster.pid").read_text().split()[0]
            return psutil.Process(int(number))
        except (OSError, IndexError, ValueError, psutil.Error):
            return None

    def kill_worker(self, chance: random.Random) -> None:
        """kill -9 of any worker."""
        chance.choice(self.all_workers()).kill()

    def stop_worker(self, chance: random.Random) -> None:
        """SIGTERM to any worker: it hands its stage back."""
        chance.choice(self.all_workers()).terminate()

    def kill_api(self, _chance: random.Random) -> None:
        """kill -9 of `pho serve`, and another one on the same data, beside the orphans."""
        self.end_api(signal.SIGKILL)
        self.start_api()

    def stop_api(self, _chance: random.Random) -> None:
        """SIGTERM to `pho serve`, which stops the database too, and another one."""
        self.end_api(signal.SIGTERM)
        self.start_api()

    def crash_database(self, _chance: random.Random) -> None:
        """kill -9 of one of PostgreSQL's processes: it drops all connections and recovers."""
        server = self.postmaster()
        if server is not None:
            chosen = [p for p in server.children() if "postgres" in " ".join(p.cmdline())]
            for process in chosen[:1]:
                process.kill()

    def restart_database(self, _chance: random.Random) -> None:
        """Immediate shutdown, which is a crash of everything; `pho serve` starts it again."""
        server = self.postmaster()
        if server is not None:
            server.send_signal(signal.SIGQUIT)

    def kill_database(self, _chance: random.Random) -> None:
        """kill -9 of PostgreSQL's first process; `pho serve` starts it again, unasked."""
        server = self.postmaster()
        if server is None:
            return
        server.kill()
        began = time.monotonic()
        while (now := self.postmaster()) is None or now == server or not _lives(now):
            if time.monotonic() - began > PATIENCE_S:
                raise SystemExit(f"PostgreSQL was killed, and was not back in {PATIENCE_S:g} s")
            time.sleep(0.1)

    def sample(self, at_s: float) -> Sample:
        """What is taken now."""
        resident = connections = None
        with suppress(psutil.Error):
            assert self._api is not None
            resident = psutil.Process(self._api.pid).memory_info().rss
        database = Database(self.database_url, pool=1)
        with suppress(StorageError), database.transaction() as connection:
            count = text("SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'client%'")
            connections = int(connection.execute(count).scalar_one())
        database.close()
        return Sample(at_s=at_s, api_bytes=resident, connections=connections)

    def _environment(self) -> dict[str, str]:
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PHO_DATA_DIR": str(self.data),
            "PHO_CACHE_DIR": str(self.folder / "cache"),
            "PHO_MODEL_ROOTS": str(self.folder),
            "PHO_TEXT_ROOTS": str(self.folder),
            "PHO_HEARTBEAT_S": "1",
            "PHO_STALLED_AFTER_S": str(STALLED_AFTER_S),
            "PHO_RETRY_AFTER_S": "0.5",
            "PHO_STOP_AFTER_S": "30",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(temporary),
        }

    def start_worker(self, number: int, *options: str) -> subprocess.Popen[bytes]:
        """Start `pho worker`, with options."""
        environment = {**self._environment(), "PHO_DATABASE_URL": self.database_url}
        with (self.folder / f"worker-{number}.log").open("a") as log:
            command = [*PHO, "worker", *options]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _end(process: "subprocess.Popen[str] | subprocess.Popen[bytes]", number: int) -> None:
    process.send_signal(number)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(PATIENCE_S)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_worker(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return _lives(process) and ("worker" in words or "workers" in words)


class Chaos:
    """
    Does something bad to a service every few seconds, until it is told to stop.

    Args:
        service: That runs.
        seed: Of what is done, and when.
        every_s: Mean time between two of them.
        more: What else to do, by its name, and how often in comparison.
    """

    def __init__(
        self,
        service: Service,
        *,
        seed: int,
        every_s: float,
        more: Mapping[str, tuple[Disturb, int]] | None = None,
    ) -> None:
        self.service = service
        self.done: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.error: BaseException | None = None
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self._every_s = every_s
        self._more = more or {}
        self._passing: list[tuple[float, Callable[[], None]]] = []  # what ends it, and when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Chaos":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it, with every part at work again."""
        self._over.set()
        self._thread.join()
        self._end_passing(all_of_it=True)
        self.service.look()

    def _run(self) -> None:
        service = self.service
        kinds: dict[str, tuple[Disturb, int]] = {
            "worker killed": (service.kill_worker, 10),
            "worker frozen": (self._freeze, 6),
            "worker stopped": (service.stop_worker, 5),
            **({OUT_OF_MEMORY: (self._starve, 5)} if _LIMITS else {}),
            "API killed": (service.kill_api, 2),
            "API stopped": (service.stop_api, 1),
            "database crashed": (service.crash_database, 2),
            "database restarted": (service.restart_database, 2),
            "database killed": (service.kill_database, 2),
            **self._more,
        }
        began = time.monotonic()
        due, sampled = began + self._wait_s(), began
        try:
            while not self._over.wait(0.2):
                now = time.monotonic()
                service.look()
                self._end_passing()
                if now - sampled >= 2:
                    self.samples.append(service.sample(now - began))
                    sampled = now
                if now >= due:
                    weights = [weight for _, weight in kinds.values()]
                    (name,) = self._chance.choices([*kinds], weights)
                    with suppress(psutil.Error, IndexError):  # it ended by itself just now
                        kinds[name][0](self._chance)
                        self.done[name] += 1
                    due = time.monotonic() + self._wait_s()
        except BaseException as error:
            self.error = error
            raise

    def _wait_s(self) -> float:
        return self._chance.expovariate(1 / self._every_s)

    def _freeze(self, chance: random.Random) -> None:
        """SIGSTOP of a worker, for less or for more than it takes to lose its stage."""
        process = chance.choice(self.service.all_workers())
        process.suspend()
        self._passes(chance.uniform(0.2, 2.5) * STALLED_AFTER_S, process.resume)

    def _starve(self, chance: random.Random) -> None:
        """The system gives a worker no more memory for a while: it has what it has."""
        process = chance.choice(self.service.all_workers())
        self._passes(chance.uniform(0.5, 4.0), starve(process))

    def _passes(self, after_s: float, end: Callable[[], None]) -> None:
        self._passing.append((time.monotonic() + after_s, end))

    def _end_passing(self, *, all_of_it: bool = False) -> None:
        now = time.monotonic()
        for when, end in self._passing:
            if all_of_it or when <= now:
                with suppress(psutil.Error):
                    end()
        self._passing = [] if all_of_it else [p for p in self._passing if p[0] > now]


def starve(process: psutil.Process) -> Callable[[], None]:
    """
    Let the system refuse a process every page that it asks for from now on.

    Returns:
        What ends it, also if it was starved twice.
    """
    _, most = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, most))
    return lambda: process.rlimit(psutil.RLIMIT_AS, (most, most))
