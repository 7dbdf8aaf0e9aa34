"""Several models: a configuration on those that it was not found on, and one search over all."""

from dataclasses import replace

import pytest
import torch

from pho_service.errors import BundleError, ConfigurationError, InvalidInput, NumericalError
from pho_service.pipeline.objectives import rate_jointly
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.transfer import (
    check_configuration,
    own_search,
    transfer_job,
    transfer_key,
)
from pho_service.pipeline.work import Work
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.shown.tables import transfer_table
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.document import percent
from pho_service.spec.objective import Objective, SearchOptions
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.results import Transfer, regret
from pho_service.spec.steps import Allocation, Reconstruction, Steps
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
def request_of_own():
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
def test_regret(values, expected):
    """Regret is the share of the own best's gain over RIA that is lost; None if nothing is."""
    assert regret(values) == expected


def test_bundle(bundle):
    """Of a bundle the proxies are known, those of the very candidates, and no perplexity."""
    done = transfer_job("b", Work.of(bundle), GOOD)
    candidates = [*reference_methods(Pattern.parse("0.5", "layer")).values(), GOOD.candidate()]
    ratings = ProxyEvaluator(bundle).evaluate(candidates)

    expected = zip(("wanda", "ria", "transferred"), [r.blend for r in ratings], strict=True)
    assert done.proxies == pytest.approx(dict(expected), rel=1e-6)
    assert done.perplexities == {}
    assert done.own is None
    assert done.regret is None


def test_model(model, bundle, report, request_of_own):
    """Of a model every perplexity is on the report text, that of its own best among them."""
    target = Work(bundles={"m": bundle}, dense=model, report=report, confirm=report)
    done = transfer_job("m", target, GOOD, search=request_of_own)
    assert done.own is not None

    def perplexity(configuration):
        candidate = configuration.candidate()
        return rate_pruned(model, bundle.statistics(), candidate, report.windows)[0].perplexity

    assert list(done.perplexities) == ["dense", "wanda", "ria", "transferred", "own"]
    assert done.perplexities["transferred"] == perplexity(GOOD)
    assert done.errors.keys() == {"wanda", "ria", "transferred", "own", "transferred/ria"}
    rise = done.perplexities["transferred"] / done.perplexities["dense"] - 1
    shown = percent(rise, signed=True, error=done.errors["transferred"])
    assert shown in transfer_table([done.to_dict()], "perplexity").rows[0]
    mine, ria = done.perplexities["transferred"], done.perplexities["ria"]
    saved = percent(1 - mine / ria, error=done.errors["transferred/ria"] * mine / ria)
    assert saved in transfer_table([done.to_dict()], "perplexity").rows[0]
    assert done.perplexities["own"] == perplexity(Configuration.model_validate(done.own))
    assert done.regret == regret(done.perplexities)
    assert done.report["tokens"] == 3 * 31


def test_a_report_on_windows_that_were_calibrated_on_has_a_warning(model, bundle, report):
    work = replace(Work.of(bundle, model=model, calibration=report.windows), report=report)
    warned = transfer_job("here", work, GOOD)
    apart = transfer_job("here", replace(work, calibration=None), GOOD)

    assert "Note: 3 of 3 windows were calibrated on" in warned.warnings[0]
    assert not [warning for warning in apart.warnings if "calibrated on" in warning]


def test_own_best_of_a_bundle(bundle, request_of_own):
    done = transfer_job("b", Work.of(bundle), GOOD, search=request_of_own)
    own, mine = done.proxies["own"], done.proxies["transferred"]
    assert mine is not None

    assert done.proxy_regret == regret(done.proxies)
    assert own == pytest.approx(done.own["objective"]["value"], rel=1e-6)


def test_it_does_not_transfer(bundle):
    """Where the configuration is no better than RIA, a sentence says so, and what to do."""
    (warning,) = transfer_job("b", Work.of(bundle), BAD).warnings

    assert "b: the proxy of the transferred configuration" in warning
    assert "it does not transfer. Search there: pho search b" in warning
    assert transfer_job("b", Work.of(bundle), GOOD).warnings == []


