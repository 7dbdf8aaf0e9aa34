"""Workers that end by themselves, or wait: without work, drained, on another artifact store."""

from pathlib import Path

import pytest

from storage.records import Drain, StageKind, StageState

LONG = 600  # trials; long enough to be waited for
SLOW_REPORTS = """
import time
from storage.jobs import JobStore
report = JobStore.enter_worker
JobStore.enter_worker = lambda *given, **named: (time.sleep(0.5), report(*given, **named))[1]
"""


def test_without_work_for_so_long_a_worker_ends_and_until_then_does_what_comes(own_crew, spec_of):
    """Meanwhile it touches the file of the probes; a report on its way is not behind the last."""
    alive = own_crew.folder / "alive"
    variable = f"os.environ['PHO_LIVENESS_FILE'] = {str(alive)!r}"
    worker = own_crew.start("--exit-when-idle", "2", sabotage=f"{variable}\n{SLOW_REPORTS}")
    own_crew.man(1)
    job = own_crew.done(spec_of())
    touched = alive.stat().st_mtime
    own_crew.until(lambda: alive.stat().st_mtime > touched)

    assert own_crew.ended(worker) == 0
    assert {stage.attempt for stage in job.stages} == {1}
    assert own_crew.at_work() == {}
    assert "no stage came for 2 s" in own_crew.logs()
    assert "Traceback" not in own_crew.logs()


def test_a_file_for_probes_that_cannot_be_written_is_refused(own_crew):
    variable = "os.environ['PHO_LIVENESS_FILE'] = '/proc/alive'"
    worker = own_crew.start(sabotage=variable)

    assert own_crew.ended(worker) == 2
    assert "PHO_LIVENESS_FILE=/proc/alive cannot be written" in own_crew.logs()


@pytest.mark.parametrize("how", list(Drain))
def test_drained_a_worker_finishes_its_stage_or_hands_it_back_takes_none_and_ends(
    how, own_crew, spec_of
):
    worker = own_crew.start()
    job = own_crew.submit(spec_of(trials=LONG))
    own_crew.busy(job, StageKind.SEARCH, done=14)
    own_crew.store.drain(own_crew.at_work()[worker].id, how, alive_s=60.0)
    code = own_crew.ended(worker)
    stages = own_crew.store.get(job.id).stages
    (search,) = (stage for stage in stages if stage.kind is StageKind.SEARCH)

    assert code == 0
    assert own_crew.at_work() == {}
    assert {*own_crew.queued(job)} == {"todo"}
    assert (search.attempt, search.failures) == (1, 0)
    expected = StageState.DONE if how is Drain.FINISH else StageState.WAITING
    assert search.state is expected


def test_a_dead_workers_stage_comes_again_while_all_others_are_busy(own_crew, spec_of):
    own_crew.man(1)
    busy = own_crew.submit(spec_of(trials=10_000))
    own_crew.busy(busy, StageKind.SEARCH, done=14)
    own_crew.man(2)
    other = own_crew.submit(spec_of(trials=LONG, name="other"))
    own_crew.kill(other, StageKind.SEARCH, done=14)
    own_crew.until(lambda: own_crew.queued(other) == ["todo"])
    (search,) = own_crew.store.get(busy.id).of_kind(StageKind.SEARCH)

    assert (search.state, search.attempt) == (StageState.RUNNING, 1)


def test_on_another_artifact_store_than_the_api_a_worker_takes_nothing_until_that_is_mended(
    own_crew, spec_of
):
    own_crew.store.set_artifact_store("the api's")
    job = own_crew.submit(spec_of())
    own_crew.start()
    own_crew.until(lambda: "is not the artifact store that the API sees" in own_crew.logs())
    own_crew.until(lambda: "" in own_crew.store.stores(60.0)[1])
    queued = own_crew.queued(job)
    own = Path(own_crew.folder, "data", "artifacts", "store-id")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("the api's")

    assert own_crew.succeeded(job)
    assert queued == ["todo"]
    own_crew.until(lambda: own_crew.store.stores(60.0)[1] == ["the api's"])
