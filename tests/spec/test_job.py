"""The document of a job: its defaults, what it refuses and where, and what it stands for."""

from dataclasses import replace

import pytest
from pydantic import TypeAdapter, ValidationError

from pho_service.errors import InvalidInput
from pho_service.host.access import Access
from pho_service.host.settings import Settings
from pho_service.spec.export import BITS_WINDOWS
from pho_service.spec.fields import FieldError, JobLimits
from pho_service.spec.job import JobSpec, island_seed
from pho_service.spec.minutes import MOST_PASSES
from pho_service.spec.objective import Objective, SearchOptions, options_of
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Reconstruction


def spec_of(**changes):
    return JobSpec.model_validate({"model": "org/name", "pattern": "0.5", **changes})


def check_access(spec, access):
    for check in spec.access_checks(access):
        check()


def test_all_but_the_model_and_the_pattern_have_defaults():
    spec = spec_of()

    assert (spec.calibration.samples, spec.calibration.context_length) == (128, 2048)
    assert spec.confirm is not None
    assert (spec.confirm.text, spec.confirm.finalists) == (None, 5)
    assert spec.objective == Objective()
    assert spec.pruning() == Pattern.parse("0.5")
    assert (spec.sampler, spec.trials, spec.islands, spec.seed) == ("cmaes", 200, 1, 0)
    assert (spec.priority, spec.timeout_s, spec.preset) == (0, None, "best")


def test_each_option_of_every_search_is_a_field_of_a_job_with_the_same_default_and_bounds():
    request = spec_of(trials=31, seed=7).request(0)

    assert options_of(spec_of()) == options_of(SearchOptions())
    assert (
        options_of(request)
        == options_of(request.plan((3,)))
        == {**options_of(SearchOptions()), "trials": 31, "seed": 7}
    )
    for name, known in TypeAdapter(SearchOptions).json_schema()["properties"].items():
        asked = JobSpec.model_json_schema()["properties"][name]
        assert {**known, "description": ""} == {**asked, "description": ""}


def test_a_longer_search_is_the_same_search_one_with_another_seed_is_not():
    assert SearchOptions(trials=31).identity() == SearchOptions().identity() == {"seed": 0}
    assert SearchOptions(seed=1).identity() == {"seed": 1}


def test_text_is_c4_by_default():
    assert spec_of().calibration.dataset == "allenai/c4"
    assert spec_of().calibration.data_file is not None
    assert spec_of(calibration={"text": "a.txt"}).calibration.dataset is None
    assert spec_of(calibration={"dataset": "x/y"}).calibration.data_file is None


SCORE = {
    "row": 0.25, "column": 0.5, "neighbourhood": 0.25, "kernel_size": 5, "activation_exponent": 0.9,
}  # fmt: skip


def test_several_models_are_searched_by_the_proxy_alone_and_each_is_calibrated_by_itself():
    spec = spec_of(more_models=["org/two", "org/three"])

    assert spec.models == ["org/name", "org/two", "org/three"]
    assert spec.confirm is None
    assert spec.request(0).objective.over == "mean"
    assert spec_of(more_models=["b"], objective={"over": "worst"}).request(0).objective.over == (
        "worst"
    )
    assert spec.of_model(2).model == "org/three"
    assert spec.of_model(2).calibration_key != spec.of_model(1).calibration_key
    assert JobSpec.model_validate(spec.model_dump()) == spec


def test_what_a_search_begins_with_is_in_its_document_and_in_its_plan():
    spec = spec_of(warm_start={"found": [{"coefficients": SCORE}]})
    (point,) = spec.plan(0).warm_start

    assert point["kernel_size"] == 5
    assert point["neighbourhood_share"] == pytest.approx(0.25)
    assert point["row_share"] == pytest.approx(1 / 3)
    assert spec_of(warm_start={}).plan(0).warm_start == ()
    assert JobSpec.model_validate(spec.model_dump()) == spec


