"""The search job: what is asked for, what is found, what is said of it, and whose its study is."""

from contextlib import contextmanager
from dataclasses import replace

import optuna
import pytest

from pho_service.errors import ChangedInput, InvalidInput, StudyError
from pho_service.models.architecture import prunable_linears
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.calibration import bundle_path, cached_bundle
from pho_service.pipeline import search as search_module
from pho_service.pipeline.objectives import rate_by_proxy
from pho_service.pipeline.search import name_of_study, search_job
from pho_service.pipeline.work import Work
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import gather
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.objective import WEIGHTINGS, Objective
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.space import Preset, parse_bounds
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SECOND_OPINION, SearchRequest
from pho_service.tuning.result import chosen_in
from storage.studies import keep_record, open_storage, record_of

PATTERN = Pattern.parse("0.5", "layer")
BY_PERPLEXITY = Objective(name="perplexity")


def request_of(**changes):
    return replace(SearchRequest(pattern=PATTERN, trials=14), **changes)


def proxies(found):
    return [rating.proxy for rating in found.baselines if rating.proxy is not None]


def loaded(studies, name):
    return optuna.load_study(study_name=name, storage=studies)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_value_is_the_proxy_of_the_configurations_own_candidate_in_the_asked_weighting(
    bundle, weighting
):
    objective = Objective(weighting=weighting)
    found = search_job(request_of(objective=objective), Work.of(bundle)).configuration
    (outcome,) = rate_by_proxy(ProxyEvaluator(bundle), objective)([found.candidate()])
    second = {"blend": "geometric", "geometric": "blend"}.get(weighting)

    assert found.objective["name"] == f"activation-reconstruction/{weighting}"
    value = found.objective["value"]
    assert value == min([*proxies(found), value])
    assert value == pytest.approx(outcome.value, rel=1e-6)  # which was rated beside others there
    assert (SECOND_OPINION in outcome.attributes) == (second is not None)
    if second is not None:
        asked = Objective(weighting=second)
        (other,) = rate_by_proxy(ProxyEvaluator(bundle), asked)([found.candidate()])
        assert outcome.attributes[SECOND_OPINION] == other.value != outcome.value


def test_searched_by_perplexity_the_value_is_the_confirmation(confirming):
    result = search_job(request_of(objective=BY_PERPLEXITY, trials=9), confirming)
    found = result.configuration

    assert found.confirmation.perplexity == found.objective["value"] <= min(proxies(found))
    assert not any("Not confirmed" in warning for warning in result.warnings)


@pytest.mark.parametrize("sampler", ["hill-climb", "cmaes"])
def test_a_search_by_perplexity_goes_on_where_it_was_with_the_same_trials(
    confirming, sampler, searched
):
    request = request_of(objective=BY_PERPLEXITY, sampler=sampler)
    searched(replace(request, trials=10), confirming)
    found = searched(request, confirming).configuration

    assert found == search_job(request, confirming).configuration
    assert found.search["sampler"] == sampler


def test_a_climb_begins_at_rias_coefficients_rates_no_point_twice_and_says_when_it_ended(
    bundle, studies, searched
):
    result = searched(request_of(sampler="hill-climb", trials=300), Work.of(bundle))
    trials = loaded(studies, result.study_name).trials
    climb = [t for t in trials if t.params["method"] == "crepe"]
    c = climb[0].user_attrs["coefficients"]
    search = result.configuration.search

    assert (c["row"], c["column"], c["neighbourhood"]) == (0.5, 0.5, 0.0)
    assert (c["activation_exponent"], c["gradient_exponent"], c["kernel_size"]) == (0.5, 0.0, 3)
    assert len({str(t.params) for t in climb}) == len(climb)
    assert (search["trials"], search["finished"]) == (300, len(trials))
    assert any(f"ended by itself after {len(trials)} of 300" in w for w in result.warnings)

    def stop(study, trial):
        if trial.number == 11:
            study.stop()

    stopped = search_job(request_of(trials=30), Work.of(bundle), callbacks=[stop])
    assert stopped.configuration.search["finished"] < 30
    assert any("was stopped after" in w for w in stopped.warnings)
    assert not any("ended by itself" in w for w in stopped.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"objective": BY_PERPLEXITY}, "needs the model and a text", id="perplexity"),
        pytest.param(
            {"bounds": {"kernel_sizes": (3, 9)}},
            "9 is not in the bundle, which has 3, 5",
            id="kernel-size",
        ),
        pytest.param(
            {"pattern": Pattern.parse("2:5")},
            r"model\.layers\.0\.\S+: in_features=32 .* M=5",
            id="groups-and-width",
        ),
    ],
)
def test_what_a_bundle_cannot_tell_is_refused(bundle, changes, message):
    with pytest.raises(InvalidInput, match=message):
        search_job(request_of(**changes), Work.of(bundle))


