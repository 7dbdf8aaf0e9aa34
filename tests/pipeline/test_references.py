"""What a result is judged by: published methods on its own windows; and whether its proxy ranks."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from pho_service.errors import InvalidInput, NumericalError, TextError
from pho_service.interface.search import validation_of
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import GivenWindows
from pho_service.pipeline import rating, search
from pho_service.pipeline.inputs import Inputs
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job, study_of
from pho_service.pipeline.work import Work
from pho_service.shown.tables import configuration_rows, verdict_table
from pho_service.spec.baselines import named_baselines, reference_methods
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import (
    WIDER,
    Confirmation,
    ProxyQuality,
    Rating,
    published,
)
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.perplexity import REFERENCES, Perplexities, Ratio, in_words
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.validation import finalists_wanted
from storage.studies import record_of

CUT = CalibrationSettings(context_length=32)
BESIDE = ("wanda/dense", "ria/dense", "wanda/ria")  # other errors that are told


@pytest.fixture
def pruned_with(monkeypatch):
    """The methods that perplexities are measured of, in their order: finalists first."""
    found = []
    really = rating.measure

    def measure(subject, candidate, *args, **more):
        found.append("dense" if candidate is None else candidate.method)
        return really(subject, candidate, *args, **more)

    monkeypatch.setattr(rating, "measure", measure)
    return found


@pytest.mark.parametrize(
    ("pattern", "steps", "objective", "same"),
    [
        pytest.param("0.5", Steps(), "activation-reconstruction", True, id="race"),
        pytest.param("0.5", Steps(), "perplexity", True, id="by-perplexity"),
        pytest.param(
            "2:4", Steps(permutation="score"), "activation-reconstruction", False, id="permuted"
        ),
    ],
)
def test_they_are_wanda_and_ria_as_published_whatever_the_steps_none_is_measured_again(
    bundle, model, report, pruned_with, pattern, steps, objective, same
):
    asked = SearchRequest(
        pattern=Pattern.parse(pattern), trials=8, steps=steps, finalists=1,
        objective=Objective(name=objective),
    )  # fmt: skip
    study = study_of(None, asked, Work.of(bundle, confirm=report))
    work = Work.of(bundle, model, report)
    found = search_job(asked, work, study=study).configuration
    measured = [*pruned_with]
    again = search_job(asked, work, study=study).configuration
    methods = reference_methods(asked.pattern)
    alone = {
        name: rate_pruned(model, bundle.statistics(), each, report.windows)[0].perplexity
        for name, each in methods.items()
    }
    good = found.perplexities
    if same:  # then finalists are published methods, of which RIA has two
        measured_ria = [
            each.perplexity
            for each in found.baselines
            if each.method.startswith("ria") and each.perplexity is not None
        ]
        alone["ria"] = min([alone["ria"], *measured_ria])

    assert good == Perplexities(
        dense=measure_perplexity(model, report.windows).perplexity,
        pruned=found.confirmation.perplexity,
        errors=good.errors,
        ria_scope=good.ria_scope,
        **alone,
    )
    assert [*good.errors] == ([] if objective == "perplexity" else [*REFERENCES, *BESIDE])
    finalists = {b.method for b in found.baselines if b.perplexity is not None}
    names = ["dense", *(each.method for each in methods.values())]
    judges = [name for name in names if not (same and name in finalists)]
    assert measured[len(measured) - len(judges) :] == judges
    assert again == found
    assert pruned_with == measured  # nothing is measured twice


def test_finalists_say_how_far_they_are_behind_the_best_and_whether_that_may_be_chance(
    bundle, model, report
):
    asked = SearchRequest(pattern=Pattern.parse("0.5"), trials=8, finalists=2)
    study = study_of(None, asked, Work.of(bundle, confirm=report))
    found = search_job(
        asked, Work.of(bundle, model=model, confirm=report), study=study
    ).configuration
    measured = [each for each in found.finalists if each.perplexity is not None]
    losses = [np.array(record_of(study)[f"perplexity:{each.trial}"]["losses"]) for each in measured]
    best, other = found.finalists[:2]
    behind, tokens = losses[1] - losses[0], found.confirmation.tokens
    error = behind.std(ddof=1) * math.sqrt(len(behind)) / tokens

    assert best.error is None
    assert other.error == pytest.approx(error)
    told = abs(math.log(other.perplexity / best.perplexity)) >= 2 * error
    assert ("statistically tied with the runner-up" in found.beside_the_next) is not told
    assert found.beside_the_next in [value for _, value in configuration_rows(found)]


def test_the_next_finalist_in_words():
    ratings = [Rating(method="crepe", trial=n, perplexity=p, error=e)
               for n, p, e in ((3, 20.0, None), (1, 21.0, 0.01), (2, None, None))]  # fmt: skip
    found = published("wanda", "0.5").model_copy(update={"finalists": ratings})
    near = found.model_copy(
        update={"finalists": [ratings[0], ratings[1].model_copy(update={"error": 0.03})]}
    )

    assert found.beside_the_next == "4.8 ± 1.0% below the runner-up (21.00)"
    assert near.beside_the_next == "statistically tied with the runner-up (21.00)"
    old = published("wanda", "0.5")
    assert old.beside_the_next == ""
    assert old.perplexities is None
    assert "perplexities" not in old.model_dump(mode="json")
    assert "error" not in ratings[0].model_dump()


def test_without_a_perplexity(confirming, monkeypatch):
    """A published method whose model gives NaN has none, and the search ends all the same."""
    really = rating.measure

    def measure(subject, candidate, *args, **more):
        if candidate == reference_methods(Pattern.parse("2:4"))["wanda"]:
            raise NumericalError("the loss is NaN or infinite.")
        return really(subject, candidate, *args, **more)

    monkeypatch.setattr(rating, "measure", measure)
    steps = Steps(permutation="score")
    asked = SearchRequest(pattern=Pattern.parse("2:4"), trials=8, steps=steps, finalists=1)
    found = search_job(asked, confirming)
    good = found.configuration.perplexities

    assert good.wanda is None
    assert "Wanda" not in str(good)
    assert any("not compared with wanda" in warning for warning in found.warnings)


@pytest.fixture
def reporting(confirming, texts):
    """The same with a report text that the confirmation has a part of."""
    model, bundle = confirming.model, confirming.bundle
    source = TextSource(path=str(texts["report"]))
    report = Inputs().reported(model, source, CUT, 4, None, confirming.confirm)
    return replace(confirming, report=report), bundle.statistics()


def test_what_wins_is_reported_with_its_judges_on_windows_that_nothing_was_chosen_on_once(
    reporting, pruned_with
):
    work, statistics = reporting
    asked = SearchRequest(pattern=Pattern.parse("0.5"), trials=8, finalists=1)
    study = study_of(None, asked, work)
    result = search_job(asked, work, study=study)
    report, measured = result.configuration.report, [*pruned_with]
    windows, ria = work.report.windows, f"ria-{report.ria_scope}"
    candidates = {
        "pruned": result.configuration.candidate(),
        "wanda": reference_methods(asked.pattern)["wanda"],
        "ria": named_baselines(asked.pattern)[ria],
    }
    alone = {
        name: rate_pruned(work.model, statistics, each, windows)[0].perplexity
        for name, each in candidates.items()
    }
    again = search_job(asked, work, study=study)

    assert {name: getattr(report, name) for name in alone} == alone
    assert report.dense == measure_perplexity(work.model, windows).perplexity
    assert report.ria_scope == result.configuration.perplexities.ria_scope  # the better one there
    assert not {tuple(w) for w in windows.tolist()} & {tuple(w) for w in work.text.windows.tolist()}
    assert result.configuration.headline == report != result.configuration.perplexities
    assert report.sentence.endswith("; nothing was chosen on this text")
    assert "±" in str(report.ratio("dense"))
    assert any("3 of its first windows were left out" in warning for warning in result.warnings)
    assert (again.configuration, pruned_with) == (result.configuration, measured)


def test_a_report_text_that_was_chosen_on_is_refused(confirming):
    model, confirm = confirming.model, confirming.confirm
    windows = GivenWindows(tokens=confirm.windows)

    with pytest.raises(TextError, match="nothing was calibrated or chosen on"):
        Inputs().reported(model, windows, CUT, 4, None, confirm)


def test_in_words():
    """A line of numbers with four digits, and the rise over dense in per cent."""
    good = Perplexities(dense=22.6, pruned=27.71, wanda=39.9, ria=41.24)

    line = "22.60 dense, 27.71 pruned (+22.6%), Wanda 39.90, RIA 41.24; chosen on this text"
    assert str(good) == line
    errors = {"dense": 0.004, "wanda": 0.2, "ria": 0.01, "wanda/dense": 0.004, "wanda/ria": 0.01}
    known = good.model_copy(update={"errors": errors})
    assert "pruned (+22.6 ± 0.5%)" in str(known)
    assert known.sentence == (
        "Perplexity 27.71: 22.6 ± 0.5% above dense (22.60), statistically tied with Wanda "
        "(39.90), 32.8 ± 0.7% below RIA (41.24); chosen on this text"
    )
    assert "below ria-row (41.24)" in known.model_copy(update={"ria_scope": "row"}).sentence
    assert [row[2:] for row in verdict_table(known).rows] == [
        ["", ""], ["+22.6 ± 0.5%", "32.8 ± 0.7%"], ["+76.5 ± 0.7%", "3.2 ± 1.0%"], ["+82.5%", ""],
    ]  # fmt: skip
    assert good.model_copy(update={"ria": 27.71}).sentence.endswith(
        "same as RIA; chosen on this text"
    )
    assert "22.50 pruned (-0.4%)" in str(good.model_copy(update={"pruned": 22.5}))
    assert in_words(5.5, {"a": Ratio(12345.6, 5.5)}, {"wanda": 3e7, "ria": None}) == (
        "5.500 dense, 12,346 a (+224,365.5%), Wanda 3.000e+07"
    )
    before = Confirmation(
        perplexity=20.0, tokens=9, context_length=4, text={}, before_reconstruction=25.0,
        errors={"before_reconstruction": 0.01},
    )  # fmt: skip
    assert before.beside("before_reconstruction") == "25.00 (-20.0 ± 0.8%)"
    plain = before.model_copy(update={"errors": {}})
    assert plain.beside("before_reconstruction") == "25.00 (-20.0%)"


REQUEST = SearchRequest(
    pattern=Pattern.parse("0.5"), trials=20, finalists=1, validation=ValidationSpec(candidates=8)
)
BLEND = "activation-reconstruction/blend"


def quality(spearman, better_half=None):
    half = spearman if better_half is None else better_half
    return ProxyQuality(
        spearman=spearman, spearman_interval=(spearman, spearman), spearman_better_half=half,
        kendall=spearman, kendall_interval=(spearman, spearman), regret=0.0,
        regret_interval=(0.0, 0.0), top_k=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        (BLEND, quality(0.9), None),
        ("gini", quality(-0.9), None),
        (BLEND, quality(0.1), "does not rank .* 20 by it are finalists instead of 5"),
        (BLEND, quality(-0.9), r"does not rank .* is -0\.90, so .* is worse than chance"),
        ("gini", quality(0.9), r"does not rank .* is \+0\.90, so .* is worse than chance"),
        (BLEND, quality(0.8, -0.3), r"does not order the better half .* \+0\.80, and -0\.30 in"),
        ("gini", quality(-0.9, 0.1), r"does not order the better half .* -0\.90, and \+0\.10 in"),
    ],
)
def test_a_proxy_that_does_not_rank_or_not_at_the_top_is_told_and_more_are_finalists(
    name, found, said
):
    count, doubt = finalists_wanted(5, name, found)

    assert (count, doubt is None) == ((5, True) if said is None else (5 * WIDER, False))
    assert said is None or re.search(said, doubt or "")


@pytest.fixture
def measured(monkeypatch):
    """What was measured, call by call; and nobody believes the proxy."""
    calls = []
    original = rating.measure

    def measure(*given, **more):
        calls.append(1)
        return original(*given, **more)

    monkeypatch.setattr(rating, "measure", measure)
    monkeypatch.setattr(search, "qualities", lambda *_, **__: {BLEND: quality(0.2)})
    return calls


def test_confirmation_takes_over(confirming, searched, measured):
    """More finalists are looked at, the result says why, and what is measured is kept."""
    wide = searched(REQUEST, confirming)
    count = len(measured)
    again = searched(REQUEST, confirming)
    at_once = len(measured)
    plain = search_job(replace(REQUEST, validation=None), confirming)

    def compared(result):
        return sum(each.divergence is not None for each in result.configuration.finalists)

    assert 8 < count == at_once
    assert compared(wide) > compared(plain)
    assert any("4 by it are finalists instead of 1" in warning for warning in wide.warnings)
    assert again.configuration == wide.configuration
    assert plain.validation is None
    assert wide.validation == {BLEND: quality(0.2)}


def test_in_python_it_is_a_number_of_candidates_and_takes_a_model(bundle):
    assert validation_of(8) == REQUEST.validation
    assert validation_of(None) is None
    with pytest.raises(InvalidInput, match=r"validate=7 is not in 8\.\.1000"):
        validation_of(7)
    with pytest.raises(InvalidInput, match=r"give a model instead of a bundle.*candidates"):
        search_job(REQUEST, Work.of(bundle))