WRONG = [
    ({"more_models": ["org/name"]}, ("more_models",)),
    ({"more_models": ["b", "b"]}, ("more_models",)),
    ({"more_models": ["a\0"]}, ("more_models", 0)),
    ({"more_models": ["b"], "revision": "main"}, ("revision",)),
    ({"more_models": ["b"], "confirm": {}}, ("confirm",)),
    ({"more_models": ["b"], "validation": {}}, ("validation",)),
    ({"more_models": ["b"], "report": {"text": "r.txt"}}, ("report",)),
    ({"confirm": None, "report": {"text": "r.txt"}}, ("report",)),
    ({"report": {}}, ("report",)),
    ({"report": {"text": "r.txt", "windows": 0}}, ("report", "windows")),
    ({"more_models": ["b"], "objective": {"name": "gini"}}, ("objective",)),
    ({"objective": {"over": "mean"}}, ("objective",)),
    ({"warm_start": True}, ("warm_start",)),
    ({"warm_start": {"found": [{}]}}, ("warm_start", "found", 0, "coefficients")),
    ({"warm_start": {"found": [{"coefficients": SCORE}]}, "trials": 6, "preset": "score"}, ()),
    ({"model": ""}, ("model",)),
    ({"model": "\ud800"}, ("model",)),
    ({"model": "m" * 513}, ("model",)),
    ({"pattern": 1.5}, ("pattern",)),
    ({"pattern": "4:4"}, ("pattern",)),
    ({"scope": "model"}, ("scope",)),
    ({"pattern": "2:4", "scope": "layer"}, ("scope",)),
    ({"name": "a\n"}, ("name",)),
    ({"dtype": "int8"}, ("dtype",)),
    ({"calibration": None}, ("calibration",)),
    ({"calibration": {"text": "a", "dataset": "b"}}, ("calibration", "dataset")),
    ({"calibration": {"data_file": "a"}}, ("calibration", "data_file")),
    ({"calibration": {"text": "a", "data_file": "b"}}, ("calibration", "data_file")),
    ({"calibration": {"text": "a\x7f"}}, ("calibration", "text")),
    ({"calibration": {"samples": True}}, ("calibration", "samples")),
    ({"calibration": {"context_length": 7}}, ("calibration", "context_length")),
    ({"calibration": {"samples": 4, "fisher_samples": 5}}, ("calibration", "fisher_samples")),
    ({"calibration": {"kernel_sizes": []}}, ("calibration", "kernel_sizes")),
    ({"calibration": {"kernel_sizes": [4]}}, ("calibration", "kernel_sizes")),
    ({"calibration": {"kernel_sizes": [3, 1]}}, ("calibration", "kernel_sizes", 1)),
    ({"calibration": {"bos": "yes"}}, ("calibration", "bos")),
    ({"calibration": {"sampels": 8}}, ("calibration", "sampels")),
    ({"confirm": False}, ("confirm",)),
    ({"confirm": {"windows": 0}}, ("confirm", "windows")),
    ({"validation": {"candidates": 7}}, ("validation", "candidates")),
    ({"validation": {}, "confirm": None}, ("validation",)),
    ({"objective": {"name": "loss"}}, ("objective", "name")),
    ({"objective": {"name": "perplexity"}, "confirm": None}, ("objective",)),
    ({"sampler": "nsga"}, ("sampler",)),
    ({"search_space": {"row_share": [0.5]}}, ("search_space", "row_share")),
    ({"search_space": {"row_share": [0.5, 0.4]}}, ("search_space", "row_share")),
    ({"search_space": {"activation_exponent": [0, 5]}}, ("search_space", "activation_exponent")),
    ({"search_space": {"kernel_sizes": [8]}}, ("search_space", "kernel_sizes")),
    ({"search_space": {"kernel_sizes": [7]}}, ("search_space",)),  # was not calibrated
    ({"search_space": {"kernels": [3]}}, ("search_space", "kernels")),
    ({"trials": 5}, ("trials",)),  # the baselines are 6
    ({"trials": "200"}, ("trials",)),
    ({"islands": 65}, ("islands",)),
    ({"sampler": "hill-climb", "islands": 2}, ("islands",)),  # they would be the same
    ({"seed": 2**32}, ("seed",)),
    ({"priority": 101}, ("priority",)),
    ({"timeout_s": float("inf")}, ("timeout_s",)),
    ({"max_attempts": 0}, ("max_attempts",)),
    ({"trails": 200}, ("trails",)),
]


@pytest.mark.parametrize(("changes", "place"), WRONG)
def test_wrong_fields(changes, place):
    """Each wrong or unknown field is reported at its own place, and nothing else is."""
    with pytest.raises(ValidationError) as caught:
        spec_of(**changes)

    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_whoever_makes_three_mistakes_hears_of_three():
    with pytest.raises(ValidationError) as caught:
        spec_of(pattern="x", calibration={"samples": 0}, seed=-1)

    places = {error["loc"] for error in caught.value.errors()}
    assert places == {("pattern",), ("calibration", "samples"), ("seed",)}


