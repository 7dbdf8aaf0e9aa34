"""
How fast and how good GGUF files are in llama.cpp: of the wheel xllamacpp, or a server's.
"""

import gc
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import torch
from torch import Tensor

from pho_service.errors import InvalidInput, ModelError, ServiceError, field_name
from pho_service.host.machine import conditions, versions
from pho_service.host.model_files import is_packed
from pho_service.models.gguf_file import converter_for
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.scratch import scratch_folder
from pho_service.models.texts import ReportText
from pho_service.pipeline.bench import Bench, Side
from pho_service.pipeline.export import SUFFIX, TOP_K, export
from pho_service.pipeline.inputs import Inputs
from pho_service.pipeline.rating import perplexity_on
from pho_service.progress import Progress, silent
from pho_service.pruning.perplexity import DenseReference, dense_reference, rate_divergence
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.export import GgufType
from pho_service.spec.perplexity import Perplexity
from pho_service.spec.verbs import BenchSettings, LlamaAsk, Where

if TYPE_CHECKING:
    from pho_service.models.texts import Text

_TYPES: tuple[GgufType, ...] = ("q8_0",)
_ASKED, _LIKELIEST = 4, 10  # prompts whose next tokens are compared, and how many of these
_PROMPT = 64  # tokens of such a prompt
_ERROR = re.compile(r"\bE\s+.*?: (.+)")
_PATIENCE_S = 600.0


class ReportedOn(NamedTuple):
    """The text that qualities are measured on."""

    source: "Text"
    windows: int | None = None  # The first so many; all by default


@dataclass(kw_only=True)
class _Row:
    """A file or a server, and what is known of it."""

    side: Side
    file: Path | None = None
    url: str = ""
    server: Any = None  # Of xllamacpp; the file is served as long as it is there
    vocabulary: int = 0

    @classmethod
    def of(cls, file: Path, name: str, base: int = 0) -> "_Row":
        return cls(side=Side(name=name, bytes=file.stat().st_size, base=base), file=file)


def bench_llama(
    models: Sequence[str],
    settings: BenchSettings,
    ask: LlamaAsk,
    report: ReportedOn | None = None,
    *,
    where: Where | None = None,
    progress: Progress = silent,
) -> Bench:
    """Measure models beside each other in llama.cpp: files, servers, and folders in some types."""
    check_llama(models, settings, ask, where or Where())
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=scratch_folder(0)))
        )
        rows = _rows(models, ask, folder, progress)
        quality = _qualities(models, rows, report, ask.context_length, progress) if report else {}
        with progress("Loading", len(rows)) as advance:
            for row in rows:
                _serve(row, settings)
                advance(1)
        with progress("Measuring", (settings.rounds + 1) * len(rows)) as advance:
            for turn in range(-1, settings.rounds):  # the first one warms up
                for row in rows if turn % 2 else reversed(rows):
                    prefill_s, decode_s = _run(row, settings)
                    if turn >= 0:
                        row.side.prefill_s.append(prefill_s)
                        row.side.decode_s.append(decode_s)
                    advance(1)
        sides = [_with_quality(row, quality.get(number)) for number, row in enumerate(rows)]
    return Bench(sides=sides, settings=settings, conditions=_conditions(rows, report))


