"""
What a job works on, in a service: opened when it is needed, and as its calibrations have read it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pho_service.errors import OutputError
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import Memo
from pho_service.models.texts import RecoveryText, ReportText
from pho_service.pipeline.blocks import blocks_kept
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.job import JobSpec
from pho_service.spec.results import Calibration
from pho_service.spec.steps import Candidate
from pho_service.spec.structure import Structure
from storage.records import JobRecord
from workers.inputs import Seal, WorkerInputs


class SealedWork(Work):
    """Models, texts and bundles of a job, compared with its seals whenever they are read."""

    def __init__(
        self,
        inputs: WorkerInputs,
        job: JobRecord,
        spec: JobSpec,
        calibrations: Sequence[Calibration],
        run: Run,
    ) -> None:
        self.inputs, self.job, self.spec, self.run = inputs, job, spec, run
        self.keeps_blocks = bool(spec.prune or spec.tasks or job.pruning)  # what prunes needs them
        self._keys = [str(calibration.provenance["key"]) for calibration in calibrations]
        self._seals = [Seal(**calibration.inputs) for calibration in calibrations]

    @property
    def bundles(self) -> dict[str, ProxyBundle]:
        """The bundles of all models, by name."""
        return {
            name: self.inputs.bundle(self.spec.of_model(i), seal, key, self.run.progress)
            for i, (name, seal, key) in enumerate(
                zip(self.spec.models, self._seals, self._keys, strict=True)
            )
        }

    @property
    def bundle(self) -> ProxyBundle:
        return self.bundles[self.spec.model]

    @property
    def dense(self) -> LanguageModel:
        return self.inputs.model(self.spec, self._seals[0])

    @property
    def confirm(self) -> ReportText | None:
        """What perplexities are measured on; None if nothing is confirmed."""
        if self.spec.confirm is None:
            return None
        return self.inputs.confirmation_text(self.spec, self._seals[0])

    @property
    def report(self) -> ReportText | None:
        """What the result is reported on; None if it is not."""
        if self.spec.report is None:
            return None
        return self.inputs.reported_text(self.spec, self._seals[0])

    @property
    def calibrated_on(self) -> CalibrationText:
        """The text that its first model was calibrated on."""
        return self.inputs.calibration_text(self.spec, self._seals[0])

    @property
    def calibration(self) -> Tensor:
        return self.calibrated_on.calibration

    @property
    def seal(self) -> Seal:
        """What the files of its first model have to be."""
        return self._seals[0]

    @property
    def recovery_text(self) -> RecoveryText:
        return self.inputs.recovery_text(self.spec, self._seals[0])

    @property
    def measures(self) -> bool:
        return self.spec.confirm is not None

    def opened(self) -> Work:
        return _Opened(
            bundles={self.spec.model: self.bundle},
            dense=self.dense,
            confirm=self.confirm,
            report=self.report,
            calibration=self.calibration,
            sealed=self,
        )

    def blocks(self, winner: Candidate | Structure) -> Memo | None:
        """Where the winner's trained or cut blocks wait for what is done with the pruned model."""
        # If nothing prunes the model later, they are there so that another attempt goes on, or
        # another job may have its turn.
        if not isinstance(winner, Structure) and not winner.steps.reconstruction.wanted:
            return None  # neither the model nor its text is needed

        def folder(key: str) -> Path:
            place = self.inputs.pruned.workplace(self.job.id, key[:16])
            if self.keeps_blocks:
                with store_faults_told():
                    place.parent.mkdir(parents=True, exist_ok=True)
            return place.with_name(f".{place.name}.blocks")

        memo = blocks_kept(self.model, self.bundle, winner, self.calibration, folder)
        return memo and replace(memo, look=self.run.look, spare=not self.keeps_blocks)

    def forget_blocks(self) -> None:
        """Remove the trained blocks of a job that nothing will prune."""
        if not self.keeps_blocks:
            self.inputs.pruned.remove(self.job.id)

    def check(self) -> str | None:
        """Compare the model once more, if its files have changed: they were read all the time."""
        # Not only a streamed model's: on a CPU, weights in their stored type are the file's own
        # pages, and change with it when somebody writes into it.
        return self.inputs.weights_sha256(self.spec, self._seals[0])


@dataclass(frozen=True, kw_only=True)
class _Opened(Work):
    """What was read of a job's work, for measurements that do not read it again each time."""

    sealed: SealedWork

    def blocks(self, winner: Candidate | Structure) -> Memo | None:
        return self.sealed.blocks(winner)

    def check(self) -> str | None:
        return self.sealed.check()


@contextmanager
def store_faults_told() -> Iterator[None]:
    """Inside, an artifact store that is full or away raises OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the artifact store cannot be written: {error.strerror or error}. See that there is "
            "room, and that it can be reached; then resume the job."
        ) from error