@pytest.mark.parametrize(("transferred", "warned"), [(24.0, 0), (26.0, 1), (31.0, 1)])
def test_half_of_the_gain(transferred, warned):
    """Beyond half of the own best's gain the loss is a warning."""
    values = {"dense": 10.0, "wanda": 29.0, "ria": 30.0, "transferred": transferred, "own": 20.0}
    done = Transfer(target="m", key="k", perplexities=values).judged()

    assert len(done.warnings) == warned


def test_key(bundle, report, request_of_own):
    """All that the numbers depend on changes the key, and nothing else does."""
    target = Work.of(bundle)
    key = transfer_key(target, GOOD, None)

    assert transfer_key(replace(target, unused_windows=3), GOOD, None) == key
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


def test_the_configurations_steps_are_taken_along(model, bundle, report, windows):
    steps = Steps(repruning="swaps")
    configuration = GOOD.model_copy(update={"steps": steps})
    target = Work(bundles={"m": bundle}, dense=model, report=report, calibration=windows % 30)
    plain, swapped = (transfer_job("m", target, each) for each in (GOOD, configuration))

    assert swapped.perplexities["transferred"] != plain.perplexities["transferred"]
    assert swapped.perplexities["ria"] == plain.perplexities["ria"]


@pytest.mark.parametrize(
    ("pattern", "scope", "asked"),
    [
        ("2:4", None, "2:4 in scope row"),
        ("0.6", None, "0.6 in scope layer"),
        ("0.5", "row", "0.5 in scope row"),
        (None, "global", "0.5 in scope global"),
    ],
)
def test_other_pattern(pattern, scope, asked):
    """A configuration of another pattern or scope is refused; less may be asked."""
    for less in ((None, None), ("0.5", None), ("0.5", "layer")):
        check_configuration("c.json", GOOD, *less)
    with pytest.raises(
        ConfigurationError, match=rf"c\.json is for 0\.5 in scope layer, but {asked}.*pho search"
    ):
        check_configuration("c.json", GOOD, pattern, scope)


def test_the_own_best_is_searched_for_in_the_configurations_space_and_with_its_steps():
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
    offsets = Allocation(offsets={"model.layers.0.mlp.up_proj": 0.5})
    configuration = GOOD.model_copy(update={"steps": Steps(allocation=offsets)})
    kept = own_search(configuration, SearchOptions(), finalists=2).steps.allocation
    assert kept == offsets
    trained = Steps(reconstruction=Reconstruction(method="block", passes=4, blocks=(1, 2)))
    configuration = GOOD.model_copy(update={"steps": trained, "model": {"parameters": 9}})
    longer = own_search(configuration, SearchOptions(), finalists=2).steps.reconstruction
    assert longer == Reconstruction(method="block", passes=4)


@pytest.mark.parametrize("space", [{"rows": [0, 1]}, {"row_share": [2, 3]}, {"row_share": 7}, [1]])
def test_a_search_space_that_somebody_wrote_by_hand_is_refused_if_it_is_none(space):
    configuration = GOOD.model_copy(update={"search": {"space": space}})

    with pytest.raises(
        ConfigurationError, match=r"search\.space is not a search space.*Take search"
    ):
        own_search(configuration, SearchOptions(trials=20), finalists=2)


PATTERN = Pattern.parse("0.5", "layer")
MEAN, WORST = Objective(over="mean"), Objective(over="worst")


@pytest.fixture
def other(bundle):
    """A bundle of another model: the inputs of ``bundle``'s channels in another order."""
    inputs = [
        replace(entry, activation_norm=entry.activation_norm.flip(0), root=entry.root.flip(1))
        for entry in bundle.inputs
    ]
    model = {**bundle.provenance["model"], "name": "folder/other"}
    provenance = {**bundle.provenance, "key": "other", "model": model}
    return replace(bundle, inputs=inputs, provenance=provenance)


@pytest.fixture
def bundles(bundle, other):
    return {"one": bundle, "two": other}


def request_of(objective, **changes):
    return replace(SearchRequest(pattern=PATTERN, objective=objective, trials=22), **changes)


