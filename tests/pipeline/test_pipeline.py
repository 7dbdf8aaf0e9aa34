"""A candidate applied to a model, block by block where its steps need it."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from pho_service.errors import InvalidInput, OutputError
from pho_service.models.loading import load_model
from pho_service.pipeline.pipeline import prune_model, pruned_model
from pho_service.pipeline.rating import rate_pruned
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.statistics import gather
from pho_service.pruning.weight_update import inverse_factor, obs_update
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps

CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)
OBS = Candidate(
    method="crepe", coefficients=CREPE, pattern=Pattern.parse("0.5"), steps=Steps(update="obs")
)


@pytest.fixture
def calibration(report):
    return report.windows


def gram_at(model, name, windows):
    """E[x x^T] at the input of a linear, by running the whole model."""
    seen = []
    module = model.linears[name].module
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for window in windows:
            model.model(input_ids=window[None], use_cache=False)
    handle.remove()
    tokens = torch.cat(seen).double()
    return (tokens.T @ tokens / len(tokens)).float()


def test_block_by_block(model, bundle, calibration):
    """A block's weights are updated for the inputs that the pruned blocks before it give."""
    statistics = bundle.statistics()
    masks = {n: m.keep for n, m in linear_masks(model.linears, statistics, OBS)}
    dense = {name: linear.weight.clone() for name, linear in model.linears.items()}
    prune_model(model, statistics, OBS, calibration)
    updated = {name: linear.weight.clone() for name, linear in model.linears.items()}
    name = "model.layers.1.self_attn.q_proj"
    for other, linear in model.linears.items():
        if other.startswith("model.layers.1"):
            linear.weight.copy_(dense[other])
    factor = inverse_factor(gram_at(model, name, calibration), layer=name)
    expected = obs_update(dense[name], masks[name], factor)

    torch.testing.assert_close(updated[name], expected, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(updated[n] == 0, ~masks[n]) for n in masks)


def test_wanda_with_sequential_statistics_is_the_published_loop_norms_then_masks_block_by_block(
    model, bundle, calibration
):
    wanda = replace(
        OBS,
        coefficients=Coefficients(
            row=1, column=0, neighbourhood=0, activation_exponent=1, normalisation="none"
        ),
        pattern=Pattern.parse("0.5", "row"),
        steps=Steps(statistics="sequential"),
    )
    dense = {name: linear.weight.clone() for name, linear in model.linears.items()}
    one_shot = {n: m.keep for n, m in linear_masks(model.linears, bundle.statistics(), wanda)}
    prune_model(model, bundle.statistics(), wanda, calibration)
    ours = {name: linear.weight == 0 for name, linear in model.linears.items()}
    for name, weight in dense.items():
        model.linears[name].weight.copy_(weight)
    expected = {}
    for block in ("model.layers.0.", "model.layers.1."):
        for name in [n for n in dense if n.startswith(block)]:
            squares = gram_at(model, name, calibration).diagonal()
            score = dense[name].double().abs() * squares.double().sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            expected[name] = torch.zeros_like(score, dtype=torch.bool).scatter(1, lowest, True)
        for name in [n for n in dense if n.startswith(block)]:
            model.linears[name].weight.masked_fill_(expected[name], 0)

    assert list(expected) == list(ours)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert any(not torch.equal(~one_shot[name], ours[name]) for name in ours)


STEPS = [
    ("0.5", Steps(statistics="sequential")),
    ("2:4", Steps(statistics="sequential", permutation="score")),
    ("0.5", Steps(allocation=Allocation(method="fisher", spread=0.3))),
    ("0.5", Steps(allocation=Allocation(method="owl", unit="block"), update="obs")),
    ("0.5", Steps(allocation=Allocation(method="curves"), repruning="dsnot")),
    ("0.5", Steps(update="sparsegpt")),
    ("2:4", Steps(permutation="score")),
    ("2:4", Steps(permutation="score", repruning="swaps", update="obs")),
    ("2:4", Steps(allocation=Allocation(method="fisher", spread=0.25), permutation="score")),
]


