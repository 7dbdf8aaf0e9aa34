"""
Recover what pruning lost: train a pruned or smaller model towards the dense model's predictions.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pho_service.errors import (
    InvalidInput,
    ModelError,
    NumericalError,
    OutOfMemory,
    TextError,
    field_name,
)
from pho_service.host.machine import first_words, let_go_of_memory, ran_out_of_memory, versions
from pho_service.host.model_files import check_not_quantised
from pho_service.models.architecture import decoder_blocks, footprint_of
from pho_service.models.calibration import USED, free_for
from pho_service.models.loading import LanguageModel, load_model, sha256_each
from pho_service.models.mask_file import MASKS, LayerMask, PackedMask, groups_of, read_masks
from pho_service.models.packed import as_folder
from pho_service.models.saving import RECIPE, read_recipe, recipe_document, save_pruned
from pho_service.models.texts import RecoveryText
from pho_service.pipeline.lesson import ALL, LEAST_WINDOWS, Lesson, draw_lesson, draw_windows
from pho_service.pipeline.minutes import machine_at_hand
from pho_service.pipeline.pace import Pace
from pho_service.pipeline.prune import PrunedFolder
from pho_service.pipeline.rating import perplexity_on
from pho_service.pipeline.workplace import Workplace
from pho_service.pipeline.writing import side_by_side, written_by
from pho_service.planning.plan import obstacles, with_process
from pho_service.planning.stage_memory import Place, recovery_peak
from pho_service.progress import Advance, Progress, Run
from pho_service.pruning.hardware import main_memory
from pho_service.pruning.masks import model_sparsity
from pho_service.pruning.perplexity import rate_divergence
from pho_service.pruning.recovery import Processes, Recovering, mixed, recovering
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.document import number, percent
from pho_service.spec.perplexity import Perplexity, ratio_errors
from pho_service.spec.recovery import CHECKS, AdamBits, Recovered, Recovery, Student

logger = logging.getLogger(__name__)

TRAINING = "Recovering"  # begins the title of its bar, beside those of what comes before
_RATIOS = (("pruned", "dense"), ("recovered", "dense"), ("recovered", "pruned"))
_OF_MODELS = ("name", "revision", "weights_sha256", "dtype")  # what is stored of one
_SLOWER = 1 / 3  # of the rate, after a check that is no better than before the training
_MOST_BACK = 3  # such checks end it
_BETAS = (0.9, 0.95)  # of Adam


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A pruned model with its masks and its recipe; or one that is smaller than its teacher."""

    model: LanguageModel
    masks: Mapping[str, PackedMask]  # None of a smaller model without zeros
    recipe: Mapping[str, Any] | None  # None of one that another tool has made

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
    ) -> "PrunedModel":
        """
        A folder of `pho prune` or `pho recover`, or of any other tool. One of several processes
        reads it to the main memory, and takes its part from there.
        """
        if Processes().count > 1 and device_map is None:
            device = "cpu"
        folder = folder.expanduser()
        with as_folder(folder) as small:
            check_not_quantised(small, "They cannot be trained: recover the model before that.")
            recipe = recipe_document(small) if (small / RECIPE).is_file() else None
            masks = {}
            if recipe is not None and read_recipe(small).layers:
                file = read_masks(small / MASKS)
                masks = {name: PackedMask.of(file.mask(name)) for name in file.names}
        model = load_model(str(folder), dtype=dtype, device=device, device_map=device_map)
        return cls.of(model, masks=masks, recipe=recipe)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        *,
        masks: Mapping[str, PackedMask] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> "PrunedModel":
        """A model, whose zeros are its masks if it has no others."""
        if recipe is None:
            weights = {name: linear.weight for name, linear in model.linears.items()}
            keeps = {name: weight != 0 for name, weight in weights.items() if not weight.all()}
            masks = {name: PackedMask.of(LayerMask(keep=keep)) for name, keep in keeps.items()}
        return cls(model=model, masks=masks or {}, recipe=recipe)

    @property
    def from_elsewhere(self) -> bool:
        """Whether another tool has made the model, also if it was recovered since."""
        recipe = self.recipe
        return recipe is None or (recipe["configuration"] is None and "structure" not in recipe)

    def linears_to_train(self, student: Student | None) -> dict[str, PrunableLinear]:
        """Those that have masks; of a smaller model that PHO has not pruned all, zeros aside."""
        if not self.masks or (student is not None and self.from_elsewhere):
            return {**self.model.linears}
        return {name: self.model.linears[name] for name in self.masks}

    def after(self, recovered: Recovered) -> PrunedFolder:
        """The model as it is now, with its recipe."""
        linears = self.model.linears
        hashes = sha256_each(linear.weight for linear in linears.values())
        sha256 = dict(zip(linears, hashes, strict=True))
        recipe = self._elsewhere(recovered) if self.from_elsewhere else dict(self.recipe or {})
        layers = {
            name: {**layer, "weights_sha256": sha256[name]}
            for name, layer in recipe["layers"].items()
        }
        dense = {name: sha256[name] for name in linears if name not in layers}
        changed = recovered.kept and recovered.train != "norms"
        recipe |= {
            "layers": layers,
            **({"dense": dense} if "dense" in recipe else {}),
            "updated": recipe["updated"] or changed,
            "recovery": recovered.to_dict(),
            "versions": versions("torch", "transformers", "accelerate"),
        }
        return PrunedFolder(
            sparsity=recipe["sparsity"],
            layers={name: layer["sparsity"] for name, layer in layers.items()},
            masks=dict(self.masks),
            recipe=recipe,
        )

    def _elsewhere(self, recovered: Recovered) -> dict[str, Any]:
        """What is known of a model that another tool has made."""
        shares = {name: 1 - float(mask.keep.float().mean()) for name, mask in self.masks.items()}
        layers = {}
        for name, mask in self.masks.items():
            keep, group = groups_of(mask.keep)
            layers[name] = {"sparsity": shares[name], "keep": keep, "group": group}
        return {
            "format": "pho-pruning",
            "version": 2,
            "configuration": None,
            "model": recovered.teacher,
            "calibration": {},
            "updated": True,  # whoever pruned it may have changed what stayed
            "folded": [],
            "sparsity": model_sparsity(self.model.linears, shares) if shares else 0.0,
            "layers": layers,
            **({"dense": {}} if len(layers) < len(self.model.linears) else {}),
        }


