"""
What a recovery learns from: windows of a text, and what the dense model predicts and writes.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, ModelError, TextError, field_name
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import (
    RecoveryText,
    TextRecord,
    apart,
    record_to_dict,
    recut,
    sample_windows,
)
from pho_service.pipeline.pace import Pace
from pho_service.pipeline.workplace import Workplace
from pho_service.planning.stage_memory import MOST, TOP_K, answers_bytes
from pho_service.progress import Advance, Run
from pho_service.pruning.perplexity import DenseReference, dense_reference, rate_divergence
from pho_service.pruning.recovery import Recovering, mixed
from pho_service.spec.recovery import BEGINNING, CHECKS, PASSES, WRITTEN_AT_ONCE, Recovery

HELD_OUT = 16  # windows at most, or one of eight
LEAST_WINDOWS = 4
ALL = 10**6  # windows: more than a text is read for
_OTHER = 0.2  # share of the time for what is beside the dense model and the steps
_KEEP_S = 10.0  # between two times that the answers of the dense model are kept


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Predictions of the dense model, and what they are of."""

    reference: DenseReference  # On what this process trains on, a window a step
    held_out: DenseReference
    before: float  # Divergence on these
    windows: int  # That what all processes train on is cut from
    written: int  # Of these
    teacher: dict[str, Any]
    text: dict[str, Any]


