"""
The stages of a job. Each can be done again after a crash, and takes up what is stored.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from torch import Tensor

from pho_service.errors import ChangedInput, NumericalError
from pho_service.host.faults import faults_told
from pho_service.pipeline.joint_search import with_each_model
from pho_service.pipeline.rating import Comparison, comparing_pays, rate_pruned
from pho_service.pipeline.search import compared_with_cold, objective_function, origin_of
from pho_service.pipeline.validate import rate_by_all_proxies
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.report.layers import layer_cells
from pho_service.search.finalists import (
    Divergences,
    best_by_divergence,
    finalists,
    measure_once,
    united,
)
from pho_service.search.plan import Evaluate, RatedCandidate
from pho_service.search.result import describe_study, mark_chosen, search_result
from pho_service.search.search import ranked
from pho_service.search.validation import qualities, random_candidates, verdict
from pho_service.search.warm_start import Saving
from pho_service.spec.candidate import Candidate
from pho_service.spec.configuration import Confirmation
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import Objective
from pho_service.spec.quality import ProxyQuality
from pho_service.spec.steps import Steps
from storage.database import Database
from storage.jobs import JobStore
from storage.records import Claim, Job, NewStage
from storage.states import StageKind
from storage.studies import open_storage, open_study, study_name
from workers.board import confirmed_plot, error_plot, show_result, show_search
from workers.calibrations import calibrate_part, calibrated
from workers.inputs import Inputs
from workers.island_search import IslandSearch
from workers.seal import Seal
from workers.transfers import transfer_stage
from workers.warm_start import started, warmed
from workers.watch import Watch

logger = logging.getLogger(__name__)

VALIDATION = 10_000_000  # perplexities of a validation have numbers from here, trials below


class Stages:
    """
    Does stages, one at a time.

    Args:
        store: Of the jobs.
        inputs: Of this worker.
        stopping: Set when the worker is to stop: the stage is put down.
    """

    def __init__(self, store: JobStore, inputs: Inputs, stopping: threading.Event) -> None:
        self.store = store
        self.inputs = inputs
        self.stopping = stopping

    def run(self, claim: Claim) -> None:
        """
        Do a stage, and store what it gave.

        Raises:
            HandBack: It was put down; nothing is lost.
            LostClaim: Another worker has it.
            DeviceLost: The GPU failed; another process may do it.
            PhoError: The user can act on it; another attempt does not help.
            Exception: Anything else; another attempt may help.
        """
        with faults_told():
            self._run(claim)

    def _run(self, claim: Claim) -> None:
        watch = Watch(self.store, claim, self.stopping)
        if claim.stage.kind is StageKind.TRANSFER:
            transfer_stage(self.store, self.inputs, claim, watch)
            return
        run = {
            StageKind.CALIBRATE: self._calibrate,
            StageKind.SEARCH: self._search,
            StageKind.CONFIRM: self._confirm,
            StageKind.PERPLEXITY: self._perplexity,
            StageKind.FINISH: self._finish,
        }[claim.stage.kind]
        run(claim, JobSpec.model_validate(claim.job.spec), watch)

    @property
    def _database(self) -> Database:
        return self.store.database

    def _calibrate(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        whole = claim.stage.part_of
        mine = spec.of_model(claim.stage.number if whole is None else whole)
        if whole is not None:
            calibrate_part(self.store, self.inputs, claim, mine, watch)
            return
        began = time.monotonic()
        # Reads all texts: one that is missing fails before the search.
        found = calibrated(self.store, self.inputs, claim, mine, watch)
        if found is None:
            return
        bundle, seal = found
        self._check_again(mine, seal)
        bundle.choose(spec.plan(0).steps.linears, spec.pruning())
        self.store.complete(
            claim,
            {
                "provenance": bundle.provenance,
                "inputs": seal.to_dict(),
                "seconds": round(time.monotonic() - began, 3),
            },
            then=[NewStage(kind=StageKind.SEARCH, number=i) for i in range(spec.islands)],
            spec=warmed(self._database, claim.job, spec, bundle.provenance.get("model", {})),
        )

    def _search(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        island = claim.stage.number
        rate = self._rating(claim.job, spec, island, watch)
        search = IslandSearch(self.store, claim, spec, watch)
        with open_storage(self._database.studies_url) as storage:
            name = study_name(claim.job.name, island)
            study = open_study(storage, name, direction=spec.plan(island).direction)
            describe_study(study, spec.request(island), spec.plan(island), _provenance(claim.job))
            show_search(study, spec)
            while True:
                search.run(storage, study, spec.plan(island), rate)
                if spec.objective.name == "perplexity":
                    self._check_again(spec, Seal.of_job(claim.job, 0))
                saving = compared_with_cold(
                    spec.request(island),
                    spec.plan(island),
                    ranked(study, spec.plan(island)),
                    rate,
                    watch.progress,
                )
                if self.store.complete(
                    claim,
                    {
                        "trials": search.done,
                        "out_of_time": search.out_of_time,
                        **({} if saving is None else {"saving": saving.to_dict()}),
                    },
                    then=[NewStage(kind=StageKind.CONFIRM)],
                    trials=None if search.out_of_time else spec.trials,
                ):
                    return
                spec = JobSpec.model_validate(self.store.get(claim.job.id).spec)  # extended

    def _rating(self, job: Job, spec: JobSpec, island: int, watch: Watch) -> Evaluate:
        """What the candidates of a search are rated by."""
        objective = spec.request(island).objective
        device = str(self.inputs.device)
        bundles = self._bundles(job, spec, watch)
        model = text = calibration = None
        if objective.name == "perplexity":
            seal = Seal.of_job(job, 0)
            model, text = self.inputs.model(spec, seal), self.inputs.confirmation_text(spec, seal)
            calibration = self._calibration(spec, seal, spec.plan(island).steps)
        return objective_function(
            objective, spec.plan(island), bundles, model, text, device, calibration
        )

    def _confirm(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        watch.look()
        chosen: list[RatedCandidate] = []
        compared = Divergences()
        if spec.confirm is not None and spec.objective.name != "perplexity":
            rated = self._rated(claim.job, spec)
            chosen = finalists(rated, spec.confirm.candidates)
            before = [r for r in rated if r.number in _measured_before(claim.job)]
            compared = self._compared(claim, spec, watch, united(rated, chosen, before))
            if compared.by_number:
                chosen = best_by_divergence(chosen, compared.by_number)
            chosen = united(rated, chosen, before)
        self.store.complete(
            claim,
            {
                "finalists": [rated.number for rated in chosen],
                "divergences": {str(number): d for number, d in compared.by_number.items()},
                "divergence_tokens": compared.tokens,
            },
            add=[
                *(_measurement(rated.number, rated.candidate) for rated in chosen),
                *(_measurement(VALIDATION + i, c) for i, c in enumerate(_random(spec))),
            ],
            then=[NewStage(kind=StageKind.FINISH)],
        )

    def _compared(
        self, claim: Claim, spec: JobSpec, watch: Watch, chosen: Sequence[RatedCandidate]
    ) -> Divergences:
        """
        How far candidates are from the dense model; nothing where that saves no perplexity.

        Each is kept in the study of its island at once, so another attempt goes on.
        """
        if not comparing_pays([c.candidate for c in chosen], stream=spec.stream):
            return Divergences()
        seal = Seal.of_job(claim.job, 0)
        model, text = self.inputs.model(spec, seal), self.inputs.confirmation_text(spec, seal)
        bundle = self._bundle(claim.job, spec, watch)
        divergences = {}
        with (
            open_storage(self._database.studies_url) as storage,
            watch.progress("Comparing with the dense model", len(chosen)) as advance,
        ):
            studies = [
                optuna.load_study(study_name=study_name(claim.job.name, island), storage=storage)
                for island in range(spec.islands)
            ]
            compare = Comparison(model, bundle.statistics(), text, advance)
            for rated in chosen:
                watch.look()
                number, island = divmod(rated.number, spec.islands)
                try:
                    divergences[rated.number] = measure_once(
                        studies[island],
                        "divergence",
                        number,
                        rated.candidate,
                        compare,
                        text_sha256=compare.key,
                        fence=lambda: self.store.fence(claim, storage),
                    )
                except NumericalError as error:
                    failed = rated.candidate.to_dict()
                    raise NumericalError(str(error), layer=error.layer, candidate=failed) from error
        self._check_again(spec, seal)
        return Divergences(by_number=divergences, tokens=compare.tokens)

    def _perplexity(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        given = (claim.stage.params or {})["candidate"]
        candidate = Candidate.from_dict(given, spec.pruning())
        seal = Seal.of_job(claim.job, 0)
        model = self.inputs.model(spec, seal)
        text = self.inputs.confirmation_text(spec, seal)
        calibration = self._calibration(spec, seal, candidate.steps)
        bundle = self._bundle(claim.job, spec, watch)
        started = time.monotonic()
        with watch.progress("Measuring", len(text.windows)) as advance:
            rating, sparsity = rate_pruned(
                model,
                bundle.statistics(),
                candidate,
                text.windows,
                advance,
                calibration=calibration,
            )
        self._check_again(spec, seal)
        result = {
            "perplexity": rating.perplexity,
            "sparsity": sparsity,
            "seconds": round(time.monotonic() - started, 3),
            "measured_on": text.measured_on(),
            "text_sha256": text.key,
            "weights_sha256": seal.weights_sha256,
        }
        self.store.complete(claim, result, then=[NewStage(kind=StageKind.FINISH)])

    def _finish(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        job = claim.job
        rated = self._rated(job, spec)
        measured, confirmation, compared = self._measured(job, spec, rated)
        searches = [s.result or {} for s in job.of_kind(StageKind.SEARCH)]
        finished = sum(int(s["trials"]) for s in searches)
        out_of_time = any(s["out_of_time"] for s in searches)
        saving = searches[0].get("saving")  # of the first island
        ended = finished < spec.trials * spec.islands and not out_of_time
        result = search_result(
            spec.request(0),
            spec.plan(0),
            _provenance(job),
            study_name(job.name, 0),
            rated,
            measured,
            confirmation,
            compared,
            ended_after=finished if ended else None,
            saving=None if saving is None else Saving(**saving),
        )
        if spec.more_models:
            result = with_each_model(result, self._relative(job, spec, rated[0]))
        configuration = result.configuration
        trial, island = divmod(result.trial, spec.islands)
        if spec.islands > 1:
            configuration = configuration.model_copy(
                update={
                    "search": {
                        **configuration.search,
                        "islands": spec.islands,
                        "island": island,
                        "study": study_name(job.name, island),
                    }
                }
            )
        if out_of_time:
            search = {**configuration.search, "timeout_s": spec.timeout_s, "finished": finished}
            configuration = configuration.model_copy(update={"search": search})
        bundles = self._bundles(job, spec, watch)
        bundle = bundles[spec.model]
        errors, layers = {}, {}
        for number, (name, each) in enumerate(bundles.items()):
            evaluator = ProxyEvaluator(each, str(self.inputs.device))
            of_layers = evaluator.layer_errors(configuration.candidate())
            errors[f"errors-{number}" if number else "errors"] = error_plot(
                of_layers, name if spec.more_models else ""
            )
            cells = layer_cells(of_layers, evaluator.layer_sparsities(configuration.candidate()))
            layers[name] = [cell.to_list() for cell in cells]
        with open_storage(self._database.studies_url) as storage:
            for each_island in range(spec.islands):
                name = study_name(job.name, each_island)
                study = optuna.load_study(study_name=name, storage=storage)
                here = [(p, r) for p, r in measured if r.number % spec.islands == each_island]
                plots = {**errors, "confirmed": confirmed_plot(configuration, here)}
                with self.store.fence(claim, storage):
                    mark_chosen(study, configuration, study_name(job.name, island), trial)
                    show_result(study, spec, configuration, here, plots)
        warnings = [*result.warnings, *started(spec, configuration), *_remade(job, bundles)]
        found: dict[str, Any] = {"layers": layers}
        if spec.validation is not None:
            judged = self._validated(job, spec, bundle)
            found["validation"] = {name: asdict(q) for name, q in judged.items()}
            doubt = verdict(Objective().label, judged[Objective().label])
            warnings = [*warnings, *([doubt] if doubt else [])]
        self.store.succeed(
            claim, best=configuration.model_dump(mode="json"), warnings=warnings, result=found
        )

    def _validated(self, job: Job, spec: JobSpec, bundle: ProxyBundle) -> dict[str, ProxyQuality]:
        """How well each proxy ranks the random candidates."""
        assert spec.validation is not None
        measured = {s.number: s.result for s in job.of_kind(StageKind.PERPLEXITY) if s.result}
        candidates = _random(spec)
        perplexities = [
            float(measured[VALIDATION + i]["perplexity"]) for i in range(len(candidates))
        ]
        proxies = rate_by_all_proxies(bundle, candidates, device=str(self.inputs.device))
        return qualities(proxies, perplexities, seed=spec.validation.seed)

    def _check_again(self, spec: JobSpec, seal: Seal) -> None:
        """
        Compare the model once more, if its files have changed: they were read all the time.

        Not only a streamed model's: on a CPU, weights in their stored type are the file's own
        pages, and change with it when somebody writes into it.
        """
        self.inputs.model(spec, seal)

    def _calibration(self, spec: JobSpec, seal: Seal, steps: Steps) -> Tensor | None:
        """The windows of the calibration, for steps that need them."""
        if not steps.needs_text:
            return None
        return self.inputs.calibration_text(spec, seal).calibration

    def _bundle(self, job: Job, spec: JobSpec, watch: Watch) -> ProxyBundle:
        """Of a job's only model."""
        return self._bundles(job, spec, watch)[spec.model]

    def _bundles(self, job: Job, spec: JobSpec, watch: Watch) -> dict[str, ProxyBundle]:
        """Of all models of a job."""
        return {
            name: self.inputs.bundle(
                spec.of_model(i), Seal.of_job(job, i), str(provenance["key"]), watch.progress
            )
            for i, (name, provenance) in enumerate(zip(spec.models, _provenances(job), strict=True))
        }

    def _relative(self, job: Job, spec: JobSpec, best: RatedCandidate) -> dict[str, float]:
        """The proxy of a candidate on each model, RIA's being 1."""
        number, island = divmod(best.number, spec.islands)
        with open_storage(self._database.studies_url) as storage:
            study = optuna.load_study(study_name=study_name(job.name, island), storage=storage)
            (trial,) = (t for t in study.get_trials(deepcopy=False) if t.number == number)
            relative: dict[str, float] = trial.user_attrs["relative_to_ria"]
            return relative

    def _rated(self, job: Job, spec: JobSpec) -> list[RatedCandidate]:
        """
        The trials of all islands, best first, with numbers that are theirs alone.

        The baselines are the same in each island: only those of the first count.
        """
        rated = []
        with open_storage(self._database.studies_url) as storage:
            for island in range(spec.islands):
                study = optuna.load_study(study_name=study_name(job.name, island), storage=storage)
                rated += [
                    RatedCandidate(
                        number=r.number * spec.islands + island,
                        candidate=r.candidate,
                        params=r.params,
                        value=r.value,
                    )
                    for r in ranked(study, spec.plan(island))
                    if island == 0 or r.candidate.method == "crepe"
                ]
        sign = 1 if spec.plan(0).direction == "minimize" else -1
        return sorted(rated, key=lambda r: (sign * r.value, r.number))

    def _measured(
        self, job: Job, spec: JobSpec, rated: Sequence[RatedCandidate]
    ) -> tuple[list[tuple[float, RatedCandidate]], Confirmation | None, Divergences]:
        """What was confirmed, best first, and how; and what was compared before."""
        if spec.objective.name == "perplexity":
            text = self.inputs.confirmation_text(spec, Seal.of_job(job, 0))
            measured = [(r.value, r) for r in rated]
            how = Confirmation(perplexity=rated[0].value, **text.measured_on())
            return measured, how, Divergences()
        stages = {s.number: s.result for s in job.of_kind(StageKind.PERPLEXITY) if s.result}
        (planned,) = (s.result or {} for s in job.of_kind(StageKind.CONFIRM))
        compared = Divergences(
            by_number={int(n): float(d) for n, d in planned.get("divergences", {}).items()},
            tokens=planned.get("divergence_tokens"),
        )
        chosen = set(planned.get("finalists", ()))
        _check_alike(stages)
        measured = [(float(stages[r.number]["perplexity"]), r) for r in rated if r.number in chosen]
        measured.sort(key=lambda pair: pair[0])
        if not measured:
            return [], None, compared
        measured_on = {
            **stages[measured[0][1].number]["measured_on"],
            "divergence_tokens": compared.tokens,
        }
        return measured, Confirmation(perplexity=measured[0][0], **measured_on), compared


