"""Options made from the fields of a job's document, and the document made from them."""

import inspect
import shlex

import click
import pytest
from click.testing import CliRunner

import pho_service as pho
from pho_service.cli import main
from pho_service.cli.document import TITLES, WHOLE_HELP, DocumentCommand, Given
from pho_service.errors import InvalidInput
from pho_service.spec.document import parse_bytes, sentences_of
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import (
    SECTIONS,
    document_fields,
    job_fields,
    search_command,
    submit_command,
)
from pho_service.spec.objective import SearchOptions
from pho_service.spec.recovery import Recovery
from pho_service.spec.verbs import BenchSettings, CompareAsk, EvaluateAsk, LlamaAsk, Where

MINE = {"model": "org/a", "pattern": "0.5"}
PARENT = click.Context(main, **main.context_settings)


def command(verb):
    """A verb that has such options."""
    found = main.get_command(PARENT, verb)
    assert isinstance(found, DocumentCommand)
    return found


def given(verb, *words):
    """What a verb is given by these words; nothing is run."""
    context = command(verb).make_context(verb, [*words], parent=PARENT)
    found = context.params["given"]
    assert isinstance(found, Given)
    return found


def shown(verb):
    """What --help says of each field's option, by the field."""
    fields = command(verb).fields
    made = [row for row in command(verb)._options.values() if row[0] in fields]
    again = command(verb)._again  # fields that an option is about when it is given again
    return {
        field.path: {
            "names": option.opts,
            "type": option.type.to_info_dict(),
            "multiple": option.multiple,
            "help": option.help,
            "section": field.shown.section,
        }
        for own, option in made
        for field in [own, *filter(None, [again.get(str(option.name))])]
    }


def leaves(document, above=""):
    """The paths of all values; bounds are one, and so are points to begin with."""
    found = set()
    for name, value in document.items():
        path = f"{above}{name}"
        whole = path in ("search_space", "steps/allocation/offsets", "labels")
        deeper = isinstance(value, dict) and value and not whole
        found |= leaves(value, f"{path}/") if deeper else {path}
    return found


def test_each_field_of_a_jobs_document_has_an_option_but_for_the_models():
    parts = {
        "calibration": {
            "dataset": "org/texts", "dataset_config": "en", "more_texts": ["b.txt"],
            "shares": [3, 1],
        },
        "validation": {}, "labels": {"team": "a"},
        "report": {"dataset": "org/report", "dataset_config": "en"},
        "prune": True, "gguf": ["q8_0"], "recovery": {"tokens": 80, "shortened": ["4:6"]},
        "tasks": ["boolq"], "tasks_dir": "tasks",
        "tasks_limit": 100,
        "notify": "https://hooks.example/pho", "warm_start": {},
        "steps": {
            "allocation": {"offsets": {"q_proj": 0.5}, "depth": [0.5]},
            "linears": {"ignore": ["q"]}, "reconstruction": {"method": "block", "blocks": [1]},
        },
    }  # fmt: skip
    paths = leaves(JobSpec.model_validate({**MINE, **parts}).model_dump(mode="json"))
    target = {"perplexity_rise": 0.1, "structured": True}
    for instead in ({"patterns": ["0.3"]}, {"target": target}):
        several = {"model": "org/name", **instead}
        document = JobSpec.model_validate(several).model_dump(mode="json")
        paths |= leaves({name: document[name] for name in instead})

    options = {*document_fields()} - {"confirm"}  # --no-confirm is of the whole
    assert paths - options == {"model", "more_models", "free_sizes"}
    assert options <= paths
    assert document_fields()["confirm"].name == "--no-confirm"


WITHOUT_STATISTICS = {
    "fisher_samples", "kernel_sizes", "memory_bytes", "mixed_precision", "projection_rows",
    "rows_per_layer", "samples", "seed",
}  # fmt: skip
# What a verb leaves out of a part that it has some options of, and why.
LEFT_OUT = {
    "recover": {  # trains on a text, and measures on one that is an option of its own
        "calibration": WITHOUT_STATISTICS, "confirm": {"text", "finalists"}, "recovery": {"text"},
    },
    "evaluate": {  # one text alone, whose split is an option of its own
        "calibration": {*WITHOUT_STATISTICS, "more_texts", "shares", "split"},
    },
    "compare": {"recovery": {"text"}},  # recovers on the calibration's text
    "validate": {"confirm": {"finalists"}},  # has none
}  # fmt: skip
FROM_A_PRESET = {"prune", "compare", "validate"}  # or from a configuration: all steps


