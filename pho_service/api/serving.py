"""
`pho serve`: the database, the front end and local workers, started and stopped together.
"""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from types import FrameType

import uvicorn
from sqlalchemy.engine import make_url

from pho_service.api.app import create_app
from pho_service.api.guard import is_local
from pho_service.errors import InvalidInput
from pho_service.host.machine import install_command
from pho_service.host.settings import Settings
from storage.claims import worker_name
from storage.database import Database
from storage.embedded import embedded_postgresql, reading_url, running_url
from storage.jobs import JobStore
from storage.keys import KeyStore
from storage.studies import StorageError

logger = logging.getLogger(__name__)

_QUICK_S = 10.0  # a worker that dies sooner is started again more slowly
_SLOWEST_S = 30.0
_SOON_S = 3.0  # in which a worker stops, but for one that loads a model or has no database
_ANSWERS_S = 2.0
_THREADS_S = 0.5
_CONNECTIONS = 1000  # at once; beyond, uvicorn answers 503


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then stop everything in order."""
    if settings.workers and find_spec("torch") is None:
        raise InvalidInput(
            f"local workers need torch: {install_command('worker')}, or serve without them, with "
            "--workers 0."
        )
    with (
        _leaving_nobody_waiting(),
        _closing_on_sigterm(),
        _listening(settings) as listener,
        database_url(settings) as url,
        closing(Database(url)) as database,
    ):
        database.migrate()
        keys_needed = not is_local(settings.host)
        if keys_needed and not KeyStore(database).let_in():
            raise InvalidInput(
                f"--host {settings.host} lets other machines in, and no key opens anything: there "
                "is none, or all were revoked, have expired or read the metrics alone. Make one "
                "with `pho keys create NAME`, or serve on 127.0.0.1."
            )
        if settings.database_url is None:
            database.let_read()
        app = create_app(database, settings, keys_needed=keys_needed)
        config = uvicorn.Config(
            app,
            http="h11",
            limit_concurrency=_CONNECTIONS,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=[*settings.trusted_proxies],
            timeout_graceful_shutdown=5,
            lifespan="on",
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        with _Workers(settings, url) as workers:
            say(f"Jobs       {address}/   (a page with all of them, and a form for new ones)")
            say(f"API        {address}/v1/jobs   (described at {address}/docs)")
            say(f"Dashboard  {address}/dashboard")
            say(f"Database   {_without_password(url)}   (for `pho worker --database-url`)")
            studies = shlex.quote(_studies_url(settings, database))
            say(f"Studies    {studies}   (for `optuna --storage` and `optuna-dashboard`)")
            say(f"Local workers: {settings.workers}. Ctrl-C stops everything; jobs go on later.")
            try:
                _Server(config, workers.stop).run(sockets=[listener])
            except KeyboardInterrupt:
                say("stopping")


class _Server(uvicorn.Server):
    """uvicorn's, which tells the workers to stop when it is told, and not when it has ended."""

    def __init__(self, config: uvicorn.Config, stop_workers: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop_workers = stop_workers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, on a signal."""
        self._stop_workers()
        super().handle_exit(sig, frame)


@contextmanager
def _leaving_nobody_waiting() -> Iterator[None]:
    """After the block the process ends, also if a request waits for a database that is frozen."""
    try:
        yield
    except SystemExit:
        _end_if_somebody_waits()
        raise
    _end_if_somebody_waits()


def _end_if_somebody_waits() -> None:
    """Python itself would wait for threads, and those for the database, without an end."""
    main = threading.main_thread()
    waiting = [t for t in threading.enumerate() if t is not main and not t.daemon]
    deadline = time.monotonic() + _THREADS_S
    for thread in waiting:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in waiting):
        logger.warning("requests that still wait, or are worked on, are given up")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def _closing_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that what is open is closed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def database_url(settings: Settings) -> Iterator[str]:
    """The URL of the database that is set, or of the embedded one, started if it does not run."""
    if settings.database_url is not None:
        with nullcontext():
            yield settings.database_url.get_secret_value()
        return
    with embedded_postgresql(settings.data_dir) as url:
        yield url


@contextmanager
def any_database_url(settings: Settings) -> Iterator[str]:
    running = None if settings.database_url else running_url(settings.data_dir)
    with nullcontext(running) if running else database_url(settings) as url:
        yield url


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The migrated database of a service, whether one runs on it or not."""
    with any_database_url(settings) as url:
        database = Database(url)
        try:
            database.migrate()
            yield database
        finally:
            database.close()


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}. "
            "Give another --port, or stop what uses this one."
        ) from error
    with listener:
        # Connections inherit it. Without, the second answer on one waits 40 ms for the client's
        # system to confirm the first; asyncio sees to it only for sockets with a protocol number.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


class _Workers:
    """Local worker processes; one that dies is started again, but not one that was told to end."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._url = url
        self._environment = {**os.environ, "PHO_DATABASE_URL": url}
        # Several workers that all use every core slow each other down many times.
        threads = max(1, (os.cpu_count() or 1) // max(1, settings.workers))
        self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        if settings.artifacts is None:
            folder = settings.data_dir.expanduser().resolve() / "artifacts"
            self._environment["PHO_ARTIFACTS"] = str(folder)
        self._stopping = threading.Event()
        self._watchers: list[threading.Thread] = []

    def __enter__(self) -> "_Workers":
        for _ in range(self._settings.workers):
            watcher = threading.Thread(target=self._watch, daemon=True)
            watcher.start()
            self._watchers.append(watcher)
        return self

    def stop(self) -> None:
        """Tell all to stop; the end of the block waits for them."""
        self._stopping.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        for watcher in self._watchers:
            watcher.join()

    def _watch(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            began = time.monotonic()
            process = self._start()
            while process.poll() is None and not self._stopping.wait(0.2):
                pass
            if self._stopping.is_set():
                self._stop(process)
                return
            if process.returncode == 0:
                logger.info("worker %d was drained, and no other starts", process.pid)
                return
            quick = time.monotonic() - began < _QUICK_S
            wait_s = min(_SLOWEST_S, max(1.0, 2 * wait_s)) if quick else 0.0
            logger.warning(
                "worker %d ended with code %d; another starts", process.pid, process.returncode
            )
            self._forget(process.pid)

    def _forget(self, process: int) -> None:
        """Take a worker that was killed off the list; without a database, its entry gets stale."""
        with closing(Database(self._url, pool=1)) as database, suppress(StorageError):
            JobStore(database).forget_worker(worker_name(process))

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P: no module comes from the folder where this was started, which may be a root of models.
        return subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", "-m", "workers", "--parent", str(os.getpid())],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we tell them
        )

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        process.terminate()
        soon_s = min(_SOON_S, self._settings.stop_after_s)
        for wait_s in (soon_s, self._settings.stop_after_s - soon_s):
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
                return
            if not _answers(self._url):  # what it has in hand cannot be handed back anyway
                break
        logger.warning("worker %d does not stop; its stage will come again", process.pid)
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    """Whether a database does, within moments."""
    answered = threading.Event()

    def ask() -> None:
        with closing(Database(url, pool=1)) as database, suppress(StorageError):
            database.check()
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(_ANSWERS_S)


def _studies_url(settings: Settings, database: Database) -> str:
    """Where programs of Optuna's find the studies: of our own server, for reading alone."""
    embedded = reading_url(settings.data_dir) if settings.database_url is None else None
    return embedded or database.shown_studies_url


def _without_password(url: str) -> str:
    parsed = make_url(url)
    if not parsed.password and "password" not in parsed.query:
        return url
    return parsed.difference_update_query(["password"]).render_as_string()