@pytest.mark.parametrize(
    ("pattern", "scope"), [("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("1:4", None)]
)
def test_whatever_wins_removes_what_was_asked_for_and_is_counted_in_no_wider_scope(
    bundle, model, pattern, scope
):
    asked = Pattern.parse(pattern, scope)
    configuration = search_job(request_of(pattern=asked), Work.of(bundle)).configuration
    found, searched = configuration.candidate(), configuration.search["space"]
    masks = {n: m.keep for n, m in linear_masks(model.linears, bundle.statistics(), found)}
    removed = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    by_row = asked.scope is Scope.ROW

    assert found.pattern.scope.width <= asked.scope.width
    assert removed == asked.removed(total)
    # in scope row the gradient exponent, which ranks no row otherwise, is not searched
    assert searched["gradient_exponent"] == [0.0, 0.0 if by_row else 1.0]
    assert ("fisher" in {r.method for r in configuration.baselines}) is not by_row


def test_a_best_value_on_the_border_is_named_in_the_result_and_in_a_warning(bundle):
    bounds = ("activation_exponent=3.8:3.9", "gradient_exponent=0", "kernel_sizes=3")
    result = search_job(
        request_of(bounds=parse_bounds(bounds), objective=Objective(name="gini"), trials=60),
        Work.of(bundle),
    )

    assert result.configuration.method == "crepe"
    assert result.configuration.coefficients.activation_exponent > 3.898
    assert "activation_exponent" in result.configuration.border
    assert any("activation exponent lies on the border" in w for w in result.warnings)
    objective = result.configuration.objective
    assert objective["direction"] == "maximize"
    assert objective["value"] >= max(proxies(result.configuration))


def test_every_candidate_but_the_baselines_lies_in_the_asked_box(bundle, studies, searched):
    bounds = ("activation_exponent=0.6:0.7", "row_share=0.25", "kernel_sizes=5")
    name = searched(request_of(bounds=parse_bounds(bounds), trials=22), Work.of(bundle)).study_name
    found = [t.params for t in loaded(studies, name).trials if t.params["method"] == "crepe"]

    assert len(found) == 22 - 6
    assert all(0.6 <= p["activation_exponent"] <= 0.7 for p in found)
    assert all(p["row_share"] == pytest.approx(0.25) for p in found)
    assert all(p["kernel_size"] == 5 for p in found)


def test_another_seed_sampler_pattern_scope_objective_or_space_is_another_study(bundle):
    requests = [
        request_of(),
        request_of(seed=1),
        request_of(sampler="random"),
        request_of(pattern=Pattern.parse("0.6", "layer")),
        request_of(pattern=Pattern.parse("0.5", "row")),
        request_of(objective=Objective(weighting="fisher")),
        request_of(bounds={"row_share": (0.5, 0.5)}),
    ]

    assert len({name_of_study(each, Work.of(bundle)) for each in requests}) == len(requests)


def test_more_trials_go_on_with_the_study_of_fewer_and_never_end_worse(bundle, searched):
    short, long = (searched(request_of(trials=n), Work.of(bundle)) for n in (10, 30))

    assert short.study_name == long.study_name
    assert long.configuration.objective["value"] <= short.configuration.objective["value"]


def test_what_a_shorter_search_confirmed_on_the_same_text_stays_a_finalist(
    confirming, studies, searched
):
    short = searched(request_of(trials=8, finalists=1), confirming)
    study, key = loaded(studies, short.study_name), confirming.text.key
    measured = {"method": "crepe", "perplexity": 1.5, "text_sha256": key}
    keep_record(study, "perplexity:6", measured)  # as if it had been that good
    of_another_text = {**measured, "perplexity": 1.0, "text_sha256": "b"}
    keep_record(study, "perplexity:7", of_another_text)
    asked = request_of(trials=40, finalists=1)
    long = searched(asked, confirming)
    own = search_job(asked, confirming).configuration

    assert 6 not in {each.trial for each in own.finalists}
    assert long.trial == 6
    assert long.configuration.confirmation.perplexity == 1.5
    assert {each.trial for each in own.finalists} < {c.trial for c in long.configuration.finalists}


@pytest.mark.parametrize("confirmed", [False, True])
def test_the_study_says_which_trial_the_result_is(bundle, confirming, studies, searched, confirmed):
    found = searched(request_of(), confirming if confirmed else Work.of(bundle))
    study, confirmation = loaded(studies, found.study_name), found.configuration.confirmation

    assert [t.number for t in study.trials if t.user_attrs.get("chosen")] == [found.trial]
    assert study.user_attrs["chosen"] == {
        "study": found.study_name,
        "trial": found.trial,
        "method": found.configuration.method,
        "objective": found.configuration.objective["value"],
        "perplexity": confirmation and confirmation.perplexity,
    }
    assert (confirmation is not None) == confirmed
    assert chosen_in(study) == found.trial
    confirming.model.model.register_forward_pre_hook(pytest.fail)  # it is not run again
    work = confirming if confirmed else Work.of(bundle)
    assert searched(request_of(), work).configuration == found.configuration


@pytest.mark.parametrize("why", ["a step needs a text", "the model is streamed"])
def test_no_race_where_pruning_costs(confirming, streamed, windows, why):
    steps = Steps(repruning="dsnot") if why == "a step needs a text" else Steps()
    if why == "the model is streamed":
        confirming = replace(confirming, dense=streamed)
    asked = request_of(steps=steps, trials=9, finalists=2)
    found = search_job(asked, replace(confirming, calibration=windows % 30)).configuration

    assert found.confirmation.divergence_tokens is None
    assert found.confirmation.evaluations == len(found.finalists)
    assert all(c.perplexity is not None and c.divergence is None for c in found.finalists)


def test_a_study_carries_its_pattern_scope_objective_space_sampler_seed_and_calibration(
    bundle, studies, searched
):
    """Also one whose process was killed while it described it, once somebody goes on with it."""
    name = name_of_study(request_of(seed=5), Work.of(bundle))
    optuna.create_study(study_name=name, storage=studies).set_user_attr("pattern", "0.5")
    searched(request_of(seed=5), Work.of(bundle))
    study = loaded(studies, name)
    attributes = record_of(study)

    assert (attributes["pattern"], attributes["scope"]) == ("0.5", "layer")
    assert attributes["objective"] == "activation-reconstruction/blend"
    assert (attributes["sampler"], attributes["seed"]) == ("cmaes", 5)
    assert attributes["calibration"]["key"] == bundle.provenance["key"]
    assert "space" in attributes
    assert {*study.user_attrs} == {"pattern", "scope", "objective", "sampler", "seed", "chosen"}
    assert study.metric_names == ["activation-reconstruction/blend"]
    assert study.trials[-1].user_attrs["seconds"] >= 0
    assert {*study.trials[-1].user_attrs["error_by_kind"]} == {
        layer.kind for layer in bundle.layers
    }


def test_weights_beyond_float32_fail_every_trial_and_the_layer_is_named(bundle):
    broken = replace(bundle.layers[3], rows=bundle.layers[3].rows * 1e30)
    layers = [*bundle.layers[:3], broken, *bundle.layers[4:]]

    with pytest.raises(StudyError, match=rf"every trial .* failed\. The first: {broken.name}"):
        search_job(request_of(), Work.of(replace(bundle, layers=layers)))


def test_if_nothing_beats_a_baseline_it_is_the_result_in_its_own_scope_and_says_so(bundle):
    result = search_job(request_of(trials=6), Work.of(bundle))

    assert result.configuration.method != "crepe"
    assert any("better than the baseline" in warning for warning in result.warnings)
    assert result.configuration.border == []
    assert Scope(result.configuration.scope).width <= PATTERN.scope.width


SHORTEST = SearchRequest(pattern=Pattern.parse("0.5"), trials=6)


def with_dense(bundle, perplexity, **changes):
    """The bundle of a model that has this perplexity; None does not say it."""
    provenance = {k: v for k, v in bundle.provenance.items() if k != "dense"}
    if perplexity is not None:
        provenance["dense"] = {**bundle.provenance["dense"], "perplexity": perplexity}
    return replace(bundle, provenance={**provenance, **changes})


@pytest.mark.parametrize("stream", [False, True])
def test_a_bundle_says_how_well_the_dense_model_predicts_out_of_how_many_tokens(
    model, calibrated, text_of, stream
):
    model = replace(model, streamed_to=model.device) if stream else model
    rating = measure_perplexity(model, text_of(model).calibration)

    assert calibrated(model).provenance["dense"] == {
        "perplexity": rating.perplexity, "tokens": rating.tokens, "vocabulary": 256
    }  # fmt: skip


@pytest.mark.parametrize(
    ("perplexity", "warned"), [(256.0, True), (130.0, True), (120.0, False), (None, False)]
)
def test_from_half_the_vocabulary_on_the_search_says_that_nothing_can_be_told_apart(
    bundle, perplexity, warned
):
    found = search_job(SHORTEST, Work.of(with_dense(bundle, perplexity))).warnings
    said = [warning for warning in found if "no better than chance" in warning]

    assert len(said) == warned
    assert all(f"{perplexity:.5g}" in each and "has 256" in each for each in said)
    bundles = {  # of several models those that predict nothing are named
        name: with_dense(bundle, value, model={"name": name})
        for name, value in (("good", 9.0), ("bad", perplexity))
    }
    request = replace(SHORTEST, objective=Objective(over="mean"))
    found = search_job(request, Work(bundles=bundles)).warnings
    (*said,) = (each for each in found if "than chance" in each)
    assert [each.startswith("The dense model bad predicts") for each in said] == [True] * warned


def preset_search(preset, **changes):
    found = Preset.of(preset, PATTERN)
    options = {"pattern": PATTERN, "steps": found.steps, "bounds": found.bounds, **changes}
    return SearchRequest(**{"trials": 16, **options})


@pytest.fixture
def database(tmp_path):
    with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
        yield storage


@pytest.fixture
def rated(monkeypatch):
    """How many candidates each call of the objective was asked for."""
    asked = []
    function = search_module.objective_function

    def counted(*args):
        rate = function(*args)

        def evaluate(candidates):
            asked.append(len(candidates))
            return rate(candidates)

        return evaluate

    monkeypatch.setattr(search_module, "objective_function", counted)
    return asked


def test_best_after_crepe_plus_rates_nothing_and_finds_to_the_byte_what_it_finds_alone(
    bundle, database, searched, rated
):
    first = searched(preset_search("crepe-plus"), Work.of(bundle), storage=database)
    alone = search_job(preset_search("best"), Work.of(bundle))
    rated.clear()
    second = searched(preset_search("best"), Work.of(bundle), storage=database)

    assert rated == []
    assert (first.rated_before, second.rated_before) == (0, 16)
    assert second.study_name != first.study_name
    assert second.configuration.steps.update != first.configuration.steps.update
    assert second.configuration.model_dump_json() == alone.configuration.model_dump_json()


def test_what_the_other_study_has_not_is_rated_and_with_another_weighting_or_pattern_everything(
    bundle, database, searched, rated
):
    searched(preset_search("crepe-plus"), Work.of(bundle), storage=database)
    rated.clear()
    longer = searched(preset_search("best", trials=20), Work.of(bundle), storage=database)

    assert (longer.rated_before, sum(rated)) == (16, 4)
    for changes in (
        {"objective": Objective(weighting="fisher")},
        {"pattern": Pattern.parse("0.6")},
    ):
        found = searched(preset_search("best", **changes), Work.of(bundle), storage=database)
        assert found.rated_before == 0


REQUEST = SearchRequest(pattern=Pattern.parse("0.5"), trials=8)


@pytest.fixture
def by_hand(tiny_llama, windows):
    def build(factor=1.0, **options):
        tiny_llama.model.layers[0].mlp.down_proj.weight.data *= factor
        linears = prunable_linears(tiny_llama)
        statistics = gather(
            tiny_llama, linears, windows, fisher_windows=2, projection_rows=16, seed=0
        ).statistics(windows)
        return sample_bundle(
            linears, statistics, rows_per_layer=4, kernel_sizes=(3, 5), seed=0, **options
        )

    return build


def test_without_a_key_a_bundle_is_named_by_its_contents_which_alone_find_its_study(
    by_hand, searched
):
    first, again, other = by_hand(), by_hand(), by_hand(factor=3.0)
    of_first, of_again, of_other = (
        searched(REQUEST, Work.of(each)) for each in (first, again, other)
    )

    assert of_again == of_first
    assert of_other.study_name != of_first.study_name
    assert of_other.configuration.objective != of_first.configuration.objective
    assert of_first.configuration.calibration["key"] == first.key


def test_what_a_rating_depends_on_is_in_the_name_of_a_bundle_without_a_key(by_hand):
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
def test_same_key_for_two_models(by_hand, joint, searched):
    def both(bundle):
        return Work(bundles={"a": bundle, "b": replace(bundle)}) if joint else Work.of(bundle)

    first, second = (by_hand(factor, provenance={"key": "mine"}) for factor in (1.0, 3.0))
    request = replace(REQUEST, objective=Objective(over="mean")) if joint else REQUEST
    searched(request, both(first))

    with pytest.raises(StudyError, match="other weights under the same key, mine"):
        searched(request, both(second))


def test_written_into_while_it_is_calibrated(model, text_of, tmp_path):
    settings = CalibrationSettings(samples=4, context_length=32, projection_rows=8)
    text = text_of(model, settings)

    @contextmanager
    def disturbing(_title, _steps):
        """When all windows were run the weights are others."""
        yield lambda _count: None
        next(iter(model.linears.values())).weight.mul_(1.5)

    with pytest.raises(ChangedInput, match="changed while it was being calibrated"):
        cached_bundle(model, text, settings, tmp_path, disturbing)
    assert not bundle_path(tmp_path, text.bundle_key).exists()
