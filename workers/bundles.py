"""
Where all workers keep their bundles: a folder, or an object store behind an fsspec URL.
"""

import uuid
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pho_service.errors import BundleError, InvalidInput, OutputError
from pho_service.files import new_file
from pho_service.jobs.bundles import bundle_path, cached_bundle, kept_bundle
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel
from pho_service.progress import Progress
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec import CalibrationSettings


class BundleStore:
    """
    Bundles by their key. A folder is used as it is; from elsewhere they are copied.

    Args:
        url: A folder, or what fsspec understands: ``s3://bucket/pho``.
        cache_dir: For copies, if ``url`` is no folder.

    Raises:
        InvalidInput: fsspec does not understand the URL, or lacks a package for it.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(
                str(Path(url).expanduser()) if "://" not in url else url
            )
        except (ImportError, ValueError) as error:
            raise InvalidInput(
                f"PHO_ARTIFACTS={url!r} cannot be used: {error}. Give a folder, or the URL of an "
                "object store whose fsspec package is installed (s3fs, gcsfs)."
            ) from error
        self._remote = None if isinstance(self._files, LocalFileSystem) else f"{root}/bundles"
        self._folder = cache_dir if self._remote else Path(root)

    def read(self, key: str) -> ProxyBundle:
        """
        The bundle with this key.

        Raises:
            BundleError: It is not there, or damaged, or another one has its name.
            OutputError: The object store or the cache fails.
        """
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

        Raises:
            ModelError, NumericalError: From the calibration.
            OutputError: It cannot be stored.
        """
        key = text.bundle_key
        try:
            bundle = self.read(key)
        except BundleError:
            bundle = cached_bundle(model, text, settings, self._folder, progress)
            self._upload(key, replace=True)
        else:
            self._upload(key, replace=False)  # if it is in our cache alone
        return bundle

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
                # Under a name of its own first: nobody ever sees half a bundle.
                partial = f"{remote}.{uuid.uuid4().hex}.part"
                self._files.put_file(str(path), partial)
                self._files.mv(partial, remote)
        except OSError as error:
            raise OutputError(f"the bundle {remote} cannot be stored: {error}.") from error