def jointly(bundles, objective):
    evaluators = {name: ProxyEvaluator(bundle) for name, bundle in bundles.items()}
    return rate_jointly(evaluators, PATTERN, objective)


@pytest.mark.parametrize(("objective", "joined"), [(MEAN, lambda a, b: (a + b) / 2), (WORST, max)])
def test_a_candidate_counts_by_its_proxy_relative_to_rias_on_each_model_the_lowest_wins(
    bundles, objective, joined
):
    result = search_job(request_of(objective), Work(bundles=bundles))
    found = result.configuration
    ria = reference_methods(PATTERN)["ria"]
    relative = []
    for bundle in bundles.values():
        mine, its = ProxyEvaluator(bundle).evaluate([found.candidate(), ria])
        relative.append(mine.blend / its.blend)

    told = [*found.objective["relative_to_ria"].values()]
    assert told == pytest.approx(relative, rel=1e-6)  # which were rated beside others
    assert found.objective["value"] == joined(*told) <= 1
    assert found.objective["name"].endswith(f"{objective.over} over models relative to RIA")
    assert next(b.proxy for b in found.baselines if b.method == "ria-layer") == 1
    # the configuration names both models and both calibrations, and says what to do next
    assert [m["name"] for m in found.model["models"]][1] == "folder/other"
    assert found.model["name"].endswith(" + other")
    assert [b["key"] for b in found.calibration["bundles"]] == [
        b.provenance["key"] for b in bundles.values()
    ]
    assert any("`pho transfer` measures all of them" in each for each in result.warnings)


def test_a_joint_search_that_is_asked_again_or_longer_goes_on_with_its_study(bundles, searched):
    first = searched(request_of(MEAN), Work(bundles=bundles))

    assert searched(request_of(MEAN), Work(bundles=bundles)) == first
    longer = searched(request_of(MEAN, trials=30), Work(bundles=bundles))
    assert longer.study_name == first.study_name
    assert longer.configuration.objective["value"] <= first.configuration.objective["value"]


def test_where_the_result_is_worse_than_ria_on_a_model_a_sentence_names_the_model(bundles):
    bounds = {"activation_exponent": (1.5, 1.5), "gradient_exponent": (1.0, 1.0)}
    result = search_job(request_of(MEAN, bounds=bounds), Work(bundles=bundles))
    relative = result.configuration.objective["relative_to_ria"]
    worse = [name for name, value in relative.items() if value >= 1]

    assert worse
    assert [w.split()[1] for w in result.warnings if "good for the others" in w] == worse


def test_a_candidate_that_fails_on_one_model_fails_and_the_model_is_named(bundles):
    ria = reference_methods(PATTERN)["ria"]
    huge = replace(ria, coefficients=replace(ria.coefficients, activation_exponent=300.0))
    failed, fine = jointly(bundles, WORST)([huge, ria])

    assert failed.value is None
    assert str(failed.failure).startswith("one: ")
    assert fine.value == 1


def test_bundles_that_cannot_be_rated_on_are_refused_with_the_way_out(bundles):
    two = bundles["two"]
    coefficients = replace(GOOD.coefficients, kernel_size=9)
    wide = GOOD.model_copy(update={"coefficients": coefficients})
    still = replace(two, inputs=[replace(e, root=torch.zeros_like(e.root)) for e in two.inputs])
    layers = [replace(la, window_means={9: la.window_means[3]}) for la in two.layers]
    apart = {**bundles, "two": replace(two, layers=layers)}

    with pytest.raises(BundleError, match=r"kernel size 9, only for 3, 5. Calibrate again"):
        transfer_job("b", Work.of(bundles["one"]), wide)
    with pytest.raises(BundleError, match=r"one, two have no kernel size in common. Calibrate"):
        search_job(request_of(MEAN), Work(bundles=apart))
    with pytest.raises(NumericalError, match=r"two: the proxy of RIA is 0\.0"):
        jointly({"two": still}, MEAN)  # which loses nothing
    with pytest.raises(InvalidInput, match="how they count"):
        search_job(request_of(Objective()), Work(bundles=bundles))
