"""
The pieces of a job that workers do: calibrate, search, measure, transfer, prune, and take notes.
"""

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any, cast

import optuna

from pho_service.errors import ChangedInput, PhoError
from pho_service.host.tasks import harness_folder
from pho_service.library import Entry, ModelFacts, Wanted, rank, stored_file
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import CalibrationText, cut, measure_shard
from pho_service.models.gguf_file import check_room, check_vocabulary, converter_for
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.saving import (
    RECIPE,
    recipe_document,
    shareable,
    with_configuration,
)
from pho_service.models.scratch import Memo
from pho_service.models.tasks import LoadedTasks
from pho_service.pipeline.curve import check_patterns
from pho_service.pipeline.minutes import Clock, Rest
from pho_service.pipeline.prune import prune_in_place, prune_job, winner_of
from pho_service.pipeline.search import Piece
from pho_service.pipeline.tasks import measure_tasks, tasks_document
from pho_service.pipeline.transfer import own_search, transfer_job
from pho_service.pipeline.work import Work
from pho_service.progress import Fence, Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.shown.parts import pairs_table
from pho_service.shown.report import Report, layer_cells
from pho_service.shown.tables import configuration_rows, results_table, verdict_table
from pho_service.spec.calibration import SHARDS
from pho_service.spec.configuration import Configuration
from pho_service.spec.export import GgufType, file_bytes
from pho_service.spec.fields import RecoverySpec, WarmPoint
from pho_service.spec.job import JobSpec
from pho_service.spec.recovery import Recovered, Recovery
from pho_service.spec.results import Calibration, Gathered, StoredModel, TasksMeasured, Transfer
from pho_service.spec.steps import Candidate
from pho_service.spec.tasks import TaskScore
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.plan import CHOSEN, Evaluate, Outcome, SearchPlan
from pho_service.tuning.search import fork_in_words, run_search
from storage.configurations import ConfigurationStore
from storage.database import Database
from storage.jobs import JobStore, chosen
from storage.records import Claim, JobRecord, NoSuchJob, StageKind
from workers.inputs import Seal, WorkerInputs
from workers.watch import HandBack, Watch
from workers.work import SealedWork, store_faults_told

logger = logging.getLogger(__name__)


# What optuna-dashboard shows of a job: a note on its study.
def show_search(study: optuna.Study, spec: JobSpec) -> None:
    _save_note(study, "\n".join([*_asked(spec), "", "*Searching.*"]))


def show_curve(study: optuna.Study, spec: JobSpec) -> None:
    patterns = ", ".join(map(str, spec.points))
    goal = f"**patterns** {patterns}" if spec.target is None else f"**target** {spec.target}"
    lines = [
        f"**Model** `{spec.model}`, {goal}",
        "",
        f"Sparsity and {spec.request(0).rated_by} of the trials of all patterns; those of a "
        "pattern are added when its search is confirmed. Each has its pattern, its study and its "
        "number there as attributes.",
    ]
    _save_note(study, "\n".join(lines))


def show_result(study: optuna.Study, spec: JobSpec, configuration: Configuration) -> None:
    """Write on a study, which has the mark of its result, what was found, and which trial it is."""
    mark = study.user_attrs[CHOSEN]
    where = "" if mark["study"] == study.study_name else f" of study `{mark['study']}`"
    good = configuration.headline
    tables = [
        None if good is None else verdict_table(good),
        pairs_table("The configuration", "part", configuration_rows(configuration)),
        results_table(Report.of(configuration)),
    ]
    lines = [*_asked(spec), "", f"**Best** trial {mark['trial']}{where}"]
    lines += [f"\n{table.markdown()}" for table in tables if table is not None]
    _save_note(study, "\n".join(lines))


def _asked(spec: JobSpec) -> list[str]:
    models = ", ".join(f"`{name}`" for name in spec.models)
    if spec.is_cut:
        return [f"**Model** {models}, **pattern** {spec.pattern}: every split of its share"]
    return [
        f"**Model** {models}, **pattern** {spec.pattern}, **scope** {spec.pruning().scope}",
        "",
        f"Objective {spec.request(0).objective.label}, sampler {spec.sampler}, {spec.trials} trials"
        f"{f' in each of {spec.islands} islands' if spec.islands > 1 else ''}, seed {spec.seed}, "
        f"preset {spec.preset}",
    ]


