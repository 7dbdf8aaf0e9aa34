"""
`pho.recover`: a pruned model trained towards the dense one.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from pho_service.interface.inputs import (
    Model,
    calibration_text_of,
    length_of,
    measured_text,
    opened,
)
from pho_service.interface.pruned import Pruned
from pho_service.models.texts import RecoveryText
from pho_service.pipeline.prune import PrunedFolder
from pho_service.pipeline.recover import PrunedModel, recover_model
from pho_service.progress import bars
from pho_service.shown.parts import Shown, Table
from pho_service.shown.tables import recovered_table
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.recovery import AdamBits, Recovered, Recovery, Trains

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts, Texts


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class RecoveredModel(Shown, PrunedFolder):
    """
    A pruned model after its recovery; ``pho.save`` writes it.

    Attributes:
        model: The model that was given, trained in place; or the one that was loaded by its name.
        tokenizer: Its own, if it is known.
        recovered: What the training came to.
    """

    model: PreTrainedModel
    tokenizer: Any = None
    recovered: Recovered

    def _shown(self) -> Table:
        return replace(recovered_table(self.recovered), title=str(self.recovered))


def recover(
    pruned: "Model | Pruned",
    teacher: Model,
    texts: "MixedTexts",
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    written: int = 0,
    train: Trains = "kept",
    rate: float | None = None,
    adam_bits: AdamBits = 32,
    seed: int = 0,
    context_length: int | None = None,
    bos: str = "auto",
    confirm: "Texts | None" = None,
    confirm_windows: int | None = 16,
    tokenizer: Any = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> RecoveredModel:
    """
    Train what a pruned model keeps towards what the dense model predicts; zeros stay zeros.

    The loss is the Kullback-Leibler divergence of the next-token distributions, over the dense
    model's 512 likeliest tokens and the rest as one event. One window of eight, 16 at most, is held
    out: these say when to stop, and the weights are as before if nothing made them better. With the
    same ``tokens`` and seed, one CPU gives the same weights. Processes that torchrun starts each
    call this: they train together, and all have the whole model after it.

    Args:
        pruned: What ``pho.prune`` gave; or a model with exact zeros in its linears, in memory or by
            its name. It is trained in place.
        teacher: The dense model that it was pruned from, in memory or by its name.
        texts: What to train on, as for ``pho.calibrate``; other text than the calibration's.
        minutes: Time for all of it, 30 by default; a step is measured, and the number of tokens
            that fit is in the result.
        tokens: Tokens to train on, instead of a time.
        written: Tokens that the dense model writes itself, to train on beside the texts; it needs
            ``tokens``, and takes as long as training on them, or some times longer on a GPU.
        train: ``kept``: the weights that the masks keep; ``norms``: norms and biases alone;
            ``lora``: a low-rank change of each linear, merged under its mask.
        rate: Learning rate of Adam in the first step, as a share of the root mean square of a
            parameter's weights; by default 2e-3, 7.5e-3 or 1.5e-3 times the divergence before, in
            nats, or 1.
        adam_bits: Bits of each number that Adam remembers, 32 or 8.
        seed: Seed of the windows and their order.
        context_length: Tokens of a window; by default 2,048 or what the model reads.
        bos: Whether windows begin with BOS: ``auto``, ``always``, ``never``.
        confirm: A text to measure perplexities on: dense, pruned, recovered. None of it is trained
            on.
        confirm_windows: Most windows of it.
        tokenizer: That of the model, if it has none.
        resume: A folder that an interrupted training goes on from; it is left there.
        progress: Show bars on stderr; None shows them in terminals and notebooks.

    Raises:
        ModelError: The model has no zeros, or the teacher is of another architecture or vocabulary.
        TextError: The text fills fewer than four windows.
        InvalidInput: Both ``minutes`` and ``tokens``, too little time for one step, or a streamed
            model.

    Source:
        KL to the dense model as in PERP, Zimmer et al. 2023, arXiv:2312.15230, and its MaskLoRA.
    """
    settings = Recovery(
        train=train, minutes=minutes, tokens=tokens, written=written, rate=rate,
        adam_bits=adam_bits, seed=seed,
    )  # fmt: skip
    given = _given(pruned, tokenizer)
    length = length_of(given.model, texts, context_length)
    how = CalibrationSettings(context_length=length, bos=bos)  # type: ignore[arg-type]  # checked
    measured = (
        None if confirm is None else measured_text(given.model, confirm, how, confirm_windows)
    )
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        recovered = recover_model(
            given,
            lambda: nullcontext(opened(teacher, given.model.tokenizer)),
            RecoveryText(
                source=calibration_text_of(texts),
                context_length=length,
                bos=bos,
                measured=measured,
            ),
            settings,
            Path(temporary if resume is None else resume).expanduser(),
            progress=bars(progress),
        )
    after = given.after(recovered)
    parts = {part.name: getattr(after, part.name) for part in fields(after)}
    return RecoveredModel(
        **parts, model=given.model.model, tokenizer=given.model.tokenizer, recovered=recovered
    )


def _given(pruned: "Model | Pruned", tokenizer: Any) -> PrunedModel:
    """The model with its masks and its recipe, as far as they are known."""
    if isinstance(pruned, Pruned):
        loaded = opened(pruned.model, tokenizer or pruned.tokenizer)
        return PrunedModel.of(loaded, masks=pruned.masks, recipe=pruned.recipe)
    if isinstance(pruned, (str, Path)):
        return PrunedModel.read(Path(pruned))
    return PrunedModel.of(opened(pruned, tokenizer))