@pytest.mark.parametrize(
    "verb",
    [
        verb
        for verb in main.list_commands(PARENT)
        if isinstance(main.get_command(PARENT, verb), DocumentCommand) and verb != "transfer-job"
    ],
)
def test_a_verb_has_all_options_of_a_part_that_it_has_one_of(verb):
    paths = {field.path for field in command(verb).fields}
    parts = {path.partition("/")[0] for path in paths if "/" in path}
    missing = {
        part: {p.removeprefix(f"{part}/") for p in document_fields() if p.startswith(f"{part}/")}
        - {path.removeprefix(f"{part}/") for path in paths}
        for part in parts - ({"steps"} if verb in FROM_A_PRESET else set())
    }

    assert {part: names for part, names in missing.items() if names} == LEFT_OUT.get(verb, {})


@pytest.mark.parametrize("verb", ["search", "submit", "calibrate", "recover"])
def test_text_given_again_is_another_text(verb):
    model = {"search": ["m", "--pattern", "0.5"], "submit": ["m"], "calibrate": ["m", "--out", "b"]}
    folder = ["m", "--teacher", "t", "--out", "o"]
    words = [*model.get(verb, folder), "--shares", "2,1,1"]
    for name in ("a.txt", "b.txt", "c4"):
        words += ["--text", name]
    context = command(verb).make_context(verb, words, parent=PARENT)
    document = context.params["given"].document()

    assert document["calibration"] == {
        "text": "a.txt", "more_texts": ["b.txt", "c4"], "shares": [2, 1, 1],
    }  # fmt: skip


def test_pho_search_and_pho_submit_have_the_same_option_for_a_field():
    searching, submitting = shown("search"), shown("submit")

    assert {*submitting} == {*document_fields()}
    assert given("submit", "org/a", "--pattern", "0.5").document() == {"pattern": "0.5"}
    assert all(job_fields()[path].shown.service for path in {*submitting} - {*searching})
    assert "--pattern" in submitting["pattern"]["names"]
    for path, option in searching.items():
        if path == "pattern":  # what there may be instead is not the same
            option["help"] = submitting[path]["help"]
        assert option == submitting[path]


@pytest.mark.parametrize("verb", ["search", "submit"])
def test_the_help_has_its_sections_in_order(verb):
    context = click.Context(command(verb), info_name=verb, parent=PARENT)
    context.meta[WHOLE_HELP] = True
    help_ = command(verb).get_help(context)
    sections = {option["section"] for option in shown(verb).values()}
    titles = [title for title in TITLES if title in {*sections, "Output"}]
    places = [help_.index(f"\n{title}:\n") for title in titles]

    assert places == sorted(places)
    assert "\nOptions:\n" not in help_
    assert all(option["help"] for option in shown(verb).values())
    assert sections <= {*SECTIONS}


ASKING = [
    verb
    for verb in main.list_commands(PARENT)
    if getattr(main.get_command(PARENT, verb), "_ask", None) is not None
]


@pytest.mark.parametrize("verb", ASKING)
def test_what_a_verb_alone_is_asked_has_an_option_with_a_sentence_in_a_section(verb):
    asked = {field.path: row for row in command(verb)._options.values() for field in row[:1]}
    fields = command(verb)._ask_fields

    assert fields
    assert {*fields} <= {*asked}
    assert all(asked[path][1].help for path in fields)
    assert {field.shown.section for field in fields.values()} <= {*TITLES}


