"""What Python refuses: the value, the rule and the way out, with names of arguments."""

import copy
import pickle
from types import SimpleNamespace

import datasets
import optuna
import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pho_service as pho
from pho_service.errors import (
    BundleError,
    ConfigurationError,
    InvalidInput,
    ModelError,
    StudyError,
    TextError,
)

SOME = {"preset": "score", "trials": 12, "ignore": "*.o_proj"}


@pytest.fixture(scope="module")
def places(new_llama, shared_bundle, texts_of_all):
    """What the lines of the table are about; none of them changes it."""
    changed = new_llama()
    changed.model.layers[0].mlp.up_proj.weight.data += 1
    other = copy.deepcopy(shared_bundle)
    other.provenance["key"] = "another"
    foreign = optuna.create_study()
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    rated = optuna.create_study()
    rated.optimize(pho.objective(shared_bundle, "0.5", preset="score"), n_trials=2)
    found = pho.search(shared_bundle, "0.5", **SOME)
    of_other = pho.calibrate(
        new_llama(), shared_bundle.tokenizer, texts_of_all["report"], samples=4, context_length=32,
        kernel_sizes=(3, 5),
    )  # fmt: skip
    both = {"one": shared_bundle, "two": shared_bundle}
    small = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_layer=1, n_head=1, n_embd=16)).eval()
    return SimpleNamespace(
        model=new_llama(), changed=changed, small=small, of_other=of_other, other=other,
        bundle=shared_bundle, tokenizer=shared_bundle.tokenizer, foreign=foreign,
        report=shared_bundle.text.held_out,
        rated=rated, found=found, file=str(texts_of_all["calibration"]), folder=texts_of_all,
        mine=found.configuration.model_copy(update={"model": {"family": "gpt2"}}),
        over=pho.search(both, "0.5", preset="score", trials=12).study,
    )  # fmt: skip


def search(the, pattern="2:4", **options):
    pho.search(the.bundle, pattern, **{"trials": 20, **options})


def compare(the, pattern="0.5", model=None, **options):
    given = {"bundle": the.bundle, "report": the.report, **options}
    pho.compare(model or the.model, None, pattern, **given)


def rate(the, study, pattern="0.5", **options):
    study.optimize(pho.objective(the.bundle, pattern, preset="score", **options), n_trials=1)


def calibrate(the, texts, **settings):
    pho.calibrate(the.model, the.tokenizer, texts, **settings)