def check_llama(
    models: Sequence[str], settings: BenchSettings, ask: LlamaAsk, where: Where
) -> None:
    """See before any long work that all of it can be measured."""
    device, dtype = field_name("device", where.device), field_name("dtype", where.dtype)
    of_torch = {device: where.device, dtype: where.dtype}
    if given := [name for name, value in of_torch.items() if value != "auto"]:
        raise InvalidInput(
            f"{', '.join(given)}: llama.cpp runs where its own build does, in the types of the "
            f"files. Leave it out; choose types by {field_name('types', 'bf16')}, or measure in "
            f"torch: {field_name('runtime', 'torch')}."
        )
    if settings.batch != 1:
        raise InvalidInput(
            f"{field_name('batch', settings.batch)}: llama.cpp is measured with one prompt at a "
            "time. Leave it out."
        )
    if len({*models}) < len(models) or len({*ask.types}) < len(ask.types):
        raise InvalidInput("a model or a type is given twice. Give each once.")
    for name in models:
        path = Path(name).expanduser()
        if not (_is_url(name) or path.exists()):
            raise InvalidInput(
                f"{name} is neither a folder, a {SUFFIX} file nor the address of a llama.cpp "
                "server. A model of the hub is fetched with `hf download`."
            )
    if not all(map(_is_url, models)):
        _xllamacpp()
    if any(Path(name).expanduser().is_dir() or is_packed(Path(name)) for name in models):
        converter_for(ask.types, ask.converter)


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise InvalidInput(
            "there is no llama.cpp here. Install its wheel (pip install xllamacpp), or give the "
            "addresses of running servers (llama-server -m FILE) as the models."
        ) from error
    return xllamacpp


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _rows(models: Sequence[str], ask: LlamaAsk, folder: Path, progress: Progress) -> list[_Row]:
    """A row for each file and server, and for each folder one in each type, written for it."""
    rows: list[_Row] = []
    of_type: dict[str, int] = {}  # the first model's row of each type
    for number, name in enumerate(models):
        path = Path(name).expanduser()
        if _is_url(name):
            rows.append(_Row(side=Side(name=name, bytes=0), url=name.rstrip("/")))
        elif path.suffix == SUFFIX:
            rows.append(_Row.of(path, name))
        else:
            for gguf_type in ask.types or _TYPES:
                file = folder / f"{number}-{gguf_type}{SUFFIX}"
                export(path, file, gguf_type, converter=ask.converter, progress=progress)
                base = of_type.get(gguf_type, 0) if number else 0
                if not number:
                    of_type[gguf_type] = len(rows)
                rows.append(_Row.of(file, f"{name}, {gguf_type}", base))
    return rows


@dataclass(frozen=True, kw_only=True)
class _Quality:
    perplexity: Perplexity
    divergence: float
    prompts: Tensor  # (prompts, tokens)
    likeliest: list[dict[int, float]]  # Probability of each prompt's likeliest next tokens


def _qualities(
    models: Sequence[str],
    rows: Sequence[_Row],
    report: ReportedOn,
    context_length: int | None,
    progress: Progress,
) -> dict[int, _Quality]:
    """Perplexity of each file as PHO reads it, and its divergence from the first model."""
    reference: DenseReference | None = None
    first = str(Path(models[0]).expanduser())
    qualities: dict[int, _Quality] = {}
    if not _is_url(models[0]) and Path(first).suffix != SUFFIX:
        model = load_model(first)
        reference = dense_reference(
            model.model, _text(model, report, context_length).windows, top_k=TOP_K
        )
        del model
    for number, row in enumerate(rows):
        if row.file is None:
            continue
        gc.collect()
        model = load_model(str(row.file))
        text = _text(model, report, context_length)
        if reference is None:
            reference = dense_reference(model.model, text.windows, top_k=TOP_K)
        if not torch.equal(reference.windows, text.windows):
            raise InvalidInput(
                f"{row.side.name} cuts {text.record.source} into other tokens than {first}, so "
                "that they do not compare. Give models with the same tokenizer."
            )
        prompts = text.windows[:_ASKED, :_PROMPT]
        qualities[number] = _Quality(
            perplexity=perplexity_on(text, model, progress),
            divergence=max(0.0, rate_divergence(model.model, reference)),
            prompts=prompts,
            likeliest=[_next_tokens(model, prompt) for prompt in prompts],
        )
        del model
    return qualities


def _text(model: LanguageModel, report: ReportedOn, context_length: int | None) -> ReportText:
    usual = CalibrationSettings.context_length
    length = context_length or min(usual, model.longest or usual)
    how = CalibrationSettings(context_length=length)
    return Inputs().report(model, report.source, how, report.windows)