def of_layers(
    bundles: Mapping[str, ProxyBundle], candidate: Candidate, device: str
) -> dict[str, list[list[Any]]]:
    """What a candidate does to each linear by the proxy: the cells of each model."""
    layers = {}
    for name, bundle in bundles.items():
        evaluator = ProxyEvaluator(bundle, device)
        errors = evaluator.layer_errors(candidate)
        cells = layer_cells(errors, evaluator.layer_sparsities(candidate))
        layers[name] = [cell.to_list() for cell in cells]
    return layers


def _save_note(study: optuna.Study, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import save_note

        save_note(study, text)


# The search of one island: watched, counted, and ended by the limits of its job.
class TrialsFailed(PhoError):
    """More trials failed than the job allows."""

    def __init__(self, message: str, *, candidate: Candidate) -> None:
        super().__init__(message)
        self.candidate = candidate.to_dict()


class _TimeIsUp(Exception):
    """A search has used up its time; what it has found so far counts."""


class IslandSearch:
    """The search of one island, or of one of several patterns: watched and counted."""

    def __init__(
        self, store: JobStore, claim: Claim, spec: JobSpec, watch: Watch, fence: Fence
    ) -> None:
        self._store, self._claim, self._spec, self._watch = store, claim, spec, watch
        self._fence = fence
        self._began = time.monotonic()
        self._best = claim.stage.best_value
        self._failed = self._done = 0
        self._fresh = False

    @property
    def _elapsed_s(self) -> float:
        return self._claim.stage.elapsed_s + time.monotonic() - self._began

    def __call__(self, study: optuna.Study, plan: SearchPlan, rate: Evaluate) -> bool:
        """Bring the study to the plan's trials; True if its time was up before."""
        show_search(study, self._spec)
        self._done = 0
        self._failed = sum(
            t.state is optuna.trial.TrialState.FAIL for t in study.get_trials(deepcopy=False)
        )
        evaluate = self._evaluate(plan, rate)
        try:
            run_search(study, plan, evaluate, self._advance, fence=self._fence)
        except _TimeIsUp:
            return True
        return False

    def _evaluate(self, plan: SearchPlan, rate: Evaluate) -> Evaluate:
        better = min if plan.direction == "minimize" else max

        def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
            # Proxies rate a generation at once, in milliseconds; a perplexity takes seconds.
            slow = self._spec.objective.name == "perplexity"
            outcomes = []
            for some in [[candidate] for candidate in candidates] if slow else [candidates]:
                self._watch.look()
                limit = self._spec.timeout_s
                if limit is not None and self._done and self._elapsed_s > limit:
                    raise _TimeIsUp
                outcomes += rate(some)
            values = [o.value for o in outcomes if o.value is not None]
            best_before = [] if self._best is None else [self._best]
            self._best = better([*best_before, *values], default=None)
            self._check_failures(candidates, outcomes)
            self._fresh = True
            return outcomes

        return evaluate

    def _check_failures(self, candidates: Sequence[Candidate], outcomes: Sequence[Outcome]) -> None:
        failed = [i for i, outcome in enumerate(outcomes) if outcome.value is None]
        self._failed += len(failed)
        if failed and self._failed > self._spec.max_failed_trials:
            last, about = failed[-1], self._claim.stage.about
            at = "" if about is None else f" at {about}"
            raise TrialsFailed(
                f"{self._failed} trials{at} failed, more than max_failed_trials="
                f"{self._spec.max_failed_trials}. The last: {outcomes[last].failure}",
                candidate=candidates[last],
            )

    def _advance(self, count: int) -> None:
        self._done += count
        if not self._fresh:  # a trial of an earlier attempt
            return
        self._fresh = False
        state = self._store.progress(
            self._claim, done=self._done, elapsed_s=self._elapsed_s, best_value=self._best
        )
        if not state.may_work:
            raise HandBack
        self._watch.look_for_others()


# The piece of a job that writes the pruned model into the artifact store.
def prune_piece(work: SealedWork, claim: Claim, watch: Watch) -> StoredModel:
    """Prune the model of a job with what it found, as `pho prune` does, and keep the files."""
    # What an attempt before has written whole is taken up; so are the blocks that its
    # reconstruction had trained.
    began = time.monotonic()
    best = chosen(claim.job, claim.stage.about)
    text = work.calibrated_on if work.spec.sized_files else None  # while the model is dense
    folder = _written(work, best)
    if _recovery(work, best) is not None:  # tasks are measured on the folder, once it is written
        with_configuration(folder, claim.job.with_tasks(best))
    recovered = recipe_document(folder).get("recovery")
    _export(work, folder, text)
    speed = _speed(work, folder)
    files = described(folder, work.run)
    watch.look(now=True)
    work.inputs.pruned.keep(claim.job.id, folder.name, [file["name"] for file in files])
    return StoredModel(
        key=folder.name,
        files=files,
        recovery=None if recovered is None else Recovered.from_dict(shareable(recovered)),
        speed=speed,
        seconds=round(time.monotonic() - began, 3),
    )


def _written(work: SealedWork, best: Mapping[str, Any]) -> Path:
    """The folder of the pruned model, recovered if that is asked for, made unless it is there."""
    recovery, place_of = _recovery(work, best), partial(work.inputs.pruned.workplace, work.job.id)
    whole = best if recovery is None else {**best, "recovery": recovery.model_dump(mode="json")}
    folder, before = (place_of(configuration_key(model)) for model in (whole, best))
    if not (folder / RECIPE).is_file() and not (before / RECIPE).is_file():
        _prune(work, Configuration.model_validate(work.job.with_tasks(best)), before)
    if recovery is not None and not (folder / RECIPE).is_file():
        _recover(work, recovery.settings(), before, folder)
    return folder


def _recovery(work: SealedWork, best: Mapping[str, Any]) -> RecoverySpec | None:
    """How a model is recovered that was pruned so; a whole one has lost nothing."""
    cut = Configuration.model_validate(best).cut
    return None if cut is not None and cut.is_nothing else work.spec.recovery


def configuration_key(configuration: Mapping[str, Any]) -> str:
    """The name of a pruned model: the same for the same configuration of a job."""
    document = json.dumps(configuration, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def described(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file of a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = []
    with run.progress("Hashing the files", len(paths)) as advance:
        for path in paths:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            files.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256})
            advance(1)
    return files


def _prune(work: SealedWork, configuration: Configuration, folder: Path) -> None:
    try:
        with store_faults_told():
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(".pho-*"):  # of an attempt that was killed
                shutil.rmtree(left, ignore_errors=True)
            blocks = work.blocks(winner_of(configuration))
            prune_job(work, configuration, folder, memo=blocks, progress=work.run.progress)
    finally:
        work.inputs.clear()  # the model is not dense any more


def _export(work: SealedWork, folder: Path, text: CalibrationText | None) -> None:
    """Write the GGUF files that a job asks for into the folder, those that are not there yet."""
    from pho_service.pipeline.export import bundle_for, export  # slow to import

    for left in folder.glob(".pho-*"):  # of an attempt that was killed
        shutil.rmtree(left, ignore_errors=True)
    place = folder.with_name(f".{folder.name}.bits")  # what files of so many bytes share
    device, run, bundle, memo = str(work.inputs.device), work.run, None, None
    for name in work.spec.files:
        file = folder / f"{PurePath(work.spec.model).stem}-pruned-{name}.gguf"
        if file.is_file():
            continue
        most = file_bytes(name)
        gguf_type = cast("GgufType", name) if most is None else "bf16"
        with store_faults_told():
            if most is not None and bundle is None:
                assert text is not None
                path, settings = place / "bundle.safetensors", work.spec.calibration.settings()
                if not path.is_file():
                    place.mkdir(exist_ok=True)
                    made = bundle_for(folder, text, settings, device=device, progress=run.progress)
                    write_bundle(made, path)
                bundle = read_bundle(path)
                memo = Memo(folder=place, key=bundle.contents_sha256, look=run.look)
            exported = export(
                folder, file, gguf_type, most=most, bundle=bundle,
                windows=None if text is None else text.calibration, memo=memo, device=device,
                progress=run.progress,
            )  # fmt: skip
        logger.info("exported", extra={"job": str(work.job.id), "file": str(exported)})
        run.look()
    shutil.rmtree(place, ignore_errors=True)


def _speed(work: SealedWork, folder: Path) -> str | None:
    """How fast a folder is beside the dense model here, if the job cuts it for a speed."""
    from pho_service.pipeline.faster import speed_of, speed_sentence  # slow to import

    goal = work.spec.pruning().goal
    if goal is None or goal.size:
        return None
    device, dtype = str(work.inputs.device), str(work.model.dtype).removeprefix("torch.")
    with store_faults_told():
        measured = speed_of(
            lambda: work.model, work.spec.model, str(folder), goal,
            device=device, dtype=dtype, progress=work.run.progress,
        )  # fmt: skip
    return speed_sentence(goal, measured)


def _recover(work: SealedWork, settings: Recovery, before: Path, folder: Path) -> None:
    """Train a pruned folder towards the job's dense model, and write what it is then."""
    from pho_service.pipeline.recover import PrunedModel, recover_folder  # slow to import

    @contextmanager
    def dense() -> Iterator[LanguageModel]:
        yield work.model
        work.inputs.clear()  # the room is needed

    text, run = work.recovery_text, work.run
    pruned = PrunedModel.read(before, **work.inputs.placing(work.spec))
    with store_faults_told():
        recover_folder(pruned, dense, text, settings, folder, run=run)


def remove_if_deleted(store: JobStore, inputs: WorkerInputs, job: JobRecord) -> None:
    """A job that was deleted meanwhile leaves nothing behind."""
    try:
        store.get(job.id)
    except NoSuchJob:
        inputs.pruned.remove(job.id)


# The pieces of a job that measure its dense model, and the pruned one, on zero-shot tasks.
DENSE, PRUNED = 0, 1  # the numbers of the pieces


def tasks_piece(work: SealedWork, number: int, check: Callable[[str], None]) -> TasksMeasured:
    """Measure one of the two models of a job on its tasks, as `pho evaluate --tasks` does."""
    # The pruned one is pruned as `pho prune` does it; blocks that a reconstruction has trained are
    # kept for another attempt, and for the piece that writes the pruned model.
    began = time.monotonic()
    tasks = work.inputs.tasks(work.spec)
    questions = tasks.questions_sha256()
    check(questions)
    if number == DENSE:
        measured = _measured(work, work.model, tasks)
        work.check()
    else:
        measured = _pruned(work, tasks)
    return TasksMeasured(
        **measured, questions_sha256=questions, seconds=round(time.monotonic() - began, 3)
    )


def check_tasks(questions: str, job: JobRecord) -> None:
    """Raise ChangedInput if the other model of the job was measured on other examples."""
    others = [stage.result or {} for stage in job.of_kind(StageKind.TASKS)]
    if any(other.get("questions_sha256", questions) != questions for other in others):
        raise ChangedInput(
            f"the examples of {', '.join(job.spec['tasks'])} have changed since the other model of "
            "the job was measured on them: the two cannot be compared. Put the former ones "
            "back and resume the job, or submit it again."
        )


def _pruned(work: SealedWork, tasks: LoadedTasks) -> dict[str, Any]:
    best = chosen(work.job, None)
    if _recovery(work, best) is not None:  # that model is what the user gets
        folder = _written(work, best)
        work.inputs.clear()  # the room is needed
        return _measured(work, load_model(str(folder), **work.inputs.placing(work.spec)), tasks)
    configuration = Configuration.model_validate(best)
    model, blocks = work.model, work.blocks(winner_of(configuration))
    dtype = model.dtype
    try:
        prune_in_place(work, configuration, memo=blocks, progress=work.run.progress)
        model.model.to(dtype)  # type: ignore[arg-type]  # rounded as it is stored, and read again
        measured = _measured(work, model, tasks)
    finally:
        work.inputs.clear()  # the model is not dense any more
    if blocks is not None and not work.spec.prune:
        blocks.remove()
    return measured


def _measured(work: SealedWork, model: LanguageModel, tasks: LoadedTasks) -> dict[str, Any]:
    """What a model scored, and how."""
    how: dict[str, Any] = {"bos": work.spec.calibration.bos, "limit": work.spec.tasks_limit}
    scores: Sequence[TaskScore] = measure_tasks(model, tasks, **how, progress=work.run.progress)
    document = tasks_document(model, scores, **how)
    kept = {name: document[name] for name in ("limit", "bos", "versions")}
    return {"scores": [*scores], **kept}


# The pieces of a transfer: each measures a configuration on one model.
def failed(name: str, error: PhoError) -> Transfer:
    """The result of a model that nothing was measured on, for a reason that a user can act on."""
    reason = {"type": type(error).__name__, "message": str(error)}
    return Transfer(target=name, key="", error=reason, warnings=[f"{name}: {error}"])


def check_report(result: dict[str, Any], job: JobRecord) -> dict[str, Any]:
    """The result of a model; a failed one if others of the job have another report text."""
    report = _report_sha256(result)
    for stage in job.of_kind(StageKind.TRANSFER):
        other = stage.result or {}
        if report is not None and _report_sha256(other) not in (None, report):
            error = ChangedInput(
                f"the report text has changed since {other['target']} was measured: the numbers "
                "of the two models could not be compared. Transfer to this model again, as a job "
                "of its own, or to all of them."
            )
            return failed(result["target"], error).to_dict()
    return result


def _report_sha256(result: Mapping[str, Any]) -> str | None:
    """Hash of the whole text, whatever a model's tokenizer makes of it."""
    report = result.get("report") or {}
    sha256: str | None = report.get("text", {}).get("sha256")
    return sha256


def transfer_piece(
    spec: TransferSpec, inputs: WorkerInputs, number: int, watch: Watch, run: Run
) -> Transfer:
    target, search = spec.target(number), None
    if spec.search is None:
        target = target.model_copy(update={"confirm": None})  # nothing is confirmed
    else:
        finalists = spec.search.confirm.finalists
        search = own_search(spec.found(), spec.search, finalists=finalists)
    seal = inputs.seal(target)
    bundle = inputs.calibrate(target, seal, run.progress)
    watch.look(now=True)
    transfer = transfer_job(
        target.model,
        Work(
            bundles={target.model: bundle},
            dense=inputs.model(target, seal),
            calibration=inputs.calibration_text(target, seal).calibration,
            confirm=inputs.confirmation_text(target, seal) if spec.search else None,
            report=inputs.report_text(target, spec.report, seal) if spec.report else None,
        ),
        spec.found(),
        search=search,
        run=Run(device=run.device, progress=run.progress, look=watch.look),  # its study is not kept
    )
    inputs.model(target, seal)  # its files were read all the time, also if it was not streamed
    return transfer


# The calibrate stages of a job: one for each model; large ones are shared out in parts.
PARTS, WHOLES = 1_000_000, 2_000_000  # parts, and what adds them up, have numbers from here


def calibrate_piece(
    inputs: WorkerInputs, spec: JobSpec, whole: JobSpec, before: Calibration | None, run: Run
) -> Calibration:
    """Calibrate a model, or say in how many parts that is to be done; ``before`` said so."""
    # Reads all texts, and what is missing fails before the search.
    began = time.monotonic()
    if spec.tasks is not None and harness_folder() is not None:
        inputs.tasks(spec)
    types = [cast("GgufType", name) for name in spec.gguf if file_bytes(name) is None]
    converter = converter_for(types) if spec.files else None
    seal = inputs.seal(spec, Seal() if before is None else Seal(**before.inputs))
    if converter is not None and before is None:
        check_vocabulary(inputs.model(spec, seal), converter)
        for most in filter(None, map(file_bytes, spec.files)):
            check_room(inputs.model(spec, seal), most, spec.points[0])
    model, linears = inputs.model(spec, seal), whole.request(0).steps.linears
    check_patterns(model, whole.points, linears)
    text = inputs.calibration_text(spec, seal)
    recovers = spec.recovery is not None and not spec.recovers_in_rest
    if recovers and spec.model == whole.model and before is None:
        _check_recovery(inputs, spec, seal)
    if before is None and not inputs.bundles.has(text.bundle_key):
        shards = len(cut(text, spec.calibration.settings(), stream=spec.stream))
        if shards > 1:
            return Calibration(
                inputs=seal.to_dict(), shards=shards, key=text.bundle_key, device=inputs.device.type
            )
    bundle = inputs.calibrate(spec, seal, run.progress)
    inputs.model(spec, seal)  # its files were read all the time
    return Calibration(
        provenance=dict(bundle.provenance),
        inputs=seal.to_dict(),
        seconds=round(time.monotonic() - began, 3),
    )


def _check_recovery(inputs: WorkerInputs, spec: JobSpec, seal: Seal) -> None:
    """See that the model of a job can be recovered when it is pruned."""
    from pho_service.pipeline.recover import check_recoverable  # slow to import

    model, settings = inputs.model(spec, seal), spec.recovery_settings()
    assert settings is not None
    linears = spec.request(0).steps.linears
    pruned = linears.choose(list(model.linears), spec.points[0], model=model.name).names
    text = inputs.recovery_text(spec, seal)
    check_recoverable(model, pruned, text, settings, inputs.pruned.free())


def rest_piece(work: SealedWork, clock: Clock) -> Rest:
    """The minutes that a job leaves for the recovery of what it has pruned."""
    return Rest.of(clock, lambda: _check_recovery(work.inputs, work.spec, work.seal))


def shards_of(first: Sequence[Calibration]) -> list[Piece]:
    """A piece for each part; one that two jobs need is gathered by one after the other."""
    return [
        Piece(
            number=PARTS + model * SHARDS + shard,
            about={"part_of": model},
            lock=f"shard {shard} of {one.key}",
        )
        for model, one in enumerate(first)
        for shard in range(one.shards)
    ]


def gather_shard(
    inputs: WorkerInputs, spec: JobSpec, one: Calibration, shard: int, run: Run
) -> Gathered:
    """Gather the sums of a shard, if nobody has yet, and keep them for who adds up."""
    # A worker that would give other last digits, since it has another kind of device or other
    # versions of packages, leaves the shard to the one that adds up.
    began, made = time.monotonic(), False
    bundles, key = inputs.bundles, str(one.key)
    # In this order: sums are removed as soon as the bundle that they became is there.
    there = bundles.sums(key, shard) is not None or bundles.has(key)
    if not there and one.device == inputs.device.type:
        seal = Seal(**one.inputs)
        text = inputs.calibration_text(spec, seal)
        if text.bundle_key == key:
            model = inputs.model(spec, seal)
            sums = measure_shard(model, text, spec.calibration.settings(), shard, run.progress)
            model.check_unchanged()
            bundles.keep_sums(key, shard, sums)
            made = True
    if not there and not made:
        logger.warning("shard %d is left to the worker that adds up", shard)
    return Gathered(made=made, seconds=round(time.monotonic() - began, 3))


# A job that begins with what the library has for similar models.
def warmed(
    database: Database, job: JobRecord, spec: JobSpec, model: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The document with what the library has to begin with; None if it is not asked."""
    if spec.warm_start is None or spec.warm_start.found is not None:
        return None
    facts = ModelFacts.of({} if spec.more_models else model)
    pattern = spec.pruning()
    wanted = Wanted(
        pattern=pattern,
        scope_matters=True,
        family=facts.family,
        parameters=facts.parameters,
    )
    stored = ConfigurationStore(database).all(pattern=str(pattern), visible_to=job.owner_id)
    files = {str(entry.id): stored_file(entry.document, entry.transfers) for entry in stored}
    matches = rank([Entry.of(name, file) for name, file in files.items()], wanted)
    room = spec.trials - len(spec.plan(0).baselines())
    chosen = [m for m in matches if m.fits and m.entry.method == "crepe"]
    warm_points = [
        WarmPoint(
            id=match.entry.id,
            coefficients=files[match.entry.id].configuration.candidate().coefficients,
            allocation=files[match.entry.id].configuration.steps.allocation,
            reasons=[*match.reasons],
        )
        for match in chosen[: min(spec.warm_start.count, room)]
    ]
    logger.info("warm start", extra={"job": str(job.id), "found": len(warm_points)})
    warm = spec.warm_start.model_copy(update={"found": warm_points})
    return spec.model_copy(update={"warm_start": warm}).model_dump(mode="json")


def started(spec: JobSpec, configuration: Configuration) -> list[str]:
    """What a search began with, in a sentence; none if that was not asked."""
    if fork := configuration.search.get("fork"):
        return [fork_in_words(fork)]
    if spec.warm_start is not None and not spec.warm_start.found:
        return [
            f"Warm start: the library had nothing for {spec.pattern} in this scope; the search "
            "began cold."
        ]
    warm_start = configuration.warm_start
    return [f"Warm start: {warm_start}."] if warm_start else []
