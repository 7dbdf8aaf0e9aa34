"""The form that submits a job: its fields, what is wrong in them, and what stands beside."""

import html
import json
import re
import shlex
import uuid
from html.parser import HTMLParser

import click
import pytest
from transformers import LlamaConfig

import pho_service.client
from pho_service.api.new_job import MORE, Typed, form_fields, sections, typed_as, without_field
from pho_service.cli import main
from pho_service.cli.remote import job_document
from pho_service.cli.remote import submit as submit_verb
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import job_fields

TYPED = {"model": "org/name", "pattern": "0.5"}

# A document that says something in every field; all others are parts of such ones.
WHOLE = {
    "model": "./my model", "pattern": "0.6", "scope": "row", "preset": "crepe",
    "steps": {"allocation": {"method": "owl", "unit": "linear", "spread": 0.3,
                             "outlier_ratio": 4.0, "offsets": {"q_proj": -0.5}, "depth": [0.5]},
              "repruning": "dsnot", "update": "obs", "statistics": "sequential",
              "reconstruction": {"method": "block", "passes": 3, "learning_rate": 0.5, "seed": 9},
              "linears": {"targets": ["*.q_proj", "re:.*[kv]{1,2}_proj"], "ignore": ["a b"],
                          "sparsities": {"*.0.q_proj": 0.3, "re:.*=x": 0.5}}},
    "name": "mine", "labels": {"team": "a", "run": "1"}, "revision": "v1",
    "dtype": "bfloat16", "stream": True,
    "calibration": {"dataset": "org/texts", "data_file": "a/b.parquet", "split": "all",
                    "field": "body", "samples": 64, "context_length": 512, "fisher_samples": 8,
                    "rows_per_layer": 4, "projection_rows": 0, "kernel_sizes": [3, 7],
                    "bos": "never", "seed": 3, "mixed_precision": True, "memory_bytes": 10**9},
    "confirm": {"text": "a b.txt", "finalists": 2, "windows": 3},
    "validation": {"candidates": 9, "seed": 4},
    "objective": {"name": "perplexity", "weighting": "fisher"},
    "warm_start": {"count": 2},
    "sampler": "tpe", "trials": 50, "seed": 7, "islands": 2, "timeout_s": 60.0,
    "search_space": {"row_share": [0.25, 0.75], "activation_exponent": [1.0, 1.0],
                     "kernel_sizes": [3, 7], "allocations": ["uniform", "owl"]},
    "prune": True, "notify": "https://hooks.example/pho", "priority": -5,
    "max_failed_trials": 3, "max_attempts": 2,
}  # fmt: skip
DOCUMENTS = [
    TYPED,
    WHOLE,
    {**TYPED, "pattern": "2:4", "preset": "score", "steps": {"permutation": "score"}},
    {"model": "org/name", "patterns": ["0.5", "2:4"], "confirm": {"finalists": 5}},
    {"model": "org/name", "pattern": "0.5", "minutes": None},
    {"model": "org/name", "pattern": "0.5", "minutes": 7.5, "in_full": 1},
    {"model": "org/name", "target": {"perplexity_rise": 0.05, "step": 0.05}},
    {**TYPED, "more_models": ["org/b", "-c"], "objective": {"over": "worst"}},
    {**TYPED, "confirm": None},
    {**TYPED, "calibration": {"text": "it's.txt"}, "scope": "global", "validation": {}},
    {**TYPED, "pattern": "2:4", "steps": {"deployable": False,
                                          "linears": {"sparsities": {"*.x": "1:4"}}}},
    {**TYPED, "warm_start": {"found": [{"coefficients": {
        "row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
        "activation_exponent": 0.5}}]}},
]  # fmt: skip


class Filled(HTMLParser):
    """A form as sent: its values, the summaries that are unfolded, and attributes by id."""

    def __init__(self, text):
        super().__init__()
        self.values = {}
        self.opened = []
        self.at = {}
        self._select = self._textarea = ""
        self._details = False
        self._summary = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.at[given.get("id", "")] = given
        name = given.get("name", "")
        if tag == "details":
            self._details = "open" in given
        self._summary = tag == "summary"
        if tag == "select":
            self._select = name
        if tag == "textarea":
            self._textarea = name
        if tag == "option" and "selected" in given:
            self.values[self._select] = given.get("value", "")
        if tag == "input" and (given.get("type") != "checkbox" or "checked" in given):
            self.values[name] = given.get("value", "")
        self.values = {name: value for name, value in self.values.items() if value}

    def handle_data(self, data):
        if self._textarea:
            self.values[self._textarea] = data.strip("\n")
        elif self._summary and self._details:
            self.opened.append(data)

    def handle_endtag(self, tag):
        self._summary = False
        self._textarea = "" if tag == "textarea" else self._textarea


