"""
What to say of a calibration with fewer tokens than a step needs.
"""

import logging
from collections.abc import Mapping
from functools import cache

from torch import Tensor

from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.candidate import Candidate

logger = logging.getLogger(__name__)


def few_tokens(
    linears: Mapping[str, PrunableLinear], candidate: Candidate, windows: Tensor | None
) -> str | None:
    """
    Say that weights are fitted to fewer tokens than they have inputs, and how many would do.

    The second moments of so few tokens are singular. Damping makes weights computable all the
    same, but they fit what they see more than the text that it stands for.

    Args:
        linears: Linears of the model, by name.
        candidate: Only its update is looked at, and which linears it prunes.
        windows: (windows, tokens), int64, of the calibration.

    Returns:
        A sentence, or None where there are enough or no weight is changed.
    """
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
