"""
What stages work with: models, texts and bundles, the last of each kept for the next stage.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pho_service.errors import BundleError, ChangedInput, TextError
from pho_service.host.access import Access, check_data_file
from pho_service.host.artifacts import PrunedStore
from pho_service.models.calibration import CalibrationText, calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.task_files import LoadedTasks, load_tasks
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline.rating import ReportText
from pho_service.progress import Progress
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.fields import TextSpec
from pho_service.spec.job import JobSpec
from pho_service.spec.transfer import ReportSpec
from workers.bundles import BundleStore
from workers.seal import Seal

T = TypeVar("T")

UNSEALED = Seal()


class _Last(Generic[T]):
    """The value of the last key; another key's is made again, after the old one is let go."""

    def __init__(self) -> None:
        self._keys: tuple[Hashable, ...] = ()
        self._value: T | None = None

    def get(
        self, key: Hashable, make: Callable[[], T], alias: Callable[[T], Hashable] | None = None
    ) -> T:
        """
        Return the value, made if it is another key's.

        Args:
            key: Names the value.
            make: Makes it.
            alias: Gives another key for the value that was made.
        """
        if self._value is None or key not in self._keys:
            self._value = None  # before the next is made: two models may not fit
            value = make()
            self._keys = (key,) if alias is None else (key, alias(value))
            self._value = value
        return self._value

    def clear(self) -> None:
        self._value = None


@dataclass(frozen=True, kw_only=True)
class _FileState:
    """Tells whether a file or a folder's files are those of last time."""

    files: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, name: str) -> "_FileState":
        path = Path(name)
        found = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
        return cls(files=tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in found))