def words(text):
    shown = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(shown).split())


def told(answer, path):
    """What is said to be wrong beside a field."""
    found = re.search(rf'id="{re.escape(path)}-error">(.*?)</div>', answer.text, flags=re.DOTALL)
    assert found is not None, path
    return words(found[1])


def summary(answer):
    """The errors above the form, each with its field."""
    alert = re.search(r'role="alert".*?</div>', answer.text, flags=re.DOTALL)
    return [words(each) for each in re.findall(r"<li>(.*?)</li>", alert[0])] if alert else []


def send(client, path="/new", **typed):
    """Send the form as a browser does; the answer is not followed."""
    return client.post(path, data={**TYPED, **typed}, follow_redirects=False)


def document_of(client):
    return client.get("/v1/jobs").json()["jobs"][0]["spec"]


@pytest.fixture
def model(tmp_path, write_small):
    """A model that reads 128 tokens, of which only the headers are there; and a text."""
    folder = tmp_path / "small"
    write_small(folder)
    (folder / "merges.txt").touch()
    (tmp_path / "text.txt").write_text("text")
    return "small"


def test_each_field_of_a_job_is_once_in_the_form_or_named_beside_the_field_for_json():
    shown = [f.path for s in sections() for f in s.fields]
    all_of_a_job = {path for path, field in job_fields().items() if not field.is_part}

    assert len(shown) == len({*shown})
    assert {path for path in shown if not job_fields()[path].is_part} == all_of_a_job - {
        *without_field()
    }
    assert without_field() == ["warm_start/found"]
    assert len({form_fields()[path].label for path in shown}) == len(shown)
    assert all(form_fields()[path].hint for path in shown)


def test_choices_bounds_and_helps_are_those_of_the_document_five_fields_come_before_more(client):
    text = client.get("/new").text
    page = Filled(text)

    assert '<option value="hill-climb">' in text
    assert "Number of calibration windows. 1 to 100,000. By default 128." in words(text)
    assert page.at["calibration/samples"]["placeholder"] == "128"
    assert page.at["calibration/samples"]["inputmode"] == "numeric"
    assert page.opened == []
    assert {*page.values} == {"token"}
    assert "<option selected>cpu</option>" in text
    before, _, after = text.partition("<summary>More")
    assert [field.path for field in sections()[0].fields] == [
        "model", "pattern", "calibration/text", "preset", "minutes",
    ]  # fmt: skip
    assert len(re.findall(r"<(input(?! type=.(?:hidden|file))|select|textarea) ", before)) == 5
    assert "fetched with <code>pho pull</code>" in after
    assert "`" not in words(before + after)


def test_a_job_is_edited_as_it_is_without_its_defaults():
    for document in DOCUMENTS:
        spec = JobSpec.model_validate(document)
        typed = typed_as(spec.model_dump(mode="json"))
        again = Typed.of(typed)

        assert again.spec() == spec
        assert not again.errors
        assert (MORE in typed) == ("found" in str(document))
        assert len(typed) >= len(document)
        assert document is not TYPED or typed == TYPED


def test_the_page_that_edits_a_job_makes_it_again(client, submit):
    document = {**WHOLE, "model": "org/name", "notify": None}
    document["calibration"] = {**WHOLE["calibration"], "dataset": "org/texts"}  # type: ignore[dict-item]
    del document["confirm"]
    job = submit(**document)
    page = Filled(client.get("/new", params={"job": job["id"]}).text)
    answer = client.post("/new", data=page.values, follow_redirects=False)

    assert page.values["steps/linears/sparsities"] == "*.0.q_proj = 0.3\nre:.*=x = 0.5"
    assert page.values["search_space/row_share"] == "0.25, 0.75"
    assert {"Which linears", "Search space", "Name, queue and others"} <= {*page.opened}
    assert "As JSON" not in page.opened
    assert answer.status_code == 303
    assert document_of(client) == job["spec"]