def recover_model(
    pruned: PrunedModel,
    dense: Callable[[], AbstractContextManager[LanguageModel]],
    text: RecoveryText,
    settings: Recovery,
    workplace: Path,
    *,
    run: Run = Run(),
) -> Recovered:
    """
    Train a model in place. What an interrupted training left in ``workplace`` is gone on with.

    Where several processes train together, each calls this, and all end with the same model.
    """
    # ``dense`` gives the dense model, which is let go of before the training begins.
    began = time.monotonic()
    processes = Processes()
    model = pruned.model
    check_trainable(model, pruned.linears_to_train(None), settings, processes)
    if model.device.type == "cpu":
        model.model.float()
    blocks = [block for _, block in decoder_blocks(model.model)]
    seen = None if text.measured is None else text.measured.key  # which is not trained on
    cut = [str(text.source), text.context_length, text.bos, seen]
    identity = [model.to_dict(), settings.to_dict(), *cut]
    place = Workplace(workplace, identity, processes)
    check_fits(model, text.context_length, settings, processes, room=place.room)
    pace = Pace(settings, place, began)
    measured: dict[str, Perplexity] = {}
    # Several processes do not write: their parts of a model do not lie on one device.
    windows = None if text.measured is None or processes.count > 1 else text.measured.windows
    said = {"pruned": written_by(model, windows)}
    recompute = not _has_room(model, text, settings, processes)
    with _shortage_told(model, text, settings), ExitStack() as teaching:
        with place.nothing_left():
            teacher = teaching.enter_context(dense())
            student = check_teacher(pruned, teacher, text)
            linears = pruned.linears_to_train(student)
            check_trainable(model, linears, settings, processes)
            if student is None and not _is_dense_of(pruned, teacher):
                logger.warning(
                    "the teacher %s is not the dense model that %s says it was pruned from: their "
                    "weights differ. What is recovered is its predictions.",
                    teacher.name, model.name,
                )  # fmt: skip
            place.begin(teacher.to_dict())
            pace.resume()
        with (
            recovering(model.model, blocks, linears, settings, processes) as trained,
            mixed(trained.device),
        ):
            trained.recompute = recompute
            there = replace(model, model=trained.model)  # type: ignore[arg-type]  # or a copy of it
            if text.measured is not None:
                with pace.comes_again():
                    measured["pruned"] = _perplexity("pruned", text, there, place, run.progress)
                pace.keep()
                run.look()
            with place.nothing_left():
                lesson = draw_lesson(model, teacher, trained, text, settings, pace, run)
                if text.measured is not None:
                    measured["dense"] = _perplexity("dense", text, teacher, place, run.progress)
                    run.look()
                said["dense"] = written_by(teacher, windows)
                teaching.close()
                del teacher
                let_go_of_memory()
            place.keep_initial(trained)
            training = _Training(trained, lesson, pace, run)
            with processes.alone(), place.writing():
                _train(training, settings, place)
            trained.round_(model.stored_dtype, settings.seed)
            after = training.check()
            kept = after < lesson.before
            if not kept:
                place.restore(trained, None)
            if text.measured is not None:
                measured["recovered"] = perplexity_on(text.measured, there, run.progress)
    model.model.to(model.stored_dtype)  # type: ignore[arg-type]  # as in loading.py
    said["recovered"] = written_by(model, windows)
    return Recovered(
        train=settings.train,
        before=lesson.before,
        after=after if kept else lesson.before,
        kept=kept,
        tokens=training.done * processes.count * text.context_length,
        planned=pace.planned * processes.count * text.context_length if pace.shortened else None,
        shortened=tuple(pace.shortened),
        windows=lesson.windows,
        written=lesson.written,
        held_out=len(lesson.held_out.windows),
        context_length=text.context_length,
        rate=settings.first_rate(lesson.before),
        adam_bits=settings.adam_bits,
        seed=settings.seed,
        teacher={key: lesson.teacher[key] for key in _OF_MODELS},
        student=student,
        text=lesson.text,
        measured=None if text.measured is None else text.measured.to_dict(),
        perplexities={name: rating.perplexity for name, rating in measured.items()},
        errors=ratio_errors(measured, _RATIOS),
        continuations=side_by_side(model, windows, **said),
        seconds=round(time.monotonic() - began, 3),
    )


