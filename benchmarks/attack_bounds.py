"""
What one request, one receiver, one file or one key could use up for all others.
"""

import hashlib
import json
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import zstandard
from attack_files import _refused
from attack_target import Attack, Target
from hostile_dump import program, write_hostile_dump
from local_service import write_text

from pho_service.client import Client
from pho_service.errors import PhoError
from pho_service.models.packed import pack
from pho_service.spec.fields import JobLimits
from pho_service.spec.job import JobSpec
from storage.backup import restore
from storage.database import Database
from storage.embedded import embedded_postgresql
from storage.keys import MOST_LOGINS, KeyStore, Quota
from storage.studies import StorageError

PLANNED_S = 60.0  # for eight plans at once, of which two are made at a time
PAGES_S = 5.0  # for pages that plan what was read before
SENT_S = 45.0  # for a webhook beside one that drips: a request's 10 s, and a look at the queue
LISTED_S = 10.0  # for the list of jobs beside a hundred submissions, on a busy machine
TURN_S = 5.0  # of the service that is attacked


class _Handler(BaseHTTPRequestHandler):
    """Answers as a test says, and logs nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def _serving(handler: type[_Handler]) -> Iterator[str]:
    """A server on this machine, and its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _deep_plans(target: Target) -> str | None:
    """Eight plans at once of a model of 30,000 blocks, and of one that says 10^8."""
    blocks: dict[str, tuple[int, dict[str, int]]] = {
        "deep-plan": (30_000, {}), "lying-plan": (2, {"num_hidden_layers": 10**8}),
    }  # fmt: skip
    for name, (count, said) in blocks.items():
        _write_headers(target.folder / name, [_names(range(count))], **said)

    def ask(name: str) -> httpx.Response:
        spec = {**target.spec, "model": name}
        return httpx.post(f"{target.url}/v1/plan", json=spec, timeout=2 * PLANNED_S)

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(ask, ["deep-plan"] * 8)]
    took, lying = time.monotonic() - started, ask("lying-plan")
    codes = {answer.status_code for answer in answers}
    if codes != {422} or "layers" not in answers[0].text:
        return f"answers {codes}: {answers[0].text[:200]}"
    if lying.status_code != 422 or "num_hidden_layers" not in lying.text:
        return f"one that says 10^8: {lying.status_code} {lying.text[:200]}"
    return f"eight plans took {took:.0f} s" if took > PLANNED_S else None