def draw_lesson(
    pruned: LanguageModel,
    teacher: LanguageModel,
    trained: Recovering,
    text: RecoveryText,
    settings: Recovery,
    pace: Pace,
    run: Run,
) -> Lesson:
    """Draw windows, as many as are needed, and keep what the dense model predicts on them."""
    place = pace.place
    together = trained.processes.count
    steps = place.once(
        "steps", lambda: torch.tensor(_steps(trained, teacher, settings, text, place.room))
    )
    total = together * int(steps)
    windows, record = draw_windows(pruned, text, settings.seed, total + HELD_OUT)
    place.check_text(str(text.source), record.sha256)
    seen = windows[:0] if text.seen is None else text.seen
    if total <= len(windows) - _held_out(len(windows)):  # there are enough without these
        seen = windows[:0]
    held_out = min(_held_out(len(windows) + len(seen)), len(windows) // 2)
    windows = torch.cat([windows, seen])
    missing = max(0, total - (len(windows) - held_out))
    count = min(missing, -(-settings.written // text.context_length))
    if count:
        begun, also = windows[held_out:], min(HELD_OUT - held_out, count // 8)
        added = _written(teacher, begun, count + also, settings.seed, place, run)
        windows = torch.cat([windows[:held_out], added[:also], begun, added[also:]])
        held_out += also
    there = len(windows) - held_out
    taken = steps_of_each(total, there, together) * together
    share = recut(windows[held_out:], taken, settings.seed)[trained.processes.number :: together]
    share = share[: pace.begin(len(share))]
    taken = together * len(share)
    with run.progress("Asking the dense model", held_out + len(share)) as advance:
        held = dense_reference(teacher.model, windows[:held_out], top_k=TOP_K, advance=advance)
        before = trained.processes.agreed(rate_divergence(trained.model, held))
        if not before:
            raise ModelError(
                f"the teacher {teacher.name} predicts exactly what {pruned.name} does, so nothing "
                "can be recovered. Give the dense model that was pruned."
            )
        with place.writing():
            reference = _answers(teacher, share, pace, advance, run)
    asked = min(trained.processes.every(len(reference.windows)))
    if asked < len(share):
        pace.shorten(0, asked)
        taken = asked * together
    return Lesson(
        reference=reference.first(asked),
        held_out=held,
        before=before,
        windows=min(taken, there),
        written=count,
        teacher=teacher.to_dict(),
        text=record_to_dict(record),
    )


def _held_out(windows: int) -> int:
    """How many of so many windows are not trained on, to say how good the training is."""
    return min(HELD_OUT, windows // 8 or 1)


def _answers(
    teacher: LanguageModel, windows: Tensor, pace: Pace, advance: Advance, run: Run
) -> DenseReference:
    """What the dense model predicts, kept on disk as it comes: another attempt asks the rest."""
    # Windows that are run at once give other last digits than single ones, so these are always the
    # same ones.
    at_once = MOST if teacher.device.type == "cuda" else 1
    rows, kept_at = pace.place.answers(), time.monotonic()
    advance(rows.count)
    with mixed(teacher.device, gradients=True):
        for begin in range(rows.count, len(windows), at_once):
            if pace.asked_enough(begin):
                break
            some = windows[begin : begin + at_once]
            answers = dense_reference(teacher.model, some, top_k=TOP_K, advance=advance)
            logs = answers.log_probabilities.view(torch.int32)
            rows.add(torch.stack([answers.tokens, logs], dim=1))
            others_wait = run.gives_way()
            if others_wait or time.monotonic() - kept_at > _KEEP_S:
                kept_at = time.monotonic()
                rows.keep()
                pace.keep()
            if others_wait:
                run.look()
    rows.keep()
    pace.keep()
    run.look()
    tokens, logs = rows.read().unbind(dim=1)
    return DenseReference(
        windows=windows[: rows.count], tokens=tokens, log_probabilities=logs.view(torch.float32)
    )


def draw_windows(
    model: LanguageModel, text: RecoveryText, seed: int, most: int
) -> tuple[Tensor, TextRecord]:
    """Windows of a text that are for nothing else."""
    apart_from = [] if text.unlike is None else [text.unlike]
    apart_from += [] if text.measured is None else [text.measured.windows]
    windows, record = sample_windows(
        model, text.source, count=0, beside=most + sum(map(len, apart_from)),
        context_length=text.context_length, bos=text.bos, seed=seed,
    )  # fmt: skip
    for seen in apart_from:
        windows = apart(windows, seen)
    if len(windows) < LEAST_WINDOWS:
        raise TextError(
            f"the text {text.source} has too few windows of {text.context_length} tokens to "
            f"recover on: {len(windows)}, and {LEAST_WINDOWS} are the least, of which one is held "
            f"out. Give a longer text, or a smaller {field_name('calibration/context_length')}."
        )
    return windows, record


def steps_of_each(windows: int, there: int, together: int) -> int:
    """How many windows each of some processes takes of so many, if so many are there."""
    if there < together:
        raise TextError(
            f"{there} windows to recover on are fewer than the {together} processes, of which each "
            "takes one at a time. Give a longer text, or start fewer processes."
        )
    steps = min(windows, PASSES * there) // together
    return steps // CHECKS * CHECKS or steps  # as many between any two checks


def _written(
    teacher: LanguageModel, windows: Tensor, count: int, seed: int, place: Workplace, run: Run
) -> Tensor:
    """Windows that the dense model writes, each from the beginning of one of the text."""
    if teacher.stream:
        raise InvalidInput(
            f"the teacher {teacher.name} is streamed, and would be read again for each token that "
            "it writes. Load it without streaming, or leave written out."
        )
    processes, length = place.processes, windows.shape[1]
    begin = max(1, length // BEGINNING)
    begins = windows[torch.arange(count) % len(windows), :begin]
    begins = begins[processes.number :: processes.count]
    network: Any = teacher.model
    cards = [teacher.device] if teacher.device.type == "cuda" else []

    def go_on(some: Tensor, number: int) -> Tensor:
        with torch.random.fork_rng(cards), torch.inference_mode():
            torch.manual_seed(seed + processes.number + processes.count * number)
            rows: Tensor = network.generate(
                some.to(teacher.device),
                attention_mask=torch.ones_like(some).to(teacher.device),
                do_sample=True, temperature=1.0, top_p=1.0, top_k=TOP_K,
                min_new_tokens=length - begin, max_new_tokens=length - begin,
                pad_token_id=0,
                cache_implementation="static", disable_compile=True,  # or all before is copied
            )  # fmt: skip
        return rows.cpu()

    def write() -> Tensor:
        written: list[Tensor] = []
        with run.progress("The dense model writes", len(begins)) as advance:
            for some in begins.split(max(1, WRITTEN_AT_ONCE // length)):
                number = len(written)
                written.append(place.part(f"written-{number}", partial(go_on, some, number)))
                advance(len(some))
                if run.gives_way():
                    run.look()
        return torch.cat([window for share in processes.every(written) for window in share])

    return place.once("written", write)


def _steps(
    trained: Recovering, teacher: LanguageModel, settings: Recovery, text: RecoveryText, room: int
) -> int:
    """
    How many windows one process trains on: its share of the tokens; or as many as the time allows,
    and as half of the room on the disk has place for their answers.
    """
    if settings.tokens is not None:
        steps = -(-settings.tokens // (text.context_length * trained.processes.count))
        return steps if steps < CHECKS else -(-steps // CHECKS) * CHECKS
    generator = torch.Generator().manual_seed(settings.seed)
    window = torch.randint(teacher.vocabulary, (1, text.context_length), generator=generator)
    took = []
    for _ in range(2):  # the first one is slower
        start = time.monotonic()
        trained.backward(dense_reference(teacher.model, window, top_k=TOP_K), 0)
        trained.zero_grad()
        took.append(time.monotonic() - start)
    answers = trained.processes.count * answers_bytes(text.context_length, teacher.vocabulary)
    steps = int(min((1 - _OTHER) * settings.time_s / min(took), room / 2 / answers))
    if steps < 1:
        raise InvalidInput(
            f"{settings.time_s / 60:g} minutes are too few: one window of {text.context_length} "
            f"tokens takes {min(took):.1f} s. Give more, or shorter windows "
            f"({field_name('calibration/context_length')})."
        )
    return steps // CHECKS * CHECKS or steps  # as of tokens, so that they repeat it