@pytest.mark.parametrize(
    ("function", "asked"),
    [(pho.compare, CompareAsk), (pho.evaluate, EvaluateAsk), (pho.bench, BenchSettings),
     (pho.bench, Where), (pho.bench, LlamaAsk), (pho.recover, Recovery),
     (pho.search, SearchOptions)],
)  # fmt: skip
def test_python_has_an_argument_with_the_same_sentence_for_what_the_terminal_has(function, asked):
    arguments, said = inspect.signature(function).parameters, " ".join(function.__doc__.split())

    for name, sentence in sentences_of(asked).items():
        assert name in arguments
        assert f"{name}: {sentence}" in said


def test_a_wrong_value_of_what_a_verb_is_asked_is_told_with_its_option():
    for words, message in (
        ("bench m --rounds 0", "--rounds 0 is below 1."),
        (
            "bench m --runtime llama.cpp --device cuda:1 --dtype bfloat16",
            "--device cuda:1, --dtype bfloat16: llama.cpp runs where its own build does",
        ),
        ("evaluate m --text t --max-windows 0", "--max-windows 0 is below 1."),
        ("compare m --pattern 0.5 --seeds 0,1,1", "--seeds 0,1,1: one is given twice"),
        ("compare m --pattern 0.5 --report-windows 0", "--report-windows 0 is below 1"),
        ("plan m --device-memory much", "--device-memory 'much' is not a size"),
    ):
        result = CliRunner().invoke(main, words.split())

        assert result.exit_code == 2
        assert message in result.stderr


POINT = {"coefficients": {"row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
                          "activation_exponent": 0.5}}  # fmt: skip
WHOLE = {
    "model": "./my model", "pattern": "0.6", "scope": "row", "preset": "best",
    "steps": {"allocation": {"method": "owl", "unit": "block", "spread": 0.3, "outlier_ratio": 4.0},
              "permutation": "none", "repruning": "dsnot", "update": "obs",
              "reconstruction": {"method": "block", "passes": 2, "learning_rate": 0.5, "seed": 9},
              "linears": {"targets": ["*.q_proj", "re:.*[kv]_proj"], "ignore": ["a b"],
                          "sparsities": {"*.0.q_proj": 0.3, "re:.*=x": 0.5}}},
    "revision": "v1", "dtype": "bfloat16", "stream": True,
    "calibration": {"dataset": "org/texts", "dataset_config": "en",
                    "data_file": "a/b.parquet", "split": "all", "field": "body", "samples": 64,
                    "context_length": 512, "fisher_samples": 8,
                    "rows_per_layer": 4, "projection_rows": 0, "kernel_sizes": [3, 7],
                    "bos": "never", "seed": 3, "mixed_precision": True, "memory_bytes": 10**9},
    "confirm": {"text": "a b.txt", "finalists": 2, "windows": 3},
    "objective": {"name": "perplexity", "weighting": "fisher"},
    "warm_start": {"count": 2},
    "sampler": "tpe", "trials": 50, "seed": 7,
    "search_space": {"row_share": [0.25, 0.75], "activation_exponent": [1.0, 1.0],
                     "kernel_sizes": [3, 7], "allocations": ["uniform", "owl"]},
}  # fmt: skip


@pytest.mark.parametrize(
    "document",
    [
        MINE,
        WHOLE,
        {**MINE, "confirm": None},
        {**MINE, "more_models": ["org/b"], "objective": {"over": "worst"}},
        {**MINE, "calibration": {"text": "it's.txt"}, "preset": "crepe-plus"},
        {**MINE, "calibration": {"text": "a", "more_texts": ["b", "c4"], "shares": [2, 1, 1]}},
        {
            **MINE, "pattern": "2:4", "preset": "score",
            "steps": {"permutation": "score", "update": "sparsegpt"},
        },
        {**MINE, "steps": {"allocation": {"method": "uniform"}}},
        {**MINE, "steps": {"allocation": {"offsets": {"q_proj": -0.5}, "depth": [-0.5, 0.25]}}},
    ],
)  # fmt: skip
def test_a_documents_command_makes_the_same_document(document):
    spec = JobSpec.model_validate(document)
    words = shlex.split(search_command(spec.model_dump(mode="json"), "--warm-start", "x.json"))
    models = words[2 : 2 + len(spec.models)]
    asked = given("search", *words[2:])
    again = asked.document({"model": models[0], "more_models": models[1:]})
    if spec.warm_start is None:
        del again["warm_start"]  # which x.json stands for

    assert words[:2] == ["pho", "search"]
    assert asked.job(again) == spec
    assert not {"--field", "--split", "--trials"} & {*words} or document is WHOLE


