"""
Hostile requests: many, odd, or for what others own.
"""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from attack_target import Attack, Target

BODIES: tuple[tuple[str, bytes], ...] = (
    ("NaN", b'{"model": "tiny", "pattern": "0.5", "timeout_s": NaN}'),
    ("infinity", b'{"model": "tiny", "pattern": "0.5", "timeout_s": 1e400}'),
    ("5,000 digits", b'{"model": "tiny", "pattern": "0.5", "trials": ' + b"9" * 5000 + b"}"),
    ("30,000 deep", b"[" * 30_000 + b"]" * 30_000),
    ("UTF-16", '{"model": "tiny"}'.encode("utf-16")),
    ("half a character", b'{"model": "\\ud800", "pattern": "0.5"}'),
    ("NUL", b'{"model": "a\\u0000b", "pattern": "0.5"}'),
    ("not JSON", b"model=tiny"),
    ("empty", b""),
    ("4 MB", b'{"model": "' + b"a" * 4_000_000 + b'"}'),
    ("a million elements", b'{"more_models": [' + b"1," * 1_000_000 + b"1]}"),
    ("a path outside", b'{"model": "../../etc/passwd", "pattern": "0.5"}'),
    ("an absolute path", b'{"model": "/etc/passwd", "pattern": "0.5"}'),
    ("a home", b'{"model": "~root/x", "pattern": "0.5"}'),
    ("a URL", b'{"model": "http://127.0.0.1/x", "pattern": "0.5"}'),
    ("file://", b'{"model": "file:///etc/passwd", "pattern": "0.5"}'),
    ("a search of 1e9 minutes", b'{"model": "tiny", "pattern": "0.5", "minutes": 1e9}'),
    ("a search of NaN minutes", b'{"model": "tiny", "pattern": "0.5", "minutes": NaN}'),
    ("a search of no minutes", b'{"model": "tiny", "pattern": "0.5", "minutes": 0}'),
    (
        "a recovery of NaN minutes",
        b'{"model": "tiny", "pattern": "0.5", "prune": true, "recovery": {"minutes": NaN}}',
    ),
    (
        "a hundred GGUF files",
        b'{"model": "tiny", "pattern": "0.5", "prune": true, "gguf": ['
        + b", ".join(b'"%dMB"' % number for number in range(100))
        + b"]}",
    ),
    (
        "a GGUF file of NaN bytes",
        b'{"model": "tiny", "pattern": "0.5", "prune": true, "gguf": ["NaNMB"]}',
    ),
    ("unknown field", b'{"model": "tiny", "pattern": "0.5", "x": 1}'),
)