def recover_folder(
    pruned: PrunedModel,
    dense: Callable[[], AbstractContextManager[LanguageModel]],
    text: RecoveryText,
    settings: Recovery,
    out: Path,
    *,
    run: Run = Run(),
) -> Recovered:
    """
    Train a model as :func:`recover_model` does, and save it. What an interrupted training goes on
    with lies beside the folder until then.
    """
    processes = Processes()
    place = out.expanduser().resolve().with_name(f".{out.name}.recovery")
    recovered = recover_model(pruned, dense, text, settings, place, run=run)
    if not processes.number:
        result = pruned.after(recovered)
        save_pruned(pruned.model, out, result.masks.items(), result.recipe)
    processes.wait()
    Workplace(place).remove()
    return recovered


def _has_room(
    model: LanguageModel, text: RecoveryText, settings: Recovery, processes: Processes
) -> bool:
    """Whether the activations of all blocks fit, so that none runs twice: a sixth less time."""
    if settings.train == "lora" or processes.count > 1:  # who have little
        return False
    footprint = footprint_of(model.model)
    peak = recovery_peak(
        footprint, Place(on_gpu=model.device.type == "cuda"), settings,
        tokens=text.context_length, asked=0, recompute=False,
    )  # fmt: skip
    return peak.device + peak.host - footprint.weights <= USED * free_for(model)


