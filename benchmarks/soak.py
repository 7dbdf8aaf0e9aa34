"""
An hour of small jobs, while everything is killed, and files are replaced, at random: does the
service keep its promises?

Starts a service of its own on this machine, checks what must hold in the end,
and stops by itself. It fails if anything does not hold:

    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 2 --seed 1   # tries it out

What happens follows from the seed, but not when: two runs are never the same.
"""

import json
import re
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil
from chaos import OUT_OF_MEMORY, Chaos, Disturb, Sample, Service
from invariants import Invariants
from job_stream import MORE, Document, Person, Sent, documents
from local_service import write_text, write_tiny_model
from machine import conditions, software
from replaced_files import MODEL, TEXT, ReplacedFiles, mixtures
from rich import box
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select, text

from pho_service.api.answers import Job as Answer
from pho_service.spec.job import JobSpec
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import KeyStore
from storage.records import JobRecord, JobState, NoSuchJob, StageKind, StageState
from storage.studies import study_name
from storage.tables import configurations, stages

OF_MEMORY = re.compile(r"[Mm]emory|can't start new thread")

_WHOLE = "the soak runs to its end"
DRAIN_S = 900.0  # for the jobs that are left when the time is over
MIB = 2**20

CHAINED = re.compile(r"^(During handling of|The above exception was the direct cause of)")
# The last lines of tracebacks that kills explain.
EXPLAINED = re.compile(
    r"server closed the connection|the connection is (closed|lost)|connection (to server|failed)"
    r"|terminating connection|database system is|AdminShutdown|CrashShutdown|CannotConnectNow"
    r"|ConnectorException|PoolTimeout|PoolClosed|IdleInTransactionSessionTimeout|DatabaseGone"
    r"|timeout graceful shutdown exceeded"
    r"|MemoryError|OutOfMemory|[Cc]an(not|'t) allocate memory|can't start new thread"
    r"|std::bad_alloc|failed to map segment|Numba could not be imported"
    r"|error return without exception set"
    r"|raise ImportError\(msg\) from exc"  # numpy's, which tells the cause after many lines
)


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="Of disturbance.")
@click.option("--seed", default=0, show_default=True)
@click.option("--every", "every_s", default=6.0, show_default=True, help="Seconds between two.")
@click.option("--workers", default=2, show_default=True, help="Of `pho serve`.")
@click.option("--outside", default=2, show_default=True, help="`pho worker` processes beside.")
@click.option("--people", default=3, show_default=True, help="That submit jobs at once.")
@click.option("--only", multiple=True, help="Documents; all by default.")
@click.option("--keep", type=click.Path(path_type=Path), help="A new folder, for data and logs.")
@click.option("--out", type=click.Path(path_type=Path), help="Write all of it as JSON, too.")
def main(
    minutes: float,
    seed: int,
    every_s: float,
    workers: int,
    outside: int,
    people: int,
    only: tuple[str, ...],
    keep: Path | None,
    out: Path | None,
) -> None:
    """Disturb a service, and print the tables."""
    print(
        f"{conditions()}; {software('torch', 'optuna', 'procrastinate')}; seed {seed}", flush=True
    )
    with (
        _ending_after(60 * minutes + 2 * DRAIN_S),
        tempfile.TemporaryDirectory(prefix="pho-soak-", ignore_cleanup_errors=True) as name,
    ):
        folder = keep or Path(name)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # the database runs as another user
        wanted, files = _documents(folder, only)
        soak = Soak(wanted, files, seed=seed, people=people)
        with Service(folder=folder, workers=workers, outside=outside) as service:
            soak.run(service, seconds=60 * minutes, every_s=every_s)
            processes = service.all_processes()
        soak.check_left(folder, processes)
    if out is not None:
        out.write_text(json.dumps(soak.to_dict(), indent=2) + "\n")
    soak.show()
    raise SystemExit(1 if soak.invariants.violated else 0)


@contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """Whatever hangs, end the block: as an exception, so that no process is left."""

    def too_long(*_: object) -> None:
        raise SystemExit(f"the soak did not end by itself after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _documents(folder: Path, only: Sequence[str]) -> tuple[dict[str, Document], ReplacedFiles]:
    """What is submitted, with the models and texts that it needs, and those that change."""
    spec = write_tiny_model(folder)
    write_tiny_model(folder, name="other", seed=1)
    write_text(folder / "text.txt")
    (folder / "short.txt").write_text("a model\n")
    found = documents(spec, "other", "short.txt", model=MODEL, text=TEXT)
    return {name: found[name] for name in only or found}, ReplacedFiles(folder)


class Soak:
    """
    One run, and what came of it.

    Args:
        wanted: What is submitted.
        files: That some of it names, and that are replaced.
        seed: Of everything.
        people: That submit at once.
    """

    def __init__(
        self, wanted: dict[str, Document], files: ReplacedFiles, *, seed: int, people: int
    ) -> None:
        self.invariants = Invariants()
        self.seed = seed
        self.kills: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.facts: dict[str, Any] = {"seed": seed}
        self._wanted = wanted
        self._files = files
        self._count = people
        self._expected: dict[tuple[str, int], set[str]] = {}
        self._transferred: dict[str, str] = {}

    def run(self, service: Service, *, seconds: float, every_s: float) -> None:
        """Disturb a service for a while, let it end its jobs, and look at all of them."""
        self.facts["seconds"] = seconds
        people = [*self._people(service)]
        try:
            self._learn(people[0])
            replacing: dict[str, tuple[Disturb, int]] = {
                "text replaced": (self._files.replace_text, 6),
                "model replaced": (self._files.replace_model, 6),
            }
            with Chaos(service, seed=self.seed, every_s=every_s, more=replacing) as chaos:
                self.kills, self.samples = chaos.done, chaos.samples
                self._disturbed(people, chaos, seconds)
            began = time.monotonic()
            for person in people:
                person.finish(began + DRAIN_S)
            self.facts |= {
                "drain_s": round(time.monotonic() - began),
                "requests": sum(p.requests for p in people),
                "unavailable": sum(p.outages for p in people),
            }
            self._check_jobs(people)
            self._check_database(service, people)
            self._check_growth()
        except Exception:  # what was counted so far is shown, with this beside it
            self.invariants.check(_WHOLE, False, traceback.format_exc()[-2000:])
        else:
            self.invariants.check(_WHOLE, True)
        finally:
            for person in people:
                person.close()

    def _people(self, service: Service) -> Iterator[Person]:
        with closing(Database(service.database_url, pool=1)) as database:
            for number in range(self._count):
                _, key = KeyStore(database).create(f"person {number}", sees_all=False)
                yield Person(
                    url=service.url, key=key, seed=1000 * self.seed + number,
                    documents=self._wanted, invariants=self.invariants,
                )  # fmt: skip

    def _learn(self, person: Person) -> None:
        """
        What each document gives undisturbed.

        A job that is extended after it was confirmed keeps its finalists, so it may give something
        else than one that had its trials from the start.
        """
        sent = [
            person.submit(name, more=more)
            for name, document in person.documents.items()
            for more in ((0, MORE) if document.extended else (0,))
            if document.fixed
        ]
        grown = [person.submit(name) for name, each in person.documents.items() if each.extended]
        person.finish(time.monotonic() + DRAIN_S)
        for each in grown:
            person.client.extend(each.id, trials=MORE)
            each.extended, each.state = "yes", "running"
        person.finish(time.monotonic() + DRAIN_S)
        self._files.put(1)
        sent += [person.submit(n) for n, document in person.documents.items() if document.changing]
        person.finish(time.monotonic() + DRAIN_S)
        for each in [*sent, *grown]:
            job = person.client.job(each.id)
            trials, answer = int(job.spec["trials"]), person.answer(job)
            self._expected.setdefault((each.name, trials), set()).add(answer)
            as_meant = (job.state == "failed") == person.documents[each.name].fails
            self.invariants.check(
                "undisturbed, jobs fail that are to, and no other", as_meant, f"{each}: {answer}"
            )
        print(f"{len(sent)} jobs done undisturbed", flush=True)

    def _disturbed(self, people: Sequence[Person], chaos: Chaos, seconds: float) -> None:
        """Let all work for a while."""
        over = threading.Event()
        with ThreadPoolExecutor(len(people)) as pool:
            working = [pool.submit(person.work, over) for person in people]
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and chaos.error is None:
                if any(w.done() for w in working):
                    break  # it failed
                time.sleep(0.2)
            over.set()
        if chaos.error is not None:
            raise chaos.error
        for each in working:
            each.result()
        print(f"disturbed for {seconds:.0f} s; the jobs that are left end now", flush=True)

    def _check_jobs(self, people: Sequence[Person]) -> None:
        """JobRecord by job, as their owners see them."""
        with ThreadPoolExecutor(len(people)) as pool:
            for states in pool.map(self._check_jobs_of, people):
                self.states += states

    def _check_jobs_of(self, person: Person) -> Counter[str]:
        states: Counter[str] = Counter()
        listed = {job.id: job for job in person.patient(lambda: [*person.client.jobs()])}
        self.invariants.check_all(
            "everybody sees their own jobs, each once, and no other",
            (str(i) for i in listed.keys() - person.jobs.keys()),
            of=len(listed),
        )
        for sent in person.jobs.values():
            job = listed.get(sent.id)
            if sent.deleted == "yes":
                self.invariants.check("a deleted job is gone", job is None, str(sent))
            elif sent.deleted == "no":
                self.invariants.check("no accepted job is lost", job is not None, str(sent))
            if job is not None:
                states[self._check_end(person, sent, job)] += 1
        return states

    def _check_end(self, person: Person, sent: Sent, job: Answer) -> str:
        """Check how a job ended, and say it."""
        check = self.invariants.check
        check("every accepted job ends", job.state.is_over, f"{sent}, {job.state}")
        if sent.cancelled == "yes":
            check("a cancelled job is cancelled", job.state == "cancelled", f"{sent}, {job.state}")
        elif sent.cancelled == "no":
            kept = job.state != "cancelled"
            check("no job is cancelled that nobody cancelled", kept, str(sent))
        if job.state not in ("succeeded", "failed"):
            return job.state
        answer = person.answer(job)
        if self.kills[OUT_OF_MEMORY] and OF_MEMORY.search(_complaints(job, answer)):
            return f"{job.state} for want of memory"
        if job.kind == "transfer":
            check("a transfer succeeds", job.state == "succeeded", answer)
            found = json.dumps(json.loads(answer)["configuration"])
            given = self._transferred.setdefault(f"{sent.name} {found}", _measured(answer))
            check("a transfer measures the same each time", _measured(answer) == given, answer)
            return job.state
        trials = int(job.spec["trials"])
        added = trials - sent.trials
        asked = {"yes": (MORE,), "no": (0,), "perhaps": (0, MORE)}[sent.extended]
        check("a job has the trials that were asked for", added in asked, f"{sent}, {trials}")
        if job.state == "failed":
            if person.documents[sent.name].changing and answer.startswith("ChangedInput in "):
                return "failed for a file that was replaced"
            expected = self._expected.get((sent.name, sent.trials), {"success"})
            about = f"{sent}: {answer}, expected {str(expected)[:200]}"
            check("a job fails only for a reason that it deserves", answer in expected, about)
        elif person.documents[sent.name].fixed:
            check(
                "a configuration is byte for byte that of an undisturbed job",
                answer in self._expected.get((sent.name, trials), ()),
                f"{sent}: {answer}",
            )
        return job.state

    def _check_database(self, service: Service, people: Sequence[Person]) -> None:
        """What the owners do not see."""
        with closing(Database(service.database_url, pool=2)) as database:
            self._check_stored(JobStore(database), service.folder, people)

    def _check_stored(self, store: JobStore, folder: Path, people: Sequence[Person]) -> None:
        done = _stages_done(folder)
        jobs = [job for person in people for job in _stored(store, person)]
        check = self.invariants.check
        for job in jobs:
            sent = next(p.jobs[job.id] for p in people if job.id in p.jobs)
            runs = 1 if sent.extended == "no" else 2
            _check_events(check, store, job, runs)
            of_kind = Counter(stage.kind for stage in job.stages)
            for kind, count in of_kind.items():
                often = done[str(job.id), kind]
                check("no stage is finished twice", often <= count * runs, f"{job.id} {kind}")
        with store.database.transaction() as connection:
            running = connection.execute(
                select(func.count()).where(stages.c.state == StageState.RUNNING)
            ).scalar_one()
            queued = connection.execute(
                text(
                    "SELECT count(*) FROM procrastinate.procrastinate_jobs "
                    "WHERE task_name = 'run_stage'"
                )
            ).scalar_one()
            entries = Counter(connection.execute(select(configurations.c.job_id)).scalars().all())
            query = text(
                "SELECT study_name, array_agg(number ORDER BY number) "
                "FROM optuna.trials JOIN optuna.studies USING (study_id) GROUP BY 1"
            )
            numbers = {row.study_name: row.array_agg for row in connection.execute(query)}
        check("no stage is left running", running == 0, str(running))
        check("the queue is empty in the end", queued == 0, str(queued))
        for job in jobs:
            if job.state is JobState.SUCCEEDED and "trials" in job.spec:
                mixed = [*mixtures(job)]
                check("no configuration mixes hashes", not mixed, f"{job.id}: {mixed}")
                sent = next(p.jobs[job.id] for p in people if job.id in p.jobs)
                if sent.name == "cut":  # of its own model, and with as many trials as splits
                    check("a cut is in no library", not entries[job.id], f"{sent}")
                    continue
                most = 1 if sent.extended == "no" else 2
                check(
                    "the library has an entry for each succeeded search",
                    1 <= entries[job.id] <= most,
                    f"{sent}: {entries[job.id]}",
                )
                for island in range(job.spec["islands"]):
                    found = numbers.get(study_name(job.name, island), [])
                    whole = found == [*range(len(found))]
                    check("trials are numbered without gaps or doubles", whole, f"{sent}: {found}")
                    full = len(found) == job.trials or job.spec["sampler"] == "hill-climb"
                    check("each island has its trials, and no more", full, f"{sent}: {found}")

    def _check_growth(self) -> None:
        """The first quarter against the last."""
        quarter = max(1, len(self.samples) // 4)
        for what, rule, factor, more in (
            ("api_bytes", "the API's memory does not grow", 1.25, 32 * MIB),
            ("connections", "the database's connections do not grow", 1.25, 5),
        ):
            first, last = (
                [v for s in part if (v := getattr(s, what)) is not None]
                for part in (self.samples[:quarter], self.samples[-quarter:])
            )
            if first and last:
                before, after = median(first), median(last)
                self.facts[what] = {"first quarter": before, "last quarter": after}
                most = factor * before + more
                self.invariants.check(rule, after <= most, f"{before} before, {after} after")

    def check_left(self, folder: Path, processes: Sequence[psutil.Process]) -> None:
        """Processes, files and logs, when the service is over."""
        check = self.invariants.check
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(p.is_running() for p in processes):
            time.sleep(0.2)
        for process in processes:
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            check("no process is left", not alive, str(process) if alive else "")
            if alive:
                process.kill()
        bundles = folder / "data" / "artifacts" / "bundles"
        keys = {
            (
                JobSpec.model_validate(
                    {**document.spec, "model": model, "more_models": []}
                ).calibration_key,
                contents,
            )
            for document in self._wanted.values()
            for model in (document.spec["model"], *document.spec.get("more_models", ()))
            for contents in ((0, 1) if document.changing else (0,))
        }
        files = [*bundles.glob("*.safetensors")]
        check("there is one bundle for each calibration", len(files) <= len(keys), str(files))
        self.facts["bytes"] = {
            part.name: sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
            for part in (folder / "data" / "postgresql", folder / "data" / "artifacts")
        }
        litter = [*bundles.glob(".pho-*")]
        self.facts["litter"] = len(litter)
        for log in sorted(folder.glob("*.log")):
            for trace in _tracebacks(log.read_text()):
                explained = EXPLAINED.search(trace) is not None
                check("errors in the logs are those of kills", explained, f"{log.name}: {trace}")
        check("errors in the logs are those of kills", True)

    def show(self) -> None:
        """Print the tables."""
        console = Console(width=120)
        table = Table(box=box.MARKDOWN)
        table.add_column("disturbance")
        table.add_column("times", justify="right")
        for name, count in sorted(self.kills.items()):
            table.add_row(name, str(count))
        console.print(table)
        print(f"jobs: {', '.join(f'{n} {state}' for state, n in sorted(self.states.items()))}")
        print(json.dumps(self.facts))
        console.print(self.invariants.table())
        for rule, example in self.invariants.examples.items():
            print(f"\nVIOLATED: {rule}\n{example}")

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "conditions": conditions(),
            "software": software("torch", "optuna", "procrastinate"),
            **self.facts,
            "kills": dict(self.kills),
            "jobs": dict(self.states),
            "invariants": {
                rule: {"checked": count, "violated": self.invariants.violated[rule]}
                for rule, count in self.invariants.checked.items()
            },
            "examples": self.invariants.examples,
            "samples": [vars(sample) for sample in self.samples],
        }


def _complaints(job: Answer, answer: str) -> str:
    """What a job, or a model of a transfer, failed for; nothing if nothing did."""
    if job.state == "failed":
        return answer
    if job.kind != "transfer":
        return ""
    errors = (target.get("error") for target in json.loads(answer)["targets"])
    return "; ".join(f"{e['type']}: {e['message']}" for e in errors if e)


def _measured(transfer: str) -> str:
    """What a transfer measured."""
    return json.dumps(
        [
            {k: t[k] for k in ("perplexities", "proxies") if k in t}
            for t in json.loads(transfer)["targets"]
        ]
    )


def _stored(store: JobStore, person: Person) -> Iterator[JobRecord]:
    for sent in person.jobs.values():
        if sent.deleted == "no":
            with suppress(NoSuchJob):  # counted as lost
                yield store.get(sent.id)


def _stages_done(folder: Path) -> Counter[tuple[str, StageKind]]:
    """How often workers said that they finished a stage, by job and kind."""
    found: Counter[tuple[str, StageKind]] = Counter()
    for log in folder.glob("*.log"):
        for kind, job in re.findall(r"(\w+) of job (\S+) done", log.read_text()):
            found[job, StageKind(kind)] += 1
    return found


def _check_events(check: Any, store: JobStore, job: JobRecord, runs: int) -> None:
    """The history of a job: it goes forwards, and nothing comes after its end."""
    history = []
    while page := store.events(job.id, after=history[-1].id if history else 0):
        history += page
    states = [event.data["state"] for event in history if event.kind == "state"]
    follow = all(b == "queued" for a, b in pairwise(states) if JobState(a).is_over)
    check("only a resume or an extension follows an end", follow, f"{job.id}: {states}")
    often = states.count("succeeded")
    check("a job succeeds once, and once more if it is extended", often <= runs, str(states))
    last = history[-1]
    ended = not job.state.is_over or (last.kind == "state" and last.data["state"] == job.state)
    check("nothing happens to a job after its end", ended, f"{job.id}: {last}")
    done: dict[tuple[str, int], int] = {}
    for event in history:
        if event.kind == "progress":
            stage = event.data["stage"], event.data["number"]
            forwards = event.data["done"] >= done.get(stage, 0)
            check("progress never goes back", forwards, f"{job.id}: {event.data}")
            done[stage] = event.data["done"]


def _tracebacks(log: str) -> list[str]:
    """Each traceback of a log, of chained ones the last, with the line before it."""
    found, lines = [], log.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            end = number + 1
            while end < len(lines) and (lines[end].startswith(" ") or not lines[end]):
                end += 1
            if any(CHAINED.search(after) for after in lines[end + 1 : end + 3]):
                continue
            found.append(
                "\n".join([*lines[max(0, number - 1) : number], *lines[end - 3 : end + 1]])
            )
    return found


if __name__ == "__main__":
    main()
