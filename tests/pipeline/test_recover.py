"""A recovery makes a pruned model better or leaves it alone, keeps zeros, and can be resumed."""

import json
import logging
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from pho_service.errors import (
    ChangedInput,
    InvalidInput,
    ModelError,
    NumericalError,
    OutOfMemory,
    OutputError,
    TextError,
    told_to,
)
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import given_model, load_model
from pho_service.models.mask_file import MASKS, groups_of
from pho_service.models.packed import pack
from pho_service.models.saving import read_recipe, save_pruned
from pho_service.models.texts import GivenWindows, RecoveryText, sample_windows
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.recover import (
    TRAINING,
    PrunedModel,
    check_recoverable,
    recover_model,
)
from pho_service.pipeline.work import Work
from pho_service.pipeline.workplace import Workplace
from pho_service.pipeline.writing import written_by
from pho_service.progress import Run
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.recovery import Recovering
from pho_service.shown.tables import recovered_table
from pho_service.spec.configuration import published
from pho_service.spec.job_options import argument, entry
from pho_service.spec.recovery import PASSES, Recovery

LENGTH = 32
SHALLOW = {"num_hidden_layers": 1}
SETTINGS = Recovery(tokens=24 * LENGTH, rate=2e-3)
HASTY = replace(SETTINGS, rate=0.1)
EACH_TRAIN = [
    "kept",
    *(pytest.param(name, marks=pytest.mark.thorough) for name in ("norms", "lora")),
]


@pytest.fixture
def text(texts):
    """What is trained on: other words than those of the calibration."""
    return RecoveryText(source=TextSource(path=str(texts["report"])), context_length=LENGTH)


@pytest.fixture
def pruned_folder(model_folder, bundle, tmp_path):
    def prune(pattern):
        folder = tmp_path / "pruned"
        dense = load_model(str(model_folder), device="cpu")
        prune_job(Work.of(bundle, dense), published("wanda", pattern), folder)
        return folder

    return prune


@pytest.fixture
def smaller_folder(model_folder, tmp_path):
    """The tiny model with other sizes, each weight cut at its end."""

    def cut(sizes):
        folder = tmp_path / "smaller"
        dense = load_model(str(model_folder), device="cpu")
        student = LlamaForCausalLM(LlamaConfig(**{**dense.model.config.to_dict(), **sizes}))
        state = dense.model.state_dict()
        for name, weight in student.state_dict().items():
            weight.copy_(state[name][tuple(map(slice, weight.shape))])
        student.save_pretrained(folder)
        dense.tokenizer.save_pretrained(folder)
        return folder

    return cut


@pytest.fixture
def recover(original, text, tmp_path):
    def recover(pruned, settings=SETTINGS, *, on=text, teacher=original, **watched):
        place, run = tmp_path / "workplace", Run(**watched)
        return recover_model(pruned, lambda: nullcontext(teacher), on, settings, place, run=run)

    return recover


