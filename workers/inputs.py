"""
What stages work with: models, texts and bundles, the last of each kept for the next stage.
"""

from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pho_service.errors import BundleError, ChangedInput, TextError
from pho_service.host.access import Access, check_data_file
from pho_service.host.artifacts import PrunedStore
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.task_files import LoadedTasks, load_tasks
from pho_service.models.texts import Text, TextSource
from pho_service.pipeline import inputs
from pho_service.pipeline.rating import ReportText, windows_key
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
        """Return the value of a key; ``alias`` gives another one for what was made."""
        if self._value is None or key not in self._keys:
            self._value = None  # before the next is made: two models may not fit
            value = make()
            self._keys = (key,) if alias is None else (key, alias(value))
            self._value = value
        return self._value

    def clear(self) -> None:
        self._value = None


def _state(source: TextSource | str) -> Hashable:
    """Tells whether a file, or a folder's files, are those of last time."""
    path = Path(source if isinstance(source, str) else source.path or str(source.dataset))
    found = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in found)


class Inputs(inputs.Inputs):
    """
    Opens what a job names where it may lie on this machine, and keeps the last of each.

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
        The dense model of a job with one model, if it is the one that was read before.

        A hub model without a revision is that of the seal's commit.
        """
        source = self.access.model(spec.model)
        local = _is_local(source)
        seal.check_place(spec.model, local=local)
        revision = spec.revision or (None if local else seal.revision)
        state = _state(source)

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
        """Read everything that a job with one model is made from, and write down what it is."""
        model = self.model(spec, before)
        confirm = None if spec.confirm is None else self.confirmation_text(spec, before)
        return Seal.of(
            model,
            self.calibration_text(spec, before),
            confirm,
            local=_is_local(self.access.model(spec.model)),
        )

    def calibration_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> CalibrationText:
        """The windows to calibrate on, and those that are left, if they are those of before."""
        model = self.model(spec, seal)
        source = self._source(spec.calibration)
        settings = spec.calibration.settings()
        key = (model.weights_sha256, spec.stream, source, settings, _state(source))
        text = self._calibration.get(key, lambda: self.windows(model, source, settings))
        seal.check_calibration(spec.calibration.text or str(spec.calibration.dataset), text)
        return text

    def confirmation_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> ReportText:
        """The windows that perplexities are measured on, if they are those of before."""
        confirm, calibration = spec.confirm, spec.calibration
        assert confirm is not None
        drawn = self.calibration_text(spec, seal)
        source = None
        if confirm.text is not None:
            source = TextSource(path=self.access.text(confirm.text))
        model = self.model(spec, seal)
        text = self.confirmation(model, source, calibration, confirm.windows, drawn)
        assert text is not None  # or nothing_left raises
        seal.check_confirmation(confirm.text or calibration.text or str(calibration.dataset), text)
        return text

    def nothing_left(self) -> None:
        """Names the fields that give a text."""
        raise TextError(
            "the calibration text has no windows left to confirm on. Give confirm.text, "
            "fewer calibration.samples, or confirm: null."
        )

    def report_text(self, spec: JobSpec, report: ReportSpec, seal: Seal) -> ReportText:
        """The windows of a text that nothing was chosen on, the same for every model."""
        source, model = self._source(report), self.model(spec, seal)
        return self.report(model, source, spec.calibration, report.windows)

    def report(
        self,
        model: LanguageModel,
        source: Text,
        how: "inputs.Cut",
        most: int | None,
        unlike: Tensor | None = None,
    ) -> ReportText:
        """Keeps the last text that was cut."""
        assert isinstance(source, TextSource)  # a service has none in memory
        key = (
            model.weights_sha256, source, how.context_length, how.bos, most, _state(source),
            None if unlike is None else windows_key(unlike),
        )  # fmt: skip
        read = partial(super().report, model, source, how, most, unlike)
        return self._confirmation.get(key, read)

    def tasks(self, spec: JobSpec) -> LoadedTasks:
        """The tasks of a job that has some, with their examples."""
        names = tuple(spec.tasks or ())
        folder = None if spec.tasks_dir is None else self.access.task_folder(spec.tasks_dir)
        state = None if folder is None else _state(folder)
        return self._tasks.get(
            (names, folder, state),
            lambda: load_tasks(
                names,
                None if folder is None else Path(folder),
                check_dataset=self.access.dataset,
            ),
        )

    def calibrate(self, spec: JobSpec, seal: Seal, progress: Progress) -> ProxyBundle:
        """The bundle of a job, made if nobody has made it yet."""
        text = self.calibration_text(spec, seal)
        settings = spec.calibration.settings()
        return self._bundle.get(
            text.bundle_key,
            lambda: self.bundles.ensure(self.model(spec, seal), text, settings, progress),
        )

    def bundle(self, spec: JobSpec, seal: Seal, key: str, progress: Progress) -> ProxyBundle:
        """The bundle with this key; if it was lost, it is made again, from what is the same."""
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