def _next_tokens(model: LanguageModel, prompt: Tensor) -> dict[int, float]:
    with torch.inference_mode():
        logits = model.model(input_ids=prompt[None].to(model.device)).logits[0, -1]
    top = logits.float().softmax(-1).topk(min(_LIKELIEST, logits.numel()))
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _serve(row: _Row, settings: BenchSettings) -> None:
    """Have a file served from this process; or see that a server answers."""
    begin = time.perf_counter()
    if row.file is not None:
        xllamacpp = _xllamacpp()
        params = xllamacpp.CommonParams()
        params.model.path = str(row.file)
        params.n_ctx = max(settings.prompt + settings.new_tokens, _PROMPT) + 8
        params.n_parallel = 1
        params.verbosity = 1  # errors
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        with _said() as lines:
            try:
                row.server = xllamacpp.Server(params)
            except RuntimeError as error:
                said = [match[1] for line in lines() if (match := _ERROR.search(line))]
                raise ModelError(
                    f"llama.cpp does not run {row.side.name}: {said[0] if said else error}. Take a "
                    "newer xllamacpp, or a model that llama.cpp knows."
                ) from error
        row.url = row.server.listening_address
        row.side.load_s.append(time.perf_counter() - begin)
    (model, *_) = _answer(row.url, "GET", "/v1/models").get("data") or [{}]
    about = model.get("meta") or {}
    row.vocabulary = int(about.get("n_vocab") or 256)
    if row.file is None:
        row.side = replace(row.side, bytes=int(about.get("size") or 0))


@contextmanager
def _said() -> Iterator[Any]:
    """What a library in C writes to stderr meanwhile, as lines."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)

        def lines() -> list[str]:
            file.seek(0)
            return file.read().decode(errors="replace").splitlines()

        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _run(row: _Row, settings: BenchSettings) -> tuple[float, float]:
    """Seconds to read the prompt, and to write the tokens after the first, as llama.cpp counts."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(row.vocabulary, (settings.prompt,), generator=generator)
    answer = _answer(
        row.url, "POST", "/completion",
        prompt=tokens.tolist(), n_predict=settings.new_tokens + 1,
        temperature=0, ignore_eos=True, cache_prompt=False,
    )  # fmt: skip
    timings = answer.get("timings") or {}
    if timings.get("prompt_n") != settings.prompt or timings.get("predicted_n") != (
        settings.new_tokens + 1
    ):
        raise ModelError(
            f"{row.side.name} read {timings.get('prompt_n')} tokens and wrote "
            f"{timings.get('predicted_n')} where {settings.prompt} and {settings.new_tokens + 1} "
            "were asked for: its context is too short, or it is not a llama.cpp server. Start it "
            "with a longer context (-c), or ask for fewer tokens."
        )
    return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000


def _answer(url: str, method: str, path: str, **document: Any) -> dict[str, Any]:
    try:
        answer = httpx.request(
            method, url + path, json=document or None, timeout=_PATIENCE_S, trust_env=False
        )
        answer.raise_for_status()
        values = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServiceError(
            f"the llama.cpp server at {url} does not answer {path}: {error}. Start one with "
            "`llama-server -m FILE`, and give its address."
        ) from error
    return values if isinstance(values, dict) else {}


def _with_quality(row: _Row, quality: _Quality | None) -> Side:
    """The side with how good it is, and how far llama.cpp is from what PHO reads."""
    if quality is None:
        return row.side
    gaps: list[float] = []
    for prompt, likeliest in zip(quality.prompts, quality.likeliest, strict=True):
        answer = _answer(
            row.url, "POST", "/completion",
            prompt=prompt.tolist(), n_predict=1, temperature=0, n_probs=4 * _LIKELIEST,
            cache_prompt=False,
        )  # fmt: skip
        # It gives none where its next token is the end of the text, or half of a character.
        for position in answer.get("completion_probabilities", ())[:1]:
            theirs = {top["id"]: math.exp(top["logprob"]) for top in position["top_logprobs"]}
            gaps += [abs(p - theirs.get(token, 0.0)) for token, p in likeliest.items()]
    return replace(
        row.side,
        perplexity=quality.perplexity.perplexity,
        error=quality.perplexity.error,
        divergence=quality.divergence,
        runtime_gap=max(gaps, default=None),
    )


def _conditions(rows: Sequence[_Row], report: ReportedOn | None) -> list[str]:
    here = any(row.file is not None for row in rows)
    software = f"llama.cpp of xllamacpp {version('xllamacpp')}" if here else "llama.cpp servers"
    used = ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers").items())
    lines = [f"{conditions()}; {torch.get_num_threads()} threads; {software}"]
    if report is not None:
        lines.append(
            f"Perplexity and KL (nats, to the first model) of the file as PHO reads it ({used}), "
            f"on {report.source}; runtime gap: the most that a next token's probability differs in "
            "llama.cpp."
        )
    return lines
