"""The search job: what is asked for, what is found, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial
from torch import Tensor

from pho_service.errors import InvalidInput, StudyError
from pho_service.models.loading import LanguageModel, load_model
from pho_service.pipeline.objectives import rate_by_proxy
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import search_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import model_masks
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.configuration import Configuration
from pho_service.spec.objective import WEIGHTINGS, Objective
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.space import parse_bounds
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SECOND_OPINION, SearchRequest
from pho_service.tuning.result import chosen_in
from storage.studies import keep_record, open_storage, record_of

PATTERN = Pattern.parse("0.5", "layer")


@pytest.fixture
def request_of() -> Any:
    """A small request with some values changed."""

    def build(**changes: Any) -> SearchRequest:
        return replace(SearchRequest(pattern=PATTERN, trials=14), **changes)

    return build


def proxies(found: Configuration) -> list[float]:
    """The values of the baselines."""
    return [rating.proxy for rating in found.baselines if rating.proxy is not None]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(bundle: ProxyBundle, request_of: Any, weighting: str, searched: Any) -> None:
    """The value is the proxy of the configuration's own candidate in the asked weighting."""
    objective = Objective(weighting=weighting)
    found = searched(request_of(objective=objective), bundle).configuration
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


def test_of_gini_the_highest_wins(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    found = searched(request_of(objective=Objective(name="gini")), bundle).configuration

    assert found.objective["direction"] == "maximize"
    assert found.objective["value"] >= max(proxies(found))


def test_searched_by_perplexity_the_value_is_the_confirmation(
    bundle: ProxyBundle, request_of: Any, model: LanguageModel, report: ReportText, searched: Any
) -> None:
    result = searched(
        request_of(objective=Objective(name="perplexity"), trials=9),
        bundle,
        model=model,
        confirm_text=report,
    )
    found = result.configuration

    assert found.confirmation is not None
    assert found.confirmation.perplexity == found.objective["value"] <= min(proxies(found))
    assert not any("Not confirmed" in warning for warning in result.warnings)


@pytest.mark.parametrize("sampler", ["hill-climb", "cmaes"])
def test_samplers_on_perplexity(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    report: ReportText,
    study_url: str,
    sampler: str,
    searched: Any,
) -> None:
    """Samplers can search by perplexity, and goes on where it was with the same trials."""
    request = request_of(objective=Objective(name="perplexity"), sampler=sampler, trials=14)
    searched(replace(request, trials=10), bundle, model=model, confirm_text=report)
    found = searched(request, bundle, model=model, confirm_text=report).configuration
    again = searched(
        request,
        bundle,
        url=study_url.replace("study.db", "other.db"),
        model=model,
        confirm_text=report,
    ).configuration

    assert found == again
    assert found.search["sampler"] == sampler


def test_climb_ends_by_itself(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    report: ReportText,
    study_url: str,
    searched: Any,
) -> None:
    """It begins at RIA's coefficients, rates no point twice, and says after how many it ended."""
    objective = Objective(name="perplexity")
    request = request_of(objective=objective, sampler="hill-climb", trials=300)
    result = searched(request, bundle, model=model, confirm_text=report)
    with open_storage(study_url) as storage:
        trials = optuna.load_study(study_name=result.study_name, storage=storage).trials
    climb = [t for t in trials if t.params["method"] == "crepe"]
    c = climb[0].user_attrs["coefficients"]
    search = result.configuration.search

    assert (c["row"], c["column"], c["neighbourhood"]) == (0.5, 0.5, 0.0)
    assert (c["activation_exponent"], c["gradient_exponent"], c["kernel_size"]) == (0.5, 0.0, 3)
    assert len({str(t.params) for t in climb}) == len(climb)
    assert (search["trials"], search["finished"]) == (300, len(trials))
    assert any(f"ended by itself after {len(trials)} of 300" in w for w in result.warnings)


def test_stopped_by_a_callback(bundle: ProxyBundle, request_of: Any) -> None:
    """What a stopped search says is not that its sampler knows nothing better."""

    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 11:
            study.stop()

    result = search_job(request_of(trials=30), bundle, callbacks=[stop])

    assert result.configuration.search["finished"] < 30
    assert any("was stopped after" in w for w in result.warnings)
    assert not any("ended by itself" in w for w in result.warnings)


def test_perplexity_without_a_model(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """A bundle alone has no perplexity."""
    with pytest.raises(InvalidInput, match="needs the model and a text"):
        searched(request_of(objective=Objective(name="perplexity")), bundle)


@pytest.mark.parametrize(
    ("pattern", "scope"), [("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("1:4", None)]
)
def test_whatever_wins_removes_what_was_asked_for_and_is_counted_in_no_wider_scope(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    pattern: str,
    scope: str | None,
    searched: Any,
) -> None:
    asked = Pattern.parse(pattern, scope)
    found = searched(request_of(pattern=asked), bundle).configuration.candidate()
    masks = dict(model_masks(model.linears, bundle.statistics(), found))
    removed = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())

    assert found.pattern.scope.width <= asked.scope.width
    assert removed == asked.removed(total)


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_in_scope_row_the_gradient_exponent_is_fixed_at_0_elsewhere_it_is_searched(
    bundle: ProxyBundle, request_of: Any, scope: str, searched: Any
) -> None:
    found = searched(request_of(pattern=Pattern.parse("0.5", scope)), bundle).configuration

    assert found.search["space"]["gradient_exponent"] == [0.0, 0.0 if scope == "row" else 1.0]
    assert ("fisher" in {r.method for r in found.baselines}) is (scope != "row")


def test_border_is_flagged(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """A best value on the border is named in the result and in a warning."""
    bounds = ("activation_exponent=3.9:4", "gradient_exponent=0", "kernel_sizes=3")
    result = searched(
        request_of(bounds=parse_bounds(bounds), objective=Objective(name="gini"), trials=60), bundle
    )
    exponent = result.configuration.coefficients.activation_exponent

    assert result.configuration.method == "crepe"
    assert exponent > 3.998
    assert "activation_exponent" in result.configuration.border
    assert any("activation_exponent lies on the border" in w for w in result.warnings)


def test_every_candidate_but_the_baselines_lies_in_the_asked_box(
    bundle: ProxyBundle, request_of: Any, study_url: str, searched: Any
) -> None:
    bounds = ("activation_exponent=0.6:0.7", "row_share=0.25", "kernel_sizes=5")
    searched(request_of(bounds=parse_bounds(bounds), trials=22), bundle)
    with open_storage(study_url) as storage:
        (summary,) = optuna.get_all_study_summaries(storage)
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    found = [t.params for t in trials if t.params["method"] == "crepe"]

    assert len(found) == 22 - 6
    assert all(0.6 <= p["activation_exponent"] <= 0.7 for p in found)
    assert all(p["row_share"] == pytest.approx(0.25) for p in found)
    assert all(p["kernel_size"] == 5 for p in found)


def test_kernel_size_without_means(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """A kernel size that the bundle lacks is refused."""
    with pytest.raises(InvalidInput, match="9 is not in the bundle, which has 3, 5"):
        searched(request_of(bounds={"kernel_sizes": (3, 9)}), bundle)


def test_width_and_groups(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """A width that M does not divide is refused before a study is made, and the layer named."""
    with pytest.raises(InvalidInput, match=r"model\.layers\.0\.\S+: in_features=32 .* M=5"):
        searched(request_of(pattern=Pattern.parse("2:5")), bundle)


def test_another_seed_sampler_pattern_scope_objective_or_space_is_another_study_in_one_file(
    bundle: ProxyBundle, request_of: Any, study_url: str, searched: Any
) -> None:
    requests = [
        request_of(),
        request_of(seed=1),
        request_of(sampler="random"),
        request_of(pattern=Pattern.parse("0.6", "layer")),
        request_of(pattern=Pattern.parse("0.5", "row")),
        request_of(objective=Objective(weighting="fisher")),
        request_of(bounds={"row_share": (0.5, 0.5)}),
    ]
    names = [searched(r, bundle).study_name for r in requests]
    with open_storage(study_url) as storage:
        kept = {s.study_name: s.n_trials for s in optuna.get_all_study_summaries(storage)}

    assert kept == dict.fromkeys(names, 14)
    assert len(set(names)) == len(requests)


def test_more_trials_go_on_with_the_study_of_fewer_and_never_end_worse(
    bundle: ProxyBundle, request_of: Any, searched: Any
) -> None:
    short, long = (searched(request_of(trials=n), bundle) for n in (10, 30))

    assert short.study_name == long.study_name
    assert long.configuration.objective["value"] <= short.configuration.objective["value"]


def test_confirmed_stays_a_finalist(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    report: ReportText,
    study_url: str,
    searched: Any,
) -> None:
    """What a shorter search confirmed on the same text still counts, however good the rest is."""
    asked = {"finalists": 1}
    short = searched(request_of(trials=8, **asked), bundle, model=model, confirm_text=report)
    with open_storage(study_url) as storage:
        study = optuna.load_study(study_name=short.study_name, storage=storage)
        measured = {"method": "crepe", "perplexity": 1.5, "text_sha256": report.key}
        keep_record(study, "perplexity:6", measured)  # as if it had been that good
        of_another_text = {**measured, "perplexity": 1.0, "text_sha256": "b"}
        keep_record(study, "perplexity:7", of_another_text)
    long = searched(request_of(trials=40, **asked), bundle, model=model, confirm_text=report)
    own = searched(
        request_of(trials=40, **asked),
        bundle,
        url=f"{study_url}2",
        model=model,
        confirm_text=report,
    ).configuration

    assert 6 not in {each.trial for each in own.candidates}
    assert long.trial == 6
    assert long.configuration.confirmation is not None
    assert long.configuration.confirmation.perplexity == 1.5
    assert {each.trial for each in own.candidates} < {
        c.trial for c in long.configuration.candidates
    }


def test_the_study_says_which_trial_the_result_is_whether_it_was_confirmed_or_not(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    report: ReportText,
    study_url: str,
    searched: Any,
) -> None:
    marks = []
    for options in ({}, {"model": model, "confirm_text": report}):
        found = searched(request_of(), bundle, **options)
        with open_storage(study_url) as storage:
            study = optuna.load_study(study_name=found.study_name, storage=storage)
            marks.append((study.user_attrs["chosen"], chosen_in(study), found))
            chosen = [t.number for t in study.trials if t.user_attrs.get("chosen")]
            assert chosen == [found.trial]

    for mark, trial, found in marks:
        confirmation = found.configuration.confirmation
        assert mark == {
            "study": found.study_name,
            "trial": found.trial,
            "method": found.configuration.method,
            "objective": found.configuration.objective["value"],
            "perplexity": confirmation and confirmation.perplexity,
        }
        assert trial == found.trial


def test_a_search_that_is_asked_again_measures_no_perplexity_again(
    bundle: ProxyBundle, request_of: Any, model: LanguageModel, report: ReportText, searched: Any
) -> None:
    first = searched(request_of(), bundle, model=model, confirm_text=report)
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    second = searched(request_of(), bundle, model=model, confirm_text=report)

    assert calls == []
    assert second.configuration == first.configuration


@pytest.mark.parametrize("why", ["a step needs a text", "the model is streamed"])
def test_no_race_where_pruning_costs(
    bundle: ProxyBundle,
    request_of: Any,
    model: LanguageModel,
    model_folder: Path,
    report: ReportText,
    windows: Tensor,
    why: str,
    searched: Any,
) -> None:
    steps = Steps(repruning="dsnot") if why == "a step needs a text" else Steps()
    if why == "the model is streamed":
        model = load_model(str(model_folder), device="cpu", stream=True)
    found = searched(
        request_of(steps=steps, trials=9, finalists=2),
        bundle,
        model=model,
        confirm_text=report,
        calibration=windows % 30,
    ).configuration

    assert found.confirmation is not None
    assert found.confirmation.divergence_tokens is None
    assert found.confirmation.evaluations == len(found.candidates)
    assert all(c.perplexity is not None and c.divergence is None for c in found.candidates)


def test_a_study_carries_its_pattern_scope_objective_space_sampler_seed_and_calibration(
    bundle: ProxyBundle, request_of: Any, study_url: str, searched: Any
) -> None:
    result = searched(request_of(seed=5), bundle)
    with open_storage(study_url) as storage:
        study = optuna.load_study(study_name=result.study_name, storage=storage)
        attributes, trial = record_of(study), study.trials[-1]
        shown = study.user_attrs

    assert (attributes["pattern"], attributes["scope"]) == ("0.5", "layer")
    assert attributes["objective"] == "activation-reconstruction/blend"
    assert (attributes["sampler"], attributes["seed"]) == ("cmaes", 5)
    assert attributes["calibration"]["key"] == bundle.provenance["key"]
    assert set(shown) == {"pattern", "scope", "objective", "sampler", "seed", "chosen"}
    assert study.metric_names == ["activation-reconstruction/blend"]
    assert set(trial.user_attrs["error_by_kind"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert trial.user_attrs["seconds"] >= 0


def test_description_survives_a_kill(
    bundle: ProxyBundle, request_of: Any, study_url: str, searched: Any
) -> None:
    """Killed while it is being described, a study is described to the end the next time."""
    name = searched(request_of(), bundle).study_name
    with open_storage(study_url) as storage:
        optuna.delete_study(study_name=name, storage=storage)
        optuna.create_study(study_name=name, storage=storage).set_user_attr("pattern", "0.5")
    searched(request_of(), bundle)
    with open_storage(study_url) as storage:
        attributes = record_of(optuna.load_study(study_name=name, storage=storage))

    assert {"scope", "objective", "space", "sampler", "seed", "calibration"} <= set(attributes)


def test_nothing_can_be_rated(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """Weights beyond float32 fail every trial, and the layer is named."""
    broken = replace(bundle.layers[3], rows=bundle.layers[3].rows * 1e30)
    layers = [*bundle.layers[:3], broken, *bundle.layers[4:]]

    with pytest.raises(StudyError, match=rf"every trial .* failed\. The first: {broken.name}"):
        searched(request_of(), replace(bundle, layers=layers))


def test_baseline_wins(bundle: ProxyBundle, request_of: Any, searched: Any) -> None:
    """If nothing beats a baseline, the baseline is the result, in its own scope, and it says so."""
    result = searched(request_of(trials=6), bundle)

    assert result.configuration.method != "crepe"
    assert any("better than the baseline" in warning for warning in result.warnings)
    assert result.configuration.border == []
    assert Scope(result.configuration.scope).width <= PATTERN.scope.width