@pytest.mark.parametrize(
    "document",
    [
        {**MINE, "steps": {"deployable": False}},
        {**MINE, "warm_start": {"found": [POINT]}},
        {**MINE, "steps": {"linears": {"sparsities": {"*.q": "0.3"}}}},
        {"model": "m", "target": {"perplexity_rise": 1.5}},
        {**MINE, "confirm": {"text": None}},
        {**MINE, "calibration": {"memory_bytes": None}},
    ],
)
def test_what_no_options_say_is_not_said_by_wrong_ones(document):
    assert submit_command(document) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--samples 0", "--samples 0 is below 1."),
        ("--islands 65", "--islands 65 is above 64."),
        ("--timeout 0", "--timeout 0.0 is not above 0."),
        ("--calibration-seed 4294967296", "--calibration-seed 4294967296 is not below 4294967296."),
        ("--samples 4 --fisher-samples 9",
         "--fisher-samples 9: fisher_samples must not be above samples, which is 4."),
        ("--kernel-sizes 3,4", "--kernel-sizes 3,4: 4 is even, but a window must have a middle"),
        ("--trials 3", "--trials 3: trials=3 is too few"),
        ("--permutation score", "permutation 'score' changes nothing at 0.5"),
        ("--trials 30 --permutation score", "permutation 'score' changes nothing at 0.5"),
        ("--space row_share=2:3", "--space row_share=2:3: "),
        ("--samples 0 --seed -1", "--samples 0 is below 1; --seed -1 is below 0."),
        ("--text a.txt --dataset b", "--dataset b: text and dataset are both given"),
        ("--no-confirm --finalists 3", "--finalists has no place in the job document"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_told_with_the_option_and_its_value(words, message):
    found = given("submit", "org/a", "--pattern", "0.5", *words.split())

    with pytest.raises(InvalidInput) as refused:
        found.job(found.document(MINE))
    assert str(refused.value).startswith(message)
    with pytest.raises(InvalidInput, match=r"^/calibration/samples 0 is below 1\.$"):
        given("submit", "org/a").job({**MINE, "calibration": {"samples": 0}})


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 2**33), ("800 MB", 8 * 10**8), ("8e9", 8 * 10**9), ("1.5Mi", 3 * 2**19),
     ("1e3kb", 10**6), ("512", 512), (" 2g ", 2 * 10**9)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text, "--memory") == size
    for word in ("much", "", "-1", "nan", "1e999GB", "8 bananas", "1.2.3"):
        with pytest.raises(InvalidInput, match=r"^--memory .* is not a size"):
            parse_bytes(word, "--memory")


def test_a_configuration_to_begin_with_stands_in_the_document(tmp_path):
    from pho_service.cli.remote import job_document
    from pho_service.spec.configuration import Configuration, write_configuration
    from pho_service.spec.pattern import Coefficients, Pattern
    from pho_service.spec.steps import Candidate

    path = tmp_path / "found.json"
    score = Coefficients(row=1.0, column=0.5, neighbourhood=0.25, kernel_size=5)
    found = Candidate(method="crepe", coefficients=score, pattern=Pattern.parse("0.5"))
    document = {**found.to_dict(), "pattern": "0.5", "scope": "layer"}
    write_configuration(Configuration.model_validate(document), path)
    words = ("org/a", "--pattern", "0.5", "--preset", "score", "--warm-start", str(path))
    sent = job_document(("org/a",), None, given("submit", *words))
    (point,) = sent["warm_start"]["found"]

    assert JobSpec.model_validate(sent).request(0).warm_start == (found,)
    assert point["coefficients"]["neighbourhood"] == 0.25
    other = given("submit", *words[:2], "0.6", *words[3:])
    with pytest.raises(InvalidInput, match=r"for 0\.5 in scope layer, but the search is for 0\.6"):
        job_document(("org/a",), None, other)
