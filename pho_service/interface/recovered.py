"""
`pho.recover`: a pruned or smaller model trained towards the dense one.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
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
from pho_service.interface.search import arguments
from pho_service.models.scratch import scratch_folder
from pho_service.models.texts import RecoveryText
from pho_service.pipeline.prune import PrunedFolder
from pho_service.pipeline.recover import PrunedModel, recover_model
from pho_service.progress import Run, bars
from pho_service.shown.parts import Shown, Table
from pho_service.shown.tables import recovered_table
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.document import part_of
from pho_service.spec.recovery import Recovered, Recovery

if TYPE_CHECKING:
    from pho_service.interface.inputs import MixedTexts, Texts


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class RecoveredModel(Shown, PrunedFolder):
    """
    A pruned or smaller model after its recovery; ``pho.save`` writes it.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoverArguments(Recovery):
    """
    Arguments of ``pho.recover``.

    Attributes:
        pruned: What ``pho.prune`` gave; or a model with exact zeros in its linears, or one that is
            smaller than its teacher, in memory or by its name. It is trained in place.
        teacher: The dense model that it was pruned from, or a larger one with the same vocabulary,
            in memory or by its name.
        texts: What to train on, as for ``pho.calibrate``; other text than the calibration's.
        context_length: Tokens of a window; by default 2,048 or what the model reads.
        bos: Whether windows begin with BOS: ``auto``, ``always``, ``never``.
        confirm: A text to measure perplexities on: dense, pruned, recovered. None of it is trained
            on. By default one window of eight of ``texts``, unless they are fewer.
        confirm_windows: Most windows of it.
        tokenizer: That of the model, if it has none.
        resume: A folder that an interrupted training goes on from; it is left there.
        progress: Show bars on stderr; None shows them in terminals and notebooks.
    """

    pruned: "Model | Pruned" = field(kw_only=False)
    teacher: Model = field(kw_only=False)
    texts: "MixedTexts" = field(kw_only=False)
    context_length: int | None = None
    bos: str = "auto"
    confirm: "Texts | None" = None
    confirm_windows: int | None = 16
    tokenizer: Any = None
    resume: str | Path | None = None
    progress: bool | None = None


@arguments(RecoverArguments)
def recover(ask: RecoverArguments) -> RecoveredModel:
    """
    Train what a pruned model keeps towards what the dense model predicts; zeros stay zeros.

    The model may be smaller than its teacher, with fewer blocks or narrower ones: one of Minitron
    or OptiPFair, or one from which layers were dropped by hand. Then all its linears are trained.

    The loss is the Kullback-Leibler divergence of the next-token distributions, over the dense
    model's 512 likeliest tokens and the rest as one event. One window of eight, 16 at most, is held
    out: these say when to stop, and the weights are as before if nothing made them better. With the
    same ``tokens`` and seed, one CPU gives the same weights. Processes that torchrun starts each
    call this: they train together, and all have the whole model after it.

    Raises:
        ModelError: The model neither has zeros nor is smaller than its teacher, or the teacher has
            another vocabulary.
        TextError: The text fills fewer than four windows.
        InvalidInput: Both ``minutes`` and ``tokens``, too little time for one step, or a streamed
            model.

    Source:
        KL to the dense model as in PERP, Zimmer et al. 2023, arXiv:2312.15230, and its MaskLoRA.
    """
    settings = part_of(ask, Recovery)
    given = _given(ask.pruned, ask.tokenizer)
    length = length_of(given.model, ask.texts, ask.context_length)
    how = CalibrationSettings(context_length=length, bos=ask.bos)  # type: ignore[arg-type]  # checked
    text = RecoveryText(source=calibration_text_of(ask.texts), context_length=length, bos=ask.bos)
    if ask.confirm is None:
        text = text.setting_aside(given.model, ask.confirm_windows, settings.seed)
    else:
        measured = measured_text(given.model, ask.confirm, how, ask.confirm_windows)
        text = replace(text, measured=measured)
    with tempfile.TemporaryDirectory(prefix="pho-", dir=scratch_folder(0)) as temporary:
        recovered = recover_model(
            given,
            lambda: nullcontext(opened(ask.teacher, given.model.tokenizer)),
            text,
            settings,
            Path(temporary if ask.resume is None else ask.resume).expanduser(),
            run=Run(progress=bars(ask.progress)),
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