@contextmanager
def _shortage_told(model: LanguageModel, text: RecoveryText, settings: Recovery) -> Iterator[None]:
    """Inside, memory that runs out raises OutOfMemory with the ways out."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the recovery of {model.name} on windows of {text.context_length} tokens ran out of "
            f"memory{first_words(error)}. {_ways_out(settings)} `pho plan` says what a "
            "recovery takes."
        ) from error


def _ways_out(settings: Recovery) -> str:
    others = ""
    if settings.train == "kept":
        others += f", or train less ({field_name('recovery/train', 'lora')} or norms)"
    if settings.adam_bits == 32:
        others += f", or let Adam remember less ({field_name('recovery/adam_bits', 8)})"
    return f"Take shorter windows ({field_name('calibration/context_length')}){others}."


def check_fits(
    model: LanguageModel, length: int, settings: Recovery, processes: Processes, *, room: int | None
) -> None:
    """See that this machine has the memory, and the room on its disk, before anything runs."""
    main, machine = main_memory(), machine_at_hand(str(model.device))
    device = len(model.devices) * machine.memory_bytes if machine.is_gpu else main
    peak = recovery_peak(
        footprint_of(model.model), Place(on_gpu=machine.is_gpu), settings,
        tokens=length, asked=settings.tokens or CHECKS * length, processes=processes.count,
    )  # fmt: skip
    machine = replace(machine, memory_bytes=device, main_bytes=main)
    lacking = [*obstacles({"recover": with_process(peak, machine)}, machine, room)]
    if lacking:
        fewer = f", or fewer tokens ({field_name('recovery/tokens')})" if settings.tokens else ""
        ways = _ways_out(settings).removesuffix(".")
        raise OutOfMemory(f"{'; '.join(lacking)}. {ways}{fewer}.")


def check_recoverable(
    model: LanguageModel,
    pruned: Collection[str],
    text: RecoveryText,
    settings: Recovery,
    room: int | None = None,
) -> None:
    """See before any search that a model can be recovered when some linears of it are pruned."""
    check_trainable(model, pruned, settings, Processes())
    check_fits(model, text.context_length, settings, Processes(), room=room)
    try:
        draw_windows(model, text, settings.seed, LEAST_WINDOWS)
    except TextError:  # of a text that repeats itself, what is drawn for longer may leave more
        draw_windows(model, text, settings.seed, ALL)


def check_trainable(
    model: LanguageModel, pruned: Collection[str], settings: Recovery, processes: Processes
) -> None:
    """See that a model can be trained as it is, before anything long."""
    if processes.count > 1 and len(model.devices) > 1:
        raise InvalidInput(
            f"{model.name} lies on {len(model.devices)} devices, and is to be trained by "
            f"{processes.count} processes, of which each has one. Leave "
            f"{field_name('device_map')} out, or start one process."
        )
    if model.stream:
        raise InvalidInput(
            f"{model.name} is streamed, and what is trained must be in memory. Load it without "
            "streaming."
        )
    if settings.train == "norms" and all(p.dim() != 1 for p in model.model.parameters()):
        raise InvalidInput(
            f"{model.name} has neither norms with weights nor biases. Train kept or lora."
        )
    places: dict[int, list[str]] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    trained = {name: model.linears[name].parameter for name in pruned}
    fused = next((name for name, weight in trained.items() if weight.dim() > 2), None)
    tied = next((places[id(p)] for p in trained.values() if len(places[id(p)]) > 1), None)
    if (tied or fused) and (settings.train == "lora" or processes.count > 1):
        who, way_out = "a low-rank change of one of them", "kept or norms"
        if processes.count > 1:
            who, way_out = "several processes", "it in one process"
        what = "one weight in several places, " + " and ".join(tied or [])
        if fused:
            what = f"the experts of a block in one parameter, {fused} among them"
        raise InvalidInput(f"{model.name} has {what}, which {who} would part. Train {way_out}.")
    held = {id(weight) for weight in trained.values()}
    whole = [name for name, linear in model.linears.items() if id(linear.parameter) in held]
    beside = next((name for name in whole if name not in trained), None)
    if beside is not None and settings.train == "kept":
        raise InvalidInput(
            f"{beside} of {model.name} is not pruned, and lies in one parameter with experts that "
            "are, so it would not stay as it is. Train norms."
        )


def _perplexity(
    name: str, text: RecoveryText, model: LanguageModel, place: Workplace, progress: Progress
) -> Perplexity:
    """The perplexity of a model, which is measured once."""
    assert text.measured is not None
    kept = place.values(name)
    if not kept:
        kept = asdict(perplexity_on(text.measured, model, progress))
        place.keep_values(name, kept)
    return Perplexity(**{**kept, "losses": tuple(kept["losses"])})


def _is_dense_of(pruned: PrunedModel, teacher: LanguageModel) -> bool:
    """Whether a teacher has the weights that a pruned model's recipe names, if it names any."""
    about = {} if pruned.from_elsewhere else dict((pruned.recipe or {}).get("model", {}))
    dtype = getattr(torch, str(about.get("dtype")), None)
    if not about.get("weights_sha256") or dtype is None:
        return True
    same_type = dtype == teacher.dtype
    sha256 = teacher.weights_sha256 if same_type else teacher.weights_sha256_as(dtype)
    return bool(sha256 == about["weights_sha256"])


