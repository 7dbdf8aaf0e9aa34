"""
Bundles made once and kept: the second job on a model starts at once.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from pho_service.errors import BundleError, OutputError
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import CalibrationText, calibrate
from pho_service.models.loading import LanguageModel
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.statistics import PrunableLinear, Sums
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.steps import Candidate


def bundle_path(cache_dir: Path, key: str) -> Path:
    return cache_dir.expanduser() / "bundles" / f"{key}.safetensors"


def kept_bundle(cache_dir: Path, key: str) -> ProxyBundle:
    path = bundle_path(cache_dir, key)
    bundle = read_bundle(path)
    if bundle.key != key:
        raise BundleError(
            f"the bundle {path.name} is another one, {bundle.key[:12]}: somebody has renamed or "
            "replaced it. Delete the file; it is made again."
        )
    return bundle


def cached_bundle(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    cache_dir: Path,
    progress: Progress = silent,
    known: Callable[[int], Sums | None] = lambda _: None,
) -> ProxyBundle:
    """Calibrate, or take the bundle of an earlier calibration with the same inputs."""
    # The file's name is the hash of weights, windows, settings and versions, so a bundle in the
    # cache is never stale.
    path = bundle_path(cache_dir, text.bundle_key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {path.parent} cannot be made: {error.strerror}. Set PHO_CACHE_DIR."
        ) from error
    if path.is_file():
        try:
            return kept_bundle(cache_dir, text.bundle_key)
        except BundleError:
            path.unlink()  # a damaged copy: what was stored is made again
    bundle = calibrate(model, text, settings, progress, known)
    model.check_unchanged()
    write_bundle(bundle, path)
    return kept_bundle(cache_dir, text.bundle_key)  # exactly what the next search will see


# What to say of a calibration with fewer tokens than a step needs.
logger = logging.getLogger(__name__)


def few_tokens(
    linears: Mapping[str, PrunableLinear], candidate: Candidate, windows: Tensor | None
) -> str | None:
    """Say that weights are fitted to fewer tokens than they have inputs, and how many would do."""
    # The second moments of so few tokens are singular. Damping makes weights computable all the
    # same, but they fit what they see more than the text that it stands for.
    if windows is None or candidate.steps.update == "none":
        return None
    chosen = candidate.steps.linears.choose(list(linears), candidate.pattern).names
    widths = {name: linears[name].weight.shape[1] for name in linears if name in chosen}
    name = max(widths, key=lambda name: widths[name])
    if windows.numel() >= widths[name]:
        return None
    enough = -(-widths[name] // windows.shape[1])
    return (
        f"The calibration has {windows.numel()} tokens, fewer than the {widths[name]} inputs of "
        f"{name}: update {candidate.steps.update!r} fits them, held back only by damping. Take "
        f"{enough} windows of {windows.shape[1]} tokens or more (--samples {enough})."
    )


@cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that this process has it: finalists share a calibration."""
    logger.warning(message)
