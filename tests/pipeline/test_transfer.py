"""A configuration on models that it was not found on."""

from dataclasses import replace

import pytest
from torch import Tensor

from pho_service.errors import BundleError, ConfigurationError
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.inputs import Calibrated
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pipeline.transfer import (
    check_configuration,
    own_search,
    transfer_job,
    transfer_key,
)
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.objective import SearchOptions
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.results import Transfer, regret
from pho_service.spec.steps import Allocation, Steps
from pho_service.tuning.plan import SearchRequest

GOOD = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.1, column=0.8, neighbourhood=0.1, kernel_size=3, activation_exponent=0.9,
        gradient_exponent=0.4,
    ),
    pattern="0.5",
    scope="layer",
)  # fmt: skip
# The less a channel is used, the more its weights matter: nonsense, but no error.
BAD = GOOD.model_copy(
    update={
        "coefficients": Coefficients(
            row=0, column=1, neighbourhood=0, kernel_size=3, activation_exponent=0,
            gradient_exponent=4.0,
        )
    }
)  # fmt: skip


@pytest.fixture
def request_of_own() -> SearchRequest:
    """A small search for a target's own best."""
    return own_search(GOOD, SearchOptions(trials=14), finalists=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ria": 30.0, "own": 20.0, "transferred": 20.0}, 0.0),
        ({"ria": 30.0, "own": 20.0, "transferred": 22.5}, 0.25),
        ({"ria": 30.0, "own": 20.0, "transferred": 30.0}, 1.0),
        ({"ria": 30.0, "own": 20.0, "transferred": 19.0}, -0.1),
        ({"ria": 30.0, "own": 30.0, "transferred": 25.0}, None),
        ({"ria": 30.0, "transferred": 25.0}, None),
        ({"ria": 30.0, "own": None, "transferred": 25.0}, None),
    ],
)
def test_regret(values: dict[str, float | None], expected: float | None) -> None:
    """Regret is the share of the own best's gain over RIA that is lost; None if nothing is."""
    assert regret(values) == expected


def test_bundle(bundle: ProxyBundle) -> None:
    """Of a bundle the proxies are known, those of the very candidates, and no perplexity."""
    done = transfer_job(Calibrated(name="b", bundle=bundle), GOOD)
    candidates = [*reference_methods(Pattern.parse("0.5", "layer")).values(), GOOD.candidate()]
    ratings = ProxyEvaluator(bundle).evaluate(candidates)

    expected = zip(("wanda", "ria", "transferred"), [r.blend for r in ratings], strict=True)
    assert done.proxies == pytest.approx(dict(expected), rel=1e-6)
    assert done.perplexities == {}
    assert done.own is None
    assert done.regret is None


def test_model(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText, request_of_own: SearchRequest
) -> None:
    """Of a model every perplexity is on the report text, that of its own best among them."""
    target = Calibrated(name="m", bundle=bundle, model=model, report=report, confirm=report)
    done = transfer_job(target, GOOD, search=request_of_own)
    assert done.own is not None

    def perplexity(configuration: Configuration) -> float:
        candidate = configuration.candidate()
        return rate_pruned(model, bundle.statistics(), candidate, report.windows)[0].perplexity

    assert list(done.perplexities) == ["dense", "wanda", "ria", "transferred", "own"]
    assert done.perplexities["transferred"] == perplexity(GOOD)
    assert done.perplexities["own"] == perplexity(Configuration.model_validate(done.own))
    assert done.regret == regret(done.perplexities)
    assert done.report is not None
    assert done.report["tokens"] == 3 * 31


def test_own_best_of_a_bundle(bundle: ProxyBundle, request_of_own: SearchRequest) -> None:
    done = transfer_job(Calibrated(name="b", bundle=bundle), GOOD, search=request_of_own)
    own, mine = done.proxies["own"], done.proxies["transferred"]
    assert own is not None
    assert mine is not None

    assert done.proxy_regret == regret(done.proxies)
    assert done.own is not None
    assert own == pytest.approx(done.own["objective"]["value"], rel=1e-6)


def test_it_does_not_transfer(bundle: ProxyBundle) -> None:
    """Where the configuration is no better than RIA, a sentence says so, and what to do."""
    (warning,) = transfer_job(Calibrated(name="b", bundle=bundle), BAD).warnings

    assert "b: the proxy of the transferred configuration" in warning
    assert "it does not transfer. Search there: pho search b" in warning
    assert transfer_job(Calibrated(name="b", bundle=bundle), GOOD).warnings == []


@pytest.mark.parametrize(("transferred", "warned"), [(24.0, 0), (26.0, 1), (31.0, 1)])
def test_half_of_the_gain(transferred: float, warned: int) -> None:
    """Beyond half of the own best's gain the loss is a warning."""
    values = {"dense": 10.0, "wanda": 29.0, "ria": 30.0, "transferred": transferred, "own": 20.0}
    done = Transfer.of("m", values, {}, key="k")

    assert len(done.warnings) == warned


