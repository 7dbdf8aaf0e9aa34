"""Finalists race over the windows of a text, and the winner is measured on all of it."""

from dataclasses import replace
from functools import partial

import pytest

from pho_service.errors import InvalidInput, NumericalError
from pho_service.pipeline import confirmation, search
from pho_service.pipeline.rating import measure, rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.spec.baselines import reference_methods
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Steps
from pho_service.tuning.finalists import still_racing
from pho_service.tuning.plan import SearchRequest

WINDOWS = 12


@pytest.fixture
def report(model, read_report):
    return read_report(model, WINDOWS, 40)


def request_of(**changes):
    return replace(SearchRequest(pattern=Pattern.parse("0.5", "layer"), trials=14), **changes)


@pytest.fixture
def eager(monkeypatch):
    """Candidates of a random model are all alike: one that is behind is dropped by a whim."""
    monkeypatch.setattr(confirmation, "still_racing", partial(still_racing, level=0.4))


@pytest.fixture
def runs(model):
    """How many windows the model has run, call by call, beside what it has written."""
    found = []

    def count(_module, _args, given):
        if not given.get("use_cache"):
            found.append(len(given["input_ids"]))

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    return found


@pytest.mark.usefixtures("eager")
def test_race(bundle, confirming, runs, monkeypatch):
    """The winner has its perplexity of the whole text, and what that took is counted."""
    monkeypatch.setattr(search._SearchPieces, "_judges", lambda *_: [])  # is not counted
    model, report = confirming.model, confirming.text
    found = search_job(request_of(finalists=3), confirming).configuration
    spent = sum(runs)
    confirmed = found.confirmation
    rated = [each for each in found.finalists if each.perplexity is not None]
    alone, _ = rate_pruned(model, bundle.statistics(), found.candidate(), report.windows)

    assert confirmed.perplexity == rated[0].perplexity == alone.perplexity
    assert confirmed.evaluations == spent / WINDOWS
    assert spent < len(found.finalists) * WINDOWS
    assert 1 <= len(rated) < len(found.finalists)
    assert {b.trial for b in found.baselines} < {c.trial for c in found.finalists}
    assert all(each.divergence is not None for each in found.finalists)
    assert confirmed.divergence_tokens == 3 * 39


@pytest.mark.parametrize(("pattern", "given"), [("0.5", None), ("2:4", 2)])
def test_where_pruning_takes_a_text_finalists_race_on_their_masks_and_few_are_pruned_in_full(
    pattern, given, confirming, windows, monkeypatch
):
    monkeypatch.setattr(confirmation, "still_racing", lambda losses, *_, **__: [*losses])
    asked = request_of(
        pattern=Pattern.parse(pattern), finalists=4, in_full=given, steps=Steps(update="obs")
    )
    work = replace(confirming, calibration=windows)
    found = search_job(asked, work).configuration
    in_full = [each for each in found.finalists if each.perplexity is not None]
    compared = [each for each in found.finalists if each.divergence is not None]
    everybody = search_job(replace(asked, in_full=9), work).configuration
    spent = found.confirmation.evaluations

    assert (len(in_full), len(compared)) == (2, 4)
    assert found.steps.update == "obs"
    assert spent == (3 + 4 * 10) / WINDOWS + 2  # dense, masks at the last look but one, in full
    assert len([each for each in everybody.finalists if each.perplexity is not None]) == 4
    assert everybody.confirmation.perplexity <= found.confirmation.perplexity


def test_the_best_masks_are_the_same_however_many_of_them_are_pruned_in_full(
    confirming, windows, monkeypatch
):
    """So fewer of them, as there is no time, are those that a search for fewer takes."""

    def race(losses, seen, *, windows):
        """Drop the best, a different one after each look."""
        del seen, windows
        return {*losses} - {min(losses, key=lambda number: sum(map(sum, losses[number].values())))}

    monkeypatch.setattr(confirmation, "still_racing", race)
    asked = request_of(finalists=5, steps=Steps(update="obs"))
    work = replace(confirming, calibration=windows)
    pruned = []
    for in_full, left in ((4, 4), (4, 2), (2, 2), (4, 1), (1, 1)):
        run = Run(in_full=lambda _, left=left: left)
        found = search_job(replace(asked, in_full=in_full), work, run=run).configuration
        pruned.append({each.trial for each in found.finalists if each.perplexity is not None})

    assert [len(trials) for trials in pruned] == [4, 2, 2, 1, 1]
    assert pruned[0] > pruned[1] == pruned[2] > pruned[3] == pruned[4]


def test_masks_of_a_streamed_model_are_compared_on_all_windows(bundle, streamed, report, windows):
    asked = request_of(finalists=3, steps=Steps(update="obs"))
    work = Work.of(bundle, streamed, report, windows)
    for given, count in ((None, 2), (1, 1)):
        found = search_job(replace(asked, in_full=given), work).configuration

        assert len([each for each in found.finalists if each.perplexity is not None]) == count
        assert found.confirmation.evaluations == 3 + count


@pytest.mark.usefixtures("eager")
def test_interrupted(confirming, runs, searched):
    """Interrupted anywhere in the race, a search goes on and ends with the same bytes."""
    model = confirming.model
    whole = search_job(request_of(finalists=2), confirming).configuration
    windows = sum(runs)
    runs.clear()

    def stop(*_):
        if len(runs) in (8, 21):  # in the first look, and after it
            runs.append(0)
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(request_of(finalists=2), confirming)
    resumed = searched(request_of(finalists=2), confirming).configuration
    hook.remove()

    assert resumed == whole
    assert sum(runs) < windows + 2 * (3 + 3)  # what the race has measured is not measured again


def test_another_seed_looks_at_other_windows_first(confirming):
    rated = [
        search_job(request_of(seed=seed, trials=9), confirming).configuration.finalists
        for seed in (0, 1)
    ]
    wanda, other = (next(c.divergence for c in each if c.method == "wanda") for each in rated)

    assert wanda != other


def test_a_window_whose_loss_is_nan_ends_the_search_and_the_error_says_of_which_candidate(
    confirming,
):
    seen = []

    def spoil(_module, _args, output):
        seen.append(1)
        if len(seen) == 5:  # windows of the dense model, then of the first finalist
            output.logits[:] = float("nan")
        return output

    confirming.model.model.register_forward_hook(spoil)
    with pytest.raises(NumericalError, match="NaN or infinite") as told:
        search_job(request_of(finalists=2), confirming)

    assert {"method", "coefficients"} <= told.value.candidate.keys()
    for name in ("finalists", "in_full"):
        with pytest.raises(InvalidInput, match=rf"^{name}=0 is below 1\.$"):
            request_of(**{name: 0})


def test_windows_that_are_known_are_not_run_again_and_count_in_the_order_of_the_text(
    bundle, model, report, runs
):
    candidate = reference_methods(Pattern.parse("0.5"))["wanda"]
    subject = Work.of(bundle, model, report)
    whole = measure(subject, candidate)
    losses = {number: [float(number), 2.0] for number in range(WINDOWS - 1)}
    runs.clear()
    part = measure(subject, candidate, raced_losses=losses)

    assert sum(runs) == 1
    assert part.perplexity != whole.perplexity
    same = {"perplexity": whole.perplexity, "losses": whole.losses, "seconds": whole.seconds}
    assert replace(part, **same) == whole
