"""A study belongs to one bundle, whoever put the bundle together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from pho_service.errors import ChangedInput, StudyError
from pho_service.models.architecture import prunable_linears
from pho_service.models.calibration import bundle_path, cached_bundle, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.progress import Advance
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.statistics import collect_statistics
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest


@pytest.fixture
def by_hand(tiny_llama: LlamaForCausalLM, windows: Tensor) -> Any:
    """Makes a bundle as a program does that has a model in memory."""

    def build(factor: float = 1.0, **options: Any) -> ProxyBundle:
        tiny_llama.model.layers[0].mlp.down_proj.weight.data *= factor
        linears = prunable_linears(tiny_llama)
        statistics = collect_statistics(
            tiny_llama, linears, windows, fisher_windows=2, projection_rows=16, seed=0
        )
        return sample_bundle(
            linears, statistics, rows_per_layer=4, kernel_sizes=(3, 5), seed=0, **options
        )

    return build


@pytest.fixture
def request_here() -> SearchRequest:
    """A short search."""
    return SearchRequest(pattern=Pattern.parse("0.5"), trials=8)


def test_named_by_its_contents(by_hand: Any, request_here: SearchRequest, searched: Any) -> None:
    """Bundles without a key have studies of their own: no model gets another one's result."""
    first, second = by_hand(), by_hand(factor=3.0)
    of_first, of_second = (searched(request_here, bundle) for bundle in (first, second))

    assert of_first.study_name != of_second.study_name
    assert of_first.configuration.objective != of_second.configuration.objective
    assert of_first.configuration.calibration["key"] == first.key


def test_found_again(by_hand: Any, request_here: SearchRequest, searched: Any) -> None:
    """The same bundle, made again, finds its study."""
    first, again = (searched(request_here, by_hand()) for _ in range(2))

    assert first == again


def test_everything_counts(by_hand: Any) -> None:
    """What a rating depends on is in the name of a bundle without a key."""
    bundle = by_hand()
    layer, entry = bundle.layers[0], bundle.inputs[0]
    others = [
        replace(bundle, layers=[replace(layer, fisher=layer.fisher * 2), *bundle.layers[1:]]),
        replace(bundle, layers=[replace(layer, output_energy=1.0), *bundle.layers[1:]]),
        replace(bundle, inputs=[replace(entry, root=entry.root * 2), *bundle.inputs[1:]]),
        replace(bundle, layers=bundle.layers[:-1]),
    ]

    assert len({bundle.key, *(each.key for each in others)}) == 5


@pytest.mark.parametrize("joint", [False, True])
def test_same_key_for_two_models(
    by_hand: Any, request_here: SearchRequest, joint: bool, searched: Any
) -> None:
    first, second = (by_hand(factor, provenance={"key": "mine"}) for factor in (1.0, 3.0))

    def search(bundle: ProxyBundle) -> Any:
        if not joint:
            return searched(request_here, bundle)
        request = replace(request_here, objective=Objective(over="mean"))
        return searched(request, {"a": bundle, "b": replace(bundle)})

    search(first)

    with pytest.raises(StudyError, match="other weights under the same key, mine"):
        search(second)


def test_written_into_while_it_is_calibrated(
    model_folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(str(model_folder), device="cpu")
    settings = CalibrationSettings(samples=4, context_length=32, projection_rows=8)
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)

    @contextmanager
    def disturbing(_title: str, _steps: int) -> Iterator[Advance]:
        """After each window the weights are others."""
        weight = next(iter(model.linears.values())).weight
        yield lambda _count: weight.mul_(1.5)

    with pytest.raises(ChangedInput, match="changed while it was being calibrated"):
        cached_bundle(model, text, settings, tmp_path, disturbing)
    assert not bundle_path(tmp_path, text.bundle_key).exists()
