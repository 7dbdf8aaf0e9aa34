"""
What stages work with, models, texts and bundles, and hashes of what a job began with.
"""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from pho_service.errors import BundleError, ChangedInput, OutputError
from pho_service.host.access import Access, check_data_file
from pho_service.host.artifacts import PrunedStore, is_local, open_store
from pho_service.host.files import new_file
from pho_service.models.calibration import (
    CalibrationText,
    bundle_path,
    cached_bundle,
    kept_bundle,
    sums_of,
    sums_record,
)
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.scratch import Memo
from pho_service.models.tasks import LoadedTasks, load_tasks
from pho_service.models.texts import (
    MixedText,
    RecoveryText,
    ReportText,
    Text,
    mixed_text,
    pool_sha256,
)
from pho_service.pipeline.inputs import Inputs
from pho_service.progress import Advance, Progress
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.perplexity import windows_key
from pho_service.pruning.statistics import Sums
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.fields import CalibrationSpec, ReportSpec, TextSpec
from pho_service.spec.job import JobSpec

if TYPE_CHECKING:
    from pho_service.pipeline.inputs import Cut


# What the first stage of a job read, so that later stages notice when a file has changed since.
@dataclass(frozen=True, kw_only=True)
class Seal:
    """Hashes of the inputs of one model of a job. A None is not compared."""

    local: bool | None = None  # Whether the model lay on this service's disks, and not on the hub
    revision: str | None = None  # Commit of a hub model
    weights_sha256: str | None = None  # Hash of the weights, as loaded
    dtype: str | None = None  # Type that the weights were loaded in
    calibration: str | None = None  # Hash of the calibration windows
    texts: Sequence[str] = ()  # Hashes of the calibration texts, where there are several
    confirmation: str | None = None  # Hash of the windows that perplexities are measured on
    recovery: str | None = None  # Hash of all that the windows of a recovery are drawn from
    report: str | None = None  # Hash of the windows that the result is reported on

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        text: CalibrationText,
        confirmation: ReportText | None,
        recovery: str | None,
        report: ReportText | None,
        *,
        local: bool,
    ) -> Self:
        return cls(
            local=local,
            revision=model.revision,
            weights_sha256=model.weights_sha256,
            dtype=model.to_dict()["dtype"],
            calibration=windows_key(text.calibration),
            texts=_hashes(text),
            confirmation=None if confirmation is None else confirmation.key,
            recovery=recovery,
            report=None if report is None else report.key,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_place(self, name: str, *, local: bool) -> None:
        """Raise ChangedInput if the model was local, and would be asked of the hub now."""
        if self.local and not local:
            raise ChangedInput(
                f"the model {name} was a local one when the job began, and is no longer there; "
                "the hub is not asked for a model of the same name. Put it back, then resume the "
                "job."
            )

    def check_model(self, name: str, weights_sha256: Callable[[str | None], str]) -> None:
        """Raise ChangedInput if the hash of the weights, in the given dtype, is another one."""
        if self.weights_sha256 is not None:
            _compare(f"the model {name}", self.weights_sha256, weights_sha256(self.dtype))

    def check_calibration(self, spec: CalibrationSpec, text: CalibrationText) -> None:
        """Raise ChangedInput if these are not the windows that the job was calibrated on."""
        if self.calibration is None:
            return
        for name, before, now in zip(spec.names, self.texts, _hashes(text), strict=False):
            _compare(f"the calibration text {name}", before, now)
        now = windows_key(text.calibration)
        _compare(f"the calibration text {spec.named}", self.calibration, now)

    def check_confirmation(self, name: str, text: ReportText) -> None:
        """Raise ChangedInput if these are not the windows that the job began with."""
        if self.confirmation is not None:
            _compare(f"the text {name}, which perplexities are measured on,", self.confirmation,
                     text.key)  # fmt: skip

    def check_recovery(self, name: str, sha256: str) -> None:
        """Raise ChangedInput if it is not the text that the job began with."""
        if self.recovery is not None:
            _compare(f"the text {name}, which the pruned model is recovered on,", self.recovery,
                     sha256)  # fmt: skip

    def check_report(self, name: str, text: ReportText) -> None:
        """Raise ChangedInput if these are not the windows that the job began with."""
        if self.report is not None:
            _compare(f"the report text {name}", self.report, text.key)


def _hashes(text: CalibrationText) -> list[str]:
    return [each.sha256 for each, _ in text.record.texts]


def _compare(what: str, before: str, now: str) -> None:
    if before != now:
        raise ChangedInput(
            f"{what} has changed since the job began (hash {before[:12]} then, {now[:12]} now): "
            "what would be measured now cannot be compared with what was measured before. Put "
            "the former files back and resume the job, or submit it again for the present ones."
        )


# Where all workers keep their bundles: a folder, or an object store behind an fsspec URL.
logger = logging.getLogger(__name__)

Turns = Callable[[str, Callable[[], None]], AbstractContextManager[None]]

_ABANDONED = timedelta(days=7)  # the shards of a calibration that nobody has ended
_LOOK_S = 0.5  # while another one makes the bundle


def _wait(advance: Advance) -> None:
    time.sleep(_LOOK_S)
    advance(0)


class BundleStore:
    """Bundles by their key, in a folder, or copied to ``cache_dir`` from what fsspec knows."""

    # What ``turns`` gives nobody else is inside of with the same name; it calls its second argument
    # while somebody is.

    def __init__(self, url: str, cache_dir: Path, turns: Turns = lambda *_: nullcontext()) -> None:
        self._turns = turns
        self._files, root = open_store(url)
        local = is_local(self._files)
        self._root = root
        self._remote = None if local else f"{root}/bundles"
        self._folder = Path(root) if local else cache_dir

    def read(self, key: str) -> ProxyBundle:
        """The bundle with this key, unless it is damaged or another one has its name."""
        self._download(key)
        return kept_bundle(self._folder, key)

    def ensure(
        self,
        model: LanguageModel,
        text: CalibrationText,
        settings: CalibrationSettings,
        progress: Progress,
    ) -> ProxyBundle:
        """The bundle of a calibration; it is made if it is not there, or damaged."""
        # If several need it at the same time, one makes it, from the shards that are kept and those
        # that are missing.
        key = text.bundle_key
        bundle = self._found(key)
        if bundle is not None:
            return bundle
        with ExitStack() as stack:
            with progress("Looking for the bundle", 1) as advance:
                stack.enter_context(self._turns(f"bundle {key}", lambda: _wait(advance)))
            bundle = self._found(key)  # since another one has made it
            if bundle is not None:
                return bundle
            sums = partial(self.sums, key)
            bundle = cached_bundle(model, text, settings, self._folder, progress, sums)
            self._upload(key, replace=True)
            self._tidy(key)
        return bundle

    def _found(self, key: str) -> ProxyBundle | None:
        try:
            bundle = self.read(key)
        except BundleError:
            return None
        self._upload(key, replace=False)  # if it is in our cache alone
        return bundle

    def has(self, key: str) -> bool:
        """Whether there is a bundle with this key, damaged or not."""
        path = bundle_path(self._folder, key)
        try:
            return path.is_file() or bool(self._remote and self._files.exists(self._place(path)))
        except OSError as error:
            raise OutputError(f"the bundle {path.name} cannot be looked for: {error}.") from error

    def keep_sums(self, key: str, shard: int, sums: Sums) -> None:
        """Keep what a shard of a calibration gave, until the bundle is made."""
        place = self._shard(key, shard)
        try:
            with tempfile.TemporaryDirectory(prefix="pho-") as folder:
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                memo = self._memo(key, folder)
                memo.keep(f"{shard}", sums_record(sums))
                if self._remote is not None:
                    self._put(memo.path(f"{shard}"), place)
        except (OSError, OutputError) as error:
            if self.has(key):  # made meanwhile, and the shards' folder removed
                return
            raise OutputError(f"the shard {place} cannot be stored: {error}") from error

    def sums(self, key: str, shard: int) -> Sums | None:
        """What a shard of a calibration gave; None if it is not there, or damaged."""
        place = self._shard(key, shard)
        try:
            with tempfile.TemporaryDirectory(prefix="pho-") as folder:
                memo = self._memo(key, folder)
                if self._remote is not None:
                    self._files.get_file(place, str(memo.path(f"{shard}")))
                record = memo.read(f"{shard}")
                return None if record is None else sums_of(record)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"the shard {place} cannot be read: {error}.") from error

    def _memo(self, key: str, copies: str) -> Memo:
        """The shards of a calibration: in our folder, or, of an object store, those copied."""
        shards = Path(self._root) / "shards" / key if self._remote is None else Path(copies)
        return Memo(folder=shards, key=key)

    def _tidy(self, key: str) -> None:
        """Remove the shards of a bundle that is made, and those that nobody has come back to."""
        try:
            for place in self._files.ls(f"{self._root}/shards", detail=False):
                if place.endswith(f"/{key}") or self._is_old(place):
                    self._files.rm(place, recursive=True)
        except FileNotFoundError:
            pass  # there are none
        except OSError as error:
            logger.warning("shards of a calibration could not be removed: %s", error)

    def _is_old(self, place: str) -> bool:
        times = [self._files.modified(file).astimezone(UTC) for file in self._files.find(place)]
        return bool(times) and datetime.now(UTC) - max(times) > _ABANDONED

    def _shard(self, key: str, shard: int) -> str:
        return f"{self._root}/shards/{key}/{shard}.safetensors"

    def _place(self, path: Path) -> str:
        return f"{self._remote}/{path.name}"

    def _put(self, path: Path, place: str) -> None:
        """Under a name of its own first: nobody ever sees half a file."""
        partial_place = f"{place}.{uuid.uuid4().hex}.part"
        self._files.put_file(str(path), partial_place)
        self._files.mv(partial_place, place)

    def _download(self, key: str) -> None:
        path = bundle_path(self._folder, key)
        if self._remote is None or path.is_file():
            return
        remote = f"{self._remote}/{path.name}"
        try:
            if self._files.exists(remote):
                path.parent.mkdir(parents=True, exist_ok=True)
                with new_file(path) as partial:
                    self._files.get_file(remote, str(partial))
        except OSError as error:
            raise OutputError(f"the bundle {remote} cannot be read: {error}.") from error

    def _upload(self, key: str, *, replace: bool) -> None:
        path = bundle_path(self._folder, key)
        if self._remote is None:
            return
        remote = f"{self._remote}/{path.name}"
        try:
            if replace or not self._files.exists(remote):
                self._files.makedirs(self._remote, exist_ok=True)
                self._put(path, remote)
        except OSError as error:
            raise OutputError(f"the bundle {remote} cannot be stored: {error}.") from error


