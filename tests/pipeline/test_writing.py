"""What the dense and the pruned model write after prompts of the text of a confirmation."""

import time
from dataclasses import replace

import pytest
import torch

from pho_service.errors import InvalidInput, ModelError
from pho_service.pipeline import confirmation
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.pipeline.writing import texts_of, write, written_by
from pho_service.shown.page import render
from pho_service.shown.report import Report
from pho_service.shown.tables import continuations_table
from pho_service.spec.configuration import MOST_CHARACTERS, Continuation
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SearchRequest

REQUEST = SearchRequest(pattern=Pattern.parse("0.5"), trials=8, finalists=1)


def likeliest(model, prompt, count):
    """Each next token from all before it, without a cache."""
    tokens = prompt[None]
    with torch.inference_mode():
        for _ in range(count):
            following = model.model(tokens, use_cache=False).logits[:, -1].argmax(-1)
            tokens = torch.cat([tokens, following[None]], dim=1)
    return model.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.usefixtures("many_words")
def test_a_result_has_what_both_models_write_and_the_study_keeps_it(bundle, confirming, searched):
    model, windows = confirming.model, confirming.text.windows
    prompts = windows[:, : min(32, model.longest // 2)]
    count = min(40, model.longest - prompts.shape[1])
    found = searched(REQUEST, confirming).configuration
    dense = [likeliest(model, prompt, count) for prompt in prompts]
    with pruned_model(model, bundle.statistics(), found.candidate(), None):
        after = [likeliest(model, prompt, count) for prompt in prompts]
    model.model.generate = None  # whoever writes again fails
    again = searched(REQUEST, confirming).configuration

    assert [each.dense for each in found.continuations] == dense
    assert [each.pruned for each in found.continuations] == after
    assert again.continuations == found.continuations


def test_a_winner_that_takes_a_text_is_pruned_once(bundle, confirming, searched, monkeypatch):
    """It writes when it is measured, and pruned again it writes the same."""
    work = replace(confirming, calibration=confirming.text.windows)
    asked = replace(REQUEST, steps=Steps(statistics="sequential"))
    monkeypatch.setattr(confirmation, "pruned_model", None)  # whoever prunes to write fails
    found = searched(asked, work).configuration
    model, windows = confirming.model, confirming.text.windows
    with pruned_model(model, bundle.statistics(), found.candidate(), work.calibration):
        after = written_by(model, windows)["written"]

    assert [each.pruned for each in found.continuations] == after


def test_a_streamed_model_and_a_search_without_a_text_write_nothing_and_the_report_says_so(
    bundle, confirming, streamed
):
    alone = search_job(REQUEST, Work.of(bundle)).configuration
    read = search_job(REQUEST, replace(confirming, dense=streamed)).configuration

    assert alone.continuations == read.continuations == []
    assert "No sample output: that takes a confirmation text" in render(Report.of(read))


def test_a_prompt_that_is_empty_or_too_long_is_refused(model):
    with pytest.raises(InvalidInput, match="a prompt is empty"):
        write(model, [" "], 4)
    with pytest.raises(InvalidInput, match=r"tokens, which is .* reads"):
        write(model, ["word " * (model.longest or 0)], 4)


def test_nothing_in_a_text_is_markup():
    texts = Continuation(prompt="<b>|*a*", dense="`x`\n[y](z)", pruned="$1$")
    table = continuations_table([texts])

    assert r"| \<b\>\|\*a\* | \`x\` \[y\]\(z\) | \$1\$ |" in table.markdown()
    assert "&lt;b&gt;|*a*" in table.html()


class Decoder:
    """A tokenizer that makes a text of any tokens."""

    def __init__(self, text="", seconds=0.0):
        self.text, self.seconds = text, seconds

    def decode(self, row, **_):
        time.sleep(self.seconds)
        return self.text * len(row)


def test_a_text_has_no_more_characters_than_such_tokens_have(model, monkeypatch):
    tokens = torch.zeros(2, 40, dtype=torch.int64)
    (first, other) = texts_of(replace(model, tokenizer=Decoder("CC" * 10**4)), tokens)
    monkeypatch.setattr("pho_service.pipeline.writing.DECODED_S", 0.05)

    assert first == other == "C" * MOST_CHARACTERS
    with pytest.raises(ModelError, match=r"more than 0\.05 s to turn 80 tokens .*its decoder"):
        texts_of(replace(model, tokenizer=Decoder(seconds=0.5)), tokens)


def test_a_text_of_a_result_that_an_older_version_stored_is_cut_when_it_is_read():
    stored = {"prompt": "p", "dense": "d" * 10**6, "pruned": "c" * 2000, "recovered": None}
    read = Continuation.model_validate(stored)

    assert (read.dense, read.pruned) == ("d" * MOST_CHARACTERS, stored["pruned"])