@pytest.mark.parametrize(("pattern", "steps"), STEPS)
def test_every_pipeline_removes_the_patterns_share_of_the_model_and_gives_it_back_dense(
    model, bundle, calibration, pattern, steps
):
    candidate = replace(OBS, pattern=Pattern.parse(pattern), steps=steps)
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    statistics = bundle.statistics()
    _, sparsity = rate_pruned(
        model, statistics, candidate, calibration[:1], calibration=calibration
    )

    exact = steps.allocation.method == "uniform" or not candidate.pattern.group
    assert sparsity == pytest.approx(0.5, abs=1e-4 if exact else 0.05)
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())
    if steps.update != "none":
        with pytest.raises(
            InvalidInput, match=rf"'{steps.update}' .* calibration text.* Give text"
        ):
            prune_model(model, statistics, candidate, None)
    # the call alone prunes the model in place, and says by how much: nothing has to be iterated
    shares = prune_model(model, statistics, candidate, calibration)
    zeros = {name: float((each.weight == 0).float().mean()) for name, each in model.linears.items()}
    assert shares == pytest.approx(zeros)


def test_what_fails_half_way_leaves_no_pruned_weights_behind(model, bundle, calibration):
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}

    def stop(_):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        pruned_model(model, bundle.statistics(), OBS, calibration, stop),
    ):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())


def test_parallel_blocks(model_folder, report, tmp_path):
    """Where attention and MLP read one input, all of its readers share one channel order."""
    config = PhiConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    for file in model_folder.glob("token*"):
        shutil.copy(file, tmp_path / "phi")
    model = load_model(str(tmp_path / "phi"), device="cpu")
    windows = report.windows % 256
    statistics = gather(
        model.model, model.linears, windows, fisher_windows=2, projection_rows=0, seed=0
    ).statistics(windows)
    steps = Steps(permutation="score", repruning="swaps", update="least-squares")
    candidate = replace(OBS, pattern=Pattern.parse("2:4"), steps=steps)
    orders = {}

    def kept(name, mask):
        orders[name] = mask.order
        assert mask.order is not None
        assert bool((mask.keep[:, mask.order].reshape(-1, 4).sum(dim=1) == 2).all()), name
        assert torch.equal(model.linears[name].weight != 0, mask.keep), name

    prune_model(model, statistics, candidate, windows, kept=kept)
    first = "model.layers.0"
    assert torch.equal(orders[f"{first}.self_attn.q_proj"], orders[f"{first}.mlp.fc1"])


SCORED = [
    ("0.5", Steps()),
    ("0.5", Steps(allocation=Allocation(method="fisher", spread=0.3))),
    ("2:4", Steps(permutation="score")),
    ("0.5", Steps(linears=Linears(ignore=("*.o_proj",), sparsities={"*.down_proj": 0.25}))),
]


@pytest.mark.parametrize(("pattern", "steps"), SCORED)
def test_streamed_and_without_text_steps_a_candidate_runs_the_report_once_and_writes_nothing(
    streamed, model, bundle, report, own_cache, pattern, steps
):
    candidate = replace(OBS, pattern=Pattern.parse(pattern), steps=steps)
    expected, share = rate_pruned(model, bundle.statistics(), candidate, report.windows)
    before = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    runs = []
    for name, linear in streamed.linears.items():
        if name.endswith("q_proj"):
            linear.module.register_forward_hook(lambda *_, name=name: runs.append(name))
    advanced = []
    actual, sparsity = rate_pruned(
        streamed, bundle.statistics(), candidate, report.windows, advanced.append
    )

    assert actual.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert sparsity == share
    assert {name: p.data_ptr() for name, p in streamed.model.named_parameters()} == before
    assert sum(advanced) == len(report.windows)
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert runs == [first] + [first] * 3 + [last] * 3  # one more to see the form of its output
    assert not own_cache.exists()


def test_a_streamed_model_is_pruned_for_good_without_a_text_its_weights_are_in_the_users_cache(
    streamed, model, bundle, own_cache
):
    candidate = replace(OBS, steps=Steps())
    masks = {}
    for each in (model, streamed):
        masks[each.stream] = dict(prune_model(each, bundle.statistics(), candidate, None))

    assert masks[True].keys() == masks[False].keys()
    for name, parameter in model.model.named_parameters():
        assert torch.equal(streamed.model.get_parameter(name), parameter)
    assert not any(p.untyped_storage().resizable() for p in streamed.model.parameters())
    assert (own_cache / "scratch").is_dir()
    assert not list((own_cache / "scratch").iterdir())  # the files have no name


def test_a_disk_without_room_for_the_changed_weights_is_refused_before_anything_is_run(
    streamed, bundle, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=70_000))

    with pytest.raises(OutputError, match=r"room for 68.4 KiB, but 72.0 KiB.*PHO_CACHE_DIR"):
        prune_model(streamed, bundle.statistics(), replace(OBS, steps=Steps()), None)