def weights(model):
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("train", EACH_TRAIN)
def test_a_recovered_folder_passes_its_check(
    train, pruned_folder, recover, original, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pruned = PrunedModel.read(pruned_folder("2:4"), device="cpu")
    recovered = recover(pruned, replace(SETTINGS, train=train))
    assert "device" not in caplog.text  # of what transformers has to say
    after = pruned.after(recovered)
    save_pruned(pruned.model, tmp_path / "out", after.masks.items(), after.recipe)
    checks = check_folder(tmp_path / "out", original=original)

    assert recovered.kept
    assert recovered.after < recovered.before
    assert [check for check in checks if not check.passed] == []
    recipe = read_recipe(tmp_path / "out")
    assert recipe.recovery is not None
    assert recipe.updated is (train != "norms")
    assert "divergence from the dense model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("is_smaller", "bits", "rate"),
    [
        (False, 8, 2e-3),
        (True, 32, 2e-3),
        *(pytest.param(False, 32, rate, marks=pytest.mark.thorough) for rate in (2e-3, HASTY.rate)),
    ],
)
def test_the_same_tokens_give_the_same_bits_also_after_a_kill(
    is_smaller, bits, rate, pruned_folder, smaller_folder, recover, tmp_path, monkeypatch
):
    from bitsandbytes.optim.adam import Adam8bit  # here, as it takes seconds

    # It leaves smaller linears in 32 bits, and those of this model are.
    monkeypatch.setattr("bitsandbytes.optim.adam.Adam8bit", partial(Adam8bit, min_8bit_size=256))
    remembered = set()
    step = Adam8bit.step

    def noted(self, *given):
        step(self, *given)
        remembered.update(state["state1"].dtype for state in self.state.values())

    monkeypatch.setattr(Adam8bit, "step", noted)
    settings = replace(SETTINGS, adam_bits=bits, rate=rate)
    folder = smaller_folder(SHALLOW) if is_smaller else pruned_folder("0.5")
    whole = PrunedModel.read(folder, device="cpu")
    first = recover(whole, settings)
    Workplace(tmp_path / "workplace").remove()
    bars = []

    @contextmanager
    def killed(title, steps):
        del steps
        bars.append(title)
        if len(bars) == 5:
            raise KeyboardInterrupt
        yield lambda _: None

    cut = PrunedModel.read(folder, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        recover(cut, settings, progress=killed)
    resumed = PrunedModel.read(folder, device="cpu")
    second = recover(resumed, settings, progress=killed)

    assert remembered == ({torch.uint8} if bits == 8 else set())
    assert first.kept
    assert first.adam_bits == bits
    assert same(weights(whole.model), weights(resumed.model))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    assert len(bars) < 2 * 9  # what was done is not done again
    assert "divergence" in bars[-1]


def test_the_dense_model_is_asked_in_bfloat16_only_for_what_is_trained_on(
    pruned_folder, recover, monkeypatch
):
    """On a CPU that has units for it, as gradients are: what is held out decides, in float32."""
    asked = []

    def noted(model, windows, **more):
        asked.append((len(windows), torch.is_autocast_enabled("cpu")))
        return dense_reference(model, windows, **more)

    monkeypatch.setattr("pho_service.pipeline.lesson.dense_reference", noted)
    monkeypatch.setattr("pho_service.pruning.hardware.multiplies_halves", lambda: True)
    found = recover(PrunedModel.read(pruned_folder("0.5"), device="cpu"))

    assert asked == [(found.held_out, False), *[(1, True)] * (found.tokens // LENGTH)]
    assert found.kept


def test_a_text_that_is_too_short_comes_again_in_other_windows(pruned_folder, recover, monkeypatch):
    """The dense model says something new of each, and no more than four times as many come."""
    asked = []

    def noted(model, windows, **more):
        asked.append(windows)
        return dense_reference(model, windows, **more)

    monkeypatch.setattr("pho_service.pipeline.lesson.dense_reference", noted)
    settings = replace(SETTINGS, tokens=1000 * LENGTH)
    found = recover(PrunedModel.read(pruned_folder("0.5"), device="cpu"), settings)
    held_out, trained_on = asked[0], torch.cat(asked[1:])
    most = PASSES * found.windows

    assert most - 8 < len(trained_on) <= most  # as many between any two checks
    assert found.tokens == trained_on.numel()
    assert len(torch.cat([held_out, trained_on]).unique(dim=0)) == len(held_out) + len(trained_on)
    assert f"each of {found.windows} windows 3.8 times, in other cuts: more text" in str(found)


class GaveWay(Exception):
    """A recovery is put down."""


class Others:
    """Jobs that want the worker each so many times that somebody looks for them."""

    def __init__(self, *, every):
        self.every, self.looks, self.turns = every, 0, 0
        self.waiting = False

    def gives_way(self):
        self.looks += 1
        self.waiting = self.waiting or self.looks % self.every == 0
        return self.waiting

    def look(self):
        if self.waiting:
            self.waiting = False
            self.turns += 1
            raise GaveWay


@pytest.mark.parametrize(
    "settings",
    [
        replace(SETTINGS, written=10 * LENGTH),
        *(
            pytest.param(replace(SETTINGS, train=train, rate=rate), marks=pytest.mark.thorough)
            for train, rate in (("kept", HASTY.rate), ("norms", 2e-3), ("lora", 2e-3))
        ),
    ],
)
def test_a_recovery_that_gives_way_again_and_again_does_nothing_twice_and_ends_the_same(
    settings, pruned_folder, recover, read_report, text, original, tmp_path, monkeypatch
):
    """While the dense model is asked, while it writes, and at every few steps of the training."""
    folder, steps = pruned_folder("0.5"), []
    few = torch.arange(8 * LENGTH).remainder(251).view(8, LENGTH)
    source = GivenWindows(tokens=few) if settings.written else text.source
    on = replace(text, source=source, bos="never", measured=read_report(original, 4, LENGTH))
    monkeypatch.setattr("pho_service.pipeline.lesson.WRITTEN_AT_ONCE", 2 * LENGTH)
    backward = Recovering.backward
    monkeypatch.setattr(
        Recovering, "backward", lambda *given: steps.append(given[-1]) or backward(*given)
    )
    asked = Mock(wraps=dense_reference)
    monkeypatch.setattr("pho_service.pipeline.lesson.dense_reference", asked)
    whole = PrunedModel.read(folder, device="cpu")
    first = recover(whole, settings, on=on)
    Workplace(tmp_path / "workplace").remove()
    steps_at_once, asked_at_once = sorted(steps), asked.call_count
    steps.clear()
    asked.reset_mock()
    others, second = Others(every=7), None
    while second is None:
        resumed = PrunedModel.read(folder, device="cpu")
        with suppress(GaveWay):
            second = recover(resumed, settings, on=on, look=others.look, gives_way=others.gives_way)

    assert others.turns > 5
    assert sorted(steps) == steps_at_once
    assert asked.call_count == asked_at_once + others.turns  # what is held out, by each attempt
    assert same(weights(whole.model), weights(resumed.model))
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_a_text_that_is_swapped_while_a_recovery_waits_is_named_and_nothing_is_lost(
    pruned_folder, recover, text, texts, tmp_path
):
    file, folder = tmp_path / "text.jsonl", pruned_folder("0.5")
    shutil.copy(texts["report"], file)
    on = replace(text, source=TextSource(path=str(file)))
    others = Others(every=30)  # in the middle of the training
    with pytest.raises(GaveWay):
        recover(
            PrunedModel.read(folder, device="cpu"), on=on,
            look=others.look, gives_way=others.gives_way,
        )  # fmt: skip
    shutil.copy(texts["calibration"], file)

    with pytest.raises(
        ChangedInput, match=r"text\.jsonl has changed .* Put the text from before back"
    ):
        recover(PrunedModel.read(folder, device="cpu"), on=on)
    shutil.copy(texts["report"], file)
    assert recover(PrunedModel.read(folder, device="cpu"), on=on).kept


def test_a_disk_that_is_full_in_the_middle_is_named_with_the_way_out(
    pruned_folder, recover, monkeypatch, tmp_path
):
    """Whichever library writes: safetensors' error is not one of the system's, nor is torch's."""
    folder = pruned_folder("0.5")
    whole = PrunedModel.read(folder, device="cpu")
    recover(whole)
    Workplace(tmp_path / "workplace").remove()
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    for name, error in (
        ("pho_service.pipeline.recover.Trainer.save_model", SafetensorError(full)),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/1")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, Mock(side_effect=error))
            with pytest.raises(OutputError, match=r"workplace, .* cannot be written.*goes on from"):
                recover(PrunedModel.read(folder, device="cpu"))
    again = PrunedModel.read(folder, device="cpu")
    recover(again)

    assert same(weights(whole.model), weights(again.model))


def test_a_teacher_that_is_not_the_model_that_was_pruned_is_told(
    pruned_folder, recover, original, caplog
):
    folder = pruned_folder("0.5")
    recover(PrunedModel.read(folder, device="cpu"), replace(SETTINGS, tokens=LENGTH))
    told = caplog.text
    other = load_model(original.name, device="cpu")
    other.linears["model.layers.0.mlp.down_proj"].weight.mul_(1.5)
    other = given_model(other.model, other.tokenizer)
    recover(PrunedModel.read(folder, device="cpu"), replace(SETTINGS, tokens=LENGTH), teacher=other)

    assert "is not the dense model" not in told
    assert "is not the dense model that" in caplog.text


def test_after_a_check_that_is_worse_a_third_of_the_rate_goes_on_from_before(
    pruned_folder, recover
):
    bars = []

    @contextmanager
    def noted(title, steps):
        del steps
        bars.append(title)
        yield lambda _: None

    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    recovered = recover(pruned, HASTY, progress=noted)
    found = [float(title.split()[2].strip("(),")) for title in bars[1:]]  # after the first bar

    assert found[2] > found[0] < found[1]  # two checks are worse
    assert found[3:] == sorted(found[3:], reverse=True)
    assert recovered.kept
    assert recovered.tokens == HASTY.tokens
    assert recovered.after < 0.9 * recovered.before


def test_the_weights_of_the_best_check_are_taken(pruned_folder, recover, monkeypatch):
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    told = [0.9, 0.8, 0.3, 0.6, 0.5, 0.7, 0.6, 0.5, 0.4, 0.35]  # before, eight checks, after
    at = []

    def scripted(model, reference):
        del model, reference
        at.append(weights(pruned.model))
        return told[len(at) - 1]

    monkeypatch.setattr("pho_service.pipeline.lesson.rate_divergence", scripted)
    monkeypatch.setattr("pho_service.pipeline.recover.rate_divergence", scripted)
    recovered = recover(pruned)

    assert len(at) == len(told)
    assert recovered.tokens == SETTINGS.tokens  # no check was worse than before the training
    assert same(at[2], weights(pruned.model))
    assert not same(at[8], at[2])


def test_a_rate_that_breaks_the_model_is_taken_back(pruned_folder, recover):
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    before = weights(pruned.model)
    recovered = recover(pruned, replace(SETTINGS, rate=1.0))

    assert not recovered.kept
    assert recovered.tokens == 3 * HASTY.tokens // 8  # the third check that is worse ends it
    assert recovered.after == recovered.before
    assert same(before, weights(pruned.model))
    assert "the weights are those from before" in str(recovered)


def test_a_model_that_predicts_nothing_any_more_is_taken_back_too(
    pruned_folder, recover, monkeypatch
):
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    before = weights(pruned.model)
    measured = []

    def first_alone(model, reference):
        if measured:
            raise NumericalError("the loss is NaN or infinite")
        measured.append(rate_divergence(model, reference))
        return measured[0]

    monkeypatch.setattr("pho_service.pipeline.lesson.rate_divergence", first_alone)
    monkeypatch.setattr("pho_service.pipeline.recover.rate_divergence", first_alone)
    recovered = recover(pruned)

    assert not recovered.kept
    assert recovered.after == recovered.before == measured[0]
    assert same(before, weights(pruned.model))


@pytest.mark.usefixtures("many_words")
def test_perplexities_before_and_after_are_of_windows_that_are_not_trained_on(
    pruned_folder, recover, read_report, text
):
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    measured = read_report(pruned.model, 4, LENGTH)
    before = written_by(pruned.model, measured.windows)
    alone = recover(pruned, on=replace(text, unlike=measured.windows, measured=measured))
    after = written_by(pruned.model, measured.windows)

    assert alone.perplexities.keys() == {"dense", "pruned", "recovered"}
    assert alone.errors.keys() == {"pruned/dense", "recovered/dense", "recovered/pruned"}
    assert all(0 < error < 1 for error in alone.errors.values())
    table = recovered_table(alone)
    assert [*table.columns] == ["model", "perplexity", "against dense", "against pruned"]
    assert " ± " in table.rows[2][3]
    assert [each.pruned for each in alone.continuations] == before["written"]
    assert [each.recovered for each in alone.continuations] == after["written"] != before["written"]
    assert all(each.prompt and each.dense != each.pruned for each in alone.continuations)
    every = read_report(pruned.model, 1000, LENGTH)
    again = PrunedModel.of(pruned.model)
    with pytest.raises(TextError, match=r"too few windows of 32 tokens to recover on: [0-3], and"):
        recover(again, on=replace(text, unlike=every.windows))


@pytest.mark.usefixtures("many_words")
def test_what_a_calibration_has_seen_is_trained_on_where_there_is_little_else_never_held_out(
    pruned_folder, recover, original, monkeypatch
):
    tokens = torch.randint(original.vocabulary, (20, LENGTH))
    seen = tokens[8:]
    few = RecoveryText(source=GivenWindows(tokens=tokens), context_length=LENGTH, unlike=seen)
    folder, asking = pruned_folder("0.5"), Mock(wraps=dense_reference)
    monkeypatch.setattr("pho_service.pipeline.lesson.dense_reference", asking)

    def trained_on(tokens, text):
        asking.reset_mock()
        settings = replace(SETTINGS, tokens=tokens, seed=tokens)
        done = recover(PrunedModel.read(folder, device="cpu"), settings, on=text)
        held_out, *_ = (call.args[1] for call in asking.call_args_list)
        seen_windows = {tuple(window) for window in seen.tolist()}
        assert seen_windows.isdisjoint(map(tuple, held_out.tolist()))
        return done.windows, len(held_out)

    assert trained_on(24 * LENGTH, few) == (7, 1)
    assert trained_on(24 * LENGTH, replace(few, seen=seen)) == (18, 2)
    assert trained_on(4 * LENGTH, replace(few, seen=seen)) == (4, 1)  # others are enough


def test_a_text_that_repeats_itself_is_read_to_its_end_before_it_is_called_too_short(
    original, texts, tmp_path, monkeypatch
):
    read = texts["report"].read_text().splitlines()
    often, *others = (str(json.loads(line)["text"]) for line in read)
    lines = [json.dumps({"text": each}) for each in [*[often] * 400, " ".join(others)]]
    path = tmp_path / "often.jsonl"
    path.write_text("\n".join(lines))
    known = original.tokenize(" ".join([often] * 20))[: 2 * LENGTH].view(2, LENGTH)
    drawn = Mock(wraps=sample_windows)
    monkeypatch.setattr("pho_service.pipeline.lesson.sample_windows", drawn)
    text = RecoveryText(source=TextSource(path=str(path)), context_length=LENGTH, unlike=known)
    check_recoverable(original, [*original.linears], text, SETTINGS)

    assert drawn.call_count == 2


def test_a_model_that_was_pruned_elsewhere_has_its_masks_from_its_zeros(
    model_folder, recover, original, tmp_path
):
    elsewhere = load_model(str(model_folder), device="cpu")
    for name, linear in elsewhere.linears.items():
        if "mlp" in name:
            groups = linear.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    elsewhere.model.save_pretrained(tmp_path / "theirs")
    elsewhere.tokenizer.save_pretrained(tmp_path / "theirs")
    pruned = PrunedModel.read(tmp_path / "theirs", device="cpu")
    after = pruned.after(recover(pruned))
    save_pruned(pruned.model, tmp_path / "out", after.masks.items(), after.recipe)

    assert [c for c in check_folder(tmp_path / "out", original=original) if not c.passed] == []
    recipe = read_recipe(tmp_path / "out")
    assert recipe.configuration is None
    assert all("mlp" in name and each.group == 4 for name, each in recipe.layers.items())
    assert len(recipe.dense) == 8
    assert "By another tool" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("sizes", "train"),
    [
        (SHALLOW, "kept"),
        ({"intermediate_size": 48}, "kept"),
        (SHALLOW, "lora"),
        pytest.param(SHALLOW, "norms", marks=pytest.mark.thorough),
        pytest.param(
            {"num_attention_heads": 2, "num_key_value_heads": 1}, "kept", marks=pytest.mark.thorough
        ),
        pytest.param({"hidden_size": 16}, "kept", marks=pytest.mark.thorough),
    ],
)
def test_a_smaller_model_is_trained_whole_and_is_an_ordinary_folder(
    sizes, train, smaller_folder, recover, original, tmp_path
):
    out = tmp_path / "out"
    student = PrunedModel.read(smaller_folder(sizes), device="cpu")
    before = weights(student.model)
    recovered = recover(student, replace(SETTINGS, train=train))
    after = student.after(recovered)
    save_pruned(student.model, out, after.masks.items(), after.recipe)
    checks = {check.name: check for check in check_folder(out, original=original)}
    trained = weights(given_model(AutoModelForCausalLM.from_pretrained(out)))
    linears = {f"{name}.weight" for name in student.model.linears}
    moved = {name for name, weight in trained.items() if not torch.equal(weight, before[name])}
    recipe = read_recipe(out)
    card = (out / "README.md").read_text()

    assert recovered.kept
    assert recovered.after < recovered.before
    assert {name: w.shape for name, w in trained.items()} == {n: w.shape for n, w in before.items()}
    assert moved == (linears if train != "norms" else {n for n, w in before.items() if w.dim() < 2})
    assert all(trained[name].bool().all() for name in linears)
    assert [check for check in checks.values() if not check.passed] == []
    assert checks["original model"].detail.endswith("is the model that was the teacher")
    assert checks["zeros"].skipped
    assert checks["kept weights"].detail == (
        "not checked: a model smaller than its teacher has other weights"
    )
    assert not (out / MASKS).parent.exists()
    assert recipe.is_student
    assert recipe.dense.keys() == student.model.linears.keys()
    assert str(recovered.student) in card
    assert "divergence from the teacher" in card
    assert "sparse" not in card
    assert pack(out, tmp_path / "out.pho").after > 0


def test_a_smaller_model_that_was_recovered_can_be_again(smaller_folder, recover, tmp_path):
    out = tmp_path / "out"
    student = PrunedModel.read(smaller_folder(SHALLOW), device="cpu")
    first = recover(student)
    after = student.after(first)
    save_pruned(student.model, out, after.masks.items(), after.recipe)
    Workplace(tmp_path / "workplace").remove()
    again = PrunedModel.read(out, device="cpu")
    second = recover(again)

    assert second.before == pytest.approx(first.after)
    assert second.after < first.after
    assert second.student.model["name"] == str(out)
    assert again.after(second).recipe["layers"] == {}


def test_zeros_of_a_smaller_model_stay_and_all_its_linears_are_trained(
    smaller_folder, recover, original, tmp_path
):
    student = load_model(str(smaller_folder(SHALLOW)), device="cpu")
    up = student.linears["model.layers.0.mlp.up_proj"].weight
    up.masked_fill_(up.abs() < up.abs().median(), 0)
    zeros, before = up == 0, weights(student)
    pruned = PrunedModel.of(student)
    after = pruned.after(recover(pruned))
    save_pruned(student, tmp_path / "out", after.masks.items(), after.recipe)

    assert torch.equal(up == 0, zeros)
    assert {name for name, w in weights(student).items() if not torch.equal(w, before[name])} == {
        f"{name}.weight" for name in student.linears
    }
    assert [*read_recipe(tmp_path / "out").layers] == ["model.layers.0.mlp.up_proj"]
    assert [c for c in check_folder(tmp_path / "out", original=original) if not c.passed] == []


def test_what_pho_has_pruned_keeps_its_recipe_also_if_its_teacher_is_larger(
    pruned_folder, recover, original, tmp_path
):
    config = LlamaConfig(**{**original.model.config.to_dict(), "num_hidden_layers": 3})
    pruned = PrunedModel.read(pruned_folder("2:4"), device="cpu")
    recovered = recover(pruned, teacher=given_model(LlamaForCausalLM(config).eval()))
    after = pruned.after(recovered)
    save_pruned(pruned.model, tmp_path / "out", after.masks.items(), after.recipe)

    assert recovered.student.teacher_blocks == 3
    assert [c for c in check_folder(tmp_path / "out", original=original) if not c.passed] == []
    assert not read_recipe(tmp_path / "out").is_student
    assert "its teacher 44,256 in 3" in (tmp_path / "out" / "README.md").read_text()


def test_the_rate_is_that_given_or_grows_with_the_divergence():
    assert Recovery().first_rate(0.25) == pytest.approx(5e-4)
    assert Recovery().first_rate(7.0) == 2e-3
    assert Recovery(train="lora").first_rate(0.5) == pytest.approx(7.5e-4)
    assert Recovery(rate=1e-4).first_rate(0.25) == 1e-4


def test_groups_are_found_only_where_each_keeps_as_many():
    keep = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0]]).bool()
    odd = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1]]).bool()

    assert groups_of(keep) == (2, 4)
    assert groups_of(odd) == (None, None)