def _odd_bodies(target: Target) -> str | None:
    """Each is refused as the client's fault."""
    wrong = []
    for name, body in BODIES:
        answer = httpx.post(
            f"{target.url}/v1/jobs", content=body, timeout=60,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        if not 400 <= answer.status_code < 500:
            wrong.append(f"{name}: {answer.status_code}")
    return ", ".join(wrong)


def _big_folder(target: Target) -> str | None:
    """A folder of 20,000 files, and 31 spellings of it in one document."""
    folder = target.folder / "big"
    if not folder.exists():
        for number in range(20):
            (folder / f"{number}").mkdir(parents=True)
            for each in range(1000):
                (folder / f"{number}" / f"{each}").touch()
    started = time.monotonic()
    target.submit()
    alone = time.monotonic() - started
    many = ["./" * (number + 1) + "big" for number in range(31)]
    answers = [target.submit(model="big", more_models=many)]
    with ThreadPoolExecutor(20) as pool:
        answers += pool.map(lambda _: target.submit(model="big"), range(40))
    took = time.monotonic() - started
    codes = {answer.status_code for answer in answers}
    if codes != {422}:
        return f"answers {codes}: {answers[-1].text[:200]}"
    return f"it took {took:.0f} s" if took > 10 + 20 * alone else None


def _reports(target: Target) -> str | None:
    """Sixty reports at once."""
    job = target.job()
    target.wait(job)
    with ThreadPoolExecutor(60) as pool:
        codes = list(
            pool.map(lambda _: target.get(f"/v1/jobs/{job}/report").status_code, range(60))
        )
    odd = {*codes} - {200, 429, 503}
    return f"answers {odd}" if odd else None


def _smuggled(target: Target) -> str | None:
    """Two lengths, a length and chunks: refused, or the connection is closed after it."""
    wrong = []
    for name, lines in (
        ("two lengths", "Content-Length: 2\r\nContent-Length: 3"),
        ("length and chunks", "Content-Length: 2\r\nTransfer-Encoding: chunked"),
        ("odd chunks", "Transfer-Encoding: xchunked"),
    ):
        with socket.create_connection(("127.0.0.1", target.port), timeout=5) as opened:
            head = f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n{lines}\r\n\r\n"
            opened.sendall((head + "0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").encode())
            opened.settimeout(5)
            answer = b""
            try:
                while part := opened.recv(65536):
                    answer += part
            except TimeoutError:
                wrong.append(f"{name}: the connection stays open")
            if answer.count(b"HTTP/1.1 200"):
                wrong.append(f"{name}: what was smuggled is answered")
    return ", ".join(wrong)


def _foreign_hosts(target: Target) -> str | None:
    """Names that are not this service's, and pages of other sites."""
    wrong = []
    for name, headers in (
        ("another Host", {"host": "evil.example"}),
        ("another Origin", {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}),
    ):
        answer = httpx.post(f"{target.url}/v1/jobs", json=target.spec, headers=headers, timeout=30)
        if answer.status_code < 400:
            wrong.append(f"{name}: {answer.status_code}")
    return ", ".join(wrong)


def _dashboard_writes(target: Target) -> str | None:
    """The dashboard is for reading."""
    wrong = []
    for method in ("DELETE", "POST", "PUT", "PATCH"):
        answer = httpx.request(method, f"{target.url}/api/studies/0", timeout=30)
        if answer.status_code < 400:
            wrong.append(f"{method}: {answer.status_code}")
    return ", ".join(wrong)


def _favicon(target: Target) -> str | None:
    """Without Accept-Encoding, which httpx would send by itself."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as opened:
        opened.sendall(b"GET /favicon.ico HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        status = opened.recv(65536).partition(b"\r\n")[0].decode(errors="replace")
    return None if " 200 " in status else f"{status!r}"


def _many_trials(target: Target) -> str | None:
    """A study of 3,000 trials, one page of one trial of it."""
    job = target.job(trials=3000)
    if target.wait(job, seconds=300)["state"] != "succeeded":
        return "the job did not end in 300 s"
    started = time.monotonic()
    answer = target.get(f"/v1/jobs/{job}/trials?page_size=1")
    took = time.monotonic() - started
    if answer.status_code != 200 or len(answer.json()["trials"]) != 1:
        return f"{answer.status_code} {json.dumps(answer.json())[:100]}"
    return f"a page of one trial took {took:.1f} s" if took > 2 else None


REQUESTS = (
    Attack(name="odd bodies", about=f"{len(BODIES)} bodies that are no job", run=_odd_bodies),
    Attack(
        name="big folder", run=_big_folder,
        about="a model folder of 20,000 files, 31 spellings of it, 40 submissions at once",
    ),
    Attack(name="reports", about="60 reports at once", run=_reports),
    Attack(name="smuggling", about="requests with two lengths, or chunks", run=_smuggled),
    Attack(name="foreign sites", about="other hosts and origins", run=_foreign_hosts),
    Attack(name="dashboard writes", about="DELETE, POST, PUT, PATCH of a study",
           run=_dashboard_writes),
    Attack(name="favicon", about="without Accept-Encoding", run=_favicon),
    Attack(name="many trials", about="a page of one trial of 3,000", run=_many_trials),
)  # fmt: skip