T = TypeVar("T")

UNSEALED = Seal()


class _Last(Generic[T]):
    """The values of the last keys; before another's is made, the oldest is let go."""

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._kept: list[tuple[tuple[Hashable, ...], T]] = []

    def get(
        self, key: Hashable, make: Callable[[], T], alias: Callable[[T], Hashable] | None = None
    ) -> T:
        """Return the value of a key; ``alias`` gives another one for what was made."""
        there = [value for keys, value in self._kept if key in keys]
        if there:
            return there[0]
        del self._kept[: len(self._kept) + 1 - self._count]  # two models may not fit
        value = make()
        self._kept.append(((key,) if alias is None else (key, alias(value)), value))
        return value

    def clear(self) -> None:
        self._kept.clear()


def _state(source: TextSource | MixedText | str) -> Hashable:
    """Tells whether a file, or a folder's files, are those of last time."""
    if isinstance(source, MixedText):
        return tuple(_state(each) for each in source.texts if isinstance(each, TextSource))
    path = Path(source if isinstance(source, str) else source.path or str(source.dataset))
    paths = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in paths)


class WorkerInputs(Inputs):
    """Opens what a job names where it may lie on this machine, and keeps the last of each."""

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
        self._measured_on: _Last[ReportText] = _Last(2)  # to confirm, and to report
        self._recovery: _Last[str] = _Last()
        self._tasks: _Last[LoadedTasks] = _Last()

    def clear(self) -> None:
        """Let everything go: after an error nobody knows what state a model is in."""
        for kept in (self._model, self._bundle, self._calibration, self._measured_on):
            kept.clear()

    def model(self, spec: JobSpec, seal: Seal = UNSEALED) -> LanguageModel:
        """The dense model of a job with one model, if it is the one that was read before."""
        # A hub model without a revision is that of the seal's commit.
        source = self.access.model(spec.model)
        local = _is_local(source)
        seal.check_place(spec.model, local=local)
        revision = spec.revision or (None if local else seal.revision)
        state = _state(source)

        def key(revision: str | None) -> Hashable:
            return source, revision, spec.dtype, spec.stream, state

        model = self._model.get(
            key(revision),
            lambda: load_model(source, revision=revision, stream=spec.stream, **self.placing(spec)),
            alias=lambda loaded: key(loaded.revision),  # the commit, from the hub
        )
        seal.check_model(spec.model, partial(self._hash_of, model))
        return model

    def weights_sha256(self, spec: JobSpec, seal: Seal) -> str:
        """Return the hash of the weights that are in use, in the dtype that the job began with."""
        return self._hash_of(self.model(spec, seal), seal.dtype)

    def placing(self, spec: JobSpec) -> dict[str, Any]:
        """Where the model of a job lies, and in which data type."""
        spread = self.spread and not spec.stream and not spec.model.endswith(".gguf")
        return {
            "device": "cuda" if spread else str(self.device),
            "dtype": spec.dtype,
            "device_map": "auto" if spread else None,
        }

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
            None if spec.recovery is None else self._recovery_sha256(spec),
            None if spec.report is None else self.reported_text(spec, before),
            local=_is_local(self.access.model(spec.model)),
        )

    def calibration_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> CalibrationText:
        """The windows to calibrate on, and those that are left, if they are those of before."""
        model = self.model(spec, seal)
        source = self.calibration_source(spec.calibration)
        settings = spec.calibration.settings()
        key = (model.weights_sha256, spec.stream, source, settings, _state(source))
        text = self._calibration.get(key, lambda: self.windows(model, source, settings))
        seal.check_calibration(spec.calibration, text)
        return text

    def confirmation_text(self, spec: JobSpec, seal: Seal = UNSEALED) -> ReportText:
        """The windows that perplexities are measured on, if they are those of before."""
        confirm, calibration = spec.confirm, spec.calibration
        assert confirm is not None
        drawn = self.calibration_text(spec, seal)
        source = None
        if confirm.text is not None:
            source = self.file(confirm.text)
        model = self.model(spec, seal)
        text = self.confirmation(model, source, calibration, confirm.windows, drawn)
        seal.check_confirmation(confirm.text or calibration.named, text)
        return text

    def recovery_text(self, spec: JobSpec, seal: Seal) -> RecoveryText:
        """What a pruned model is recovered on: nothing that it was chosen or is measured on."""
        assert spec.recovery is not None
        text = spec.recovery.text
        seal.check_recovery(text or spec.calibration.named, self._recovery_sha256(spec))
        calibration = unlike = self.calibration_text(spec, seal).calibration
        measured = None if spec.confirm is None else self.confirmation_text(spec, seal)
        if spec.report is not None and measured is not None:  # which is where the result is told
            unlike = torch.cat([unlike, measured.windows])
            measured = self.reported_text(spec, seal)
        return RecoveryText(
            source=self._recovery_source(spec),
            context_length=spec.calibration.context_length,
            bos=spec.calibration.bos,
            unlike=unlike,
            seen=calibration if text is None else None,
            measured=measured,
        )

    def _recovery_source(self, spec: JobSpec) -> TextSource | MixedText:
        text = spec.recovery and spec.recovery.text
        return self.file(text) if text else self.calibration_source(spec.calibration)

    def _recovery_sha256(self, spec: JobSpec) -> str:
        source = self._recovery_source(spec)
        return self._recovery.get((source, _state(source)), lambda: pool_sha256(source))

    def reported_text(self, spec: JobSpec, seal: Seal) -> ReportText:
        """The windows that a result is reported on, if they are those of before."""
        assert spec.report is not None
        confirm = None if spec.confirm is None else self.confirmation_text(spec, seal)
        text = self.reported(
            self.model(spec, seal), self._source(spec.report), spec.calibration,
            spec.report.windows, self.calibration_text(spec, seal).calibration, confirm,
        )  # fmt: skip
        seal.check_report(spec.report.text or str(spec.report.dataset), text)
        return text

    def report_text(self, spec: JobSpec, report: ReportSpec, seal: Seal) -> ReportText:
        """The windows of a text that nothing was chosen on, the same for every model."""
        source, model = self._source(report), self.model(spec, seal)
        return self.report(model, source, spec.calibration, report.windows)

    def report(
        self,
        model: LanguageModel,
        source: Text,
        how: "Cut",
        most: int | None,
        unlike: Tensor | None = None,
    ) -> ReportText:
        assert isinstance(source, TextSource)  # a service has none in memory
        key = (
            model.weights_sha256, source, how.context_length, how.bos, most, _state(source),
            None if unlike is None else windows_key(unlike),
        )  # fmt: skip
        read = partial(super().report, model, source, how, most, unlike)
        return self._measured_on.get(key, read)

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

    def file(self, name: str) -> TextSource:
        return TextSource(path=self.access.fetched_text(name))

    def calibration_source(self, spec: CalibrationSpec) -> TextSource | MixedText:
        return mixed_text([*map(self._source, spec.parts.values())], spec.shares)

    def _source(self, spec: TextSpec) -> TextSource:
        if spec.data_file is not None:
            check_data_file(spec.data_file)
        return TextSource(
            path=None if spec.text is None else self.access.fetched_text(spec.text),
            dataset=None if spec.dataset is None else self.access.dataset(spec.dataset),
            config=spec.dataset_config,
            data_file=spec.data_file,
            split=spec.split,
            field=spec.field,
        )


def _is_local(source: str) -> bool:
    """Whether the answer of :meth:`Access.model` is a path and not a hub id."""
    return Path(source).is_absolute()
