"""
Where the blocks are kept that were trained or cut, so that nobody does it again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pho_service.host.machine import versions
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import Memo
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.perplexity import windows_key
from pho_service.spec.steps import Candidate
from pho_service.spec.structure import Structure

_SETS = 3  # of such blocks that the cache of this machine holds


def blocks_kept(
    model: LanguageModel,
    bundle: ProxyBundle,
    winner: Candidate | Structure,
    calibration: Tensor | None,
    folder: Callable[[str], Path],
) -> Memo | None:
    """The blocks of a winner, in a folder by its key; None where nothing is trained or cut."""
    pattern, document = "", winner.to_dict()
    if not isinstance(winner, Structure):
        pattern, how = str(winner.pattern), winner.steps.reconstruction
        if not how.wanted:
            return None
        # Where the training gets shorter shows in what the records of blocks are called.
        steps = replace(winner.steps, reconstruction=replace(how, blocks=()))
        document = replace(winner, steps=steps).to_dict()
    if calibration is None:
        return None
    # All that the weights of a pruned block follow from.
    identity = [
        model.to_dict(), str(model.device.type), pattern, document,
        bundle.contents_sha256, windows_key(calibration), versions("torch", "transformers"),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Memo(folder=folder(key), key=key)


def cached_blocks(
    cache_dir: Path,
    model: LanguageModel,
    bundle: ProxyBundle,
    winner: Candidate | Structure,
    calibration: Tensor | None,
) -> Memo | None:
    """
    The blocks of a winner of `pho search`, kept for `pho prune`: the last few sets. Where nothing
    is cut, what cuts of a model cost, which is the same for every share.
    """
    place = cache_dir.expanduser().resolve() / ("costs" if winner == Structure() else "blocks")
    blocks = blocks_kept(model, bundle, winner, calibration, lambda key: place / key[:16])
    if blocks is None:
        return None
    others = [other for other in place.glob("*") if other != blocks.folder]
    with suppress(OSError):  # somebody else has removed one
        others.sort(key=lambda other: other.stat().st_mtime)
        for old in others[: -(_SETS - 1)]:
            shutil.rmtree(old, ignore_errors=True)
    return replace(blocks, spare=True)
