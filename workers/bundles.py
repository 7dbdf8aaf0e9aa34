"""
Where all workers keep their bundles: a folder, or an object store behind an fsspec URL.
"""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from pho_service.errors import BundleError, OutputError
from pho_service.host.artifacts import open_store
from pho_service.host.files import new_file
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel
from pho_service.models.sums_file import read_sums, write_sums
from pho_service.pipeline.bundles import bundle_path, cached_bundle, kept_bundle
from pho_service.progress import Advance, Progress
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.sums import Sums
from pho_service.spec.calibration import CalibrationSettings

logger = logging.getLogger(__name__)

Turns = Callable[[str, Callable[[], None]], AbstractContextManager[None]]

_ABANDONED = timedelta(days=7)  # the shards of a calibration that nobody has ended
_LOOK_S = 0.5  # while another one makes the bundle


def _wait(advance: Advance) -> None:
    time.sleep(_LOOK_S)
    advance(0)


class BundleStore:
    """
    Bundles by their key, in a folder, or copied to ``cache_dir`` from what fsspec understands.

    What ``turns`` gives nobody else is inside of with the same name; it calls its second argument
    while somebody is.
    """

    def __init__(self, url: str, cache_dir: Path, turns: Turns = lambda *_: nullcontext()) -> None:
        self._turns = turns
        self._files, root = open_store(url)
        local = isinstance(self._files, LocalFileSystem)
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
        """
        The bundle of a calibration; it is made if it is not there, or damaged.

        If several need it at the same time, one makes it, from the shards that are kept and
        those that are missing.
        """
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
            known = partial(self.sums, key)
            bundle = cached_bundle(model, text, settings, self._folder, progress, known)
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
                if self._remote is None:
                    write_sums(sums, Path(place), key=key, shard=shard)
                    return
                path = Path(folder) / "sums"
                write_sums(sums, path, key=key, shard=shard)
                self._put(path, place)
        except (OSError, OutputError) as error:
            if self.has(key):  # made meanwhile, and the shards' folder removed
                return
            raise OutputError(f"the shard {place} cannot be stored: {error}") from error

    def sums(self, key: str, shard: int) -> Sums | None:
        """What a shard of a calibration gave; None if it is not there, or damaged."""
        place = self._shard(key, shard)
        try:
            with tempfile.TemporaryDirectory(prefix="pho-") as folder:
                path = Path(place)
                if self._remote is not None:
                    path = Path(folder) / "sums"
                    self._files.get_file(place, str(path))
                return read_sums(path, key=key, shard=shard)
        except (BundleError, FileNotFoundError):
            return None
        except OSError as error:
            raise OutputError(f"the shard {place} cannot be read: {error}.") from error

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