def test_the_form_makes_the_job_that_post_v1_jobs_makes_of_it(client):
    answer = send(
        client,
        pattern=" 0.6 ",
        scope="global",
        trials="50",
        prune="on",
        timeout_s="60",
        more='{"islands": 2,\r\n"calibration": {"seed": 4}}',
        **{
            "calibration/dataset": "org/texts",
            "calibration/samples": "4",
            "calibration/kernel_sizes": "3; 5",
            "steps/linears/ignore": "*.q_proj\r\n\r\n*.k_proj",
            "steps/linears/sparsities": "*.v_proj = 0.3",
            "search_space/row_share": "0.5",
            "validation": "yes",
        },
    )
    job = client.get("/v1/jobs").json()["jobs"][0]
    document = {
        "model": "org/name", "pattern": "0.6", "scope": "global", "trials": 50, "prune": True,
        "timeout_s": 60, "islands": 2, "validation": {}, "search_space": {"row_share": [0.5, 0.5]},
        "calibration": {"dataset": "org/texts", "samples": 4, "kernel_sizes": [3, 5], "seed": 4},
        "steps": {"linears": {"ignore": ["*.q_proj", "*.k_proj"],
                              "sparsities": {"*.v_proj": 0.3}}},
    }  # fmt: skip

    assert answer.status_code == 303, summary(answer)
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["spec"] == JobSpec.model_validate(document).model_dump(mode="json")


def test_however_often_a_form_is_sent_it_makes_one_job(client):
    token = Filled(client.get("/new").text).values["token"]
    first, second = (send(client, token=token).headers["location"] for _ in range(2))
    other = send(client, token=token, trials="99")
    fresh = Filled(other.text).values["token"]
    last = send(client, token=fresh, trials="99")

    assert first == second
    assert "This form has made a job already, of other values." in summary(other)[0]
    assert fresh != token
    assert last.headers["location"] not in (first, second)
    assert len(client.get("/v1/jobs").json()["jobs"]) == 2
    tokens = ["short", "short", "x" * 300, "with space and more", "\x00" * 20]  # none of ours
    assert len({send(client, token=token).headers["location"] for token in tokens}) == 5


ERRORS = [
    ("model", "", "This is needed."),
    ("pattern", "", "Say how sparse the model is to be: give a pattern"),
    ("calibration/fisher_samples", "900", "“Fisher samples” must not be above samples"),
    ("trials", "many", "'many' should be a valid integer"),
    ("steps/linears/sparsities", "q_proj", "'q_proj' is not NAME = VALUE."),
    ("search_space/row_share", "0.9, 0.1", "0 <= low <= high <= 1 must hold"),
    ("notify", "https://hooks.example", "this service sends no webhooks"),
    (MORE, "{nonsense", "This is not JSON: Expecting property name"),
    (MORE, "[" * 20_000, "This cannot be read as JSON."),
    (MORE, '{"nonsense": 1}', "/nonsense: Unknown field; known are model,"),
    (MORE, '{"model": "b"}', "/model: is given above, too."),
    (MORE, '{"timeout_s": NaN}', "/timeout_s: Nan should be a finite number"),
]


def test_errors(client):
    """What is wrong is said beside its field and above the form; what was typed is kept."""
    for field, value, said in ERRORS:
        answer = send(client, **{"max_attempts": "7", field: value})
        page = Filled(answer.text)
        attributes = page.at[field]

        assert answer.status_code == 422
        assert said in told(answer, field)
        assert attributes["aria-invalid"] == "true"
        assert attributes["aria-describedby"] == f"{field}-hint {field}-error"
        assert f'<a href="#{field}">' in answer.text
        assert page.values.get(field, "") == value.strip()
        assert page.values["max_attempts"] == "7"
        assert "<title>Error: New job" in answer.text
        assert len(summary(answer)) == answer.text.count("aria-invalid=") == 1
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_nothing_that_is_wrong_hides_what_else_is(client):
    answer = send(
        client,
        model="/etc/model",
        more="{",
        trials="x",
        **{
            "calibration/text": "/etc/a.txt",
            "confirm/text": "/etc/b.txt",
            "steps/linears/sparsities": "q",
            "search_space/row_share": "2",
        },
    )
    fields = [each.partition(" : ")[0].rstrip(":") for each in summary(answer)]

    assert [each.partition(":")[0].strip() for each in fields] == [
        "Model", "Text file", "Linears with a sparsity of their own", "Trials",
        "Search space row share", "Confirm text", "As JSON",
    ]  # fmt: skip
    assert {"Which linears", "Search space", "As JSON"} <= {*Filled(answer.text).opened}
    half_off = send(client, confirm="no", **{"confirm/windows": "4"})
    off = send(client, confirm="no")  # a part that is switched off has no fields
    assert "'Confirm by perplexity' says no." in told(half_off, "confirm/windows")
    assert off.status_code == 303
    assert document_of(client)["confirm"] is None