def test_a_time_is_turned_into_tokens_that_give_the_same_weights(pruned_folder, recover):
    folder = pruned_folder("0.5")
    timed, counted = (PrunedModel.read(folder, device="cpu") for _ in range(2))
    first = recover(timed, Recovery(minutes=0.03, rate=2e-3))
    tokens = first.planned or first.tokens  # which is said where the machine was busy
    second = recover(counted, Recovery(tokens=tokens, shortened=first.shortened, rate=2e-3))

    assert second.tokens == first.tokens
    assert same(weights(timed.model), weights(counted.model))


class Busy:
    """A clock that steps alone move: the later ones of a training far more."""

    def __init__(self, *, from_step):
        self.now, self.steps, self.slow = 0.0, 0, from_step

    def monotonic(self):
        return self.now

    def stepped(self, backward):
        def step(trained, *given):
            self.steps += 1
            self.now += 1.0 if self.steps < self.slow else 5.0
            return backward(trained, *given)

        return step


@pytest.fixture
def busy(monkeypatch):
    """A machine on which each step takes a second, and from some step on five."""

    def from_step(step):
        clock = Busy(from_step=step)
        monkeypatch.setattr("pho_service.pipeline.recover.time", clock)
        monkeypatch.setattr("pho_service.pipeline.lesson.time", clock)
        monkeypatch.setattr("pho_service.pipeline.pace.time", clock)
        monkeypatch.setattr(Recovering, "backward", clock.stepped(Recovering.backward))
        return clock

    return from_step