def test_a_pattern_written_down_is_the_pattern_that_was_asked_for_to_its_last_digit():
    pattern = spec_of(pattern="0.333333333333").pruning()

    assert Pattern.parse(str(pattern)) == pattern


def test_the_first_island_has_the_jobs_seed_the_others_have_their_own():
    seeds = [spec_of(seed=3, islands=64).plan(island).seed for island in range(64)]

    assert seeds[0] == 3
    assert len(set(seeds)) == 64
    assert seeds[1] == island_seed(3, 1) != island_seed(4, 1)


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "name 0.5 layer"),
        ({"model": "/models/tiny/", "pattern": "2:4"}, "tiny 2:4 row"),
        ({"model": "///"}, "/// 0.5 layer"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_job_has_its_models_name_or_its_own(changes, title):
    assert spec_of(**changes).title == title


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"trials": 9, "seed": 1, "pattern": "2:4", "confirm": None, "priority": 1}, True),
        ({"calibration": {"memory_bytes": 2**30}}, True),
        ({"model": "a"}, False),
        ({"revision": "b"}, False),
        ({"dtype": "float32"}, False),
        ({"calibration": {"samples": 9}}, False),
    ],
)
def test_jobs_share_a_bundle_unless_they_differ_in_the_model_or_the_calibration(changes, *, same):
    assert (spec_of(**changes).calibration_key == spec_of().calibration_key) is same


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"model": "../x"}, "/model"),
        ({"model": "m" * 300}, "/model"),
        ({"calibration": {"text": "/etc/passwd"}}, "/calibration/text"),
        ({"calibration": {"dataset": "x/y"}}, "/calibration/dataset"),
        ({"calibration": {"dataset": "a/b", "data_file": "x::y"}}, "/calibration/data_file"),
        ({"calibration": {"text": "a.txt", "more_texts": ["../x.txt"]}},
         "/calibration/more_texts/0"),
        ({"calibration": {"text": "a.txt", "more_texts": ["b.txt", "x/y"]}},
         "/calibration/more_texts/1"),
        ({"calibration": {"text": "a.txt", "more_texts": ["./a.txt"]}},
         "/calibration/more_texts/0"),
        ({"confirm": {"text": "../x"}}, "/confirm/text"),
    ],
)  # fmt: skip
def test_a_path_that_is_not_allowed(tmp_path, changes, pointer):
    roots = (tmp_path,)
    settings = Settings(model_roots=roots, text_roots=roots, hub_datasets=("a/*", "allenai/*"))
    access = Access.of(settings)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()

    with pytest.raises(FieldError) as caught:
        check_access(spec_of(**changes), access)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("calibration", "field", "message"),
    [
        ({"text": "a.txt", "more_texts": ["a.txt"]}, "more_texts", "a.txt is given twice"),
        ({"dataset": "c4", "more_texts": ["b.txt", "b.txt"]}, "more_texts", "b.txt is given twice"),
        ({"more_texts": ["b.txt"]}, "more_texts", "no first text"),
        ({"text": "a.txt", "more_texts": ["b.txt"], "shares": [1, 0]}, "shares",
         "the share of b.txt is 0"),
        ({"text": "a.txt", "more_texts": ["b.txt"], "shares": [1]}, "shares",
         "give one share for each of several texts, here a.txt, b.txt"),
        ({"text": "a.txt", "more_texts": ["b.txt"], "shares": [1, 99], "samples": 16}, "shares",
         "a.txt gets none of 16 windows"),
        ({"text": "a.txt", "more_texts": ["b.txt"], "samples": 1}, "shares",
         "b.txt gets none of 1 windows"),
    ],
)  # fmt: skip
def test_several_texts_that_cannot_be_are_named(calibration, field, message):
    with pytest.raises(ValidationError) as caught:
        spec_of(calibration=calibration)
    (error,) = caught.value.errors()
    assert error["loc"] == ("calibration", field)
    assert message in error["msg"]


def test_one_text_is_stored_as_if_there_could_not_be_several():
    stored = spec_of(calibration={"text": "a.txt"}).model_dump(mode="json")["calibration"]

    assert not {"more_texts", "shares"} & {*stored}


def test_a_data_set_among_the_further_texts_is_kept_by_the_place_where_it_lies(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "a.txt").touch()
    access = Access.of(Settings(text_roots=(tmp_path,), hub_datasets=("Salesforce/*",)))
    calibration = {"text": "a.txt", "more_texts": ["rows", "wikitext2"]}
    placed = spec_of(calibration=calibration).placed(access).calibration

    assert placed.more_texts == ["./rows", "wikitext2"]


