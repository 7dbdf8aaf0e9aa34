"""The sizes of a job that takes its minutes: the largest that fit, or else the least."""

from functools import partial

import pytest
from pydantic import ValidationError

from pho_service.errors import InvalidInput
from pho_service.planning.costs import CARDS, named_machine
from pho_service.planning.minutes import LEVELS, fitted, ladder, sentence
from pho_service.planning.plan import ComparedWork, plan_job
from pho_service.planning.shapes import Header, TensorHeader, model_shapes
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import minimal_document, search_command
from pho_service.spec.minutes import AFTER_CALIBRATION, MINUTES, REST, SIZES

H100 = CARDS["H100"]
SMALL = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = SMALL | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip


def asked(**fields):
    return JobSpec.model_validate({"model": "org/m", "pattern": "0.5", **fields})


def shapes_of(config):
    hidden, width = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    tensors = {
        f"model.layers.{i}.{name}.weight": TensorHeader(shape, "BF16")
        for i in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    tensors["model.embed_tokens.weight"] = TensorHeader((config["vocab_size"], hidden), "BF16")
    return model_shapes("org/m", Header(config=config, tensors=tensors))


@pytest.fixture(scope="module")
def cpu():
    """A CPU whose rates are the same everywhere."""
    return CARDS["H100"].__class__(
        **{**vars(named_machine("cpu")), "products": 1e11, "float_products": 1e11,
           "bandwidth": 1e10, "copies": 1e10, "memory_bytes": 2**35, "main_bytes": 2**35,
           "quick": 1.0}
    )  # fmt: skip


def planned(machine, config=SMALL, **fields):
    return plan_job(asked(**fields), shapes_of(config), machine)


def test_who_says_nothing_gets_twenty_minutes_who_gives_a_text_size_none():
    default, given = asked(), asked(calibration={"samples": 128})
    none, both = asked(minutes=None), asked(minutes=5, calibration={"samples": 16})

    assert (default.minutes, default.free_sizes) == (MINUTES, [*SIZES])
    assert (given.minutes, given.free_sizes) == (None, [])
    assert (none.minutes, none.free_sizes) == (None, [])
    assert none.calibration.tokens == 128 * 2048
    assert "calibration/samples" not in both.free_sizes
    assert "calibration/context_length" in both.free_sizes
    with pytest.raises(ValidationError, match="the minutes choose these sizes, and none are given"):
        asked(minutes=None, free_sizes=["in_full"])


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"minutes": 5}, {"minutes": None}, {"minutes": 7, "in_full": 1}, {"confirm": None},
        {"minutes": 5, "calibration": {"samples": 16}}, {"pattern": "2:4"},
        {"pattern": "structured:20%"}, {"pattern": None, "patterns": ["0.5", "2:4"]},
        {"more_models": ["org/n"]},
    ],
)  # fmt: skip
def test_a_document_that_is_read_again_leaves_the_same_sizes_free(cpu, fields):
    """So does its short form; once they are chosen, none is free, and the command says each."""
    spec = asked(**fields)
    again = JobSpec.model_validate(spec.model_dump(mode="json"))
    chosen = plan_job(spec, shapes_of(SMALL), cpu).spec
    command = search_command(chosen.model_dump(mode="json"))

    assert again == spec
    assert JobSpec.model_validate(minimal_document(spec)) == spec
    assert JobSpec.model_validate(minimal_document(chosen)) == chosen
    assert chosen.free_sizes == []
    assert JobSpec.model_validate(chosen.model_dump(mode="json")) == chosen
    if spec.minutes is not None and not spec.several:
        assert f"--samples {chosen.calibration.samples} " in command
        assert "--minutes" not in command
    if fields == {"minutes": None}:
        assert "--minutes none" in command


ALL_SIZES = {
    "calibration": {"samples": 8, "context_length": 64},
    "confirm": {"windows": 4, "finalists": 1},
    "in_full": 1,
}


