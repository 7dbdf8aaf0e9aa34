"""
Zero-shot tasks that a model is measured on, and its scores.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Document, Number, Whole

# What papers on pruning report, by their names in lm-evaluation-harness.
USUAL_TASKS = (
    "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip
MOST_TASKS = 100  # of a job


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """
    One metric of one task.

    Attributes:
        task: Its name.
        metric: ``acc``: the likeliest answer is the right one. ``acc_norm``: the likeliest for
            its length in characters is. Tasks may have others.
        value: The metric; of an accuracy the share of right answers, 0 to 1.
        stderr: Its standard error over the examples; None where the harness gives none.
        examples: How many were asked; None for a group of tasks.
        shots: Solved examples in front of each question.
        version: Version of the task's definition.
    """

    __pydantic_config__ = STRICT

    task: str
    metric: str
    value: Number
    stderr: Number | None
    examples: Whole | None
    shots: Whole | None
    version: str | None

    @property
    def shown(self) -> str:
        """The value and its standard error, as tables have them: of accuracies in percent."""
        error = "" if self.stderr is None else f" ± {self._number(self.stderr)}"
        return f"{self._number(self.value)}{error}"

    def change(self, pruned: float) -> str:
        """The difference to another model: of accuracies in points."""
        return self._number(pruned - self.value, sign="+")

    def _number(self, value: float, sign: str = "") -> str:
        scale, digits = (100, 2) if self.metric.startswith("acc") else (1, 4)
        return f"{value * scale:{sign}.{digits}f}"


class TaskScores(Document):
    """
    What a model scored before and after it was pruned, on the same questions.

    Attributes:
        dense: A score for each task and metric.
        pruned: The same, in the same order.
        limit: Only the first so many examples of each task were asked; None: all.
        bos: Whether questions begin with BOS.
        versions: Versions of the packages that measured.
    """

    columns: ClassVar = ("task", "metric", "dense", "pruned", "change", "examples")
    note: ClassVar = (
        "Accuracies in percent, ± standard error over the examples; the change in points."
    )

    dense: list[TaskScore]
    pruned: list[TaskScore]
    limit: int | None = None
    bos: bool
    versions: dict[str, str]

    def rows(self) -> list[tuple[str, ...]]:
        """A table as text, under ``columns``; the last row is the mean of all ``acc``."""
        rows: list[tuple[str, ...]] = [
            (
                before.task, before.metric, before.shown, after.shown, before.change(after.value),
                "" if before.examples is None else str(before.examples),
            )
            for before, after in zip(self.dense, self.pruned, strict=True)
        ]  # fmt: skip
        dense, pruned = mean_accuracy(self.dense), mean_accuracy(self.pruned)
        if dense is not None and pruned is not None:
            shown = (f"{100 * dense:.2f}", f"{100 * pruned:.2f}", f"{100 * (pruned - dense):+.2f}")
            rows.append(("mean", "acc", *shown, ""))
        return rows


def task_names(said: str | Iterable[str]) -> tuple[str, ...]:
    """The names of tasks, from a list or from one string with commas."""
    listed = said.split(",") if isinstance(said, str) else said
    names = tuple(name.strip() for name in listed)
    if not names or not all(names):
        raise InvalidInput(
            f"tasks {said!r} name none, or have a comma too many. Write names with commas between: "
            f"{','.join(USUAL_TASKS)}."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidInput(f"the task {twice[0]} is named twice. Name each task once.")
    return names


def mean_accuracy(scores: Sequence[TaskScore]) -> float | None:
    """The mean of all ``acc``, as papers give it; None if there are fewer than two."""
    accuracies = [score.value for score in scores if score.metric == "acc" and score.examples]
    return sum(accuracies) / len(accuracies) if len(accuracies) > 1 else None