def test_a_recovery_that_takes_longer_than_planned_ends_in_its_time_and_can_be_repeated(
    pruned_folder, recover, busy
):
    folder = pruned_folder("0.5")
    timed, repeated, whole = (PrunedModel.read(folder, device="cpu") for _ in range(3))
    clock = busy(16)
    first = recover(timed, Recovery(minutes=1, rate=2e-3))
    took = clock.now
    again = Recovery(tokens=first.planned, shortened=first.shortened, rate=2e-3)
    second, all_of_it = (
        recover(model, settings)
        for model, settings in ((repeated, again), (whole, replace(again, shortened=())))
    )
    ((after, last),) = (map(int, words.split(":")) for words in first.shortened)

    assert 54 <= took <= 66
    assert first.tokens == second.tokens == last * LENGTH < first.planned == all_of_it.tokens
    assert 0 < after < last
    assert same(weights(timed.model), weights(repeated.model))
    assert not same(weights(timed.model), weights(whole.model))
    assert "tokens were planned, and it took longer" in str(first)
    assert type(first).from_dict(first.to_dict()) == first
    with pytest.raises(InvalidInput, match=r"shortened=8:9 repeats a recovery of so many tokens"):
        Recovery(shortened=("8:9",))


@pytest.mark.thorough
def test_a_shortened_recovery_that_is_killed_keeps_its_end_and_the_time_that_is_left(
    pruned_folder, recover, busy, tmp_path
):
    folder = pruned_folder("0.5")
    settings = Recovery(minutes=1, rate=2e-3)
    at_once, killed, resumed = (PrunedModel.read(folder, device="cpu") for _ in range(3))
    busy(16)
    whole = recover(at_once, settings)
    shutil.rmtree(tmp_path / "workplace")
    clock = busy(16)

    def look():
        if clock.steps >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(killed, settings, look=look)
    clock.slow = 0  # and so it goes on
    second = recover(resumed, settings)

    assert second.shortened[0] == whole.shortened[0]
    assert second.tokens <= whole.tokens
    assert clock.now <= 80