REFUSED = [
    (lambda p: search(p, space={"rows": 1}), InvalidInput, "space: 'rows' is not one of neighbou"),
    (lambda p: search(p, steps={"prune": 1}), InvalidInput, "steps: 'prune' is not one of linears"),
    (lambda p: search(p, preset="worst"), InvalidInput, "preset 'worst' is not one of"),
    (lambda p: search(p, sampler="best"), InvalidInput, "sampler 'best' is not one of"),
    (lambda p: search(p, confirm=["a"]), InvalidInput, "Give model="),
    (lambda p: search(p, warm_start=[p.found]), InvalidInput, "for 0.5 in scope layer"),
    (lambda p: search(p, study="study.db"), StudyError, "not a database URL"),
    (lambda p: search(p, "0.5", model=p.changed), BundleError, "of another model"),
    (lambda p: search(p, "0.5", targets=["*.fc1"]), InvalidInput,
     r"'\*\.fc1' matches none of the 14 linears"),
    (lambda p: search(p, "0.5", steps={"linears": {"ignore": ["*.o"]}}, targets="*.q_proj"),
     InvalidInput, "Give one of them"),
    (lambda p: search(p, "0.5", preset="score", study=p.found.study), StudyError,
     r"its linears are .*o_proj.*, and these are all"),
    (lambda p: search(p, study=p.found.study), StudyError, "pattern is 0.5, and this is 2:4"),
    (lambda p: search(p, pho.Pattern.parse("0.5", "row"), study=p.found.study), StudyError,
     "its scope is layer, and this is row"),
    (lambda p: pho.search(p.of_other, "0.5", **SOME, study=p.found.study), StudyError,
     "is of another bundle"),
    (lambda p: search(p, study=p.foreign), StudyError, "not made by PHO"),
    (lambda p: search(p, "0.5", objective="gini", study=optuna.create_study()), StudyError,
     "direction='maximize'"),
    (lambda p: search(p, "0.5", objective="perplexity"), InvalidInput,
     r"instead of a bundle, and confirm\."),
    (lambda p: pho.load_model(p.folder["tokenizer"], revision="main"), InvalidInput,
     "revision='main' is for hub ids"),
    (lambda p: compare(p, targets="*.q_proj", configurations={"found": p.found}),
     ConfigurationError, r"found prunes without \*\.o_proj.* of only"),
    (lambda p: compare(p, "2:4", configurations={"mine": p.found}), ConfigurationError,
     r"mine is for the pattern 0.5.*for 2:4"),
    (lambda p: compare(p, configurations={"mine": p.mine}), ConfigurationError,
     r"mine was found on gpt2.*family llama"),
    (lambda p: compare(p, bundle=None), InvalidInput, "nothing to calibrate on"),
    (lambda p: compare(p, configurations={"mine": p.found}, recovery={"tokens": 256}),
     InvalidInput, "trains on texts beyond the bundle's windows"),
    (lambda p: compare(p, pho.Pattern.parse("0.5"), scope="row"), InvalidInput,
     "scope 'row' is given beside a pattern"),
    (lambda p: compare(p, configurations={"mine": 0.5}), InvalidInput,
     "a float is given for a configuration"),
    (lambda p: compare(p, model=p.changed), BundleError, "bundle is of another model"),
    (lambda p: compare(p, bundle={}), InvalidInput, "bundle is a dict, not a bundle"),
    (lambda p: compare(p, bundle="no.safetensors"), BundleError, "does not exist"),
    (lambda p: pho.evaluate(nn.Linear(2, 2), None, p.report), InvalidInput,
     "a Linear, not a model"),
    (lambda p: pho.evaluate(3, None, p.report), InvalidInput, "an int|a int"),
    (lambda p: calibrate(p, ["the model"], context_length=64), TextError,
     "do not fill one window of 64"),
    (lambda p: calibrate(p, []), TextError, "a text in memory is empty"),
    (lambda p: calibrate(p, datasets.Dataset.from_dict({"words": ["a"]})), TextError,
     r"no column 'text', only words.*rename_column"),
    (lambda p: calibrate(p, datasets.Dataset.from_dict({"text": [1]})), TextError, "holds a int"),
    (lambda p: calibrate(p, 5), InvalidInput, "texts is an int, which is not a text"),
    (lambda p: calibrate(p, ["a b c"]), TextError, "the text in memory has "),
    (lambda p: calibrate(p, ["a"], samples="64"), InvalidInput,
     "samples='64' is not a whole number"),
    (lambda p: calibrate(p, [1, 2]), InvalidInput, "texts is a list, which is not a text"),
    (lambda p: calibrate(p, [("a.txt", 1), "b.txt"]), InvalidInput,
     "is not a pair of a text and its share"),
    (lambda p: pho.evaluate(p.model, p.tokenizer, [(p.file, 2), (["a"], 1)]), InvalidInput,
     "texts is a list, which is not a text"),
    (lambda p: calibrate(p, p.report[0]), InvalidInput, r"windows are \(windows, context_length\)"),
    (lambda p: calibrate(p, p.report[:, :4]), TextError, "at least one of 8"),
    (lambda p: calibrate(p, p.report, context_length=24), InvalidInput,
     "have 32 tokens each, but context_length=24"),
    (lambda p: calibrate(p, p.report, bos="always"), InvalidInput, "Put BOS into them"),
    (lambda p: pho.evaluate(p.small, p.tokenizer, ["a model prune study"], context_length=8),
     ModelError, "tokenizer is of another model"),
    (lambda p: pho.evaluate(p.small, None, p.report), TextError, r"not in 0..19.*another model"),
    (lambda p: pho.evaluate(p.model, "gpt2", p.report), InvalidInput,
     "tokenizer is a str, not a tokenizer"),
    (lambda p: pho.evaluate(p.model, None, ["a model"], context_length=8), InvalidInput,
     "but no tokenizer"),
    (lambda p: pho.evaluate(p.model, p.tokenizer, tasks="words", beside=p.model), InvalidInput,
     "no text is given"),
    (lambda p: pho.objective(p.bundle, "0.5", preset="score", objective="perplexity"),
     InvalidInput, "needs a model"),
    (lambda p: search(p, objective=lambda *_: None), InvalidInput, "gave None and not a number"),
    (lambda _: pho.bench("dense", runtime="llama.cpp", dtype="float16"), InvalidInput,
     r"^dtype='float16': llama\.cpp .* types='bf16', or measure in torch: runtime='torch'"),
    (lambda _: pho.serach, AttributeError, r"no attribute 'serach'\. Did you mean search\?"),
    (lambda p: rate(p, optuna.create_study(), objective="gini"), StudyError,
     "direction='maximize'"),
    (lambda p: rate(p, p.rated, "2:4"), StudyError, r"its pattern is 0.5, and this is 2:4"),
    (lambda p: rate(p, p.foreign), StudyError, "not made by PHO"),
    (lambda p: pho.configuration(p.rated, p.other), StudyError, "is of another bundle"),
    (lambda p: pho.configuration(p.foreign, p.bundle), StudyError, r"not made by pho\.objective"),
    (lambda p: pho.configuration(p.over, p.bundle), StudyError, "another bundle"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "message"), REFUSED, ids=[str(line) for line in range(len(REFUSED))]
)
def test_what_cannot_be_done_is_said_with_its_rule_and_a_study_stays(places, call, kind, message):
    study = places.found.study
    before = (study.user_attrs, len(study.trials))
    with pytest.raises(kind, match=message) as caught:
        call(places)

    assert "--" not in str(caught.value)  # an option is an argument here
    assert (study.user_attrs, len(study.trials)) == before


def test_a_function_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(pho.search)) is pho.search  # noqa: S301 - our own


def test_an_argument_that_is_not_known_is_refused_with_the_name_of_the_function():
    with pytest.raises(TypeError, match=r"^search\(\) .* 'n_trials'\. Did you mean trials\?$"):
        pho.search(None, "0.5", n_trials=3)