def test_a_model_in_other_letters_is_the_same_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    access = Access.of(Settings(model_roots=(tmp_path,)))

    with pytest.raises(FieldError, match=r"'\./m' is the same model as 'm'") as caught:
        check_access(spec_of(model="m", more_models=["org/x", "./m"], confirm=None), access)
    assert caught.value.pointer == "/more_models/1"


def test_a_presets_steps_stay_where_nothing_else_is_said():
    spec = JobSpec.model_validate(
        {"model": "m", "pattern": "4:8", "preset": "best", "steps": {"repruning": "dsnot"}}
    )
    stored = JobSpec.model_validate(spec.model_dump(mode="json"))
    steps = stored.plan(0).steps

    assert (steps.permutation, steps.repruning, steps.update) == ("score", "dsnot", "least-squares")
    assert stored.plan(0) == spec.plan(0)


def test_an_allocation_that_is_named_is_the_only_one_searched_with_its_own_spread():
    steps = {"allocation": {"method": "owl", "unit": "block", "spread": 0.1}}
    spec = JobSpec.model_validate(
        {"model": "m", "pattern": "0.5", "preset": "best", "steps": steps}
    )
    plan = spec.plan(0)

    assert plan.space.allocations == ("owl",)
    assert plan.space.allocation_spread == (0.1, 0.1)
    assert plan.steps.allocation.unit == "block"


def several(**changes):
    return JobSpec.model_validate({"model": "org/name", **changes})


def test_each_has_the_request_of_a_job_with_it_alone():
    spec = several(patterns=["2:4", "0.3"], preset="best", scope="row", trials=50)
    kept = JobSpec.model_validate_json(spec.model_dump_json())

    assert kept == spec
    assert [str(each) for each in spec.points] == ["0.3", "2:4"]
    for text, scope in (("0.3", "row"), ("2:4", None)):
        alone = spec_of(pattern=text, scope=scope, preset="best", trials=50)
        mine = spec.of_pattern(Pattern.parse(text, scope))
        assert mine.request(0) == replace(alone.request(0), finalists=2)
        assert JobSpec.model_validate(mine.model_dump()) == mine
    assert several(patterns=["0.3"], confirm={"finalists": 7}).confirm.finalists == 7
    assert several(target={"perplexity_rise": 0.05}).most_points == 6


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "say how sparse the model is to be: give a pattern"),
        ({"pattern": "0.5", "patterns": ["0.3"]}, "pattern and patterns are given"),
        ({"patterns": ["0.3"], "target": {"perplexity_rise": 0.1}}, "patterns and target are"),
        ({"patterns": ["0.3", "0.30"]}, "0.3 is given twice"),
        ({"patterns": ["0.3"], "islands": 2}, "islands cannot be asked for with several"),
        ({"patterns": ["0.3"], "confirm": None}, "confirm: null cannot"),
        ({"target": {"perplexity_rise": 0.1}, "confirm": None}, "with a target"),
        ({"patterns": ["0.3"], "more_models": ["org/b"]}, "more_models cannot"),
        ({"patterns": ["0.3"], "timeout_s": 1.0}, "timeout_s cannot"),
        ({"patterns": ["0.3"], "warm_start": {}}, "warm_start cannot"),
        ({"patterns": ["0.3"], "prune": True}, ":prune with its pattern"),
        ({"patterns": ["0.3"], "tasks": ["boolq"]}, "tasks cannot be asked for with several"),
        ({"patterns": ["0.3", "2:4"], "trials": 3}, "trials=3 is too few"),
        ({"pattern": "0.5", "steps": {"permutation": "score"}}, "changes nothing at 0.5"),
        ({"pattern": "0.5", "steps": {"update": "adam"}}, "'none', 'obs'"),
        ({"pattern": "0.5", "scope": "global", "steps": {"allocation": {"method": "owl"}}},
         "both say how much"),
        ({"pattern": "0.5", "preset": "worst"}, "'score', 'crepe'"),
        ({"pattern": "0.5", "search_space": {"allocations": ["fair"]}}, "'uniform', 'owl'"),
    ],
)  # fmt: skip
def test_what_is_of_one_pattern_and_a_step_without_a_meaning_are_refused(changes, told):
    with pytest.raises(ValidationError) as refused:
        several(**changes)

    assert told in str(refused.value)