@pytest.fixture
def asked_slowly(busy, monkeypatch):
    """The clock of a machine on which the dense model, and each step, take a second a window."""
    clock = busy(10**6)

    def slowly(model, windows, *, advance=None, **how):
        def asked(count):
            if advance is not None and len(windows) == 1:  # of what is trained on
                clock.now += count
                advance(count)

        return dense_reference(model, windows, advance=asked, **how)

    monkeypatch.setattr("pho_service.pipeline.lesson.dense_reference", slowly)
    return clock


@pytest.mark.thorough
def test_waiting_takes_none_of_the_minutes_and_what_was_spent_before_does(
    pruned_folder, recover, asked_slowly, tmp_path
):
    folder, settings = pruned_folder("0.5"), Recovery(minutes=1, rate=2e-3)
    whole = recover(PrunedModel.read(folder, device="cpu"), settings)
    Workplace(tmp_path / "workplace").remove()
    before, others = asked_slowly.now, Others(every=10)
    with pytest.raises(GaveWay):
        recover(
            PrunedModel.read(folder, device="cpu"), settings,
            look=others.look, gives_way=others.gives_way,
        )  # fmt: skip
    asked_slowly.now += 1000
    resumed = recover(PrunedModel.read(folder, device="cpu"), settings)

    assert resumed.tokens == whole.tokens
    assert resumed.shortened == whole.shortened
    assert asked_slowly.now - before - 1000 <= 66