class Inputs:
    """
    Args:
        access: What jobs may name on this machine.
        bundles: Shared by all workers.
        pruned: Where pruned models are kept, shared with the API.
        device: Where models run.
        spread: Whether they lie on all GPUs together, of which ``device`` is the first. Streamed
            models and GGUF files need only that.
    """

    def __init__(
        self,
        access: Access,
        bundles: BundleStore,
        pruned: PrunedStore,
        device: torch.device,
        *,
        spread: bool = False,
    ) -> None:
        self.access = access
        self.bundles = bundles
        self.pruned = pruned
        self.device = device
        self.spread = spread
        self._model: _Last[LanguageModel] = _Last()
        self._cast: _Last[str] = _Last()
        self._bundle: _Last[ProxyBundle] = _Last()
        self._calibration: _Last[CalibrationText] = _Last()
        self._confirmation: _Last[ReportText] = _Last()
        self._tasks: _Last[LoadedTasks] = _Last()

    def clear(self) -> None:
        """Let everything go: after an error nobody knows what state a model is in."""
        for kept in (self._model, self._bundle, self._calibration, self._confirmation):
            kept.clear()

    def model(self, spec: JobSpec, seal: Seal = UNSEALED) -> LanguageModel:
        """
        The dense model of a job.

        Args:
            spec: The job, with one model.
            seal: What was read before. A hub model without a revision is that commit's.

        Raises:
            InvalidInput: It may not be named here.
            ModelError, NumericalError: It cannot be loaded.
            ChangedInput: It is not the one that was read before.
        """
        source = self.access.model(spec.model)
        local = _is_local(source)
        seal.check_place(spec.model, local=local)
        revision = spec.revision or (None if local else seal.revision)
        state = _FileState.of(source)

        def key(revision: str | None) -> Hashable:
            return source, revision, spec.dtype, spec.stream, state

        spread = self.spread and not spec.stream and Path(source).suffix != ".gguf"
        model = self._model.get(
            key(revision),
            lambda: load_model(
                source,
                revision=revision,
                device="cuda" if spread else str(self.device),
                dtype=spec.dtype,
                stream=spec.stream,
                device_map="auto" if spread else None,
            ),
            alias=lambda loaded: key(loaded.revision),  # the commit, from the hub
        )
        seal.check_model(spec.model, partial(self._hash_of, model))
        return model

    def _hash_of(self, model: LanguageModel, dtype: str | None) -> str:
        """Return the hash of the weights in this dtype, computed once."""
        if dtype is None or dtype == str(model.dtype).removeprefix("torch."):
            return model.weights_sha256
        key = (model.weights_sha256, dtype)
        return self._cast.get(key, lambda: model.weights_sha256_as(getattr(torch, dtype)))

    def seal(self, spec: JobSpec, before: Seal = UNSEALED) -> Seal:
        """
        Read everything that a job is made from, and write down what it is.

        Args:
            spec: The job, with one model.
            before: What was read before.

        Raises:
            PhoError: As :meth:`model`, :meth:`calibration_text` and :meth:`confirmation_text`.
        """
        model = self.model(spec, before)
        confirm = None if spec.confirm is None else self.confirmation_text(spec, before)
        return Seal.of(
            model,
            self.calibration_text(spec, before),
            confirm,
            local=_is_local(self.access.model(spec.model)),
        )

    def calibration_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> CalibrationText:
        """
        The windows to calibrate on, and those that are left.

        Raises:
            InvalidInput: The text may not be named here.
            TextError: It cannot be read, or is too short.
            ChangedInput: It, or the model, is not the one that was read before.
        """
        model = self.model(spec, seal)
        source = self._source(spec.calibration)
        settings = spec.calibration.settings()
        state = _FileState.of(source.path or str(source.dataset))
        key = (model.weights_sha256, spec.stream, source, settings, state)
        text = self._calibration.get(key, lambda: calibration_text(model, source, settings))
        seal.check_calibration(spec.calibration.text or str(spec.calibration.dataset), text)
        return text

    def confirmation_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> ReportText:
        """
        The windows that perplexities are measured on.

        Raises:
            InvalidInput: The text may not be named here.
            TextError: It cannot be read, is too short, or the calibration used it up.
            ChangedInput: It, or the model, is not the one that was read before.
        """
        assert spec.confirm is not None
        text = self._confirmation_text(spec, seal)
        calibration = spec.calibration
        name = spec.confirm.text or calibration.text or str(calibration.dataset)
        seal.check_confirmation(name, text)
        return text

    def _confirmation_text(self, spec: JobSpec, seal: Seal) -> ReportText:
        assert spec.confirm is not None
        text = self.calibration_text(spec, seal)
        if spec.confirm.text is None:
            if len(text.held_out) == 0:
                raise TextError(
                    "the calibration text has no windows left to confirm on. Give confirm.text, "
                    "fewer calibration.samples, or confirm: null."
                )
            return ReportText(windows=text.held_out[: spec.confirm.windows], record=text.record)
        source = TextSource(path=self.access.text(spec.confirm.text))
        return self._read(spec, source, spec.confirm.windows, seal, text)

    def report_text(self, spec: JobSpec, report: ReportSpec, seal: Seal) -> ReportText:
        """
        The windows of a text that nothing was chosen on, the same for every model.

        Raises:
            InvalidInput, TextError, ChangedInput: As :meth:`confirmation_text`.
        """
        return self._read(spec, self._source(report), report.windows, seal, None)

    def _read(
        self,
        spec: JobSpec,
        source: TextSource,
        windows: int | None,
        seal: Seal,
        unlike: CalibrationText | None,
    ) -> ReportText:
        """A text, cut for perplexity, without what overlaps with a calibration."""
        model = self.model(spec, seal)
        settings = spec.calibration
        key = (
            model.weights_sha256, source, settings.context_length, settings.bos, windows,
            _FileState.of(source.path or str(source.dataset)),
            None if unlike is None else unlike.bundle_key,
        )  # fmt: skip

        def read() -> ReportText:
            cut, record = read_windows(
                model,
                source,
                context_length=settings.context_length,
                bos=settings.bos,
                max_windows=windows,
                unlike=None if unlike is None else unlike.calibration,
            )
            return ReportText(windows=cut, record=record)

        return self._confirmation.get(key, read)

    def tasks(self, spec: JobSpec) -> LoadedTasks:
        """
        The tasks of a job that has some, with their examples.

        Raises:
            ModuleNotFoundError: The extra ``eval`` is not installed.
            InvalidInput: One is not there, or its folder or data set may not be named here.
            TextError: Examples cannot be read.
        """
        names = tuple(spec.tasks or ())
        folder = None if spec.tasks_dir is None else self.access.task_folder(spec.tasks_dir)
        state = None if folder is None else _FileState.of(folder)
        return self._tasks.get(
            (names, folder, state),
            lambda: load_tasks(
                names,
                None if folder is None else Path(folder),
                check_dataset=self.access.dataset,
            ),
        )

    def calibrate(self, spec: JobSpec, seal: Seal, progress: Progress) -> ProxyBundle:
        """
        The bundle of a job, made if nobody has made it yet.

        Raises:
            PhoError: As :meth:`model`, :meth:`calibration_text` and :meth:`BundleStore.ensure`.
        """
        text = self.calibration_text(spec, seal)
        settings = spec.calibration.settings()
        return self._bundle.get(
            text.bundle_key,
            lambda: self.bundles.ensure(self.model(spec, seal), text, settings, progress),
        )

    def bundle(self, spec: JobSpec, seal: Seal, key: str, progress: Progress) -> ProxyBundle:
        """
        The bundle with this key; if it was lost, it is made again.

        Raises:
            ChangedInput: What it was made from is no longer there, so that it would be
                another one.
        """
        try:
            return self._bundle.get(key, lambda: self.bundles.read(key))
        except BundleError:
            bundle = self.calibrate(spec, seal, progress)
        if bundle.key != key:
            raise ChangedInput(
                f"the bundle {key[:12]} of the job is lost, and what is made now is another one, "
                f"{bundle.key[:12]}: a package has another version, or the "
                f"worker another kind of device ({self.device.type}), than when the job began. Its "
                "trials cannot be compared with new ones. Put the bundle back, or submit the job "
                "again."
            )
        return bundle

    def _source(self, spec: TextSpec) -> TextSource:
        if spec.data_file is not None:
            check_data_file(spec.data_file)
        return TextSource(
            path=None if spec.text is None else self.access.text(spec.text),
            dataset=None if spec.dataset is None else self.access.dataset(spec.dataset),
            config=spec.dataset_config,
            data_file=spec.data_file,
            split=spec.split,
            field=spec.field,
        )


def _is_local(source: str) -> bool:
    """Whether the answer of :meth:`Access.model` is a path and not a hub id."""
    return Path(source).is_absolute()