def test_what_was_typed_comes_back_as_text_what_no_page_can_show_is_refused(client):
    typed = '\n"></textarea><script>alert(1)</script>\U0001f600'
    answer = send(client, model=typed.strip(), more=typed)
    half = send(client, more='{"name": "\\ud800", "\\ud800": 1}')

    assert answer.text.count("<script") == 1
    assert f">\n{typed}</textarea>" in html.unescape(answer.text)
    assert half.status_code == 422
    assert summary(half)


def test_windows_are_as_long_as_the_model_reads(client, model):
    shown = send(client, "/new/check", model=model)
    made = send(client, model=model)
    stored = document_of(client)
    long = send(client, model=model, **{"calibration/context_length": "2048"})

    assert Filled(shown.text).at["calibration/context_length"]["placeholder"] == "128"
    assert "The model reads 128, so that is taken." in words(shown.text)
    assert made.status_code == 303
    assert stored["calibration"]["context_length"] == 128
    assert told(long, "calibration/context_length") == (
        f"2048 is more than {model} can read: 128. Give 128 or less."
    )


def test_of_a_model_on_the_hub_this_machines_cache_tells_it_and_nobody_is_asked(
    client, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text('{"n_positions": 64}')
    document = {"model": "org/unknown", "pattern": "0.5", "calibration": {"context_length": 65}}
    answers = [
        client.post("/v1/jobs", json={**document, **changes})
        for changes in (
            {"more_models": ["org/cached"]}, {},
            {"model": "org/cached", "revision": "../../refs/main"},
        )
    ]  # fmt: skip
    (error,) = answers[0].json()["errors"]

    assert [answer.status_code for answer in answers] == [422, 202, 202]
    assert error["pointer"] == "/calibration/context_length"
    assert "65 is more than org/cached can read: 64." in error["detail"]


def test_models_and_texts_of_the_roots_can_be_picked_what_may_not_be_there_is_said(client, model):
    text = client.get("/new").text
    page = Filled(text)
    lists = dict(re.findall(r'<datalist id="pick-(\w+)">(.*?)</datalist>', text))

    assert f'<option value="{model}">' in lists["models"]
    assert '<option value="text.txt">' in lists["texts"]
    assert "merges.txt" not in text
    assert page.at["model"]["list"] == "pick-models"
    assert page.at["calibration/text"]["list"] == page.at["confirm/text"]["list"] == "pick-texts"
    typo = f"{model[:-1]}x"
    quiet = words(send(client, "/new/check", model=typo, quiet="on").text)
    assert f"{typo} is not a folder here, but taken for the hub's. Did you mean {model}?" in quiet
    assert "The Hugging Face hub cannot be reached from this service" in quiet


def test_a_plan_is_shown_and_nothing_stored_what_does_not_fit_says_why(
    client, model, tmp_path, write_header
):
    answer = send(client, "/new/check", model=model, card="4090")
    shown = words(answer.text)
    write_header(tmp_path / "large", LlamaConfig(dtype="float32", max_position_embeddings=4096))
    large = words(send(client, "/new/check", model="large", card="4090").text)

    assert answer.status_code == 200
    assert re.search(r"\d+ to \d+ s on 4090, by its data sheet. It fits.", shown)
    assert "search, 200 trials" in shown
    assert "119 thousand parameters (llama)" in shown
    assert "<option selected>4090</option>" in answer.text
    assert client.get("/v1/jobs").json()["jobs"] == []
    assert "It does not fit." in large
    assert "leave the weights on disk (Stream, for safetensors)" in large
    assert "--stream" not in large.partition("The same without this form")[0]


def test_check(client, tmp_path, monkeypatch):
    """The button tells all and asks the hub; a script that asks quietly does neither."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "odd"}')
    odd = words(send(client, "/new/check", model="odd").text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    typing = words(send(client, "/new/check", quiet="on").text)
    away = words(send(client, "/new/check").text)
    asked = send(client, "/new/check", trials="x")
    quiet = send(client, "/new/check", trials="x", quiet="on")

    assert (asked.status_code, quiet.status_code) == (422, 200)
    assert "'x' should be a valid integer" in told(asked, "trials")
    assert summary(quiet) == []
    assert "aria-invalid=" not in quiet.text
    assert "Once a model and a pattern are given" in words(quiet.text)
    assert "“Check and plan” reads the configuration of the model" in typing
    assert "No plan can be made. org/name is not a folder here, and the Hugging Face hub" in away
    assert "No plan can be made. odd has neither model.safetensors nor" in odd
    assert send(client, model="odd").status_code == 303  # without a plan it can be submitted


def commands(client, typed, **options):
    """What is shown beside the form, by its title."""
    answer = client.post("/new/check", data={**typed, "quiet": "on"}, **options)
    found = re.findall(r'aria-label="([^"]*)"><code>(.*?)</code></pre>', answer.text, re.DOTALL)
    return {title: html.unescape(text) for title, text in found}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_curl_pho_submit_and_python_send_the_document_of_the_form_without_its_defaults(
    client, tmp_path, monkeypatch, document
):
    texts = ("it's.txt", "a b.txt")
    for text in texts:
        (tmp_path / text).touch()
    for model in ("my model", "-c"):
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / model / "config.json").write_text("{}")
    document = {name: value for name, value in document.items() if name != "notify"}
    if document.get("more_models"):
        document["more_models"] = ["org/b", "./-c"]
    spec = JobSpec.model_validate(document)
    found = commands(client, typed_as(spec.model_dump(mode="json")))
    curl = shlex.split(found["curl"].replace("\\\n", ""))
    sent = curl[curl.index("-d") + 1]

    assert curl[:3] == ["curl", "-sS", "http://127.0.0.1:8000/v1/jobs"]
    assert JobSpec.model_validate_json(sent) == spec
    assert len(json.loads(sent)) <= len(document)
    assert _submitted(found["pho submit"]) == spec
    assert _run(found["Python"], monkeypatch) == spec


def _submitted(command):
    """What `pho submit` sends, which reads its words as a shell and click give them."""
    line, _, more = command.partition(" --job - <<'END'\n")
    if more:
        document, _, end = more.rpartition("\n")
        assert end == "END"
        assert shlex.split(line) == ["pho", "submit", "--url", "http://127.0.0.1:8000"]
        return JobSpec.model_validate_json(document)
    program, verb, *rest = shlex.split(line)
    assert (program, verb) == ("pho", "submit")
    parent = click.Context(main, **main.context_settings)  # click remembers what it is given first
    asked = submit_verb.make_context("submit", rest, parent=parent).params
    assert asked["url"] == "http://127.0.0.1:8000"
    assert not asked["ask"].said  # no --job
    return JobSpec.model_validate(job_document(asked["models"], None, asked["given"]))


def _run(program, monkeypatch):
    """What a program submits by the client, which sends it nowhere."""
    sent = []

    def submit(self, spec):
        sent.append((self.url, spec))
        return type("Job", (), {"id": "an id"})

    monkeypatch.setattr(pho_service.client.Client, "submit", submit)
    exec(program, {})  # noqa: S102 - what the page shows
    ((url, document),) = sent
    assert url == "http://127.0.0.1:8000"
    return JobSpec.model_validate(document)


def test_the_key_comes_from_the_environment(client, keys):
    key, secret = keys.create("k", sees_all=False)
    found = commands(client, TYPED, headers={"Authorization": f"Bearer {secret}"})

    assert '"Authorization: Bearer $PHO_API_KEY"' in found["curl"]
    assert not [text for text in found.values() if secret in text or key.prefix in text]


def test_the_plan_is_for_the_card_of_a_worker_that_is_connected(client, hand):
    def card():
        return re.findall(r"<option selected>(.*?)</option>", client.get("/new").text)[0]

    before = card()
    for device in ("cpu", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"):
        hand.store.enter_worker(uuid.uuid4(), name=device, device=device, kinds=[])

    assert (before, card()) == ("cpu", "L40S")


def test_the_plan_has_what_is_done_with_the_pruned_model_only_if_one_is_written(client, model):
    plain, pruned = (
        client.post("/new/check", data={"model": model, "pattern": "0.5", **more}).text
        for more in ({}, {"prune": "on"})
    )

    for title in ("prune", "save"):
        row = f'<th scope="row">{title}</th>'
        assert (row in plain, row in pruned) == (False, True)


def test_a_check_says_all_that_is_wrong_a_name_that_is_nearly_known_too(client, model):
    answer = client.post("/new/check", data={"model": "smal", "pattern": "half"})
    page = words(answer.text)

    assert answer.status_code == 422
    assert "The job cannot be submitted yet" in page
    assert "was not submitted" not in page
    assert "Pattern 'half' is neither" in page
    assert "Did you mean small?" in page
    assert "org/model" not in page
    assert f"Found here: {model}" in page


def test_a_text_is_uploaded_beside_each_field_that_takes_one(client):
    page = client.get("/new").text
    texts = [path for path, field in form_fields().items() if field.shown.picks == "texts"]

    assert re.findall(r'data-upload="(.*?)" hidden', page) != []
    assert {*re.findall(r'data-upload="(.*?)" hidden', page)} == {*texts}
    assert "at most 64.0 MiB" in words(page)