def test_a_number_of_passes_alone_says_that_blocks_are_trained_in_so_many():
    trained = spec_of(preset="score", steps={"reconstruction": {"passes": 3}})

    assert trained.request(0).steps.reconstruction == Reconstruction(method="block", passes=3)
    with pytest.raises(ValidationError, match="trains nothing, so passes"):
        spec_of(steps={"reconstruction": {"method": "none", "passes": 3}})


def test_a_training_gets_shorter_behind_some_blocks_and_by_default_it_does_not():
    trained = {"method": "block", "passes": 3}
    how, whole = Reconstruction(**trained, blocks=(2, 3)), Reconstruction(**trained)
    once = Reconstruction(method="block", passes=1)

    assert [how.passes_of(number) for number in range(4)] == [3, 3, 1, 0]
    assert [whole.passes_of(number) for number in range(4)] == [3, 3, 3, 3]
    assert whole.shorter(2).shorter(3) == how == how.shorter(9)
    assert once.shorter(2).blocks == (2, 2)
    assert "3 passes in the first 2 blocks and one up to block 3, from" in str(how)
    assert "3 passes in the first 2 blocks and one in the others, from" in str(whole.shorter(2))
    assert "3 passes from" in str(whole)
    assert '"blocks"' not in spec_of(steps={"reconstruction": trained}).model_dump_json()
    for wrong in ([0], [-1], [True], [1.5], [2, 1], [1, 2, 3]):
        with pytest.raises(InvalidInput, match="are not up to 2 numbers above 0, the smaller"):
            Reconstruction(**trained, blocks=wrong)
        with pytest.raises(ValidationError, match="reconstruction"):
            spec_of(steps={"reconstruction": {**trained, "blocks": wrong}})


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"minutes": None}, 2),
        ({"minutes": 20}, MOST_PASSES),
        ({"minutes": 20, "steps": {"reconstruction": {"passes": 3}}}, 3),
        ({"minutes": 20, "prune": True, "recovery": {}}, 2),
        ({"minutes": 20, "preset": "crepe-plus"}, 0),
    ],
)
def test_tokens_of_training_are_those_of_the_most_passes_that_minutes_may_choose(changes, passes):
    job = spec_of(**changes)

    recovered = job.recovery.written if job.recovery else 0
    assert job.tokens_to_prune() == job.calibration.tokens * (1 + passes) + recovered


def test_a_job_that_cuts_for_bytes_writes_a_file_of_so_many():
    def job(**fields):
        fields = {"model": "org/m", "pattern": "bytes:95MB", "minutes": None, **fields}
        return JobSpec.model_validate(fields)

    limits, cut = JobLimits(trials=1000, tokens=10**9), job(pattern="structured:20%", prune=True)
    few = BITS_WINDOWS * cut.calibration.context_length
    written = job(prune=True)

    assert written.is_cut
    assert written.files == job(prune=True, gguf=["95MB"]).files == ["95MB"]
    assert job(prune=True, gguf=["q8_0"]).files == ["q8_0", "95MB"]
    assert job(pattern="faster:1.2x").files == cut.files == []
    assert written.check_size(limits) == cut.check_size(limits) + few
    assert job().check_size(limits) == cut.check_size(limits)  # no file is written
    assert written.tokens_to_prune() == cut.tokens_to_prune() + few
    with pytest.raises(ValidationError, match=r"islands cannot be asked for with bytes:95MB"):
        job(islands=2)


def test_gguf_files_are_types_or_sizes_each_once_and_the_text_of_sizes_is_counted():
    def job(*gguf):
        return JobSpec.model_validate(
            {"model": "org/m", "pattern": "0.5", "minutes": None, "prune": True, "gguf": [*gguf]}
        )

    limits = JobLimits(trials=1000, tokens=10**9)
    typed, sized = job("q8_0"), job("q8_0", "105MB", "1.5GiB")

    assert (typed.sized_files, sized.sized_files) == (0, 2)
    few = BITS_WINDOWS * typed.calibration.context_length  # once for both
    assert sized.check_size(limits) == typed.check_size(limits) + few
    assert sized.tokens_to_prune() == typed.tokens_to_prune() + few
    for gguf, told in (
        (["q9"], r"'q9' is neither a type \(f32, .*\) nor a size: 105MB"),
        (["105 apples"], "neither a type"),
        (["105MB", "105MB"], "given twice"),
        ([f"{number}MB" for number in range(21)], "at most 20"),
    ):
        with pytest.raises(ValidationError, match=told):
            job(*gguf)
