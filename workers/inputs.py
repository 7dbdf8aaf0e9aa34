"""
What stages work with: models, texts and bundles, the last of each kept for the next stage.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pho_service.access import Access, check_data_file
from pho_service.errors import BundleError, TextError
from pho_service.job_fields import CalibrationSpec
from pho_service.job_spec import JobSpec
from pho_service.jobs.rating import ReportText
from pho_service.models.calibration import CalibrationText, calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_windows
from pho_service.progress import Progress
from pho_service.pruning.bundle import ProxyBundle
from workers.bundles import BundleStore

T = TypeVar("T")


class _Last(Generic[T]):
    """The value of the last key; another key's is made anew, after the old one is let go."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: T | None = None

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if self._value is None or self._key != key:
            self._value = None  # before the next is made: two models may not fit
            self._value = make()
            self._key = key
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
        device: Where models run.
    """

    def __init__(self, access: Access, bundles: BundleStore, device: torch.device) -> None:
        self.access = access
        self.bundles = bundles
        self.device = device
        self._model: _Last[LanguageModel] = _Last()
        self._bundle: _Last[ProxyBundle] = _Last()
        self._calibration: _Last[CalibrationText] = _Last()
        self._confirmation: _Last[ReportText] = _Last()

    def clear(self) -> None:
        """Let everything go: after an error nobody knows what state a model is in."""
        for kept in (self._model, self._bundle, self._calibration, self._confirmation):
            kept.clear()

    def model(self, spec: JobSpec) -> LanguageModel:
        """
        The dense model of a job.

        Raises:
            InvalidInput: It may not be named here.
            ModelError, NumericalError: It cannot be loaded.
        """
        source = self.access.model(spec.model)
        key = (source, spec.revision, spec.dtype, spec.stream, _FileState.of(source))
        return self._model.get(
            key,
            lambda: load_model(
                source,
                revision=spec.revision,
                device=str(self.device),
                dtype=spec.dtype,
                stream=spec.stream,
            ),
        )

    def calibration_text(self, spec: JobSpec) -> CalibrationText:
        """
        The windows to calibrate on, and those that are left.

        Raises:
            InvalidInput: The text may not be named here.
            TextError: It cannot be read, or is too short.
        """
        model = self.model(spec)
        source = self._source(spec.calibration)
        settings = spec.calibration.settings()
        state = _FileState.of(source.path or str(source.dataset))
        key = (model.weights_sha256, spec.stream, source, settings, state)
        return self._calibration.get(key, lambda: calibration_text(model, source, settings))

    def confirmation_text(self, spec: JobSpec) -> ReportText:
        """
        The windows that perplexities are measured on.

        Raises:
            InvalidInput: The text may not be named here.
            TextError: It cannot be read, is too short, or the calibration used it up.
        """
        assert spec.confirm is not None
        if spec.confirm.text is None:
            text = self.calibration_text(spec)
            if len(text.held_out) == 0:
                raise TextError(
                    "the calibration text has no windows left to confirm on. Give confirm.text, "
                    "fewer calibration.samples, or confirm: null."
                )
            return ReportText(windows=text.held_out[: spec.confirm.windows], record=text.record)
        model = self.model(spec)
        path = self.access.text(spec.confirm.text)
        settings = spec.calibration
        key = (
            model.weights_sha256, path, settings.context_length, settings.bos,
            spec.confirm.windows, _FileState.of(path),
        )  # fmt: skip

        def read() -> ReportText:
            windows, record = read_windows(
                model,
                TextSource(path=path),
                context_length=settings.context_length,
                bos=settings.bos,
                max_windows=spec.confirm.windows if spec.confirm else None,
            )
            return ReportText(windows=windows, record=record)

        return self._confirmation.get(key, read)

    def calibrate(self, spec: JobSpec, progress: Progress) -> ProxyBundle:
        """
        The bundle of a job, made if nobody has made it yet.

        Raises:
            PhoError: As :meth:`model`, :meth:`calibration_text` and :meth:`BundleStore.ensure`.
        """
        text = self.calibration_text(spec)
        settings = spec.calibration.settings()
        return self._bundle.get(
            text.bundle_key,
            lambda: self.bundles.ensure(self.model(spec), text, settings, progress),
        )

    def bundle(self, spec: JobSpec, key: str, progress: Progress) -> ProxyBundle:
        """The bundle with this key; if it was lost, it is made again."""
        try:
            return self._bundle.get(key, lambda: self.bundles.read(key))
        except BundleError:
            return self.calibrate(spec, progress)

    def _source(self, spec: CalibrationSpec) -> TextSource:
        if spec.text is not None:
            return TextSource(path=self.access.text(spec.text), field=spec.field)
        assert spec.dataset is not None  # the document says so
        if spec.data_file is not None:
            check_data_file(spec.data_file)
        return TextSource(
            dataset=self.access.dataset(spec.dataset),
            data_file=spec.data_file,
            split=spec.split,
            field=spec.field,
        )