@pytest.mark.parametrize(
    ("fields", "recovers"),
    [
        ({"prune": True}, True),
        ({"prune": True, "pattern": "structured:20%"}, True),
        ({"prune": True, "preset": "crepe", "recovery": {}}, True),
        ({"prune": True, "preset": "crepe"}, False),  # every kept weight keeps its value
        ({"prune": True, "recovery": None}, False),
        ({"prune": True, "recovery": {"tokens": 100}}, False),
        ({"prune": True, "stream": True}, False),
        ({"prune": True, "calibration": {"samples": 8, "context_length": 64}, "minutes": 5}, True),
        ({"prune": True, "calibration": {"samples": 8, "context_length": 64}}, False),  # no minutes
        ({"prune": True, "calibration": {"samples": 8}, "minutes": 5, "recovery": None}, False),
        ({"prune": True, "minutes": 5, **ALL_SIZES}, False),  # nothing is chosen for the minutes
        ({"prune": True, "minutes": None}, False),
        ({}, False),
    ],
)
def test_a_model_that_is_written_is_recovered_in_what_the_minutes_leave(fields, recovers):
    spec = asked(**fields)
    settings = spec.recovery_settings()
    again = JobSpec.model_validate(spec.model_dump(mode="json"))

    assert spec.recovers_in_rest is recovers
    assert again == spec
    if recovers:
        assert settings.time_s == 60 * spec.minutes * REST


def test_a_share_of_the_minutes_is_set_aside_for_the_recovery(cpu):
    plan = planned(cpu, pattern="0.5", preset="best", prune=True, minutes=20)
    searched = planned(cpu, pattern="0.5", preset="best", prune=True, recovery=None, minutes=20)

    assert plan.own_seconds() <= 1200
    assert plan.own_seconds() - 1200 * REST <= searched.own_seconds()
    assert "and a recovery in what is left" in sentence(plan)


@pytest.mark.parametrize(("pattern", "least"), [("0.5", 8192), ("structured:20%", 8 * 256)])
def test_a_recovery_on_too_little_text_is_left_out_and_the_search_has_its_time(cpu, pattern, least):
    fields = {"pattern": pattern, "preset": "best", "prune": True}
    sizes = {"calibration": {"context_length": 256}}
    longer = planned(cpu, **fields, **sizes, minutes=20)
    minutes = longer.costs.recovered(least) / REST / 60
    enough, short = (
        planned(cpu, **fields, **sizes, minutes=m) for m in (1.01 * minutes, 0.99 * minutes)
    )
    searched = planned(cpu, **fields, **sizes, minutes=0.99 * minutes, recovery=None)

    assert enough.work.recovery is not None
    assert short.work.recovery is None
    assert short.spec.sizes == searched.spec.sizes
    assert short.own_seconds() == pytest.approx(searched.own_seconds())
    assert "recovery" not in sentence(short)


def test_what_a_share_of_the_file_cuts_is_said_of_a_curve_as_well(cpu):
    patterns = ["smaller:10%", "smaller:20%", "smaller:30%"]
    alone = sentence(planned(cpu, pattern=patterns[1], minutes=20))
    curve = sentence(planned(cpu, pattern=None, patterns=patterns, minutes=20))

    assert alone.partition(" of the weights")[0] == curve.partition(" of the weights")[0]
    assert curve.startswith("smaller:20% cuts 25.3% of the weights of its blocks. ")