@pytest.mark.thorough
def test_a_dense_model_that_takes_too_long_is_asked_about_fewer_windows(
    pruned_folder, recover, asked_slowly
):
    folder = pruned_folder("0.5")
    timed, repeated = (PrunedModel.read(folder, device="cpu") for _ in range(2))
    first = recover(timed, Recovery(minutes=1, rate=2e-3))
    second = recover(repeated, Recovery(tokens=first.planned, shortened=first.shortened, rate=2e-3))

    assert first.shortened[0].startswith("0:")
    assert first.windows == second.windows
    assert first.tokens < first.planned
    assert asked_slowly.now < 2 * 66
    assert second.tokens == first.tokens
    assert same(weights(timed.model), weights(repeated.model))


def test_what_the_dense_model_writes_is_trained_on_too_and_written_once(
    pruned_folder, recover, text, tmp_path
):
    folder, few = pruned_folder("0.5"), torch.arange(8 * LENGTH).remainder(251).view(8, LENGTH)
    settings = replace(SETTINGS, written=10 * LENGTH)
    place = tmp_path / "workplace"
    bars = []

    @contextmanager
    def killed(title, steps):
        del steps
        bars.append(title)
        if title == "Asking the dense model" and bars.count(title) == 1:
            raise KeyboardInterrupt
        yield lambda _: None

    def run():
        pruned = PrunedModel.read(folder, device="cpu")
        on = replace(text, source=GivenWindows(tokens=few), bos="never")
        return recover(pruned, settings, on=on, progress=killed), weights(pruned.model)

    with pytest.raises(KeyboardInterrupt):
        run()
    first = run()
    written = load_file(place / "written.safetensors")["written"]
    Workplace(place).remove()
    second = run()

    assert bars.count("The dense model writes") == 2  # not again after the kill
    assert (first[0].windows, first[0].written, first[0].held_out) == (17, 10, 2)
    assert "more text" not in str(replace(first[0], tokens=17 * LENGTH))
    assert "(each of 17 windows 4 times, in other cuts: more text would do more)" in str(
        replace(first[0], tokens=PASSES * 17 * LENGTH)
    )
    assert replace(first[0], seconds=0) == replace(second[0], seconds=0)
    assert same(first[1], second[1])
    assert written.shape == (11, LENGTH)  # one of eight more is held out
    begins = {tuple(row) for row in few[:, : LENGTH // 8].tolist()}
    assert {tuple(row) for row in written[:, : LENGTH // 8].tolist()} < begins
    assert len({tuple(row) for row in written.tolist()}) == 11  # each goes on otherwise


def test_bad_input_is_named_before_anything_is_trained(
    pruned_folder, recover, original, text, tmp_path
):
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    thin = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=64, **sizes)
    config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, **sizes)
    wordy = LlamaForCausalLM(config).eval()
    there = original.model.config.to_dict()
    shallow = LlamaConfig(**{**there, **SHALLOW})
    short = LlamaConfig(**{**there, "num_hidden_layers": 3, "max_position_embeddings": 16})
    few = GivenWindows(tokens=torch.zeros(2, LENGTH, dtype=torch.int64))
    seven = GivenWindows(tokens=torch.arange(7 * LENGTH).remainder(251).view(7, LENGTH))

    with pytest.raises(ModelError, match=r"has no zeros in its 14 linears: it is not pruned"):
        recover(PrunedModel.of(original), teacher=original)
    for smaller, sizes in ((thin, "2 blocks, its teacher .* in 2"), (shallow, "2 .* in 1")):
        with pytest.raises(
            ModelError, match=rf"of another architecture .*not larger: .* parameters in {sizes}\."
        ):
            recover(pruned, teacher=given_model(LlamaForCausalLM(smaller).eval()))
    with pytest.raises(InvalidInput, match=r"context_length=32 is more than .* can read: 16"):
        recover(pruned, teacher=given_model(LlamaForCausalLM(short).eval()))
    with pytest.raises(ModelError, match=r"predicts exactly what .*Give the dense model"):
        recover(pruned, teacher=PrunedModel.read(tmp_path / "pruned", device="cpu").model)
    with pytest.raises(ModelError, match=r"another vocabulary .* Give the dense model"):
        recover(pruned, teacher=given_model(wordy))
    with pytest.raises(TextError, match=r"too few windows .*: 2, and 4 are the least, of which"):
        recover(pruned, on=replace(text, source=few))
    with pytest.raises(InvalidInput, match=r"minutes are too few: one window of 32 tokens takes"):
        recover(pruned, Recovery(minutes=1e-6, train="lora"))
    with pytest.raises(InvalidInput, match=r"both say how long to train"):
        Recovery(minutes=1, tokens=1)
    with pytest.raises(InvalidInput, match=r"written=64: .* none are given. Give tokens"):
        Recovery(written=64)
    streamed = load_model(original.name, device="cpu", stream=True)
    with pytest.raises(InvalidInput, match=r"is streamed, and would be read again for each token"):
        recover(
            pruned, replace(SETTINGS, written=64), teacher=streamed, on=replace(text, source=seven)
        )
    assert not (tmp_path / "workplace").exists()
    file = tmp_path / "pruned" / "config.json"
    how = {"quant_method": "gptq", "bits": 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": how}))
    with pytest.raises(ModelError, match=r"pruned has quantised weights \(gptq\)"):
        PrunedModel.read(tmp_path / "pruned", device="cpu")


def test_tied_weights_stay_tied_and_masked_or_are_refused(pruned_folder, recover, original):
    tied = []
    for given in (PrunedModel.read(pruned_folder("0.5"), device="cpu").model, original):
        first, second = (block.mlp for block in given.model.model.layers)
        second.down_proj.weight = first.down_proj.weight
        tied.append(given_model(given.model, given.tokenizer))
    pruned, teacher = tied
    zeros = pruned.linears["model.layers.1.mlp.down_proj"].weight == 0
    recovered = recover(PrunedModel.of(pruned), teacher=teacher)
    first, second = (block.mlp.down_proj.weight for block in pruned.model.model.layers)

    assert recovered.kept
    assert first is second
    assert torch.equal(second == 0, zeros)
    with pytest.raises(InvalidInput, match=r"0\.mlp\.down_proj\.weight and .*low-rank change"):
        recover(PrunedModel.of(pruned), replace(SETTINGS, train="lora"), teacher=teacher)


def test_memory_that_runs_out_is_told_with_the_ways_out_that_the_reader_has(
    pruned_folder, recover, monkeypatch
):
    monkeypatch.setattr(Recovering, "backward", Mock(side_effect=MemoryError))
    pruned = PrunedModel.read(pruned_folder("0.5"), device="cpu")
    for wording, less in (
        (argument, r"\(train='lora' or norms\).*\(adam_bits=8\)"),
        (entry, r'\(recovery\.train="lora" or norms\).*\(recovery\.adam_bits=8\)'),
    ):
        message = rf"of 32 tokens ran out of memory.*{less}"
        with told_to(wording), pytest.raises(OutOfMemory, match=message):
            recover(pruned)


def test_a_transposed_linear_is_trained_too(text, tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH)
    model = GPT2LMHeadModel(config).eval()
    dense = GPT2LMHeadModel(config).eval()
    dense.load_state_dict(model.state_dict())
    given = given_model(model)
    for linear in given.linears.values():
        linear.weight.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    zeros = {name: linear.weight == 0 for name, linear in given.linears.items()}
    tokens = torch.randint(40, (40, LENGTH), generator=torch.Generator().manual_seed(0))
    recovered = recover_model(
        PrunedModel.of(given),
        lambda: nullcontext(given_model(dense)),
        replace(text, source=GivenWindows(tokens=tokens), bos="never"),
        SETTINGS,
        tmp_path / "workplace",
    )

    assert recovered.kept
    assert all(torch.equal(linear.weight == 0, zeros[n]) for n, linear in given.linears.items())


@pytest.mark.parametrize("train", EACH_TRAIN)
def test_experts_that_lie_in_one_parameter(train, text, tmp_path):
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, initializer_range=0.2,
    )  # fmt: skip
    model, dense = (MixtralForCausalLM(config).eval() for _ in range(2))
    dense.load_state_dict(model.state_dict())
    given = given_model(model)
    experts = {name: each for name, each in given.linears.items() if ".experts." in name}
    for linear in experts.values():
        linear.weight.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
    before = {name: linear.weight.clone() for name, linear in given.linears.items()}
    tokens = torch.randint(40, (40, LENGTH), generator=torch.Generator().manual_seed(0))

    def recover(pruned):
        return recover_model(
            pruned,
            lambda: nullcontext(given_model(dense)),
            replace(text, source=GivenWindows(tokens=tokens), bos="never"),
            replace(SETTINGS, train=train),
            tmp_path / "workplace",
        )

    if train == "lora":
        with pytest.raises(
            InvalidInput, match=r"experts of a block in one parameter, .*experts\.0"
        ):
            recover(PrunedModel.of(given))
        return
    assert recover(PrunedModel.of(given)).kept
    for name, linear in given.linears.items():
        assert torch.equal(linear.weight == 0, before[name] == 0)
        trained = name in experts and train == "kept"
        assert torch.equal(linear.weight, before[name]) is not trained
    masks = PrunedModel.of(given).masks
    few = {name: mask for name, mask in masks.items() if "experts.0.up_proj" not in name}
    if train == "kept":
        with pytest.raises(InvalidInput, match=r"0\.up_proj of .* is not pruned.*Train norms"):
            recover(PrunedModel(model=given, masks=few, recipe=None))


def test_the_bar_of_a_training_counts_all_its_steps_from_check_to_check(recover, pruned_folder):
    bars = []

    @contextmanager
    def progress(title, steps):
        counts = []
        bars.append((title, steps, counts))
        yield counts.append

    recovered = recover(PrunedModel.read(pruned_folder("0.5"), device="cpu"), progress=progress)
    training = [(steps, counts) for title, steps, counts in bars if title.startswith(TRAINING)]

    steps = recovered.tokens // recovered.context_length
    assert len(training) > 1
    assert {total for total, _ in training} == {steps}
    done = 0
    for _, (before, *each) in training:
        assert before == done
        done += sum(each)
    assert done == steps