def check_teacher(
    pruned: PrunedModel, teacher: LanguageModel, text: RecoveryText
) -> Student | None:
    """See that a model can learn from a teacher; of a larger teacher, both sizes are returned."""
    model = pruned.model
    teacher_shapes = {name: tuple(linear.weight.shape) for name, linear in teacher.linears.items()}
    shapes = {name: tuple(linear.weight.shape) for name, linear in model.linears.items()}
    student = None
    if shapes != teacher_shapes:
        model_record = model.to_dict()
        student = Student(
            model={key: model_record[key] for key in _OF_MODELS},
            parameters=model.parameters,
            blocks=len(decoder_blocks(model.model)),
            teacher_parameters=teacher.parameters,
            teacher_blocks=len(decoder_blocks(teacher.model)),
        )
        if student.parameters >= student.teacher_parameters:
            raise ModelError(
                f"the teacher {teacher.name} is of another architecture than {model.name}, and not "
                f"larger: {model.name} has {student}. Give the dense model that was pruned, or a "
                "larger one."
            )
        teacher.check_context(text.context_length)
    elif not pruned.masks:
        raise ModelError(
            f"{model.name} has no zeros in its {len(shapes)} linears: it is not pruned, nor is it "
            f"smaller than its teacher {teacher.name}, and there is nothing to recover. Give the "
            "pruned or smaller model, and the dense one as its teacher."
        )
    tokenizers = (model.tokenizer, teacher.tokenizer)
    tokens = [tokenizer.get_vocab() for tokenizer in tokenizers if tokenizer is not None]
    if model.vocabulary != teacher.vocabulary or tokens[:1] != tokens[-1:]:
        sizes = f"{teacher.vocabulary} tokens and {model.vocabulary}"
        if teacher.vocabulary == model.vocabulary:
            sizes = "as many tokens, but others"
        raise ModelError(
            f"the teacher {teacher.name} has another vocabulary than {model.name} ({sizes}), so "
            "what they predict cannot be compared. Give the dense model that was pruned, or a "
            "larger one with the same tokens."
        )
    return student


class _Training(TrainerCallback):
    """What is trained on what, and how far it is."""

    def __init__(
        self,
        trained: Recovering,
        lesson: Lesson,
        pace: Pace,
        run: Run,
    ) -> None:
        self.trained, self.lesson, self.pace = trained, lesson, pace
        self._run = run
        self.checks = min(CHECKS, len(lesson.reference.windows))
        self.done = 0  # steps
        self.before = self._now = lesson.before
        self._stack = ExitStack()
        self._advance: Advance = lambda _: None

    def check(self) -> float:
        """The divergence on the held-out windows; infinite of a model that has come apart."""
        try:
            self._now = rate_divergence(self.trained.model, self.lesson.held_out)
        except NumericalError:
            self._now = math.inf
        self._now = self.trained.processes.agreed(self._now)
        return self._now

    def _show(self) -> None:
        """Show the bar of all steps, which says what the last check found."""
        self._stack.close()
        status = f"divergence {number(self._now)}"
        if self._now != self.before:
            status += f", {percent(self._now / self.before - 1, signed=True)}"
        title = f"{TRAINING} ({status})"
        self._advance = self._stack.enter_context(self._run.progress(title, self.pace.steps))
        self._advance(self.done)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        del args
        self.pace.train_from(state.global_step)
        self.done = state.global_step
        self._show()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        self.done = state.global_step
        self._advance(1)
        if self.done >= self.pace.steps:  # looked at and kept, wherever the schedule ends
            control.should_evaluate = control.should_save = control.should_training_stop = True
        elif self._run.gives_way():
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        self.pace.look(state.global_step)
        if state.global_step < self.pace.steps and not control.should_training_stop:
            self._show()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        self.trained.processes.wait()  # so that all have kept one check that is the same
        self.pace.keep()
        if state.global_step < self.pace.steps and not control.should_training_stop:
            self._run.look()  # another attempt would go on from here

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._stack.close()


