"""
Zero-shot tasks by lm-evaluation-harness, on a model in memory.

The harness asks, counts and averages; how likely an answer is, our own passes say: so a streamed
model can be asked, and windows begin as everywhere else.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.host.machine import versions
from pho_service.models.loading import LanguageModel
from pho_service.models.tasks import Ending, Likelihood, LoadedTasks, rate_continuations
from pho_service.pipeline.compare import STDERR, Also
from pho_service.progress import Progress, silent
from pho_service.spec.tasks import TaskScore, mean_accuracy

_RESAMPLES = 1000  # for standard errors of metrics that are no means
_SEED = 1234  # the harness's own, for the examples that few-shot tasks show
_LONGEST = 2048  # tokens, where a model does not say how many it reads


def measure_tasks(
    model: LanguageModel,
    tasks: LoadedTasks,
    *,
    bos: str = "auto",
    limit: int | None = None,
    progress: Progress = silent,
) -> list[TaskScore]:
    """Ask a model all questions of some tasks."""
    from lm_eval.evaluator import evaluate

    if limit is not None and limit < 1:
        raise InvalidInput(f"limit={limit} examples of each task is below 1.")
    for task in tasks.tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    with _quiet():
        evaluation = evaluate(
            lm=TaskModel(model, bos, progress),
            task_dict=tasks.tasks,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    assert evaluation is not None  # this is the only process
    return [score for name in evaluation["results"] for score in _scores(name, evaluation)]


def _scores(name: str, evaluation: Any) -> Iterator[TaskScore]:
    """The metrics of one task, from what the harness says of all."""
    metrics = evaluation["results"][name]
    version, samples = evaluation["versions"].get(name), evaluation["n-samples"].get(name)
    for key, value in metrics.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = metrics.get(f"{metric}_stderr,{way}")
        yield TaskScore(
            task=name,
            metric=metric if way == "none" else f"{metric} ({way})",
            value=float(value),
            stderr=None if error is None or isinstance(error, str) else float(error),
            examples=samples["effective"] if samples else None,
            shots=evaluation["n-shot"].get(name),
            version=None if version is None else str(version),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness shows no bars, prints nothing, and starts no processes."""
    import lm_eval.api.task as harness

    bar, variable = harness.tqdm, "DISABLE_MULTIPROC"
    before = os.environ.get(variable)
    harness.tqdm = partial(bar, disable=True)
    os.environ[variable] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        harness.tqdm = bar
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


class TaskModel:
    """A model as the harness asks it; it needs no more of the harness's own class than this."""

    rank = 0
    world_size = 1

    def __init__(self, model: LanguageModel, bos: str, progress: Progress) -> None:
        self._model, self._progress = model, progress
        self._prefix = model.window_prefix(bos)
        longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self._longest = longest if isinstance(longest, int) and longest > 0 else _LONGEST

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely is each (context, continuation), and is it what the model would write?"""
        rated = self._rate([self._encode(*request.args[:2]) for request in requests])
        return [(likelihood.log, likelihood.greedy) for likelihood in rated]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """How likely is each text as a whole, in windows as long as the model can read?"""
        texts = [self._windows(request.args[0]) for request in requests]
        rated = iter(self._rate([window for text in texts for window in text]))
        return [sum(next(rated).log for _ in text) for text in texts]

    def _rate(self, continuations: Sequence[Ending]) -> list[Likelihood]:
        with self._progress("Measuring tasks", len(continuations)) as advance:
            return rate_continuations(self._model, continuations, advance=advance)

    def _encode(self, context: str, continuation: str) -> Ending:
        """Tokens of a context and what follows it, tokenised together and then cut."""
        # Spaces at the end of the context belong to what follows, as in the harness.
        context_tokens = self._tokens(context.rstrip())
        whole = self._tokens(context + continuation)
        if not whole:
            raise InvalidInput("a task has an example without any text. Check its data.")
        start = self._prefix or ([] if context_tokens else [self._first_token()])
        tokens = (*start, *whole[len(start) - self._longest - 1 :])  # a context may be too long
        length = min(len(whole) - len(context_tokens), len(tokens) - 1)
        return Ending(tokens=tokens, length=max(1, length))

    def _windows(self, text: str) -> list[Ending]:
        """A text as the harness cuts it: each token is predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        first = self._prefix[0] if self._prefix else self._first_token()
        windows = get_rolling_token_windows(self._tokens(text), first, self._longest, 1)
        cut = (make_disjoint_window(window) for window in windows)
        return [Ending(tokens=(*a, *b), length=len(b)) for a, b in cut]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._model.tokenize(text).tolist()
        return tokens

    def _first_token(self) -> int:
        """What stands before a text that nothing stands before: BOS, or else EOS."""
        tokenizer = self._model.tokenizer
        special_tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return int(next((token for token in special_tokens if token is not None), 0))


def also_tasks(tasks: LoadedTasks | None, *, bos: str, limit: int | None) -> Also | None:
    """What a comparison measures of each model beside its perplexity; None without tasks."""
    if tasks is None:
        return None

    def measure(model: LanguageModel) -> dict[str, float]:
        return as_extra(measure_tasks(model, tasks, bos=bos, limit=limit))

    return measure


def as_extra(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Scores as the further columns of a comparison, with their standard errors beside them."""
    columns = {}
    for score in scores:
        name = f"{score.task} {score.metric}"
        columns[name] = score.value
        if score.stderr is not None:
            columns[name + STDERR] = score.stderr
    mean = mean_accuracy(scores)
    return columns if mean is None else {**columns, "mean acc": mean}


def tasks_document(
    model: LanguageModel, scores: Sequence[TaskScore], *, bos: str, limit: int | None
) -> dict[str, Any]:
    """Scores as JSON values, with what they depend on beside the model."""
    return {
        "tasks": [asdict(score) for score in scores],
        "mean_accuracy": mean_accuracy(scores),
        "limit": limit,
        "bos": bool(model.window_prefix(bos)),
        "versions": versions("lm-eval", "torch", "transformers"),
    }