def test_the_first_line_says_that_a_goal_is_worked_out_later(cpu):
    said = sentence(planned(cpu, pattern="bytes:95MB", minutes=20))

    assert said.startswith("What bytes:95MB takes is found once the model is calibrated. ")


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "structured:20%", "bytes:95MB"])
def test_more_minutes_give_more_text_and_are_nearly_used(cpu, pattern):
    least = planned(cpu, pattern=pattern, minutes=0.01).own_seconds()
    tokens, used = [], []
    for minutes in (1, 2, 4):
        plan = planned(cpu, pattern=pattern, minutes=minutes * least / 60)
        tokens.append(plan.spec.calibration.tokens)
        used.append(plan.own_seconds() / (minutes * least))

    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]
    assert all(0.6 < share <= 1 for share in used)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_what_is_chosen_behind_the_calibration_is_planned_before_it(cpu, pattern):
    """So the first line tells of finalists that there will be time for, and how long they take."""
    fields = {"pattern": pattern, "minutes": 20}
    fields |= {"calibration": {"samples": 8, "context_length": 512}}
    plan = planned(cpu, **fields)
    later = {path: size for path, size in plan.spec.sizes.items() if path not in AFTER_CALIBRATION}
    calibration_s = plan.own_seconds() - plan.own_seconds(calibrated=True)
    behind = fitted(
        asked(**fields).sized(later), 8192, partial(plan_job, shapes=plan.shapes, machine=cpu),
        20 * 60 - calibration_s,
    )  # fmt: skip

    assert plan.spec.sizes == behind.spec.sizes
    assert plan.work.finalists > 1
    assert plan.work.in_full > 1
    assert 0.8 * 20 * 60 < plan.own_seconds() <= 20 * 60


def test_a_fast_card_takes_what_papers_take_and_a_slow_machine_says_that_it_takes_longer(cpu):
    card, slow = planned(H100), planned(cpu, LARGE, minutes=5)

    assert card.spec.calibration.tokens == 128 * 2048
    assert sentence(card).startswith("128 windows of 2048 tokens, 200 trials, 5 finalists on 16 ")
    assert slow.spec.calibration.tokens == LEVELS[0][0] * LEVELS[0][1]
    assert sentence(slow).endswith("It is the least, and more than 5 minutes.")


def test_what_is_given_stays_as_it_is(cpu):
    fields = {"confirm": {"finalists": 4}, "calibration": {"context_length": 128}, "minutes": 9}
    plan = planned(cpu, **fields)

    assert plan.spec.confirm.finalists == 4
    assert plan.spec.calibration.context_length == 128
    assert plan.own_seconds() <= 9 * 60


def test_windows_are_no_longer_than_the_model_reads():
    shapes = shapes_of(SMALL | {"max_position_embeddings": 300})
    lengths = {sizes["calibration/context_length"] for sizes in ladder(asked(), shapes.context)}

    assert lengths == {256, 300}


def test_several_texts_get_a_window_each_however_few_the_minutes(cpu):
    texts = {"text": "a.txt", "more_texts": ["b.txt", "c.txt"], "shares": [20, 1, 1]}
    plan = planned(cpu, minutes=0.01, calibration=texts)

    assert plan.spec.calibration.samples > LEVELS[0][0]


@pytest.mark.parametrize("said", ["0", "-1", "inf", "nan", "soon", "1e9"])
def test_minutes_that_are_none_are_refused_with_the_way_out(said):
    from pho_service.spec.minutes import parse_minutes

    with pytest.raises(InvalidInput, match=r"not a number of minutes above 0 .* Write --minutes"):
        parse_minutes(said, "--minutes")


def test_a_comparison_is_calibrated_on_less_text_the_more_rows_and_calibrations_it_has(cpu):
    spec = asked(confirm=None, minutes=60)
    steps, shapes = spec.request(0).steps, shapes_of(SMALL)
    chosen = []
    for rows, calibrations in ((1, 1), (4, 1), (4, 3)):
        work = ComparedWork(rows=[steps] * rows, searches=[], windows=16, calibrations=calibrations)
        plan = partial(plan_job, shapes=shapes, machine=cpu)
        chosen.append(fitted(spec, shapes.context, plan, 3600, work.seconds))
        assert work.seconds(chosen[-1]) <= 3600
    tokens = [plan.work.tokens for plan in chosen]

    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[1] > tokens[2]


def test_the_searches_of_a_comparison_take_its_time_too(cpu):
    plan = planned(cpu, minutes=20)
    search = asked(preset="score", minutes=None)
    alone, searched = (
        ComparedWork(rows=[], searches=searches, windows=16, calibrations=1).seconds(plan)
        for searches in ([], [search])
    )

    assert searched > alone