def _write_headers(folder: Path, shards: Sequence[Sequence[str]], **config: int) -> None:
    """A model of these tensors, of which there are the headers alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    entry = {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]}
    index = {}
    for number, names in enumerate(shards):
        file = f"{number}.safetensors" if len(shards) > 1 else "model.safetensors"
        index |= dict.fromkeys(names, file)
        header = json.dumps(dict.fromkeys(names, entry)).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8192))
    if len(shards) > 1:
        place = folder / "model.safetensors.index.json"
        place.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _names(blocks: Iterable[int], experts: int = 0) -> list[str]:
    places = [f"experts.{number}." for number in range(experts)] or [""]
    return [f"model.layers.{i}.mlp.{where}up_proj.weight" for i in blocks for where in places]


def _large_pages(target: Target) -> str | None:
    """A quarter of a million tensors, and the form of a job with them twelve times at once."""
    shards = [_names(range(first, first + 5), 9_999) for first in range(0, 25, 5)]
    _write_headers(target.folder / "large-pages", shards)
    path, started = f"/new?job={target.job(model='large-pages')}", time.monotonic()
    answers = [target.get(path)]
    alone = time.monotonic() - started
    with ThreadPoolExecutor(12) as pool:
        answers += pool.map(target.get, [path] * 12)
    took, codes = time.monotonic() - started - alone, {answer.status_code for answer in answers}
    if codes != {200} or "Stages of the plan" not in answers[0].text:
        return f"answers {codes}, or without a plan"
    return f"one took {alone:.1f} s, twelve {took:.1f} s" if took > alone + PAGES_S else None


def _patterns(target: Target) -> str | None:
    """Counted repeats that are gigabytes when written out, and many slow expressions."""
    nested = "re:(?:(?:(?:(?:a{999}){999}){999}){999})|.*"
    answer = target.submit(steps={"linears": {"targets": [nested]}})
    if answer.status_code != 422 or "repeats" not in answer.text:
        return f"nested counts: {answer.status_code} {answer.text[:200]}"
    # Each matches after all: one that matches nothing would be refused before the next is tried.
    slow = [f"re:(?:.|.|..)*(?<={i}v_proj)|.*" for i in range(256)]
    return _refused(target, "regular expressions", "take more than", **{
        "steps": {"linears": {"targets": slow}}
    })  # fmt: skip


def _hostile_pull(target: Target) -> str | None:
    """A service whose hashes, names and sizes lead out of the folder, or never end."""
    place = Path(tempfile.mkdtemp(dir=target.folder))
    canary = place / "canary-file"
    canary.write_text("mine")
    sent, listed = 0, {}

    class Service(_Handler):
        """Lists a file, and sends more of it than it has."""

        def do_GET(self) -> None:
            """The list, or the file."""
            nonlocal sent
            if self.path.endswith("/artifacts"):
                job = "d5aed9d3-7b7c-40f9-9896-b5f528363229"
                files = {"files": [listed], "bytes": 5, "archive": "/x"}
                body = json.dumps({"job_id": job, **files}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    sent += 1  # before the other side may hang up
                    self.wfile.write(bytes(2**20))

    wrong, right = [], {"name": "file", "bytes": 5, "sha256": hashlib.sha256().hexdigest()}
    odd: tuple[dict[str, Any], ...] = (
        {"sha256": "../canary"}, {"name": "../canary-file"}, {"name": ".bashrc"},
        {"name": "a\0b"}, {"name": "a\nb"}, {},
    )  # fmt: skip
    with _serving(Service) as url, Client(url) as client:
        for change in odd:
            listed = {**right, **change, "href": "/x"}
            try:
                client.pull("d5aed9d3-7b7c-40f9-9896-b5f528363229", place / "out")
                wrong.append(f"{change} was taken")
            except PhoError as error:
                if not str(error).isprintable():
                    wrong.append(f"{change}: control characters")
    if canary.read_text() != "mine":
        wrong.append("a file outside of the folder was changed")
    if not sent:
        wrong.append("nothing was sent, so nothing was tried")
    if sent > 100 * 2**20:
        wrong.append(f"{sent >> 20} MiB were taken of a file of 5 bytes")
    return "; ".join(wrong)


def _dripping_receiver(target: Target) -> str | None:
    """Six messages to a receiver that sends a letter now and then; others are told meanwhile."""
    dripped, told, over = threading.Event(), threading.Event(), threading.Event()

    class Drips(_Handler):
        """Its headers never end."""

        def do_POST(self) -> None:
            """A letter each second."""
            dripped.set()
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not over.wait(1):
                    self.wfile.write(b"a")

    class Takes(_Handler):
        """Takes what it is told."""

        def do_POST(self) -> None:
            """Says so."""
            told.set()
            self.send_response(204)
            self.end_headers()

    with _serving(Drips) as slow, _serving(Takes) as quick:
        for number in range(6):
            _cancelled(target, f"{slow}/{number}")
        if not dripped.wait(120):
            return "the receiver was never told, so nothing was tried"
        _cancelled(target, quick)
        in_time = told.wait(SENT_S)
        over.set()
    return None if in_time else f"another receiver was not told within {SENT_S:.0f} s"


def _cancelled(target: Target, notify: str) -> None:
    """A job that has ended, and tells so."""
    job = target.job(notify=notify)
    target.until(
        lambda: httpx.post(f"{target.url}/v1/jobs/{job}:cancel", timeout=30).status_code < 300
    )


def _packed_bomb(target: Target) -> str | None:
    """A README of 900 MB in a packed model of a megabyte."""
    good, bad = target.folder / "good.pho", target.folder / "bad.pho"
    pack(target.folder / "tiny", good)
    with ZipFile(good) as files, ZipFile(bad, "w") as archive:
        archive.comment = files.comment
        for name in files.namelist():
            archive.writestr(name, files.read(name))
        content = zstandard.ZstdCompressor().compress(bytes(900_000_000))
        archive.writestr("README.md.zst", content)
    return _refused(target, "README.md", "beside the weights", model=bad.name)


def _hostile_dump(target: Target) -> str | None:
    """A dump whose table checks its rows by a function that runs a program."""
    ran, dump = target.folder / "ran", target.folder / "evil.dump"
    with tempfile.TemporaryDirectory(prefix="pho-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        with embedded_postgresql(Path(name) / "from") as url:
            database = Database(url)
            database.migrate()
            write_hostile_dump(database, dump, program(ran))
            database.close()
        with embedded_postgresql(Path(name) / "to") as url:
            database = Database(url)
            try:
                restore(database, dump)
                said = "it was restored"
            except StorageError as error:
                said = "" if "program" in str(error) else f"it was refused for {error}"
            database.close()
    return "a program ran" if ran.exists() else said


def _fair_share(target: Target) -> str | None:
    """A curve of many patterns; a small job of another key begins within a turn and a piece."""
    mine, yours = _keys(target)
    confirm = {"confirm": {"text": "confirm.txt", "finalists": 2, "windows": 4}}
    patterns = [f"{number / 100:g}" for number in range(20, 52)]
    spec = {**target.spec, **confirm, "pattern": None, "patterns": patterns, "trials": 60}
    write_text(target.folder / "confirm.txt", seed=target.seed)
    answer = httpx.post(f"{target.url}/v1/jobs", json=spec, headers=mine, timeout=60)
    assert answer.status_code == 202, answer.text
    job = f"{target.url}/v1/jobs/{answer.json()['id']}"

    def trials() -> int:
        shown = httpx.get(job, headers=mine, timeout=60).json()
        return sum(p["done"] for p in shown["progress"]["pieces"] if p["unit"] == "trials")

    if not target.until(lambda: trials() > 0, seconds=120):
        return "the curve never began"
    started = time.monotonic()
    if not target.until(lambda: trials() > spec["trials"], seconds=300):
        return "the first point never ended"
    point_s = time.monotonic() - started
    small = httpx.post(f"{target.url}/v1/jobs", json=target.spec, headers=yours, timeout=60).json()
    path, started = f"{target.url}/v1/jobs/{small['id']}", time.monotonic()

    def got_in() -> bool:
        return httpx.get(path, headers=yours, timeout=60).json()["state"] != "queued"

    target.until(got_in, seconds=300)
    took, done = time.monotonic() - started, trials()
    httpx.post(f"{job}:cancel", headers=mine, timeout=60)
    if done == spec["trials"] * len(patterns):
        return "the curve was over before the other job came, so nothing was tried"
    # The turn that had just begun, the point that was in hand when it ended, and a busy machine.
    most = TURN_S + 2 * point_s + 5
    return f"it waited for {took:.0f} s, and a point takes {point_s:.0f}" if took > most else None


def _two_keys(target: Target) -> str | None:
    """Whatever key b asks of a job of key a."""
    mine, yours = _keys(target)
    job = httpx.post(f"{target.url}/v1/jobs", json=target.spec, headers=mine, timeout=60).json()
    tried = [("GET", path) for path in ("", "/best", "/trials", "/events", "/report", "/artifacts")]
    tried += [("POST", verb) for verb in (":cancel", ":pause", ":resume", ":prune")]
    tried += [("DELETE", "")]
    wrong = []
    for method, path in tried:
        url = f"{target.url}/v1/jobs/{job['id']}{path}"
        code = httpx.request(method, url, headers=yours, timeout=30).status_code
        if code != 404:
            wrong.append(f"{method} {path}: {code}")
    listed = httpx.get(f"{target.url}/v1/jobs", headers=yours, timeout=30).text
    if job["id"] in listed:
        wrong.append("it is listed")
    if httpx.get(f"{target.url}/v1/jobs/{job['id']}", headers=mine, timeout=30).status_code != 200:
        wrong.append("its own key does not see it, so nothing was tried")
    return ", ".join(wrong)


def _quotas(target: Target) -> str | None:
    """Two keys spend their quotas from many threads at once, which are changed meanwhile."""
    limits = JobLimits(trials=10**6, tokens=10**9)
    tokens = JobSpec.model_validate(target.spec).check_size(limits)
    database = Database(target.service.database_url, pool=1)
    secrets = KeyStore(database)

    def quota(jobs: int) -> Quota:
        return Quota(jobs * tokens + tokens // 2, timedelta(days=1))

    keys = [secrets.create(n, sees_all=False, quota=quota(1)) for n in "ab"]
    wrong, accepted = [], [0, 0]

    def submit(number: int) -> tuple[int, int]:
        headers = {"authorization": f"Bearer {keys[number][1]}"}
        url = f"{target.url}/v1/jobs"
        return number, httpx.post(url, json=target.spec, headers=headers, timeout=120).status_code

    with ThreadPoolExecutor(24) as pool:
        for rooms in ((3, 2), (5, 1), (9, 4)):
            before = pool.map(submit, [0, 1] * 6)  # while the quotas are changed
            for number, room in enumerate(rooms):
                secrets.set_quota(keys[number][0].prefix, quota(room))
            found = [*before, *pool.map(submit, [0, 1] * 12)]
            for number, room in enumerate(rooms):
                codes = [code for whose, code in found if whose == number]
                accepted[number] += codes.count(202)
                if not {*codes} <= {202, 429}:
                    wrong.append(f"answers {sorted({*codes})}")
                most = max(room, accepted[number] - codes.count(202))
                if accepted[number] != most:
                    wrong.append(f"{accepted[number]} jobs were accepted instead of {most}")
    database.close()
    return ", ".join(wrong)


def _silent_hub(target: Target) -> str | None:
    """Jobs of a key with a model of a hub that never answers, as attack.py sets."""
    mine, other = _keys(target)
    spec = {**target.spec, "model": "org/name"}

    def submit() -> int:
        url = f"{target.url}/v1/jobs"
        return httpx.post(url, json=spec, headers=mine, timeout=120).status_code

    with ThreadPoolExecutor(100) as pool:
        stored = [pool.submit(submit) for _ in range(100)]
        started = time.monotonic()
        found = httpx.get(f"{target.url}/v1/jobs", headers=other, timeout=60).status_code
        took = time.monotonic() - started
    codes = {each.result() for each in stored}
    if took > LISTED_S:
        return f"the list of another key took {took:.1f} s"
    return None if (found, codes) == (200, {202}) else f"answers {found}, {codes}"


def _logins(target: Target) -> str | None:
    """A hundred logins of one key."""
    secret = _keys(target)[0]["authorization"].removeprefix("Bearer ")
    cookies = []
    for _ in range(MOST_LOGINS + 10):
        answer = httpx.post(f"{target.url}/login", data={"key": secret}, timeout=30)
        cookies += [answer.cookies.get("pho_session")]
    if None in cookies:
        return "a login was refused, so nothing was tried"
    open_ones = [
        httpx.get(f"{target.url}/v1/jobs", cookies={"pho_session": each}, timeout=30).status_code
        for each in cookies
    ].count(200)
    return None if open_ones == MOST_LOGINS else f"{open_ones} of them are open"


def _keys(target: Target) -> tuple[dict[str, str], dict[str, str]]:
    """The headers of two keys; from now on the service asks for one."""
    database = Database(target.service.database_url, pool=1)
    secrets = [KeyStore(database).create(name, sees_all=False)[1] for name in ("mine", "yours")]
    database.close()
    mine, yours = ({"authorization": f"Bearer {secret}"} for secret in secrets)
    return mine, yours


BOUNDS = (
    Attack(name="deep plans", about="8 of 30,000 blocks, 1 that says 10^8", run=_deep_plans),
    Attack(name="large pages", about="13 of a model of 250,000 tensors", run=_large_pages),
    Attack(name="patterns", about="counts in counts, 256 slow ones", run=_patterns),
    Attack(name="hostile pull", about="6 lists of a service that lies", run=_hostile_pull),
    Attack(name="dripping receiver", about="6 webhooks to it, 1 beside", run=_dripping_receiver),
    Attack(name="packed bomb", about="a README of 900 MB in a .pho", run=_packed_bomb),
    Attack(
        name="hostile dump", about="COPY FROM PROGRAM in a check", run=_hostile_dump,
        health=False,  # it starts two servers of its own
    ),
)  # fmt: skip
# Those with keys come last: from then on nobody is let in without one.
WITH_KEYS = (
    Attack(name="two keys", about="a job of another key, 11 ways", run=_two_keys),
    Attack(name="quotas", about="108 jobs of 2 keys at once, 6 changes", run=_quotas),
    Attack(name="logins", about=f"{MOST_LOGINS + 10} of one key", run=_logins),
    Attack(name="fair share", about="32 patterns, and another key's job", run=_fair_share),
    Attack(name="silent hub", about="100 jobs with a model of it", run=_silent_hub),
)
