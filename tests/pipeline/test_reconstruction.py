"""Blocks that are trained after they are pruned."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace

import optuna
import pytest
import torch
from optuna.storages import InMemoryStorage

from pho_service import progress as progress_of
from pho_service.errors import InvalidInput, OutputError
from pho_service.models.loading import load_model
from pho_service.models.saving import read_recipe
from pho_service.models.scratch import Memo
from pho_service.pipeline import confirmation, in_time, pipeline, rating
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.pipeline import prune_model
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.pruning.reconstruction import summary
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.steps import Candidate, Reconstruction, Steps
from pho_service.tuning.plan import SearchRequest

TRAINED = Reconstruction(method="block", passes=3, learning_rate=3e-2)
CANDIDATE = Candidate(
    method="crepe",
    coefficients=Coefficients(row=1, column=1, neighbourhood=0, kernel_size=3),
    pattern=Pattern.parse("2:4"),
    steps=Steps(permutation="score", update="obs", reconstruction=TRAINED),
)


class Run:
    """A model pruned and trained, with what was told of it."""

    def __init__(
        self, model, bundle, windows, *, candidate=CANDIDATE, done=None, heard=lambda _: None
    ):
        self.masks = {}
        self.blocks = {}
        prune_model(
            model, bundle.statistics(), candidate, windows, heard, self.masks.__setitem__,
            memo=done, rebuilt=self.blocks.__setitem__,
        )  # fmt: skip
        self.weights = {name: each.weight.clone() for name, each in model.linears.items()}


def same(first, second):
    return first.blocks == second.blocks and all(
        torch.equal(weight, second.weights[name])
        and torch.equal(first.masks[name].keep, second.masks[name].keep)
        for name, weight in first.weights.items()
    )


@pytest.fixture
def windows(report):
    return report.windows


def test_blocks_are_trained(model, original, bundle, windows):
    """Held-out error falls or stays, zeros are exact, and N:M holds in the cut order."""
    before = replace(CANDIDATE, steps=CANDIDATE.steps.before_reconstruction)
    untrained = Run(original, bundle, windows, candidate=before)
    run = Run(model, bundle, windows)
    results = run.blocks.values()

    assert [*run.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(r.before and r.after and r.after <= r.before for r in results)
    assert any(r.kept for r in results)
    assert all(r.kept == (r.after < r.before) for r in results if r.before and r.after)
    first = "model.layers.0.mlp.down_proj"
    assert torch.equal(run.masks[first].keep, untrained.masks[first].keep)
    trained = not torch.equal(run.weights[first], untrained.weights[first])
    assert trained == run.blocks["model.layers.0"].kept
    for name, mask in run.masks.items():
        assert torch.equal(run.weights[name] != 0, mask.keep)


def test_resumed(model, model_folder, bundle, windows, tmp_path):
    """A run that is killed in the second block goes on there, and ends with the same bytes."""
    done = Memo(folder=tmp_path / "blocks", key="a")
    killed = load_model(str(model_folder), device="cpu")
    heard = 0

    def kill(_count):
        nonlocal heard
        heard += 1
        if (tmp_path / "blocks" / "model.layers.0.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(killed, bundle, windows, done=done, heard=kill)
    steps = []
    resumed = Run(
        load_model(str(model_folder), device="cpu"), bundle, windows, done=done, heard=steps.append
    )
    whole = Run(model, bundle, windows)

    assert same(resumed, whole)
    assert steps.count(0) < heard + 2  # only the second block was trained
    assert Memo(folder=done.folder, key="b").read("model.layers.0") is None
    (done.folder / "model.layers.1.safetensors").write_bytes(b"torn")
    assert done.read("model.layers.1") is None


def shorter(*blocks):
    """The candidate whose training gets shorter."""
    trained = replace(TRAINED, blocks=blocks)
    return replace(CANDIDATE, steps=replace(CANDIDATE.steps, reconstruction=trained))


def test_the_blocks_behind_some_are_trained_in_one_pass_and_those_behind_others_not_at_all(
    model, original, model_folder, bundle, windows, tmp_path
):
    """What was kept of a training in all passes is used up to there, and no further."""
    done = Memo(folder=tmp_path / "blocks", key="a")

    def run(candidate, memo=None):
        again = load_model(str(model_folder), device="cpu")
        return Run(again, bundle, windows, candidate=candidate, done=memo)

    whole = Run(original, bundle, windows, done=done)
    resumed, fresh = run(shorter(1), done), Run(model, bundle, windows, candidate=shorter(1))
    untrained = run(shorter(1, 1), done)
    put_back = run(shorter(1, 1), done)

    assert same(fresh, resumed)
    assert same(run(shorter(2)), whole)
    assert same(run(shorter(1, 2)), fresh)
    assert same(run(shorter(1, 1)), untrained)
    assert same(put_back, untrained)
    assert [each.passes for each in untrained.blocks.values()][1] == 0
    assert [each.passes for each in fresh.blocks.values()][1] in range(1, 4)
    assert not same(fresh, whole)
    assert not same(fresh, untrained)
    assert fresh.blocks["model.layers.0"] == whole.blocks["model.layers.0"]
    assert summary(untrained.blocks).endswith("; 1 not trained")


def test_blocks_that_are_all_kept_are_put_back_without_a_text(
    model, original, streamed, bundle, windows, tmp_path, monkeypatch
):
    done = Memo(folder=tmp_path / "blocks", key="a")
    whole = Run(original, bundle, windows, done=done)
    monkeypatch.setattr(pipeline, "walk", lambda *_, **__: pytest.fail("a text was run"))

    assert same(Run(model, bundle, windows, done=done), whole)
    assert same(Run(streamed, bundle, windows, done=done), whole)
    monkeypatch.setattr(Memo, "holds", lambda *_: True)
    done.path("model.layers.1").unlink()
    with pytest.raises(OutputError, match=r"layers\.1 was removed from .*blocks while others were"):
        Run(model, bundle, windows, done=done)


def test_a_streamed_model_ends_with_the_same_weights_another_seed_gives_other_ones(
    model, original, streamed, bundle, windows
):
    other = replace(TRAINED, seed=1)
    seeded = replace(CANDIDATE, steps=replace(CANDIDATE.steps, reconstruction=other))
    first = Run(model, bundle, windows)

    assert same(Run(streamed, bundle, windows), first)
    assert not same(Run(original, bundle, windows, candidate=seeded), first)


def test_dense_linears_stay(model, bundle, windows):
    """What is left dense is not trained: norms, and linears that are ignored."""
    dense = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    left = replace(CANDIDATE.steps, linears=Linears(ignore=("*.q_proj", "model.layers.0.*")))
    run = Run(model, bundle, windows, candidate=replace(CANDIDATE, steps=left))
    changed = {n for n, p in model.model.named_parameters() if not torch.equal(p, dense[n])}

    assert [*run.blocks] == ["model.layers.1"]
    assert changed == {f"{name}.weight" for name in run.masks}
    assert len(run.masks) == 6
    with pytest.raises(InvalidInput, match=r"only 1\. Give 2 samples or more"):
        Run(model, bundle, windows[:1])


def test_pruned_folder(model, original, model_folder, bundle, windows, tmp_path):
    """`pho prune` keeps finished blocks beside its folder until that is whole, with a record."""
    configuration = Configuration(
        method="crepe", coefficients=CANDIDATE.coefficients, steps=CANDIDATE.steps,
        pattern="2:4", scope="row",
    )  # fmt: skip
    blocks = tmp_path / ".out.blocks"

    class Killed(Exception):
        pass

    @contextmanager
    def progress(_title, _count):
        def advance(_count):
            if (blocks / "model.layers.0.safetensors").exists():
                raise Killed

        yield advance

    with pytest.raises(Killed):
        prune_job(
            Work.of(bundle, load_model(str(model_folder), device="cpu"), calibration=windows),
            configuration, tmp_path / "out", progress=progress,
        )  # fmt: skip
    kept = [path.name for path in blocks.iterdir()]
    pruned = prune_job(Work.of(bundle, model, calibration=windows), configuration, tmp_path / "out")
    recipe = read_recipe(tmp_path / "out")

    assert kept == ["model.layers.0.safetensors"]
    assert not blocks.exists()
    assert {name: r.model_dump() for name, r in recipe.blocks.items()} == {
        name: each.to_dict() for name, each in pruned.blocks.items()
    }
    assert all(check.passed for check in check_folder(tmp_path / "out", original=original))


@pytest.mark.parametrize(("times", "blocks"), [(1, (1, 1)), (2, ())])
def test_where_the_training_gets_shorter_is_for_models_of_its_own_size(
    model, bundle, windows, tmp_path, times, blocks
):
    candidate = shorter(1, 1)
    configuration = Configuration(
        method="crepe", coefficients=candidate.coefficients, steps=candidate.steps,
        pattern="2:4", scope="row", model={"parameters": times * model.parameters},
    )  # fmt: skip
    work = Work.of(bundle, model, calibration=windows)
    prune_job(work, configuration, tmp_path / "out")
    recipe = read_recipe(tmp_path / "out")

    steps = json.loads((tmp_path / "out" / "pruning.json").read_text())["configuration"]["steps"]
    assert steps["reconstruction"].get("blocks", []) == [*blocks]
    assert recipe.blocks["model.layers.0"].passes > 0
    assert (recipe.blocks["model.layers.1"].passes > 0) == (not blocks)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_winner(searched, bundle, confirming, monkeypatch, factor):
    """Only the winner is trained, once in a study, and only a better perplexity is taken."""
    measured = []

    def measure(_, candidate, *_more, writes, shorten):
        measured.append(candidate)
        assert writes
        assert shorten is None
        perplexity = factor * without.confirmation.perplexity
        first_loss, *others = before.measured.losses
        losses = [first_loss, *(factor * loss for loss in others)]
        tokens = without.confirmation.tokens
        rated = {"perplexity": perplexity, "tokens": tokens, "windows": 3, "losses": losses}
        return {**rated, "written": ["one", "two", "three"]}

    monkeypatch.setattr(confirmation, "_measure", measure)
    work = replace(confirming, calibration=confirming.text.windows)
    request = SearchRequest(pattern=Pattern.parse("0.5"), trials=10, finalists=1)
    before = searched(request, work)
    without = before.configuration
    asked = replace(request, steps=Steps(reconstruction=TRAINED))
    first, second = (searched(asked, work) for _ in range(2))
    found = first.configuration

    assert second.configuration == found
    assert [each.steps.reconstruction for each in measured] == [TRAINED]
    assert found.finalists == without.finalists
    alone = search_job(asked, Work.of(bundle)).configuration  # nothing says that it is worse
    assert alone.steps.reconstruction == TRAINED
    if factor < 1:
        assert found.steps == Steps(reconstruction=TRAINED)
        assert found.confirmation == without.confirmation.model_copy(
            update={
                "perplexity": factor * without.confirmation.perplexity,
                "before_reconstruction": without.confirmation.perplexity,
                "errors": found.confirmation.errors,
            }
        )
        assert 0 < found.confirmation.errors["before_reconstruction"] < 1
        assert [each.pruned for each in found.continuations] == ["one", "two", "three"]
    else:
        assert (found.steps, found.confirmation) == (without.steps, without.confirmation)
        assert found.continuations == without.continuations
        assert "The reconstruction was left out" in first.warnings[-1]


def test_the_only_one_is_trained_at_once(searched, studies, confirming, monkeypatch):
    """It is pruned once, measured as it is trained, and stays a finalist of a longer search."""
    passes = []

    def counting(prune):
        def pruned(model, statistics, candidate, *args, **options):
            passes.append(candidate.steps.reconstruction.passes * candidate.steps.needs_text)
            return prune(model, statistics, candidate, *args, **options)

        return pruned

    for module in (confirmation, rating):
        monkeypatch.setattr(module, "pruned_model", counting(module.pruned_model))
    work = replace(confirming, calibration=confirming.text.windows)
    request = SearchRequest(
        pattern=Pattern.parse("0.5"), trials=10, in_full=1,
        steps=Steps(update="obs", reconstruction=TRAINED),
    )  # fmt: skip
    first = searched(request, work)
    pruned = [*passes]
    winner, again = first.configuration, searched(request, work)
    alone, _ = rating.rate_pruned(
        work.model, work.bundle.statistics(), winner.candidate(), work.text.windows,
        calibration=work.calibration,
    )  # fmt: skip
    trial = optuna.load_study(study_name=first.study_name, storage=studies).trials[first.trial]
    longer = searched(replace(request, trials=20), work).configuration

    assert pruned == [0, 0, 3]  # Wanda and RIA, which it is judged by
    assert again.configuration == winner
    assert winner.steps.reconstruction == TRAINED
    assert first.measured.perplexity == winner.confirmation.perplexity == alone.perplexity
    assert trial.user_attrs["perplexity"] == alone.perplexity  # as dashboards and jobs list it
    assert winner.is_measured_as_trained
    assert winner.confirmation.before_reconstruction is None
    assert winner.finalists[0].trial == first.trial
    assert first.trial in [each.trial for each in longer.finalists if each.perplexity]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("passes", [3, 1])
def test_a_winner_that_takes_too_long_is_trained_less_from_there_on(
    searched, confirming, original, bundle, tmp_path, killed, passes
):
    """What is found says so, and whoever trains it from the start gets the same bits."""
    heard, interrupts = [], killed

    def trains_on(trained):
        heard.append(trained)
        return False

    @contextmanager
    def progress(*_):
        def advance(_count):
            if heard and interrupts:
                raise KeyboardInterrupt

        yield advance

    windows, how = confirming.text.windows, replace(TRAINED, passes=passes)
    work = replace(confirming, calibration=windows, cache_dir=tmp_path)
    request = SearchRequest(
        pattern=Pattern.parse("0.5"), trials=10, in_full=1,
        steps=Steps(update="obs", reconstruction=how),
    )  # fmt: skip
    run = progress_of.Run(trains_on=trains_on, progress=progress)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            searched(request, work, run=run)
    interrupts = False
    found = searched(request, work, run=run).configuration
    alone, _ = rating.rate_pruned(
        original, bundle.statistics(), found.candidate(), windows, calibration=windows
    )
    (asked, *others), blocks = heard, found.steps.reconstruction.blocks
    given = replace(request, steps=found.steps)
    again = searched(given, replace(work, cache_dir=None), storage=InMemoryStorage(), run=run)

    assert (asked.done, asked.blocks, asked.passes) == (1, 2, passes)
    assert asked.shorter == ((1,) if passes > 1 else (1, 1))
    assert [each.passes for each in others] == [1] * (killed and passes > 1)
    assert blocks == ((1, 1) if others else asked.shorter)
    assert found.steps.reconstruction == replace(how, blocks=blocks)
    assert found.confirmation.perplexity == alone.perplexity
    assert again.configuration.confirmation.perplexity == alone.perplexity
    assert again.configuration.steps == found.steps


def test_another_winner_of_a_longer_search_is_not_trained_less_for_the_first_one():
    def of(winner, passes):
        run = progress_of.Run(passes=lambda _: passes)
        return in_time.trained(winner, TRAINED, study, run).steps.reconstruction

    study = optuna.create_study()
    other = replace(CANDIDATE, coefficients=replace(CANDIDATE.coefficients, kernel_size=5))
    shorten = in_time.Shortening(
        CANDIDATE, study, progress_of.Run(trains_on=lambda _: False), blocks=2
    )
    first = of(CANDIDATE, 2)
    shorter = shorten(1, first)

    assert shorter == replace(first, blocks=(1,))
    assert of(CANDIDATE, 3) == shorter  # as the study keeps it
    assert of(other, 3) == replace(TRAINED, passes=3)


def test_the_cache_holds_the_blocks_of_the_last_three_searches(model, bundle, tmp_path):
    work = Work.of(bundle, model, calibration=torch.arange(64).view(2, 32))
    kept = []
    for number in range(5):
        pattern = Pattern.parse(f"0.{number + 1}")
        candidate = replace(CANDIDATE, pattern=pattern, steps=Steps(reconstruction=TRAINED))
        found = replace(work, cache_dir=tmp_path).blocks(candidate)
        found.folder.mkdir(parents=True)
        os.utime(found.folder, (number, number))
        kept.append(found.folder)

    assert sorted((tmp_path / "blocks").iterdir()) == sorted(kept[2:])