def _measured_before(job: Job) -> set[int]:
    """The trials that have a perplexity from before the job was extended: they stay finalists."""
    done = (s.number for s in job.of_kind(StageKind.PERPLEXITY) if s.result)
    return {number for number in done if number < VALIDATION}


def _remade(job: Job, bundles: Mapping[str, ProxyBundle]) -> list[str]:
    """What to know of a job whose bundle was lost when PHO was upgraded in the middle of it."""
    keys = [str(provenance["key"]) for provenance in _provenances(job)]
    if keys == [bundle.key for bundle in bundles.values()]:
        return []
    return [
        "the bundle that an older PHO had made was lost, and this one made it again of the same "
        "weights and text: trials before and after differ by how the bundles were made. Submit "
        "the job anew for a search on one bundle."
    ]


def _random(spec: JobSpec) -> list[Candidate]:
    """The candidates of a validation; none if it was not asked for."""
    if spec.validation is None:
        return []
    plan = spec.plan(0)
    return random_candidates(
        plan.space,
        plan.pattern,
        count=spec.validation.candidates,
        seed=spec.validation.seed,
        linears=plan.steps.linears,
    )


def _measurement(number: int, candidate: Candidate) -> NewStage:
    """A stage that measures the perplexity of a candidate."""
    params = {"candidate": candidate.to_dict()}
    return NewStage(kind=StageKind.PERPLEXITY, number=number, params=params)


def _check_alike(stages: Mapping[int, Mapping[str, Any]]) -> None:
    """
    Raises:
        ChangedInput: Perplexities are of several texts or weights, which an older version did
            not prevent.
    """
    for what, key in (("texts", "text_sha256"), ("weights", "weights_sha256")):
        found = {stage[key] for stage in stages.values() if stage.get(key) is not None}
        if len(found) > 1:
            raise ChangedInput(
                f"the perplexities of this job were measured on {len(found)} different {what}: a "
                "file changed meanwhile. They cannot be compared. Submit the job anew."
            )


def _provenances(job: Job) -> list[dict[str, Any]]:
    """What the calibration of each model wrote down."""
    return [(stage.result or {})["provenance"] for stage in job.of_kind(StageKind.CALIBRATE)]


def _provenance(job: Job) -> dict[str, Any]:
    """The same of all models together."""
    return origin_of(_provenances(job))