class _Trainer(Trainer):
    """A trainer whose loss is a divergence, computed some positions at a time."""

    training: _Training
    place: Workplace

    def _move_model_to_device(self, *_: Any) -> None:
        """What is trained stays where it is, and nobody needs to be told."""

    def training_step(self, _model: Any, inputs: Any, _count: Any = None) -> Tensor:
        (window,) = inputs["window"].tolist()
        value = self.training.trained.backward(self.training.lesson.reference, window)
        self.training.trained.clip()
        return torch.tensor(value, device=self.args.device)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        value, before, least = self.training.check(), self.training.before, self.state.best_metric
        if value >= before:
            self._take_back()
            value = before if least is None else least
        score = {"eval_divergence": value}  # of the weights as they are now
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, score)
        return score

    def _take_back(self) -> None:
        """Go on at a lower rate from the best weights."""
        self.place.restore(self.training.trained, self.state.best_global_step)
        adam, schedule = self.optimizer, self.lr_scheduler
        assert adam is not None
        assert isinstance(schedule, LambdaLR)
        adam.state.clear()  # it leads to where it went wrong
        for group in adam.param_groups:
            group["lr"] *= _SLOWER
        schedule.base_lrs = [rate * _SLOWER for rate in schedule.base_lrs]  # kept in checkpoints
        first = adam.param_groups[0]["initial_lr"]  # as the schedule began
        if schedule.base_lrs[0] < first * _SLOWER ** (_MOST_BACK - 0.5):
            self.control.should_training_stop = True


def _adam(groups: Sequence[dict[str, Any]], bits: AdamBits) -> torch.optim.Optimizer:
    if bits == 8:
        # On a CPU it warns that it lacks a package for quantised weights.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from bitsandbytes.optim.adam import Adam8bit

        return Adam8bit(groups, betas=_BETAS)  # type: ignore[no-untyped-call]
    return torch.optim.Adam(groups, betas=_BETAS, fused=True)  # and no copies of all at once


def _train(training: _Training, settings: Recovery, place: Workplace) -> None:
    trained, lesson = training.trained, training.lesson
    steps = len(lesson.reference.windows)
    every = steps // training.checks
    device = trained.device
    adam = _adam(trained.groups(settings.first_rate(training.before)), settings.adam_bits)
    schedule = LambdaLR(adam, training.pace.rate)
    arguments = TrainingArguments(
        output_dir=str(place.folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        max_grad_norm=0,  # which is seen to with the gradients of other processes
        seed=settings.seed,
        eval_strategy="steps", eval_steps=every,
        save_strategy="steps", save_steps=every,
        save_total_limit=1 if trained.processes.count == 1 else 3,  # others may lack the last one
        metric_for_best_model="divergence", greater_is_better=False,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False, dataloader_pin_memory=False,
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    assert arguments.device  # which counts the cards
    arguments._n_gpu = 1  # or as many windows as there are cards would be one step
    trainer = _Trainer(
        model=trained,
        args=arguments,
        train_dataset=[{"window": i} for i in range(steps)],
        eval_dataset=[{"window": 0}],
        optimizers=(adam, schedule),
        callbacks=[training],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.training, trainer.place = training, place
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        trainer.train(resume_from_checkpoint=place.last_check())
    place.restore(trained, trainer.state.best_global_step)
