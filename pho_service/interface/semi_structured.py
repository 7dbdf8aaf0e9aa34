"""
`pho.load_semi_structured`: a 2:4 model on the kernels that GPUs have for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pho_service.errors import InvalidInput
from pho_service.models.devices import pick_device
from pho_service.models.loading import load_model
from pho_service.pipeline.semi_structured import Conversion, check_gpu, convert_
from pho_service.progress import bars
from pho_service.shown.parts import Shown, Table


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SemiStructured(Shown, Conversion):
    """
    A model whose 2:4 linears torch's kernels multiply.

    Attributes:
        model: On its GPU, to be run, not trained or saved.
        tokenizer: Its own.
    """

    model: PreTrainedModel
    tokenizer: Any

    def _shown(self) -> Table:
        return Table(
            ("linear", "stays dense because"),
            [*self.left.items()],
            title=f"{len(self.converted)} of {len(self.converted) + len(self.left)} linears run "
            "as 2:4",
        )


def load_semi_structured(
    folder: str | Path, *, device: str = "cuda", dtype: str = "auto", progress: bool = False
) -> SemiStructured:
    """
    Load a 2:4 model with torch's semi-structured tensors in place of its weights.

    Only linears are converted whose groups hold in the stored order; ``left`` says of each
    other one why it stays dense. `pho search --deployable` and `pho prune --deployable` leave no
    group in another order.

    Args:
        folder: What ``pho.save`` or ``pho.pack`` wrote; or any folder whose zeros are 2:4.
        device: A GPU of the Ampere generation or newer: ``cuda`` or ``cuda:N``.
        dtype: ``auto`` is the stored one; ``bfloat16`` or ``float16``.
        progress: Show a bar on stderr.

    Raises:
        InvalidInput: There is no such GPU, or the weights are in float32.
        ModelError: The model cannot be loaded, or its masks are damaged.
        ConfigurationError: Its recipe is broken.
    """
    if not torch.cuda.is_available():
        raise InvalidInput(
            f"{folder} cannot run as 2:4: torch sees no GPU, and has kernels for it on NVIDIA "
            "Ampere and newer alone. Load it with pho.load_model: it gives the same outputs "
            "anywhere, as fast as a dense model."
        )
    check_gpu(pick_device(device))
    path = Path(folder).expanduser()
    loaded = load_model(str(path), device=device, dtype=dtype)
    done = convert_(loaded, path, progress=bars(progress))
    return SemiStructured(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        converted=done.converted,
        left=done.left,
    )
