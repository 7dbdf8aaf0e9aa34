"""
What zero-shot tasks a model is measured on, and what it scored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pho_service.errors import InvalidInput

# What papers on pruning report, by their names in lm-evaluation-harness.
USUAL_TASKS = (
    "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip


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
        version: Of the task's definition.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None
    shots: int | None
    version: str | None

    @property
    def shown(self) -> str:
        """The value and its standard error, as tables have them: of accuracies in percent."""
        scale, digits = (100, 2) if self.metric.startswith("acc") else (1, 4)
        error = "" if self.stderr is None else f" ± {self.stderr * scale:.{digits}f}"
        return f"{self.value * scale:.{digits}f}{error}"


def task_names(said: str | Iterable[str]) -> tuple[str, ...]:
    """
    The names of tasks, from a list or from one string with commas.

    Raises:
        InvalidInput: None is named, or one twice.
    """
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
    found = [score.value for score in scores if score.metric == "acc" and score.examples]
    return sum(found) / len(found) if len(found) > 1 else None