def test_key(bundle: ProxyBundle, report: ReportText, request_of_own: SearchRequest) -> None:
    """All that the numbers depend on changes the key, and nothing else does."""
    target = Calibrated(name="a", bundle=bundle)
    key = transfer_key(target, GOOD, None)

    assert transfer_key(replace(target, name="b"), GOOD, None) == key
    assert len(
        {
            key,
            transfer_key(target, BAD, None),
            transfer_key(replace(target, report=report), GOOD, None),
            transfer_key(target, GOOD, request_of_own),
            transfer_key(target, GOOD, replace(request_of_own, seed=1)),
            transfer_key(target, GOOD.model_copy(update={"scope": "row"}), None),
        }
    ) == 6  # fmt: skip


def test_the_configurations_steps_are_taken_along(
    model: LanguageModel, bundle: ProxyBundle, report: ReportText, windows: Tensor
) -> None:
    steps = Steps(repruning="swaps")
    configuration = GOOD.model_copy(update={"steps": steps})
    target = Calibrated(
        name="m", bundle=bundle, model=model, report=report, calibration=windows % 30
    )
    plain, swapped = (transfer_job(target, each) for each in (GOOD, configuration))

    assert swapped.perplexities["transferred"] != plain.perplexities["transferred"]
    assert swapped.perplexities["ria"] == plain.perplexities["ria"]


def test_missing_kernel_size(bundle: ProxyBundle) -> None:
    """A bundle without the configuration's kernel size is refused, with the way out."""
    coefficients = replace(GOOD.coefficients, kernel_size=9)
    configuration = GOOD.model_copy(update={"coefficients": coefficients})

    with pytest.raises(BundleError, match=r"kernel size 9, only for 3, 5. Calibrate again"):
        transfer_job(Calibrated(name="b", bundle=bundle), configuration)


@pytest.mark.parametrize(("pattern", "scope"), [(None, None), ("0.5", None), ("0.5", "layer")])
def test_right_pattern(pattern: str | None, scope: str | None) -> None:
    """What is asked for may be less than what the configuration is for."""
    check_configuration("c.json", GOOD, pattern, scope)


@pytest.mark.parametrize(
    ("pattern", "scope", "asked"),
    [
        ("2:4", None, "2:4 in scope row"),
        ("0.6", None, "0.6 in scope layer"),
        ("0.5", "row", "0.5 in scope row"),
        (None, "global", "0.5 in scope global"),
    ],
)
def test_other_pattern(pattern: str | None, scope: str | None, asked: str) -> None:
    """A configuration of another pattern or scope is refused, with the way out."""
    with pytest.raises(
        ConfigurationError, match=rf"c\.json is for 0\.5 in scope layer, but {asked}.*pho search"
    ):
        check_configuration("c.json", GOOD, pattern, scope)


def test_the_own_best_is_searched_for_in_the_configurations_space_and_with_its_steps() -> None:
    steps = Steps(allocation=Allocation(method="fisher", spread=0.1))
    configuration = GOOD.model_copy(
        update={
            "steps": steps,
            "search": {
                "space": {
                    "row_share": [0.2, 0.4], "kernel_sizes": [3, 5], "allocations": ["fisher"],
                    "allocation_spread": [0.1, 0.3],
                }
            },
        }
    )  # fmt: skip
    request = own_search(configuration, SearchOptions(trials=20, seed=3), finalists=2)
    space = request.plan((3, 9)).space

    assert space.row_share == (0.2, 0.4)
    assert space.kernel_sizes == (3, 9)  # the target's
    assert space.allocations == ("fisher",)
    assert space.allocation_spread == (0.1, 0.3)
    assert request.steps.allocation.method == "fisher"


@pytest.mark.parametrize("corrected", [True, False])
def test_own_search_is_uncorrected(corrected: bool) -> None:
    """Offsets that a correction found are of its model; those that were asked for are kept."""
    allocation = Allocation(method="fisher", offsets={"q_proj": 0.5}, depth=(0.1, 0.0))
    search = {"correction": {}} if corrected else {}
    configuration = GOOD.model_copy(
        update={"steps": Steps(allocation=allocation), "search": search}
    )

    found = own_search(configuration, SearchOptions(), finalists=2).steps.allocation

    assert found == (Allocation(method="fisher") if corrected else allocation)


@pytest.mark.parametrize("space", [{"rows": [0, 1]}, {"row_share": [2, 3]}, {"row_share": 7}, [1]])
def test_a_search_space_that_somebody_wrote_by_hand_is_refused_if_it_is_none(space: object) -> None:
    configuration = GOOD.model_copy(update={"search": {"space": space}})

    with pytest.raises(
        ConfigurationError, match=r"search\.space is not a search space.*Take search"
    ):
        own_search(configuration, SearchOptions(trials=20), finalists=2)
